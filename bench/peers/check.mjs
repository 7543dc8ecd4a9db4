// What each library's result is compared with before anything is timed: float64, for a few queries
// of every head; all of the last head where gradients are asked for.
import { computeHead, relativeError } from '../reference.mjs';

/** @typedef {import('../cases.mjs').Case} Case */
/** @typedef {Record<'query' | 'key' | 'value' | 'gradOutput', Float32Array>} Arrays */

/** Queries of each head that are compared. */
const SAMPLES = 8;

/**
 * Computes in float64 what is expected, and returns the check: the relative L2 error of the worst
 * of the sampled rows, or of the worst gradient.
 * @param {Case} problem
 * @param {Arrays} arrays [batch, heads, length, headDim]
 * @returns {(outputs: Float32Array[]) => number}
 */
export function createCheck(problem, arrays) {
  const { batch, heads, queryLength, headDim, isBackward } = problem;
  const count = batch * heads;
  const headOf = (/** @type {Float32Array} */ data, /** @type {number} */ head) =>
    data.subarray((head * data.length) / count, ((head + 1) * data.length) / count);
  const compute = (/** @type {number} */ head, /** @type {number[] | undefined} */ rows) => {
    const { query, key, value, gradOutput } = arrays;
    const [q, k, v, g] = [query, key, value, gradOutput].map((data) => headOf(data, head));
    const position = { batch: Math.floor(head / heads), head: head % heads };
    return computeHead(problem, { query: q, key: k, value: v, gradOutput: g }, position, rows);
  };
  const last = count - 1;
  if (isBackward) {
    const expected = compute(last, undefined);
    return (outputs) =>
      Math.max(...outputs.map((output, i) => relativeError(headOf(output, last), expected[i])));
  }
  const rows = sample(queryLength);
  const expected = Array.from({ length: count }, (_, head) => compute(head, rows)[0]);
  return ([output]) => {
    const errors = expected.flatMap((matrix, head) =>
      rows.map((row) => {
        const [first, end] = [row * headDim, (row + 1) * headDim];
        const got = headOf(output, head).subarray(first, end);
        return relativeError(got, matrix.subarray(first, end));
      }),
    );
    return Math.max(...errors);
  };
}

/** A few numbers below length, the first and the last among them. @param {number} length */
function sample(length) {
  const step = Math.max(1, (length - 1) / (SAMPLES - 1));
  const rows = Array.from({ length: SAMPLES }, (_, i) => Math.round(i * step));
  return rows.filter((row) => row < length);
}
