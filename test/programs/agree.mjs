// Writes to the file named what loaded here and how far each native backend is from the JavaScript
// backend, as the largest relative error of a result; a dropout mask; and an error out of C++.
import { writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { attentionForward, attentionForwardSync, backendInfo, dropoutMask } from 'node-sdpa';
import { makeInputs, makeTensor } from './inputs.mjs';

/** @type {[number, number, number, number][]} */
const SHAPES = [
  [2, 3, 70, 20],
  [1, 2, 130, 64],
  [1, 2, 33, 7],
];
const PLACEMENTS = /** @type {const} */ (['weights', 'context', 'scores']);
const SEEDS = { seed: 0x123456789abcdef0n, offset: 7 };
const DROPOUT = { ...SEEDS, dropoutP: 0.3, training: true };

/** @type {import('node-sdpa').AttentionOptions[]} */
const OPTIONS = [
  {},
  { isCausal: true },
  { windowSize: [9, 4], softcap: 5 },
  ...PLACEMENTS.map((dropoutPlacement) => ({ ...DROPOUT, dropoutPlacement })),
];

const { tried, binary } = backendInfo();
const errors = Object.fromEntries(
  tried
    .filter(({ backend, ok }) => ok && backend.startsWith('cpu:'))
    .map(({ backend }) => [backend, worstError(backend)]),
);
const tensors = makeInputs([1, 2, 33, 16]);
const sync = attentionForwardSync(...tensors, DROPOUT);
const async = await attentionForward(...tensors, DROPOUT);
const result = {
  system: `${process.platform}-${process.arch}`,
  binary,
  errors,
  sameAsync: Buffer.from(sync.output.data.buffer).equals(Buffer.from(async.output.data.buffer)),
  mask: [...dropoutMask([1, 1, 2, 32], { p: 0.1, ...SEEDS, batchOffset: 1, headOffset: 2 })],
  thrown: messageOf(() => createRequire(import.meta.url)(`${binary}`).forwardSync()),
};
// Not every emulated system can print into a pipe.
writeFileSync(process.argv[2], JSON.stringify(result));

/** @param {import('node-sdpa').BackendName} backend */
function worstError(backend) {
  return Math.max(
    ...SHAPES.flatMap((dims) =>
      OPTIONS.flatMap((options) => {
        const [got, expected] = [backend, /** @type {const} */ ('js')].map((name) => {
          const all = { ...options, backend: name };
          const result = attentionForwardSync(...makeInputs(dims), all);
          const gradients = result.backwardSync(makeTensor(dims, 307));
          return [result.output, gradients.gradQuery, gradients.gradKey, gradients.gradValue];
        });
        return expected.map((tensor, i) => relativeError(got[i].data, tensor.data));
      }),
    ),
  );
}

/** @param {ArrayLike<number>} got @param {ArrayLike<number>} expected */
function relativeError(got, expected) {
  let difference = 0;
  let length = 0;
  for (let i = 0; i < expected.length; i++) {
    difference += (Number(got[i]) - Number(expected[i])) ** 2;
    length += Number(expected[i]) ** 2;
  }
  return Math.sqrt(difference / length);
}

/** @param {() => unknown} call */
function messageOf(call) {
  try {
    call();
    return 'nothing was thrown';
  } catch (error) {
    return /** @type {Error} */ (error).message;
  }
}
