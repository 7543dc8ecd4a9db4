// Collects garbage at every turn around calls (--expose-gc): results, tensors and caches are dropped
// and kept at random, and what is kept has the right bits. The argument says how many rounds.
import {
  attentionForward,
  attentionForwardSync,
  KVCache,
  scaledDotProductAttention,
} from 'node-sdpa';
import { DROPOUT, fingerprint, makeInputs, makeTensor } from '../inputs.mjs';

const rounds = Number(process.argv[2]);
const gc = /** @type {() => void} */ (globalThis.gc);
/** @type {[number, number, number, number]} */
const DIMS = [1, 3, 70, 24];
const wanted = attentionForwardSync(...makeInputs(DIMS), DROPOUT);
const wantedPrints = [wanted.output, wanted.backwardSync(makeTensor(DIMS, 5)).gradKey].map(
  fingerprint,
);
let wrong = 0;
for (let round = 0; round < rounds; round++) {
  // Nothing but the calls holds their inputs.
  const promises = Array.from({ length: 4 }, () => attentionForward(...makeInputs(DIMS), DROPOUT));
  void scaledDotProductAttention(...makeInputs(DIMS), DROPOUT);
  const cache = new KVCache({ kvHeads: 3, headDim: 24, maxLength: 70 });
  cache.append(makeTensor(DIMS, 1), makeTensor(DIMS, 2));
  const attending = cache.attend(makeTensor(DIMS, 3));
  gc();
  await new Promise(setImmediate);
  gc();
  const results = await Promise.all(promises);
  const backward = results[0]?.backward(makeTensor(DIMS, 5));
  results.length = 1;
  gc();
  const prints = [results[0]?.output, (await backward)?.gradKey].map(
    (tensor) => tensor && fingerprint(tensor),
  );
  gc();
  if (prints.join() !== wantedPrints.join()) wrong++;
  await attending;
}
process.stdout.write(JSON.stringify({ rounds, wrong }));
