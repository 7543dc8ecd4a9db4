// Four worker threads and the main thread compute at once, synchronously and asynchronously,
// forward and backward; prints the fingerprints of each.
import { fileURLToPath } from 'node:url';
import { isMainThread, parentPort, Worker } from 'node:worker_threads';
import { attentionForward, attentionForwardSync, dropoutMask } from 'node-sdpa';
import { DROPOUT, fingerprint, makeInputs, makeTensor } from './inputs.mjs';

/** @type {[number, number, number, number]} */
const DIMS = [2, 4, 97, 32];

/** @param {number} rounds */
async function compute(rounds) {
  const prints = new Set();
  const gradOutput = makeTensor(DIMS, 307);
  for (let round = 0; round < rounds; round++) {
    const sync = attentionForwardSync(...makeInputs(DIMS), DROPOUT);
    const gradients = sync.backwardSync(gradOutput);
    const many = await Promise.all(
      Array.from({ length: 4 }, () => attentionForward(...makeInputs(DIMS), DROPOUT)),
    );
    const asyncGradients = await many[0].backward(gradOutput);
    const mask = dropoutMask(DIMS, { p: 0.1, placement: 'weights', seed: 5, offset: 0 });
    const outputs = [sync, ...many].map(({ output }) => fingerprint(output));
    for (const print of outputs) prints.add(print);
    const all = [gradients.gradQuery, gradients.gradKey, gradients.gradValue];
    const asyncAll = [asyncGradients.gradQuery, asyncGradients.gradKey, asyncGradients.gradValue];
    prints.add(`${all.map(fingerprint)}`);
    prints.add(`${asyncAll.map(fingerprint)}`);
    prints.add(mask.reduce((sum, bit) => sum + bit, 0));
  }
  return [...prints];
}

if (isMainThread) {
  const workers = Array.from({ length: 4 }, () => new Worker(fileURLToPath(import.meta.url)));
  const answers = workers.map(
    (worker) => new Promise((resolve, reject) => worker.on('message', resolve).on('error', reject)),
  );
  const exits = workers.map((worker) => new Promise((resolve) => worker.on('exit', resolve)));
  const results = await Promise.all([compute(5), ...answers]);
  const exitCodes = await Promise.all(exits);
  process.stdout.write(JSON.stringify({ results, exitCodes }));
} else {
  parentPort?.postMessage(await compute(5));
}
