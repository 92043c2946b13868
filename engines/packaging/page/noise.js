// The noise of one picture: bit for bit what lutdeploy.sampling.image_noise makes with NumPy.
//
// Philox4x64-10 (Salmon et al. 2011) with (seed, index) as its key gives the random bits, and the
// ziggurat method (Marsaglia and Tsang 2000; Doornik 2005) makes normal float32 of them. 64-bit
// numbers are pairs of 32-bit limbs, because BigInt is slow. The one step that NumPy leaves to the
// C library is log1pf, in the tail beyond R; here it is correctly rounded.

const TWO32 = 2 ** 32;

// Philox: what each round multiplies words 0 and 2 with [high, low], and what it adds to the two
// words of the key, low limbs first.
const MULTIPLIERS = [[0xd2e7470e, 0xe14c6c93], [0xca5a8263, 0x95121157]];
const WEYL = [0x7f4a7c15, 0x9e3779b9, 0x84caa73b, 0xbb67ae85];
const ROUNDS = 10;

// Ziggurat: 256 strips of area V under exp(-x²/2), the last one from R on.
const R = 3.654152885361009;
const V = 0.004928673233974655;
const SCALE = 2 ** 23; // float32 has 23 bits for the place in a strip
const R32 = Math.fround(R);
const INVERSE_R32 = Math.fround(1 / R);

/** The high limb of a product of two 32-bit numbers whose low limb is known. */
function highLimb(a, b, low) {
  return Math.round((a * b - low) / TWO32); // a·b as a double is off by far less than 2^32
}

/** Multiply two unsigned 64-bit numbers into four limbs of ``out``, lowest first. */
function multiply(aHigh, aLow, bHigh, bLow, out) {
  const low = Math.imul(aLow, bLow) >>> 0;
  const cross1 = Math.imul(aLow, bHigh) >>> 0;
  const cross2 = Math.imul(aHigh, bLow) >>> 0;
  const high = Math.imul(aHigh, bHigh) >>> 0;
  const second = highLimb(aLow, bLow, low) + cross1 + cross2;
  const crossed = highLimb(aLow, bHigh, cross1) + highLimb(aHigh, bLow, cross2);
  const third = high + crossed + Math.floor(second / TWO32);
  out[0] = low;
  out[1] = second; // a Uint32Array takes them modulo 2^32
  out[2] = third;
  out[3] = highLimb(aHigh, bHigh, high) + Math.floor(third / TWO32);
}

const PRODUCT0 = new Uint32Array(4);
const PRODUCT2 = new Uint32Array(4);
const KEY = new Uint32Array(4);

/** One block of Philox4x64-10, in place: a counter of four words becomes four random words.
 *
 * Words are pairs of limbs, the low one first: ``words`` has eight limbs, ``key`` four.
 */
function philoxBlock(words, key) {
  KEY.set(key);
  for (let round = 0; round < ROUNDS; round++) {
    multiply(words[1], words[0], ...MULTIPLIERS[0], PRODUCT0);
    multiply(words[5], words[4], ...MULTIPLIERS[1], PRODUCT2);
    words[0] = PRODUCT2[2] ^ words[2] ^ KEY[0];
    words[1] = PRODUCT2[3] ^ words[3] ^ KEY[1];
    words[4] = PRODUCT0[2] ^ words[6] ^ KEY[2];
    words[5] = PRODUCT0[3] ^ words[7] ^ KEY[3];
    words[2] = PRODUCT2[0];
    words[3] = PRODUCT2[1];
    words[6] = PRODUCT0[0];
    words[7] = PRODUCT0[1];
    for (let k = 0; k < 4; k += 2) {
      const low = KEY[k] + WEYL[k];
      KEY[k] = low;
      KEY[k + 1] += WEYL[k + 1] + (low >= TWO32 ? 1 : 0);
    }
  }
}

/** The stream of unsigned 32-bit numbers for a key of two BigInts below 2^64. */
export function philox(seed, index) {
  const limbs = [seed, index].flatMap((word) => [word & 0xffffffffn, word >> 32n]);
  const key = Uint32Array.from(limbs, Number);
  const words = new Uint32Array(8);
  let block = 0;
  let next = 8;
  return () => {
    if (next === 8) {
      block += 1; // NumPy counts before it computes
      words.fill(0);
      words[0] = block;
      words[1] = Math.floor(block / TWO32);
      philoxBlock(words, key);
      next = 0;
    }
    return words[next++];
  };
}

/** The strips: from x = bits·width to the density at their edges. */
function strips() {
  const inside = new Uint32Array(256); // below these bits a point is surely under the curve
  const width = new Float32Array(256);
  const density = new Float32Array(256);
  let x = R;
  let y = Math.exp(-0.5 * R * R);
  width[255] = R / SCALE;
  density[255] = y;
  inside[0] = Math.round(((R * y) / V) * SCALE); // strip 0 is the lowest, with the tail
  width[0] = V / y / SCALE;
  density[0] = 1;
  for (let k = 254; k > 0; k--) {
    const next = Math.sqrt(-2 * Math.log(V / x + y));
    inside[k + 1] = Math.round((next / x) * SCALE);
    x = next;
    y = Math.exp(-0.5 * x * x);
    width[k] = x / SCALE;
    density[k] = y;
  }
  return { inside, width, density };
}

export const STRIPS = strips();

/** A float32 in [0, 1) of 24 random bits. */
const uniform = (bits) => (bits() >>> 8) / 2 ** 24;

/** A number beyond R (Marsaglia 1964). */
function tail(bits) {
  for (;;) {
    const x = Math.fround(-INVERSE_R32 * Math.fround(Math.log1p(-uniform(bits))));
    const y = Math.fround(-Math.log1p(-uniform(bits)));
    if (Math.fround(y + y) > Math.fround(x * x)) return Math.fround(R32 + x);
  }
}

/** One number of N(0, 1), float32, from a stream of 32-bit numbers. */
export function normal(bits) {
  const { inside, width, density } = STRIPS;
  for (;;) {
    const drawn = bits(); // 23 bits for the place, one for the sign, eight for the strip
    const strip = drawn & 0xff;
    const place = drawn >>> 9;
    const magnitude = Math.fround(place * width[strip]);
    const x = drawn & 0x100 ? -magnitude : magnitude;
    if (place < inside[strip]) return x; // 99.3% of the time
    if (strip === 0) return place & 0x100 ? -tail(bits) : tail(bits);
    const rise = Math.fround(density[strip - 1] - density[strip]);
    const y = Math.fround(Math.fround(rise * uniform(bits)) + density[strip]);
    if (y < Math.exp(-0.5 * x * x)) return x;
  }
}

/** The noise of one image, Float32Array of ``count`` numbers; seed and index are BigInts. */
export function imageNoise(seed, index, count) {
  const bits = philox(seed, index);
  return Float32Array.from({ length: count }, () => normal(bits));
}
