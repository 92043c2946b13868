// The sampling loop. A schedule is a list of rows [t, a, b, c, ratio]; one step is
// x' = a·x + b·x0 + c·(x0_prev + ratio·x0_prev2), which the network's graph computes but for the
// sum in brackets. See lutdeploy.sampling.

/** The one history term that the graph takes; null before the second step. */
export function history(ratio, x0Prev, x0Prev2) {
  if (ratio === 0 || x0Prev === null || x0Prev2 === null) return x0Prev;
  const scale = Math.fround(ratio);
  return x0Prev.map((value, k) => value + Math.fround(scale * x0Prev2[k]));
}

/**
 * Yield the state x after each step, Float32Array of a whole batch.
 *
 * ``step(x, [t, a, b, c], x0Prev)`` gives the next x and x0. A state that is not finite is an Error.
 */
export async function* trajectory(step, noise, rows) {
  let x = noise;
  let x0 = null;
  let x0Prev = null;
  for (const [k, [t, a, b, c, ratio]] of rows.entries()) {
    const before = history(ratio, x0, x0Prev);
    x0Prev = x0;
    [x, x0] = await step(x, [t, a, b, c], before ?? x);
    if (!x.every(Number.isFinite)) throw new Error(`NaN or Inf after step ${k + 1}`);
    yield x;
  }
}

/** Images [n, C, S, S] in [−1, 1] (clipped) as RGBA bytes [n, S, S, 4]; C is 1, 3 or 4. */
export function toPixels(x, channels, side) {
  const plane = side * side;
  const pixels = new Uint8ClampedArray((x.length / channels) * 4).fill(255);
  for (let place = 0; place < pixels.length / 4; place++) {
    const image = Math.floor(place / plane);
    const first = image * channels * plane + (place % plane);
    for (let k = 0; k < Math.max(3, channels); k++) {
      const value = x[first + (channels === 1 ? 0 : k) * plane];
      // It rounds halves to even and clips, as lutdeploy.images.to_uint8 does.
      pixels[4 * place + k] = Math.fround(Math.fround(value * 127.5) + 127.5);
    }
  }
  return pixels;
}
