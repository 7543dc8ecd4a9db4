// Checks and times one case on several subjects (a backend with a number of threads): checked
// first, then timed turn by turn, so that whatever else the machine does meets all alike.
import {
  attentionForwardSync,
  scaledDotProductAttentionSync,
  setNumThreads,
  Tensor,
} from 'node-sdpa';
import { normals } from './cases.mjs';
import { computeHead, relativeError } from './reference.mjs';
import { summarize, takeTurn } from './timing.mjs';

/** The largest relative error that arithmetic of each precision may show here. */
export const TOLERANCE = { highest: 1e-5, high: 1e-4, medium: 1e-2 };

/** @typedef {import('./cases.mjs').Case} Case */
/** @typedef {{backend: import('node-sdpa').BackendName, threads: number}} Subject */
/** @typedef {import('node-sdpa').TensorLike} TensorLike */
/** @typedef {Record<'query' | 'key' | 'value' | 'gradOutput', TensorLike>} Inputs */
/** @typedef {{seconds: number, turns: number}} Effort least time and turns for a case */
/** @typedef {import('./timing.mjs').Result} Result */

/**
 * @param {Case} problem
 * @param {Subject[]} subjects
 * @param {Effort} effort
 * @returns {Promise<Result[]>}
 */
export async function measure(problem, subjects, effort) {
  const tensors = createTensors(problem);
  const expected = computeHead(problem, lastHead(problem, tensors), lastPosition(problem));
  const runs = subjects.map((subject) => {
    setNumThreads(subject.threads);
    const { threads } = subject;
    const call = prepare(problem, tensors, { backend: subject.backend, out: tensors.out });
    const backend = nameBackend(subject.backend);
    const results = lastHeads(problem, call());
    const error = Math.max(...results.map((got, i) => relativeError(got, expected[i])));
    if (!(error <= TOLERANCE.highest)) {
      throw new Error(`${problem.name} on ${backend}: relative error ${error}`);
    }
    return { backend, threads, call, error, /** @type {number[]} */ times: [] };
  });
  const end = performance.now() + 1000 * effort.seconds;
  for (let turn = 0; turn < effort.turns || performance.now() < end; turn++) {
    for (const run of runs) {
      setNumThreads(run.threads);
      await takeTurn(run);
    }
  }
  return runs.map((run) => summarize(problem, run));
}

/**
 * What is timed: the whole call, or the backward call alone.
 * @param {Case} problem
 * @param {Inputs} inputs
 * @param {import('node-sdpa').AttentionOptions} more options besides the problem's own
 * @returns {() => Tensor[]}
 */
export function prepare({ options, isBackward }, { query, key, value, gradOutput }, more) {
  const all = { ...options, ...more };
  if (!isBackward) return () => [scaledDotProductAttentionSync(query, key, value, all)];
  const { out: _, ...rest } = all;
  const result = attentionForwardSync(query, key, value, rest);
  return () => {
    const { gradQuery, gradKey, gradValue } = result.backwardSync(gradOutput);
    return [gradQuery, gradKey, gradValue];
  };
}

/** The backend that really computes. @param {import('node-sdpa').BackendName} backend as asked */
export function nameBackend(backend) {
  const tensor = { data: Float32Array.of(1), dims: [1, 1, 1, 1] };
  return attentionForwardSync(tensor, tensor, tensor, { backend }).backend;
}

/** @param {Case} problem */
export function createTensors({ batch, heads, queryLength, keyLength, headDim }) {
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
