// One head of attention in float64 with explicit matrices, forward and backward: what every
// backend's result is checked against before it is timed.
import { dropoutMask } from 'node-sdpa';

/** @typedef {import('./cases.mjs').Case} Case */
/** @typedef {Float32Array | Float64Array} Floats */
/**
 * @typedef {object} Head
 * @property {Floats} query [queryLength, headDim]
 * @property {Floats} key [keyLength, headDim]
 * @property {Floats} value [keyLength, headDim]
 * @property {Floats} gradOutput [queryLength, headDim]
 */

/**
 * The output of one head, or its three gradients.
 * @param {Case} problem
 * @param {Head} head
 * @param {{batch: number, head: number}} position of the head, for its dropout decisions
 * @param {Iterable<number>} [queries] only these; the output's other rows stay 0
 * @returns {Floats[]}
 */
export function computeHead(problem, head, position, queries = Array(problem.queryLength).keys()) {
  const { queryLength: rows, keyLength: keys, headDim: width, options } = problem;
  const scale = 1 / Math.sqrt(width);
  const keep = decide(problem, position);
  const output = new Float64Array(rows * width);
  const gradQuery = new Float64Array(rows * width);
  const gradKey = new Float64Array(keys * width);
  const gradValue = new Float64Array(keys * width);
  for (const i of queries) {
    const weights = new Float64Array(keys);
    const seen = options.isCausal ? Math.min(i + 1, keys) : keys;
    for (let j = 0; j < seen; j++) {
      weights[j] = scale * dot(head.query, i, head.key, j, width);
      if (keep.scores(i, j) === 0) weights[j] = Number.NEGATIVE_INFINITY;
    }
    softmax(weights.subarray(0, seen));
    for (let j = 0; j < seen; j++) {
      addRow(output, i, weights[j] * keep.weights(i, j), head.value, j, width);
    }
    for (let d = 0; d < width; d++) output[i * width + d] *= keep.context(i, d);
    if (!problem.isBackward) continue;

    const upstream = new Float64Array(width);
    for (let d = 0; d < width; d++) {
      upstream[d] = head.gradOutput[i * width + d] * keep.context(i, d);
    }
    const gains = new Float64Array(seen);
    let mean = 0;
    for (let j = 0; j < seen; j++) {
      gains[j] = keep.weights(i, j) * dot(upstream, 0, head.value, j, width);
      mean += weights[j] * gains[j];
    }
    for (let j = 0; j < seen; j++) {
      const gradScore = scale * weights[j] * (gains[j] - mean);
      addRow(gradQuery, i, gradScore, head.key, j, width);
      addRow(gradKey, j, gradScore, head.query, i, width);
      addRow(gradValue, j, weights[j] * keep.weights(i, j), upstream, 0, width);
    }
  }
  return problem.isBackward ? [gradQuery, gradKey, gradValue] : [output];
}

/**
 * What each score, weight or channel is multiplied by.
 * @param {Case} problem
 * @param {{batch: number, head: number}} position
 */
function decide({ queryLength, keyLength, headDim, options }, position) {
  const one = (/** @type {number} */ _row, /** @type {number} */ _column) => 1;
  const factors = { scores: one, weights: one, context: one };
  const { dropoutP: p = 0, dropoutPlacement: placement = 'weights', seed, offset } = options;
  if (p === 0) return factors;
  const columns = placement === 'context' ? headDim : keyLength;
  const kept = dropoutMask([1, 1, queryLength, columns], {
    ...{ p, placement, seed: seed ?? 0, offset: offset ?? 0 },
    ...{ batchOffset: position.batch, headOffset: position.head },
  });
  // Dropout's exact rescale: decisions have 16 bits.
  const keepScale = placement === 'scores' ? 1 : 65536 / (65536 - Math.round(p * 65536));
  const factor = (/** @type {number} */ row, /** @type {number} */ column) =>
    kept[row * columns + column] * keepScale;
  return { ...factors, [placement]: factor };
}

/** @param {Float64Array} scores become weights */
function softmax(scores) {
  const max = scores.reduce((a, b) => Math.max(a, b), Number.NEGATIVE_INFINITY);
  let sum = 0;
  scores.forEach((score, j) => {
    scores[j] = Math.exp(score - max);
    sum += scores[j];
  });
  for (let j = 0; j < scores.length; j++) scores[j] /= sum;
}

/**
 * @param {Floats} a
 * @param {number} aRow
 * @param {Floats} b
 * @param {number} bRow
 * @param {number} width
 */
function dot(a, aRow, b, bRow, width) {
  let sum = 0;
  for (let d = 0; d < width; d++) sum += a[aRow * width + d] * b[bRow * width + d];
  return sum;
}

/**
 * @param {Float64Array} out
 * @param {number} outRow
 * @param {number} factor
 * @param {Floats} rows
 * @param {number} row
 * @param {number} width
 */
function addRow(out, outRow, factor, rows, row, width) {
  for (let d = 0; d < width; d++) out[outRow * width + d] += factor * rows[row * width + d];
}

/**
 * Length of the difference relative to the length of what is expected.
 * @param {ArrayLike<number>} got
 * @param {ArrayLike<number>} expected
 */
export function relativeError(got, expected) {
  let difference = 0;
  let length = 0;
  for (let i = 0; i < expected.length; i++) {
    const wanted = Number(expected[i]);
    difference += (Number(got[i]) - wanted) ** 2;
    length += wanted ** 2;
  }
  return Math.sqrt(difference / length);
}
