// Helpers on plain arrays that the libraries' modules share.
import { closeSync, fstatSync, openSync, readSync } from 'node:fs';

/** A file of float32 numbers, read without a second copy in between. @param {string} file */
export function readFloats(file) {
  const descriptor = openSync(file, 'r');
  const floats = new Float32Array(fstatSync(descriptor).size / 4);
  const bytes = new Uint8Array(floats.buffer);
  for (let done = 0; done < bytes.length; ) {
    done += readSync(descriptor, bytes, done, bytes.length - done, null);
  }
  closeSync(descriptor);
  return floats;
}

/** Added to scores: -Infinity where a key comes after the query. */
export function causalMask(/** @type {number} */ rows, /** @type {number} */ columns) {
  const mask = new Float32Array(rows * columns);
  for (let i = 0; i < rows; i++) {
    mask.fill(Number.NEGATIVE_INFINITY, i * columns + i + 1, (i + 1) * columns);
  }
  return mask;
}

/**
 * [batch, a, b, width] -> [batch, b, a, width]
 * @param {Float32Array} data
 * @param {number} batch
 * @param {number} a
 * @param {number} b
 * @param {number} width
 */
export function swapAxes(data, batch, a, b, width) {
  const swapped = new Float32Array(data.length);
  for (let row = 0; row < batch * a * b; row++) {
    const first = Math.floor(row / (a * b));
    const [i, j] = [Math.floor(row / b) % a, row % b];
    const to = ((first * b + j) * a + i) * width;
    swapped.set(data.subarray(row * width, (row + 1) * width), to);
  }
  return swapped;
}

/**
 * The last row of each matrix: [heads, length, width] -> [heads, 1, width]
 * @param {Float32Array} data
 * @param {number} length
 * @param {number} width
 */
export function lastRows(data, length, width) {
  const rows = new Float32Array(data.length / length);
  for (let end = length * width; end <= data.length; end += length * width) {
    rows.set(data.subarray(end - width, end), end / length - width);
  }
  return rows;
}
