// Steers test/hostile/faults.c, which this process has preloaded: the same memory, as a file.
import { openSync, readFileSync, readSync, writeSync } from 'node:fs';
import { backendInfo } from 'node-sdpa';

const FIELDS = /** @type {const} */ ([
  'begin',
  'end',
  'left',
  'failures',
  'allocations',
  'bytes',
  'most',
  'refuseThreads',
  'threads',
]);

/** @typedef {typeof FIELDS[number]} Field */

const file = openSync(/** @type {string} */ (process.env.SDPA_FAULTS), 'r+');
const word = new BigInt64Array(1);

/** @param {Field} field @param {number} value */
export function set(field, value) {
  word[0] = BigInt(value);
  writeSync(file, new Uint8Array(word.buffer), 0, 8, 8 * FIELDS.indexOf(field));
}

/** @param {Field} field */
export function get(field) {
  readSync(file, new Uint8Array(word.buffer), 0, 8, 8 * FIELDS.indexOf(field));
  return Number(word[0]);
}

/** From here on the addon's calls, and nobody else's, are counted and may be made to fail. */
export function watchAddon() {
  const { binary } = backendInfo();
  const lines = readFileSync('/proc/self/maps', 'latin1').split('\n');
  const own = lines.filter((line) => line.endsWith(` ${binary}`)).map((line) => line.split(/[- ]/));
  if (own.length === 0) throw new Error(`${binary} is not mapped`);
  set('left', -1);
  set('begin', Number.parseInt(/** @type {string} */ (own[0]?.[0]), 16));
  set('end', Number.parseInt(/** @type {string} */ (own.at(-1)?.[1]), 16));
}

/**
 * Lets `count` allocations fail after the next `first`; none where `first` is -1.
 * @param {number} first
 * @param {number} [count]
 */
export function failFrom(first, count = 0) {
  set('failures', count);
  set('left', first);
}
