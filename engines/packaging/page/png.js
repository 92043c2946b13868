// What a PNG says of itself: chunks tEXt, https://www.w3.org/TR/png-3/#11tEXt.

const START = 33; // bytes: the signature and the chunk IHDR, which comes first

const CRCS = Uint32Array.from({ length: 256 }, (_, byte) => {
  let crc = byte;
  for (let bit = 0; bit < 8; bit++) crc = crc & 1 ? 0xedb88320 ^ (crc >>> 1) : crc >>> 1;
  return crc;
});

function crc32(bytes) {
  let crc = 0xffffffff;
  for (const byte of bytes) crc = CRCS[(crc ^ byte) & 255] ^ (crc >>> 8);
  return ~crc; // setUint32 takes it as unsigned
}

function textChunk(keyword, text) {
  const named = new TextEncoder().encode(`tEXt${keyword}\0${text}`);
  const chunk = new Uint8Array(named.length + 8);
  const view = new DataView(chunk.buffer);
  view.setUint32(0, named.length - 4); // of the data, without the name of the chunk
  chunk.set(named, 4);
  view.setUint32(4 + named.length, crc32(named));
  return chunk;
}

/** The parts of a PNG (bytes) with ASCII texts by keyword. */
export function withTexts(png, texts) {
  const chunks = Object.entries(texts).map(([keyword, text]) => textChunk(keyword, text));
  return [png.subarray(0, START), ...chunks, png.subarray(START)];
}
