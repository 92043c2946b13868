// Opens the model in ONNX Runtime Web. Every file is held against the hash that page.json has.

/** What went wrong, in words for the person who looks at the page. */
export class PageError extends Error {}

/**
 * Fetch a file of page.json: {url, bytes, integrity}. Calls ``onBytes`` with each part's length.
 */
async function download({ url, bytes, integrity }, what, onBytes) {
  const place = new URL(url, self.location);
  let response;
  try {
    response = await fetch(place, { integrity });
  } catch {
    // The browser says no more to scripts, whether the network failed or the hash.
    throw new PageError(
      `${what} could not be loaded: ${place.host} does not answer, or sent another file than this ` +
        "page was made with. Check the connection and reload the page.",
    );
  }
  if (!response.ok) {
    throw new PageError(`${what} is missing: the server answered ${response.status} for ${place}.`);
  }
  const data = new Uint8Array(bytes);
  let filled = 0;
  try {
    for (const reader = response.body.getReader(); ; ) {
      const { done, value } = await reader.read();
      if (done) break;
      data.set(value, filled);
      filled += value.length;
      onBytes(value.length);
    }
  } catch {
    filled = -1;
  }
  if (filled !== bytes) {
    throw new PageError(`${what} did not arrive as a whole. Check the connection and reload.`);
  }
  return data;
}

/** Whether this browser has what an engine of page.json needs: features of WebGPU, if any. */
async function supports({ backend, features }) {
  if (backend !== "webgpu") return true;
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  return Boolean(adapter) && features.every((feature) => adapter.features.has(feature));
}

/** The first engine of page.json that this browser can run. */
export async function chooseEngine(engines) {
  for (const engine of engines) if (await supports(engine)) return engine;
  throw new PageError("This browser can run none of the model's engines.");
}

/** One thread unless the server's headers allow shared memory; more than four gain little. */
export const threads = () =>
  self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency ?? 1) : 1;

/**
 * Open an engine of page.json.
 *
 * Gives ``step(x, [t, a, b, c], x0Prev)`` for batches of images of ``shape`` [C, S, S].
 * ``onProgress`` is called with the bytes that are here and those that there are.
 */
export async function openEngine(engine, shape, onProgress) {
  const { script, wasm, graph, weights } = engine.files;
  const all = [script, wasm, graph, weights];
  const total = all.reduce((sum, file) => sum + file.bytes, 0);
  let here = 0;
  const onBytes = (bytes) => onProgress((here += bytes), total);
  const runtime = "The runtime (ONNX Runtime Web)";
  const [code, binary, model, data] = await Promise.all([
    download(script, runtime, onBytes),
    download(wasm, runtime, onBytes),
    download(graph, "The model", onBytes),
    download(weights, "The model", onBytes),
  ]);
  // The code runs from the bytes that were checked, not from a second request.
  const ort = await import(URL.createObjectURL(new Blob([code], { type: "text/javascript" })));
  ort.env.wasm.wasmBinary = binary.buffer;
  ort.env.wasm.numThreads = threads();
  ort.env.logLevel = "error";
  const session = await ort.InferenceSession.create(model, {
    executionProviders: [engine.backend],
    externalData: [{ path: weights.url.split("/").pop(), data }],
  });
  return async (x, row, x0Prev) => {
    const batch = x.length / (shape[0] * shape[1] * shape[2]);
    const image = (values) => new ort.Tensor("float32", values, [batch, ...shape]);
    const filled = (value) => new ort.Tensor("float32", new Float32Array(batch).fill(value), [batch]);
    const [t, a, b, c] = row.map(filled);
    const made = await session.run({ x: image(x), t, a, b, c, x0_prev: image(x0Prev) });
    return [made.x_next.data, made.x0.data];
  };
}
