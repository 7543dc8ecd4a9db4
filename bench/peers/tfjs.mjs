// TensorFlow.js on its WebAssembly backend: single operations on the arrays of each call. In
// Node.js it computes with one thread.
import { causalMask } from './arrays.mjs';
import { loadPeer } from './install.mjs';

const tf = loadPeer('@tensorflow/tfjs-core');
loadPeer('@tensorflow/tfjs-backend-wasm');
await tf.setBackend('wasm');

export const version = tf.version_core;

/**
 * @param {import('../cases.mjs').Case} problem
 * @param {import('./check.mjs').Arrays} arrays
 * @returns {import('./child.mjs').Run}
 */
export function prepare(problem, { query, key, value }) {
  const { batch, heads, queryLength, keyLength, headDim, options } = problem;
  const scale = 1 / Math.sqrt(headDim);
  /** @type {any} */
  let mask = null;
  const compute = () => {
    const q = tf.tensor4d(query, [batch, heads, queryLength, headDim]);
    const k = tf.tensor4d(key, [batch, heads, keyLength, headDim]);
    const v = tf.tensor4d(value, [batch, heads, keyLength, headDim]);
    const scores = tf.mul(tf.matMul(q, k, false, true), scale);
    const weights = tf.softmax(mask === null ? scores : tf.add(scores, mask));
    return tf.matMul(weights, v).dataSync();
  };
  return {
    open() {
      if (!options.isCausal || mask !== null) return;
      const bias = causalMask(queryLength, keyLength);
      mask = tf.tensor4d(bias, [1, 1, queryLength, keyLength]);
    },
    close() {
      mask?.dispose();
      mask = null;
    },
    call: () => tf.tidy(compute),
    read: (output) => [output],
  };
}
