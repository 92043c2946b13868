// The page: what is asked for, what is seen. worker.js makes the pictures.

import { imageNoise } from "./noise.js";
import { withTexts } from "./png.js";
import { chooseEngine } from "./runtime.js";
import { toPixels } from "./sampler.js";

const MOST_PICTURES = 64;
const MOST_BYTES = 2 ** 27; // of the states that are kept to look back at

const element = (id) => document.getElementById(id);
const form = element("form");
const calm = matchMedia("(prefers-reduced-motion: reduce)");

let page; // page.json
let worker = null; // made at the first press
let job = 0;
let asked = null; // {seed, count, schedule} of what is shown
let busy = false;
let states = []; // states[step][index]: RGBA bytes of a picture; step 0 is its noise
let loads = ""; // what the first press will load, in words; empty once it is here

const say = (text) => (element("status").textContent = text);
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

/** What the form asks for; null, and a line that says why, where it cannot be made. */
function request() {
  const text = element("seed").value.trim();
  const count = Number(element("count").value);
  const seed = /^[0-9]+$/.test(text) ? BigInt(text) : -1n;
  let problem = "";
  if (seed < 0n || seed >= 2n ** 64n) problem = "The seed is a whole number from 0 to 2⁶⁴ − 1.";
  else if (!(Number.isInteger(count) && count >= 1 && count <= MOST_PICTURES)) {
    problem = `Between 1 and ${MOST_PICTURES} pictures, please.`;
  }
  element("problem").textContent = problem;
  element("problem").hidden = problem === "";
  if (problem !== "") return null;
  return { seed, count, schedule: page.schedules[element("schedule").selectedIndex] };
}

/** Empty places for the pictures, each with its noise, before anything is computed. */
function showNoise() {
  const wanted = request();
  if (wanted === null) return;
  asked = wanted;
  const { channels, image_size: side } = page.config;
  const noise = Array.from({ length: asked.count }, (_, index) =>
    toPixels(imageNoise(asked.seed, BigInt(index), channels * side * side), channels, side),
  );
  states = [noise];
  const places = noise.map((_, index) => {
    const canvas = Object.assign(document.createElement("canvas"), { width: side, height: side });
    const button = Object.assign(document.createElement("button"), { type: "button" });
    button.append(canvas);
    button.addEventListener("click", () => save(index));
    const place = document.createElement("li");
    place.append(button);
    return place;
  });
  element("pictures").replaceChildren(...places);
  for (const index of noise.keys()) draw(index, 0);
  element("back").hidden = true;
  element("command").textContent = command();
}

const canvases = () => element("pictures").querySelectorAll("canvas");

/** Draw a picture as it was after a step. */
function draw(index, step) {
  const canvas = canvases()[index];
  const side = page.config.image_size;
  canvas.getContext("2d").putImageData(new ImageData(states[step][index], side, side), 0, 0);
  canvas.dataset.step = step;
  const name = fileName(index, step);
  canvas.parentElement.setAttribute("aria-label", `Picture ${index}: save as ${name}`);
  canvas.parentElement.title = `Save ${name}`;
}

/** Whether the states on the way fit into memory, to look back at. */
const keepsStates = () =>
  asked.count * (asked.schedule.rows.length + 1) * 4 * page.config.image_size ** 2 <= MOST_BYTES;

const fileName = (index, step) => {
  const end = step === asked.schedule.rows.length ? "" : `-step${step}`;
  return `${asked.seed}-${index}${end}.png`;
};

/** What the file of a picture says: at the end of its steps, what `lutdeploy sample` says. */
function texts(index, step) {
  const told = { Software: `lutdeploy ${page.lutdeploy}` };
  const { seed, schedule } = asked;
  if (step === schedule.rows.length) {
    told.lutdeploy = `${schedule.text}, "seed": ${seed}, "index": ${index}}`;
  }
  return told;
}

