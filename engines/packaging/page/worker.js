// Makes the pictures, beside the page so that it stays responsive.
//
// Takes {job, seed, count, rows} and {stop}; posts {job, kind, …}: "loading", "opened", "state"
// (the pixels of some pictures after a step), "done", "failed".

import { imageNoise } from "./noise.js";
import { chooseEngine, openEngine, PageError, threads } from "./runtime.js";
import { toPixels, trajectory } from "./sampler.js";

const TOGETHER = 8; // pictures in a batch: all are seen to form, and memory stays flat
const LEAST_PSNR = 40; // dB, the limit that `lutdeploy parity` has for float16

let page; // page.json
let opened; // a promise of {engine, step, note}
let current = 0; // the job that may go on

self.onmessage = async ({ data }) => {
  current = data.job;
  if (data.stop) return;
  page ??= data.page;
  try {
    await make(data);
  } catch (error) {
    self.postMessage({ job: data.job, kind: "failed", text: inWords(error) });
  }
};

/** One line for a person. */
function inWords(error) {
  if (error instanceof PageError) return error.message;
  const text = String(error?.message ?? error);
  if (error instanceof RangeError || /memory|bad_alloc|\boom\b/i.test(text)) {
    return "Out of memory: this device has not enough for the model. Close other tabs and reload.";
  }
  return `The model could not be run here: ${text.split("\n")[0]}`;
}

async function make({ job, seed, count, rows }) {
  const report = (kind, more, transfer = []) =>
    self.postMessage({ job, kind, ...more }, transfer);
  opened ??= open((bytes, total) =>
    self.postMessage({ job: current, kind: "loading", bytes, total }),
  );
  let found;
  try {
    found = await opened;
  } catch (error) {
    opened = undefined; // the next press tries again
    throw error;
  }
  if (job !== current) return;
  report("opened", { engine: found.engine.backend, threads: threads(), note: found.note });
  const began = performance.now();
  for (let first = 0; first < count; first += TOGETHER) {
    const some = Math.min(TOGETHER, count - first);
    let step = 0;
    for await (const x of trajectory(found.step, noiseOf(seed, first, some), rows)) {
      await new Promise((resolve) => setTimeout(resolve)); // lets a stop arrive
      if (job !== current) return;
      const pixels = toPixels(x, page.config.channels, page.config.image_size);
      report("state", { first, step: ++step, pixels }, [pixels.buffer]);
    }
  }
  report("done", { seconds: (performance.now() - began) / 1000 });
}

/** The noise of images first … first+count−1, one behind the other. */
function noiseOf(seed, first, count) {
  const size = page.config.channels * page.config.image_size ** 2;
  const noise = new Float32Array(count * size);
  for (let k = 0; k < count; k++) noise.set(imageNoise(seed, BigInt(first + k), size), k * size);
  return noise;
}

/** Open the first engine that runs here; one on a GPU must first paint a known picture. */
async function open(onProgress) {
  const { channels, image_size: side } = page.config;
  const engine = await chooseEngine(page.engines);
  const rest = page.engines.slice(page.engines.indexOf(engine) + 1);
  try {
    const step = await openEngine(engine, [channels, side, side], onProgress);
    if (engine.backend === "webgpu") await check(step);
    return { engine, step, note: "" };
  } catch (error) {
    if (rest.length === 0) throw error;
    page = { ...page, engines: rest };
    const next = await open(onProgress);
    return { ...next, note: `Not with ${engine.backend}: ${inWords(error)}` };
  }
}

/** Hold picture 0 of seed 0 against the one that lutdeploy made when it packaged the model. */
async function check(step) {
  const { channels, image_size: side } = page.config;
  let x;
  for await (x of trajectory(step, noiseOf(0n, 0, 1), page.schedules[0].rows));
  const pixels = toPixels(x, channels, side);
  const expected = Uint8Array.from(atob(page.check), (letter) => letter.charCodeAt(0));
  let squares = 0;
  for (let place = 0; place < side * side; place++) {
    for (let k = 0; k < channels; k++) {
      squares += (pixels[4 * place + k] - expected[channels * place + k]) ** 2;
    }
  }
  const psnr = 10 * Math.log10(255 ** 2 / (squares / expected.length));
  if (!(psnr >= LEAST_PSNR)) {
    throw new PageError(`its pictures differ from lutdeploy's (${psnr.toFixed(0)} dB).`);
  }
}
