// What every cell of the matrix computes: forward, backward and a dropout mask, with answers that
// were worked out by hand, or by the published Philox.
import assert from 'node:assert/strict';

/** Two keys with scores 0 and ln 3: weights 1/4 and 3/4. */
const query = { data: Float32Array.of(1), dims: [1, 1, 1, 1] };
const key = { data: Float32Array.of(0, Math.log(3)), dims: [1, 1, 2, 1] };
const value = { data: Float32Array.of(4, 8), dims: [1, 1, 2, 1] };
const gradOutput = { data: Float32Array.of(1), dims: [1, 1, 1, 1] };
const ANSWERS = {
  output: [7], // 4/4 + 8 * 3/4
  gradQuery: [0.75 * Math.log(3)],
  gradKey: [-0.75, 0.75], // weight * (value - output)
  gradValue: [0.25, 0.75],
};

/** Rows of 32 keys, kept or dropped, the lowest index in the lowest bit. */
const MASK = { p: 0.1, seed: 0x123456789abcdef0n, offset: 7 };
const MASK_ANSWER = 'df7f2af7 d3c77fff';

/** @param {typeof import('node-sdpa')} sdpa */
export async function check(sdpa) {
  const sync = sdpa.attentionForwardSync(query, key, value);
  compare({ output: sync.output, ...sync.backwardSync(gradOutput) });
  const async = await sdpa.attentionForward(query, key, value);
  compare({ output: async.output, ...(await async.backward(gradOutput)) });

  const kept = sdpa.dropoutMask([1, 1, 2, 32], { ...MASK, batchOffset: 1, headOffset: 2 });
  assert.equal([toHex(kept.subarray(0, 32)), toHex(kept.subarray(32))].join(' '), MASK_ANSWER);

  const dropped = sdpa.attentionForwardSync(
    { data: new Float32Array(2), dims: [1, 1, 2, 1] },
    { data: new Float32Array(32), dims: [1, 1, 32, 1] },
    { data: new Float32Array(32), dims: [1, 1, 32, 1] },
    {
      ...{ dropoutP: MASK.p, training: true, seed: MASK.seed, offset: MASK.offset },
      ...{ batchOffset: 1, headOffset: 2, outputs: ['droppedWeights'] },
    },
  );
  const positive = Array.from(dropped.droppedWeights?.data ?? [], (weight) => (weight > 0 ? 1 : 0));
  assert.deepEqual(positive, [...kept]);

  const { selected, binary } = sdpa.backendInfo();
  assert.match(async.backend, /^cpu:/);
  return { selected, binary };
}

/** @param {Record<string, {data: ArrayLike<number>} | undefined>} results */
function compare(results) {
  for (const [name, answer] of Object.entries(ANSWERS)) {
    const data = Array.from(results[name]?.data ?? []);
    assert.equal(data.length, answer.length, name);
    for (const [i, x] of data.entries()) assert(Math.abs(x - answer[i]) < 1e-5, `${name}: ${data}`);
  }
}

/** @param {Uint8Array} bits */
function toHex(bits) {
  const bytes = Buffer.alloc(bits.length / 8);
  bits.forEach((bit, i) => {
    bytes[i >> 3] |= bit << (i & 7);
  });
  return bytes.toString('hex');
}
