// One of many kinds of calls, by lot: at once and asynchronous, cancelled before and in the middle,
// with and without dispose, on shapes that repeat and on shapes of their own.
import {
  attentionForward,
  attentionForwardSync,
  dropoutMask,
  KVCache,
  KVCachePool,
  mergeAttention,
  scaledDotProductAttention,
  scaledDotProductAttentionSync,
  Tensor,
} from 'node-sdpa';

// Caches that are only forgotten hold their blocks until they are collected.
const pool = new KVCachePool({ blocks: 4096, kvHeads: 2, headDim: 16, type: 'float16' });

/** @param {number[]} dims */
const plain = (dims) => {
  const length = dims.reduce((product, n) => product * n, 1);
  return { data: new Float32Array(length).fill(0.25), dims };
};
const small = plain([1, 2, 8, 16]);
const middle = plain([1, 4, 64, 32]);
const owned = new Tensor('float32', middle.data, middle.dims);
const dropout = /** @type {const} */ ({ dropoutP: 0.1, training: true });

/** Cancelled calls end so; anything else is a fault. @param {any} error */
function onlyAborted(error) {
  if (error?.code !== 'ERR_SDPA_ABORTED') throw error;
}

/** @type {((lot: number) => unknown)[]} */
const KINDS = [
  () => scaledDotProductAttentionSync(small, small, small),
  () => scaledDotProductAttentionSync(small, small, small, { isCausal: true }).dispose(),
  () => scaledDotProductAttention(small, small, small, dropout),
  () => scaledDotProductAttention(owned, owned, owned),
  async () =>
    (await scaledDotProductAttention(middle, middle, middle, { isCausal: true })).dispose(),
  (lot) => {
    const other = plain([1, 1, 1 + (lot % 130), 8]);
    return scaledDotProductAttention(other, other, other);
  },
  () => {
    const controller = new AbortController();
    const call = scaledDotProductAttention(owned, owned, owned, { signal: controller.signal });
    controller.abort();
    return call.catch(onlyAborted);
  },
  (lot) => {
    const controller = new AbortController();
    const call = scaledDotProductAttention(middle, middle, middle, { signal: controller.signal });
    if (lot % 2 === 0) setImmediate(() => controller.abort());
    return call.catch(onlyAborted);
  },
  () =>
    scaledDotProductAttention(small, small, small, { signal: AbortSignal.abort() }).catch(
      onlyAborted,
    ),
  () => {
    const result = attentionForwardSync(small, small, small, dropout);
    result.backwardSync(small);
    result.dispose();
  },
  async () => {
    const result = await attentionForward(middle, middle, middle, dropout);
    await result.backward(middle);
  },
  () => dropoutMask([1, 2, 16, 16], { p: 0.3, seed: 1 }),
  () => {
    const result = attentionForwardSync(small, small, small);
    mergeAttention([result, result]);
  },
  async (lot) => {
    const cache = new KVCache({ pool });
    const rows = plain([1, 2, 1 + (lot % 70), 16]);
    cache.append(rows, rows);
    const attending = cache.attend(small);
    if (lot % 3 > 0) cache.dispose(); // the others are for the garbage collector
    await attending;
  },
  () => {
    const half = new Tensor('bfloat16', new Uint16Array(4096), [1, 1, 128, 32]);
    const output = scaledDotProductAttentionSync(half, half, half);
    half.dispose();
    output.dispose();
  },
];

/** @param {number} lot any non-negative integer */
export async function callOnce(lot) {
  const kind = KINDS[lot % KINDS.length];
  await kind?.(Math.floor(lot / KINDS.length));
}
