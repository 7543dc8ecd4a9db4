// Inputs for the programs of this folder: the same numbers in every process and thread.
import { Tensor } from 'node-sdpa';

/**
 * A float32 tensor of numbers in [-1, 1) that cycle at a prime.
 * @param {number[]} dims
 * @param {number} start
 */
export function makeTensor(dims, start) {
  const length = dims.reduce((product, n) => product * n, 1);
  const data = Float32Array.from({ length }, (_, i) => (((i + start) * 7919) % 1009) / 504.5 - 1);
  return new Tensor('float32', data, dims);
}

/**
 * Query, key and value of one shape [batch, heads, length, headDim].
 * @param {[number, number, number, number]} dims
 * @returns {[Tensor, Tensor, Tensor]}
 */
export function makeInputs(dims) {
  return [makeTensor(dims, 0), makeTensor(dims, 101), makeTensor(dims, 211)];
}

/**
 * FNV-1a over the bytes of a tensor or mask: equal for equal bits.
 * @param {{data: ArrayBufferView}} tensor
 */
export function fingerprint({ data }) {
  const { buffer, byteOffset, byteLength } = data;
  let hash = 0x811c9dc5;
  for (const byte of new Uint8Array(buffer, byteOffset, byteLength)) {
    hash = Math.imul(hash ^ byte, 0x01000193) >>> 0;
  }
  return hash.toString(16);
}

export const DROPOUT = /** @type {const} */ ({
  dropoutP: 0.1,
  training: true,
  seed: 5,
  offset: 0,
  isCausal: true,
});
