// The named problems of the benchmark: shape, options, and what they cost.

/** @typedef {import('node-sdpa').AttentionOptions} AttentionOptions */

/**
 * @typedef {object} Case
 * @property {string} name
 * @property {number} batch
 * @property {number} heads
 * @property {number} queryLength
 * @property {number} keyLength
 * @property {number} headDim
 * @property {AttentionOptions} options
 * @property {boolean} isBackward the backward call alone is timed
 */

/**
 * @param {string} shape batch x heads x length x headDim
 * @param {string} [label] what is added to the name
 * @param {Partial<Case>} [more]
 * @returns {Case}
 */
function define(shape, label, more) {
  const [batch, heads, length, headDim] = shape.split('x').map(Number);
  const sizes = { batch, heads, queryLength: length, keyLength: length, headDim };
  const name = label === undefined ? shape : `${shape} ${label}`;
  return { name, ...sizes, options: {}, isBackward: false, ...more };
}

/** @param {'weights' | 'context' | 'scores'} dropoutPlacement */
function dropout(dropoutPlacement) {
  return { options: { dropoutP: 0.1, dropoutPlacement, training: true, seed: 1, offset: 2 } };
}

export const CASES = [
  define('1x12x128x64'),
  define('8x12x128x64'),
  define('1x12x512x64'),
  define('1x12x512x64', 'causal', { options: { isCausal: true } }),
  define('1x12x512x64', 'drop weights', dropout('weights')),
  define('1x12x512x64', 'drop context', dropout('context')),
  define('1x12x512x64', 'drop scores', dropout('scores')),
  define('1x12x512x64', 'backward', { isBackward: true }),
  define('1x12x512x64', 'backward, drop weights', { ...dropout('weights'), isBackward: true }),
  define('1x12x1024x64'),
  define('1x32x1024x128'),
  define('1x32x1024x128', 'decode', { queryLength: 1 }),
];

const causal = { options: { isCausal: true } };

/** What is compared with other libraries. */
export const PEER_CASES = [
  define('1x12x128x64'),
  define('8x12x128x64'),
  define('1x12x512x64'),
  define('1x12x1024x64'),
  define('1x12x1024x64', 'causal', causal),
  define('1x12x2048x64'),
  define('1x12x2048x64', 'causal', causal),
  define('1x12x8192x64'),
  define('1x12x8192x64', 'causal', causal),
  define('1x32x1024x128'),
  define('1x32x1024x128', 'causal', causal),
  define('1x32x1024x128', 'decode', { queryLength: 1 }),
  define('1x32x4096x128', 'decode', { queryLength: 1 }),
  define('1x12x1024x64', 'backward', { isBackward: true }),
  define('1x32x1024x128', 'backward', { isBackward: true }),
];

/** Whose errors are compared with those of other libraries: 64 queries, and more and more keys. */
export const ERROR_CASES = [128, 1024, 4096, 16384, 65536].flatMap((keyLength) => {
  const sizes = { batch: 1, heads: 2, queryLength: 64, keyLength, headDim: 64, options: {} };
  return [false, true].map((isBackward) => {
    const name = `${keyLength} keys${isBackward ? ', gradients' : ''}`;
    return { name, ...sizes, isBackward };
  });
});

/** Floating-point operations of one call, by the usual count. @param {Case} problem */
export function countFlops({ batch, heads, queryLength, keyLength, headDim, options, isBackward }) {
  const pairs = queryLength * keyLength * (options.isCausal ? 0.5 : 1);
  return 4 * batch * heads * pairs * headDim * (isBackward ? 2.5 : 1);
}

/** Bytes of key and value: what a decoding step has to read. @param {Case} problem */
export function countKeyBytes({ batch, heads, keyLength, headDim }) {
  return batch * heads * keyLength * headDim * 2 * Float32Array.BYTES_PER_ELEMENT;
}

/** Mulberry32 and Box-Muller: the same standard normal numbers everywhere. @param {number} seed */
export function normals(seed) {
  let state = seed >>> 0;
  const uniform = () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t = (t + Math.imul(t ^ (t >>> 7), t | 61)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
  return () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
}
