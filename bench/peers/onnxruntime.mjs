// onnxruntime-node: a session for each form and number of threads. Denormal numbers count as zero
// in a whole process or not at all, so each setting has a process of its own.
import { causalMask, lastRows, swapAxes } from './arrays.mjs';
import { loadPeer } from './install.mjs';
import { FORMS } from './onnx-models.mjs';

const { InferenceSession, Tensor, env } = loadPeer('onnxruntime-node');

/** @typedef {import('../cases.mjs').Case} Case */
/** @typedef {import('./check.mjs').Arrays} Arrays */
/** @typedef {import('./onnx-encode.mjs').Value} Value */

/** A session that may have held more than this for its scores is closed after a turn. */
const LARGE_BYTES = 2 ** 26;

export const { node: version } = env.versions;

/**
 * @param {Case} problem
 * @param {Arrays} arrays
 * @param {import('./subjects.mjs').Subject} subject
 * @returns {import('./child.mjs').Run}
 */
export function prepare(problem, arrays, { form, setting, threads, reusesOutput }) {
  const { bytes, inputs, outputs } = FORMS[form](problem);
  const feeds = inputs.map((input) => ({ ...input, data: sharedData(input, problem, arrays) }));
  const options = {
    executionProviders: ['cpu'],
    intraOpNumThreads: threads,
    interOpNumThreads: 1,
    ...(setting === 'denormals as zero' && {
      extra: { session: { set_denormal_as_zero: '1' } },
    }),
  };
  const { batch, heads, queryLength, keyLength } = problem;
  const [{ dims }] = outputs;
  const output = reusesOutput ? new Tensor('float32', arrays.query.slice(), dims) : null;
  const isLarge = 4 * batch * heads * queryLength * keyLength > LARGE_BYTES;
  /** @type {any} */
  let session = null;
  return {
    isLarge,
    async open() {
      session ??= await InferenceSession.create(bytes, options);
    },
    async close() {
      await session?.release();
      session = null;
    },
    async call() {
      /** @type {Record<string, any>} */
      const tensors = {};
      for (const { name, data, dims, type = 'float32' } of feeds) {
        tensors[name] = new Tensor(type, data, dims);
      }
      const { pastKey: presentKey, pastValue: presentValue } = tensors;
      const cache = presentKey && { presentKey, presentValue };
      const results = await session.run(tensors, { output, ...cache });
      return results.output.data;
    },
    read: (/** @type {Float32Array} */ data) =>
      dims.length === 3 ? [swapAxes(data, batch, queryLength, heads, problem.headDim)] : [data],
  };
}

/** What the models' inputs hold, once for all forms of a case. @type {WeakMap<Arrays, any>} */
const shared = new WeakMap();

/** @param {Value} input @param {Case} problem @param {Arrays} arrays */
function sharedData(input, problem, arrays) {
  if (!shared.has(arrays)) shared.set(arrays, {});
  const known = shared.get(arrays);
  known[`${input.name} ${input.dims}`] ??= dataOf(input, problem, arrays);
  return known[`${input.name} ${input.dims}`];
}

/**
 * What a model's input holds, in its own layout.
 * @param {Value} input
 * @param {Case} problem
 * @param {Arrays} arrays
 */
function dataOf({ name, dims }, { batch, heads, keyLength, headDim }, { query, key, value }) {
  const orient = (/** @type {Float32Array} */ data) =>
    dims.length === 3 ? swapAxes(data, batch, heads, dims[1], headDim) : data;
  switch (name) {
    case 'query':
      return orient(query);
    case 'key':
      return orient(key);
    case 'value':
      return orient(value);
    case 'newKey':
      return lastRows(key, keyLength, headDim);
    case 'newValue':
      return lastRows(value, keyLength, headDim);
    case 'pastKey':
      return key;
    case 'pastValue':
      return value;
    case 'mask':
      return causalMask(dims[2], dims[3]);
    case 'lastKeys':
      return new Int32Array(batch).fill(keyLength - 1);
    case 'totalLength':
      return Int32Array.of(keyLength);
    default:
      throw new Error(`no input has the name ${name}`);
  }
}