function save(index) {
  const canvas = canvases()[index];
  const step = Number(canvas.dataset.step);
  const name = fileName(index, step);
  const told = texts(index, step);
  canvas.toBlob(async (blob) => {
    const png = new Uint8Array(await blob.arrayBuffer());
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob(withTexts(png, told), { type: "image/png" }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  });
}

/** The command that makes the same pictures. */
function command() {
  const { seed, count, schedule } = asked;
  return `lutdeploy sample ${page.source} -n ${count} --seed ${seed} ${schedule.options}`.trim();
}

function start() {
  const wanted = request();
  if (wanted === null) return;
  showNoise();
  job += 1;
  setBusy(true);
  history.replaceState(null, "", `#${new URLSearchParams({
    seed: asked.seed,
    pictures: asked.count,
    steps: asked.schedule.name,
  })}`);
  if (worker === null) {
    worker = new Worker("worker.js", { type: "module" });
    worker.onmessage = ({ data }) => busy && data.job === job && heard[data.kind](data);
    worker.onerror = () => {
      worker = null;
      heard.failed({ text: "The page's scripts could not be loaded whole. Reload the page." });
    };
  }
  say(loads === "" ? "Starting." : "Loading the model.");
  const { seed, count, schedule } = asked;
  worker.postMessage({ job, seed, count, rows: schedule.rows, page });
}

function stop() {
  job += 1;
  worker.postMessage({ job, stop: true });
  setBusy(false);
  say("Stopped.");
}

function setBusy(now) {
  busy = now;
  element("make").textContent = now ? "Stop" : "Make pictures";
  element("progress").classList.toggle("on", now);
  element("progress").value = 0;
  element("pictures").setAttribute("aria-busy", now);
}

/** What is done with each kind of message from the worker. */
const heard = {
  loading({ bytes, total }) {
    element("progress").value = bytes / total;
    element("status").textContent =
      bytes < total ? `Loading: ${megabytes(bytes)} of ${megabytes(total)}.` : "Opening the model.";
  },
  opened({ engine, threads, note }) {
    loads = "";
    const how = engine === "webgpu" ? "WebGPU" : `WebAssembly, ${plural(threads, "thread")}`;
    element("within").textContent =
      engine === "webgpu" ? ", as closely as float16 computes" : ", each pixel within 2 of 255";
    element("engine").textContent = note ? `${how}. ${note}` : `${how}.`;
    say("Painting.");
  },
  state({ first, step, pixels }) {
    const steps = asked.schedule.rows.length;
    const size = 4 * page.config.image_size ** 2;
    const some = pixels.length / size;
    states[step] ??= [];
    for (let k = 0; k < some; k++) {
      states[step][first + k] = pixels.slice(k * size, (k + 1) * size);
      if (!keepsStates() && step > 1) states[step - 1][first + k] = null;
      if (calm.matches && step < steps) continue; // no flicker on the way
      draw(first + k, step);
    }
    element("progress").value = (first + (some * step) / steps) / asked.count;
    if (asked.count > some) say(`Step ${step} of ${steps}, pictures ${first} to ${first + some - 1}.`);
    else say(`Step ${step} of ${steps}.`);
  },
  done({ seconds }) {
    setBusy(false);
    const rate = (asked.count / seconds).toFixed(1);
    say(
      `${plural(asked.count, "picture")} in ${seconds.toFixed(1)} seconds, ${rate} a second. ` +
        "Click a picture to save it.",
    );
    const steps = asked.schedule.rows.length;
    const slider = element("shown");
    slider.max = steps;
    slider.value = steps;
    element("shown-step").value = `${steps} of ${steps}`;
    element("back").hidden = !keepsStates();
  },
  failed({ text }) {
    setBusy(false);
    say(text);
  },
};

function lookBack() {
  const step = Number(element("shown").value);
  element("shown-step").value = `${step} of ${asked.schedule.rows.length}`;
  for (let index = 0; index < asked.count; index++) draw(index, step);
}

/** A random seed of nine digits at most, to be told to others. */
function another() {
  element("seed").value = crypto.getRandomValues(new Uint32Array(1))[0] % 1_000_000_000;
  change();
}

/** The form has changed: what it asks for is shown as noise. */
function change() {
  if (request() === null) return;
  if (busy) stop();
  say(`The noise of seed ${element("seed").value.trim()}. Press “Make pictures”.${loads}`);
  showNoise();
}

function fillPage() {
  const { config, model } = page;
  const million = (model.parameters / 1e6).toFixed(1);
  document.title = model.name;
  element("name").textContent = model.name;
  element("about").textContent =
    `A model of ${million} million parameters that turns noise into pictures of ` +
    `${config.image_size}×${config.image_size} pixels. It runs on this device; nothing that you do ` +
    "here is sent anywhere.";
  for (const { name, label } of page.schedules) element("schedule").append(new Option(label, name));
  const size = `${config.patch_size}×${config.patch_size}`;
  const sums = config.weights === "softmax" ? "a mix (weights from 0 to 1 that add up to 1)"
    : "a sum (weights from −1 to 1)";
  const these = config.lut === "static"
    ? `These ${config.entries} patches of ${size} pixels are the model's lookup table.`
    : `For each picture and step the model computes a lookup table of ${config.entries} patches of ` +
      `${size} pixels. This is the one for picture 0 of seed 0 half-way.`;
  element("lut").alt = `${config.entries} patches of ${size} pixels`;
  element("lut-text").textContent =
    `${these} Every patch of every picture is ${sums} of them, and nothing else. Each is drawn at its ` +
    "full contrast here; mid-grey is zero.";
  const facts = [
    ["Engine", "chosen when pictures are made."],
    ["Model", `SHA-256 ${model.sha256}`],
    ["Made by", `lutdeploy ${page.lutdeploy}, ONNX Runtime Web ${page.runtime}`],
  ];
  const list = document.createElement("dl");
  for (const [term, text] of facts) {
    const value = Object.assign(document.createElement("dd"), { textContent: text });
    if (term === "Engine") value.id = "engine";
    list.append(Object.assign(document.createElement("dt"), { textContent: term }), value);
  }
  element("facts").append(list);
}

/** What the address asks for, such as #seed=7&pictures=8&steps=euler-16. */
function readAddress() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  if (wanted.has("seed")) element("seed").value = wanted.get("seed");
  if (wanted.has("pictures")) element("count").value = wanted.get("pictures");
  const names = page.schedules.map(({ name }) => name);
  element("schedule").selectedIndex = Math.max(0, names.indexOf(wanted.get("steps")));
}

try {
  const response = await fetch("page.json", { cache: "no-cache" });
  if (!response.ok) throw new Error(`the server answered ${response.status}`);
  page = await response.json();
  fillPage();
  readAddress();
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (busy) stop();
    else start();
  });
  form.addEventListener("change", change);
  element("another").addEventListener("click", another);
  element("shown").addEventListener("input", lookBack);
  const { files } = await chooseEngine(page.engines);
  const total = Object.values(files).reduce((sum, file) => sum + file.bytes, 0);
  loads = ` The first time loads up to ${megabytes(total)}.`;
  element("make").disabled = false;
  change();
} catch (error) {
  say(`page.json could not be read: ${error.message}. Package the model again.`);
}
