// Tokens -> query, key and value, by a stated rule instead of a trained model: the same text gives
// the same numbers everywhere.
//
// content(token)     sum over the token's letter triples of Gaussian vectors seeded by their hash,
//                    of length 1: the same words are equal, similar words are close.
// position(i)        sinusoids as in "Attention Is All You Need", of length 1: near is close.
// query, key, value  a head mixes content and position, projected by the head's Gaussian matrix.

export const HEAD_DIM = 32;
const MODEL_DIM = 64;
const SEED = 1851; // the year of Moby-Dick

/**
 * What the heads look for. A query is made of the token's own content and of the position `back`
 * tokens earlier; a key is made of the content of the token `back` places before it.
 */
export const HEADS = [
  { name: 'the same word and its neighbourhood', gain: 4.5, content: 1, position: 0.55, back: 0 },
  { name: 'the word before', gain: 9, content: 0, position: 1, back: 1 },
  { name: 'what followed this word earlier', gain: 7, content: 1, position: 0, back: 1 },
  { name: 'everything, a little', gain: 1.5, content: 0.5, position: 0.8, back: 0 },
];

/**
 * Query, key and value of every head, each [1, heads, tokens, HEAD_DIM].
 * @param {readonly string[]} tokens
 */
export function embed(tokens) {
  const dims = [1, HEADS.length, tokens.length, HEAD_DIM];
  const contents = tokens.map(contentOf);
  const nothing = new Float64Array(MODEL_DIM);
  const query = { data: new Float32Array(HEADS.length * tokens.length * HEAD_DIM), dims };
  const key = { data: new Float32Array(query.data.length), dims };
  const value = { data: new Float32Array(query.data.length), dims };

  HEADS.forEach((head, h) => {
    const matching = gaussianMatrix(`match ${h}`);
    const reading = gaussianMatrix(`value ${h}`);
    // The operation divides by sqrt(HEAD_DIM); the gain is how strongly a full match is preferred.
    const gain = head.gain * Math.sqrt(HEAD_DIM);
    tokens.forEach((_, i) => {
      const at = (h * tokens.length + i) * HEAD_DIM;
      const own = contents[i] ?? nothing;
      const earlier = contents[i - head.back] ?? nothing;
      const asks = mix(own, head.content, positionOf(i - head.back), head.position);
      const offers = mix(earlier, head.content, positionOf(i), head.position);
      query.data.set(project(matching, asks, gain), at);
      key.data.set(project(matching, offers, 1), at);
      value.data.set(project(reading, own, 1), at);
    });
  });
  return { query, key, value };
}

/** @param {string} token */
function contentOf(token) {
  const letters = ` ${token.toLowerCase()} `;
  const sum = new Float64Array(MODEL_DIM);
  for (let i = 0; i + 3 <= letters.length; i++) {
    const normal = gaussian(hash(letters.slice(i, i + 3)));
    for (let d = 0; d < MODEL_DIM; d++) sum[d] += normal();
  }
  const length = Math.hypot(...sum);
  return sum.map((x) => x / length);
}

/** @param {number} i */
function positionOf(i) {
  const pairs = MODEL_DIM / 2;
  return Float64Array.from({ length: MODEL_DIM }, (_, d) => {
    const angle = i / 1000 ** (Math.floor(d / 2) / pairs);
    return (d % 2 === 0 ? Math.sin(angle) : Math.cos(angle)) / Math.sqrt(pairs);
  });
}

/**
 * @param {Float64Array} content
 * @param {number} contentShare
 * @param {Float64Array} position
 * @param {number} positionShare
 */
function mix(content, contentShare, position, positionShare) {
  const length = Math.hypot(contentShare, positionShare);
  return content.map((x, d) => (contentShare * x + positionShare * (position[d] ?? 0)) / length);
}

/**
 * A [HEAD_DIM, MODEL_DIM] matrix that keeps lengths on average.
 * @param {string} name
 */
function gaussianMatrix(name) {
  const normal = gaussian(hash(name));
  const rows = Array.from({ length: HEAD_DIM }, () => new Float64Array(MODEL_DIM));
  return rows.map((row) => row.map(() => normal() / Math.sqrt(HEAD_DIM)));
}

/**
 * @param {Float64Array[]} matrix
 * @param {Float64Array} vector
 * @param {number} gain
 */
function project(matrix, vector, gain) {
  return matrix.map((row) => gain * row.reduce((sum, x, d) => sum + x * (vector[d] ?? 0), 0));
}

/** FNV-1a. @param {string} text */
function hash(text) {
  let state = 0x811c9dc5 ^ SEED;
  for (const byte of Buffer.from(text)) state = Math.imul(state ^ byte, 0x01000193);
  return state >>> 0;
}

/**
 * Normal numbers by Box and Muller from the generator mulberry32.
 * @param {number} state
 */
function gaussian(state) {
  const uniform = () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
  return () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
}
