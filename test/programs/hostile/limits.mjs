// What calls take of native memory under one limit after another, from all that they like down to
// nothing: never more than the limit, and the same bits or ERR_SDPA_OUT_OF_MEMORY.
import { createRequire } from 'node:module';
import { attentionForwardSync, backendInfo, setNumThreads } from 'node-sdpa';
import { DROPOUT, fingerprint, makeInputs, makeTensor } from '../inputs.mjs';
import { get, set, watchAddon } from './faults.mjs';

backendInfo();
watchAddon();
const { loadBinding } = createRequire(import.meta.url)('../../../dist/binding.js');
/** @type {import('../../../lib/binding').NativeBinding} */
const native = loadBinding().native;

/** Errors, tables of a few words for each entry of a batch, and what malloc rounds up. */
const SLACK = 16_384;

/** @type {[number, number, number, number]} */
const LONG = [1, 2, 2300, 16];
const inputs = makeInputs(LONG);
const bias = makeTensor([2300, 1], 401);
const packed = /** @type {typeof inputs} */ ([0, 1, 2].map((i) => makeTensor([2300, 2, 16], i)));
const starts = Int32Array.of(0, 1000, 1000, 1300, 2300);
const few = makeTensor([1, 2, 3, 16], 5);
const saved = attentionForwardSync(...inputs, { ...DROPOUT, attnMask: bias });
const [, key, value] = inputs;
const FLOATS = 2 * 2300 * 16;

/** Bytes of results, and the call. @type {Record<string, [number, () => {data: ArrayBufferView}[]]>} */
const CALLS = {
  forward: [
    4 * (FLOATS + 2 * 2300),
    () => [attentionForwardSync(...inputs, { ...DROPOUT, attnMask: bias }).output],
  ],
  decode: [4 * (2 * 3 * 16 + 2 * 3), () => [attentionForwardSync(few, key, value).output]],
  packed: [
    4 * (FLOATS + 2 * 2300),
    () => [attentionForwardSync(...packed, { cuSeqlens: { query: starts, key: starts } }).output],
  ],
  moments: [
    4 * (2 * FLOATS + 2 * 2300),
    () => {
      const options = { ...DROPOUT, samples: 3, moments: /** @type {const} */ (true) };
      const { mean, variance } = attentionForwardSync(...inputs, options);
      return [mean, variance];
    },
  ],
  backward: [
    4 * (3 * FLOATS + 2300),
    () => {
      const { gradQuery, gradKey, gradAttnMask } = saved.backwardSync(inputs[0]);
      return [gradQuery, gradKey, ...(gradAttnMask ? [gradAttnMask] : [])];
    },
  ],
};

/** @type {Record<string, Record<string, number>>} */
const report = {};
for (const threads of [1, 4]) {
  setNumThreads(threads);
  for (const [name, [results, call]] of Object.entries(CALLS)) {
    native.setMostBytes(Number.MAX_SAFE_INTEGER);
    const wanted = call().map(fingerprint).join();
    const seen = { same: 0, outOfMemory: 0, beyond: 0, wrong: 0, most: 0 };
    for (let scratch = 2 ** 24; scratch >= 64; scratch = Math.floor(scratch * 0.7)) {
      native.setMostBytes(results + scratch);
      set('bytes', 0);
      set('most', 0);
      try {
        if (call().map(fingerprint).join() === wanted) seen.same++;
        else seen.wrong++;
      } catch (error) {
        const { code, message } = /** @type {any} */ (error);
        if (code === 'ERR_SDPA_OUT_OF_MEMORY' && /SDPA_MAX_BYTES/.test(message)) seen.outOfMemory++;
        else throw error;
      }
      if (get('most') > scratch + SLACK) seen.beyond++;
      seen.most = Math.max(seen.most, get('most'));
    }
    report[`${name}, ${threads} threads`] = seen;
  }
}
process.stdout.write(JSON.stringify(report));
