// Every allocation that a call makes in native code fails, one at a time and from each one on.
// Prints what came of it: the bits of an undisturbed call, ERR_SDPA_OUT_OF_MEMORY with `out` as it
// was, or anything else, which is a fault.
import {
  attentionForward,
  attentionForwardSync,
  backendInfo,
  KVCache,
  scaledDotProductAttention,
  scaledDotProductAttentionSync,
  setNumThreads,
  Tensor,
} from 'node-sdpa';
import { DROPOUT, fingerprint, makeInputs, makeTensor } from '../inputs.mjs';
import { failFrom, get, set, watchAddon } from './faults.mjs';

backendInfo();
watchAddon();

/** @typedef {{data: ArrayBufferView}[] | Promise<{data: ArrayBufferView}[]>} Results */
/** @typedef {(out: Tensor) => Results} Call */

/** @type {[number, number, number, number]} */
const LONG = [1, 2, 1100, 16];
const inputs = makeInputs(LONG);
const [, key, value] = inputs;
const gradOutput = makeTensor(LONG, 307);
const bias = makeTensor([1100, 1], 401);
const few = makeTensor([1, 2, 2, 16], 503);
const manyHeads = makeInputs([2, 16, 70, 16]);
const starts = Int32Array.of(0, 70, 70, 300, 1100);
const packed = /** @type {[Tensor, Tensor, Tensor]} */ (
  [0, 1, 2].map((i) => makeTensor([1100, 2, 16], i))
);
const saved = attentionForwardSync(...inputs, { ...DROPOUT, attnMask: bias });
const cache = new KVCache({ batch: 2, kvHeads: 3, headDim: 16, maxLength: 300, type: 'bfloat16' });
cache.append(makeTensor([2, 3, 300, 16], 5), makeTensor([2, 3, 300, 16], 6));
const two = makeTensor([2, 3, 2, 16], 7);

const cuSeqlens = { query: starts, key: starts };
/** @param {import('node-sdpa').Gradients} gradients */
const list = ({ gradQuery, gradKey, gradValue, gradAttnMask }) => [
  ...[gradQuery, gradKey, gradValue],
  ...(gradAttnMask ? [gradAttnMask] : []),
];

/** What is called, and the shape of its `out`. @type {Record<string, [number[], Call]>} */
const CALLS = {
  forward: [
    LONG,
    (out) => [scaledDotProductAttentionSync(...inputs, { ...DROPOUT, attnMask: bias, out })],
  ],
  'many heads': [
    [2, 16, 70, 16],
    (out) => [scaledDotProductAttentionSync(...manyHeads, { ...DROPOUT, out })],
  ],
  asynchronous: [
    LONG,
    async (out) => [await scaledDotProductAttention(...inputs, { ...DROPOUT, out })],
  ],
  'with lse': [LONG, async (out) => [(await attentionForward(...inputs, { out })).lse]],
  decode: [[1, 2, 2, 16], (out) => [scaledDotProductAttentionSync(few, key, value, { out })]],
  packed: [
    [1100, 2, 16],
    (out) => [scaledDotProductAttentionSync(...packed, { ...DROPOUT, cuSeqlens, out })],
  ],
  'samples of weights': [
    [4, ...LONG],
    (out) => [scaledDotProductAttentionSync(...inputs, { ...DROPOUT, samples: 4, out })],
  ],
  'moments of samples': [
    [1, 1, 1, 1],
    async () => {
      const options = { ...DROPOUT, samples: 40, moments: /** @type {const} */ (true) };
      const { mean, variance } = await attentionForward(...manyHeads, options);
      return [mean, variance];
    },
  ],
  backward: [[1, 1, 1, 1], () => list(saved.backwardSync(gradOutput))],
  'backward, asynchronous': [[1, 1, 1, 1], async () => list(await saved.backward(gradOutput))],
  cache: [
    [1, 1, 1, 1],
    async () => {
      const { output, lse } = await cache.attend(two);
      return [output, lse];
    },
  ],
};

/** @type {Record<string, Record<string, number>>} */
const report = {};
for (const threads of [1, 3]) {
  setNumThreads(threads);
  for (const [name, [dims, call]] of Object.entries(CALLS)) {
    report[`${name}, ${threads} threads`] = await attack(dims, call);
  }
}
process.stdout.write(JSON.stringify(report));

/** @param {number[]} dims @param {Call} call */
async function attack(dims, call) {
  const size = dims.reduce((product, n) => product * n, 1);
  const out = new Tensor('float32', new Float32Array(size), dims);
  const wanted = (await call(out)).map(fingerprint).join();
  set('allocations', 0);
  await call(out);
  const allocations = get('allocations');
  const seen = { allocations, same: 0, outOfMemory: 0, halfWritten: 0, wrong: 0, other: 0 };
  for (let first = 0; first < allocations; first++) {
    for (const count of [1, 2, 1e9]) {
      out.data.fill(7);
      try {
        failFrom(first, count);
        const results = await call(out);
        failFrom(-1);
        if (results.map(fingerprint).join() === wanted) seen.same++;
        else seen.wrong++;
      } catch (error) {
        failFrom(-1);
        if (/** @type {any} */ (error).code !== 'ERR_SDPA_OUT_OF_MEMORY') {
          seen.other++;
          console.error(error);
        } else if (/** @type {any} */ (out.data).every((/** @type {number} */ x) => x === 7)) {
          seen.outOfMemory++;
        } else seen.halfWritten++;
      }
    }
  }
  if ((await call(out)).map(fingerprint).join() !== wanted) seen.wrong++;
  return seen;
}
