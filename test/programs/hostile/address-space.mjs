// The system gives this process no more than 256 MiB beyond what it has (RLIMIT_AS): what does not
// fit is an error with a code, and what fits is computed.
import { spawnSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import {
  attentionForward,
  attentionForwardSync,
  dropoutMask,
  KVCache,
  scaledDotProductAttention,
  Tensor,
} from 'node-sdpa';
import { DROPOUT, fingerprint, makeInputs } from '../inputs.mjs';

const MIB = 2 ** 20;
const small = makeInputs([1, 4, 128, 32]);
const wanted = fingerprint((await attentionForward(...small, DROPOUT)).output);
const long = makeInputs([1, 4, 9000, 64]);
const saved = attentionForwardSync(...long, { windowSize: [1, 0] });
const large = new Float32Array(80 * MIB); // not touched, so that it takes no memory

const used =
  1024 * Number(/^VmSize:\s+(\d+)/m.exec(readFileSync('/proc/self/status', 'utf8'))?.[1]);
const limit = used + 256 * MIB;
const { status, stderr } = spawnSync('prlimit', ['--pid', `${process.pid}`, `--as=${limit}`], {
  encoding: 'utf8',
});
if (status !== 0) throw new Error(`prlimit: ${stderr}`);

/** @type {Record<string, () => unknown>} */
const WORKS = {
  tensor: () => new Tensor('float32', large, [large.length]),
  weights: () => attentionForwardSync(...long, { outputs: ['weights'] }),
  'weights, asynchronous': () => attentionForward(...long, { outputs: ['weights'] }),
  mask: () => dropoutMask([1, 1, 2 ** 15, 2 ** 15], { p: 0.5, seed: 1 }),
  cache: () => new KVCache({ kvHeads: 8, headDim: 128, maxLength: 2 ** 20 }),
  backward: () => saved.backwardSync(long[0]), // its slices are 8 times gradQuery
  'backward, asynchronous': () => saved.backward(long[0]),
  // 40 outputs of 9.2 MB, and the copies of their inputs
  'many calls': () =>
    Promise.all(
      Array.from({ length: 40 }, () => {
        const copies = long.map(({ data, dims }) => ({ data, dims }));
        const [query, key, value] = /** @type {typeof long} */ (copies);
        return scaledDotProductAttention(query, key, value, { windowSize: [1, 0] });
      }),
    ),
};
/** @type {Record<string, string>} */
const codes = {};
for (const [name, work] of Object.entries(WORKS)) {
  try {
    await work();
    codes[name] = 'none';
  } catch (error) {
    const { code, name: kind, message } = /** @type {any} */ (error);
    codes[name] = code ?? `${kind}: ${message}`;
  }
}
const again = fingerprint((await attentionForward(...small, DROPOUT)).output);
process.stdout.write(JSON.stringify({ codes, isSame: again === wanted }));
