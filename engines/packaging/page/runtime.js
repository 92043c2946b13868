// Opens the model in ONNX Runtime Web. Every file is held against the hash that page.json has.

/** What went wrong, in words for the person who looks at the page. */
export class PageError extends Error {}

/** Fetch a file of page.json, {url, integrity}; a browser gives it only if its hash is right. */
async function download({ url, integrity }, what, signal) {
  const place = new URL(url, self.location);
  try {
    // The cache asks the server first: a model that was packaged again has the old names.
    const response = await fetch(place, { integrity, signal, cache: "no-cache" });
    if (response.ok) return new Uint8Array(await response.arrayBuffer());
  } catch {
    // It does not say whether the network failed or the hash.
  }
  throw new PageError(signal.aborted ? "" : `${what} ${await whyNot(place)}`);
}

/** Why a file did not come, as the end of a sentence. */
async function whyNot(place) {
  try {
    const { ok, status } = await fetch(place, { method: "HEAD" });
    return ok
      ? `could not be loaded: ${place.host} sent another file than this page was made with. Reload it.`
      : `is missing: the server answered ${status} for ${place}.`;
  } catch {
    return `could not be loaded: ${place.host} does not answer. Check the connection and try again.`;
  }
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
  onProgress(here, total);
  const others = new AbortController();
  const get = async (file, what) => {
    const data = await download(file, what, others.signal);
    onProgress((here += file.bytes), total);
    return data;
  };
  const runtime = "The runtime (ONNX Runtime Web)";
  const [code, binary, model, data] = await Promise.all([
    get(script, runtime),
    get(wasm, runtime),
    get(graph, "The model"),
    get(weights, "The model"),
  ]).finally(() => others.abort()); // where one fails, the others are of no use
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
