// Another thread writes to all arrays of calls while they run, for so many milliseconds as the
// argument says: numbers may come out as they like, but what is not visible keeps the weight 0, what
// is dropped stays dropped, and nothing crashes.
import { fileURLToPath } from 'node:url';
import { isMainThread, Worker, workerData } from 'node:worker_threads';
import {
  attentionForward,
  attentionForwardSync,
  dropoutMask,
  KVCache,
  scaledDotProductAttention,
  Tensor,
} from 'node-sdpa';

if (isMainThread) await main(Number(process.argv[2]));
else scribble(workerData);

/** Writes all kinds of bits until the process ends. @param {SharedArrayBuffer[]} buffers */
function scribble(buffers) {
  const words = buffers.map((buffer) => new Int32Array(buffer, 0, buffer.byteLength >> 2));
  const values = [0, -1, 0x7f800000, 0x7fc00000, 0x3f800000, 1, 0x80000000 | 0, 0x7f7fffff];
  for (let i = 0; ; i++) {
    for (const array of words) {
      const value = values[i % values.length] ?? 0;
      for (let j = i % 7; j < array.length; j += 7) array[j] = value ^ (j & i);
    }
  }
}

/** @param {number} milliseconds */
async function main(milliseconds) {
  const [batch, heads, length, dim] = [2, 3, 150, 24];
  const dims = [batch, heads, length, dim];
  const shared = (/** @type {number} */ bytes) => new SharedArrayBuffer(bytes);
  const floats = () => ({ data: new Float32Array(shared(4 * batch * heads * length * dim)), dims });
  const [query, key, value] = [floats(), floats(), floats()];
  const owned = [1, 2, 3].map(
    () => new Tensor('float32', new Float32Array(query.data.length), dims),
  );
  const bias = { data: new Float32Array(shared(4 * length * length)), dims: [length, length] };
  const keep = {
    data: new Uint8Array(shared(batch * heads * length * length)),
    dims: [batch, heads, length, length],
  };
  const kvLengths = new Int32Array(shared(4 * batch));
  const starts = new Int32Array(shared(4 * 4));
  const packed = { data: query.data.subarray(0, length * dim), dims: [length, 1, dim] };
  const tensors = [query, key, value, bias, keep, ...owned];
  const arrays = [...tensors.map(({ data }) => data), kvLengths, starts];
  const worker = new Worker(fileURLToPath(import.meta.url), {
    workerData: arrays.map(({ buffer }) => buffer),
  });
  await new Promise((resolve) => worker.once('online', resolve));

  const dropout = /** @type {const} */ ({ dropoutP: 0.4, training: true, seed: 11 });
  const mask = dropoutMask([batch, heads, length, length], { p: 0.4, seed: 11 });
  const visible = { isCausal: true, windowSize: /** @type {const} */ ([40, -1]) };
  /** @type {Record<string, number>} */
  const codes = {};
  let calls = 0;
  let outOfRange = 0;

  /** @param {import('node-sdpa').AttentionResult} result */
  const check = ({ droppedWeights }) => {
    const weights = /** @type {Float32Array} */ (droppedWeights?.data);
    for (let i = 0; i < weights.length; i++) {
      const [q, k] = [Math.floor(i / length) % length, i % length];
      const isSeen = k <= q && k >= q - 40 && mask[i] === 1;
      if (!isSeen && weights[i] !== 0) outOfRange++;
    }
  };
  const outputs = /** @type {const} */ (['droppedWeights']);
  const all = { ...dropout, ...visible, outputs };
  const [first, second, third] = /** @type {[Tensor, Tensor, Tensor]} */ (owned);
  const cache = new KVCache({ kvHeads: heads, headDim: dim, batch, maxLength: length });
  const works = [
    async () => check(attentionForwardSync(query, key, value, { ...all, attnMask: bias })),
    async () => check(attentionForwardSync(first, second, third, all)),
    async () => {
      const result = await attentionForward(first, second, third, { ...all, attnMask: bias });
      check(result);
      await result.backward(first);
    },
    async () => {
      const { dropoutP, training } = dropout;
      const options = { dropoutP, training, keepMask: keep, kvLengths };
      attentionForwardSync(query, key, value, options).backwardSync(value);
    },
    async () => {
      await scaledDotProductAttention(query, key, value, { kvLengths, precision: 'medium' });
    },
    async () => {
      const options = { cuSeqlens: { query: starts, key: starts } };
      await scaledDotProductAttention(packed, packed, packed, options);
    },
    async () => {
      cache.truncate(0);
      cache.append(key, value);
      const attending = cache.attend(first);
      cache.truncate(3);
      await attending;
    },
  ];
  for (
    const end = performance.now() + milliseconds;
    performance.now() < end || calls < 2 * works.length;
  ) {
    try {
      await works[calls++ % works.length]?.();
    } catch (error) {
      const code = /** @type {any} */ (error).code ?? String(error);
      codes[code] = (codes[code] ?? 0) + 1;
    }
  }
  await worker.terminate();
  process.stdout.write(JSON.stringify({ calls, outOfRange, codes }));
}
