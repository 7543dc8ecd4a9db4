// This package, as any caller has it: tensors in, a new output out.
import { backendInfo, setNumThreads, Tensor } from 'node-sdpa';
import { nameBackend, prepare as prepareCall } from '../measure.mjs';

export const { version } = backendInfo();

/**
 * @param {import('../cases.mjs').Case} problem
 * @param {import('./check.mjs').Arrays} arrays
 * @param {import('./subjects.mjs').Subject} subject
 * @returns {import('./child.mjs').Run}
 */
export function prepare(problem, arrays, { form, precision, threads, reusesOutput }) {
  const { batch, heads, queryLength, keyLength, headDim } = problem;
  const wrap = (/** @type {Float32Array} */ data, /** @type {number} */ length) =>
    new Tensor('float32', data, [batch, heads, length, headDim]);
  const inputs = {
    query: wrap(arrays.query, queryLength),
    key: wrap(arrays.key, keyLength),
    value: wrap(arrays.value, keyLength),
    gradOutput: wrap(arrays.gradOutput, queryLength),
  };
  const backend = /** @type {import('node-sdpa').BackendName} */ (form);
  const { dims } = inputs.query;
  const out = reusesOutput ? new Tensor('float32', arrays.query, dims) : undefined;
  const call = prepareCall(problem, inputs, { backend, precision, out });
  return {
    open: () => setNumThreads(threads),
    call,
    read: (outputs) => outputs.map((/** @type {{data: Float32Array}} */ { data }) => data),
    prove: () => nameBackend(backend),
  };
}
