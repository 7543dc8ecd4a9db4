// Checks and times one case on several subjects (a backend with a number of threads): checked
// first, then timed turn by turn, so that whatever else the machine does meets all alike.
import {
  attentionForwardSync,
  scaledDotProductAttentionSync,
  setNumThreads,
  Tensor,
} from 'node-sdpa';
import { countFlops, normals } from './cases.mjs';
import { computeHead, relativeError } from './reference.mjs';

/** The largest relative error that float32 arithmetic may show here. */
const TOLERANCE = 1e-5;
/** What a subject computes in its turn: calls for this long, and at least one. */
const TURN_MS = 15;

/** @typedef {import('./cases.mjs').Case} Case */
/** @typedef {{backend: import('node-sdpa').BackendName, threads: number}} Subject */
/** @typedef {{seconds: number, turns: number}} Effort least time and turns for a case */
/**
 * @typedef {object} Result
 * @property {string} case
 * @property {string} backend
 * @property {number} threads
 * @property {number} calls
 * @property {number} minMs
 * @property {number} medianMs
 * @property {number} p90Ms
 * @property {number} gflops at the median
 * @property {number} error relative L2 error of one head
 */

/**
 * @param {Case} problem
 * @param {Subject[]} subjects
 * @param {Effort} effort
 * @returns {Result[]}
 */
export function measure(problem, subjects, effort) {
  const tensors = createTensors(problem);
  const expected = computeHead(problem, lastHead(problem, tensors), lastPosition(problem));
  const runs = subjects.map((subject) => {
    setNumThreads(subject.threads);
    const { call, backend } = prepare(problem, tensors, subject);
    const results = lastHeads(problem, call());
    const error = Math.max(...results.map((got, i) => relativeError(got, expected[i])));
    if (!(error <= TOLERANCE)) {
      throw new Error(`${problem.name} on ${backend}: relative error ${error}`);
    }
    const { threads } = subject;
    return { backend, threads, call, error, /** @type {number[]} */ times: [] };
  });
  const end = performance.now() + 1000 * effort.seconds;
  for (let turn = 0; turn < effort.turns || performance.now() < end; turn++) {
    for (const run of runs) takeTurn(run);
  }
  return runs.map((run) => summarize(problem, run));
}

/** @param {{threads: number, call: () => void, times: number[]}} run */
function takeTurn({ threads, call, times }) {
  setNumThreads(threads);
  call(); // wakes threads and fills caches, untimed
  const end = performance.now() + TURN_MS;
  do {
    const start = performance.now();
    call();
    times.push(performance.now() - start);
  } while (performance.now() < end);
}

/**
 * What is timed, and the name of the backend that really computes it.
 * @param {Case} problem
 * @param {ReturnType<typeof createTensors>} tensors
 * @param {Subject} subject
 */
function prepare({ options, isBackward }, tensors, { backend }) {
  const { query, key, value, gradOutput, out } = tensors;
  const result = attentionForwardSync(query, key, value, { ...options, backend });
  const forward = () =>
    scaledDotProductAttentionSync(query, key, value, { ...options, backend, out });
  const backward = () => {
    const { gradQuery, gradKey, gradValue } = result.backwardSync(gradOutput);
    return [gradQuery, gradKey, gradValue];
  };
  const call = isBackward ? backward : () => [forward()];
  return { call, backend: result.backend };
}

/** @param {Case} problem */
function createTensors({ batch, heads, queryLength, keyLength, headDim }) {
  const next = normals(20240229);
  const create = (/** @type {number} */ length) => {
    const data = Float32Array.from({ length: batch * heads * length * headDim }, next);
    return new Tensor('float32', data, [batch, heads, length, headDim]);
  };
  return {
    query: create(queryLength),
    key: create(keyLength),
    value: create(keyLength),
    gradOutput: create(queryLength),
    out: create(queryLength),
  };
}

/** @param {Case} problem */
function lastPosition({ batch, heads }) {
  return { batch: batch - 1, head: heads - 1 };
}

/** @param {Case} problem @param {ReturnType<typeof createTensors>} tensors */
function lastHead(problem, { query, key, value, gradOutput }) {
  const [q, k, v, g] = lastHeads(problem, [query, key, value, gradOutput]);
  return { query: q, key: k, value: v, gradOutput: g };
}

/** The last head of each tensor. @param {Case} problem @param {Tensor[]} tensors */
function lastHeads({ headDim }, tensors) {
  return tensors.map(({ data, dims }) =>
    /** @type {Float32Array} */ (data).slice(-dims[2] * headDim),
  );
}

/**
 * @param {Case} problem
 * @param {{backend: string, threads: number, times: number[], error: number}} run
 * @returns {Result}
 */
function summarize(problem, { backend, threads, times, error }) {
  const sorted = times.sort((a, b) => a - b);
  const quantile = (/** @type {number} */ q) => sorted[Math.round(q * (sorted.length - 1))];
  const medianMs = quantile(0.5);
  return {
    case: problem.name,
    backend,
    threads,
    calls: sorted.length,
    minMs: quantile(0),
    medianMs,
    p90Ms: quantile(0.9),
    gflops: countFlops(problem) / medianMs / 1e6,
    error,
  };
}
