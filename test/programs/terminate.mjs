// Workers are terminated in the middle of their calls, asynchronous and synchronous ones by turns;
// afterwards the main thread still computes.
import { fileURLToPath } from 'node:url';
import { isMainThread, parentPort, Worker, workerData } from 'node:worker_threads';
import { attentionForward, attentionForwardSync } from 'node-sdpa';
import { DROPOUT, fingerprint, makeInputs, makeTensor } from './inputs.mjs';

/** @type {[number, number, number, number]} */
const DIMS = [1, 8, 384, 64];

if (isMainThread) {
  const [small] = [makeInputs([1, 2, 33, 16])];
  const before = fingerprint(attentionForwardSync(...small, DROPOUT).output);
  const rounds = 12;
  for (let round = 0; round < rounds; round++) {
    const worker = new Worker(fileURLToPath(import.meta.url), { workerData: round % 2 });
    await new Promise((resolve, reject) => worker.once('message', resolve).once('error', reject));
    // A little later each time, so that other stages of a call are hit.
    await new Promise((resolve) => setTimeout(resolve, round * 3));
    await worker.terminate();
  }
  const after = fingerprint((await attentionForward(...small, DROPOUT)).output);
  process.stdout.write(JSON.stringify({ rounds, before, after }));
} else {
  const inputs = makeInputs(DIMS);
  const gradOutput = makeTensor(DIMS, 307);
  parentPort?.postMessage('started');
  for (;;) {
    if (workerData === 0) {
      const results = await Promise.all([1, 2, 3].map(() => attentionForward(...inputs, DROPOUT)));
      await results[0].backward(gradOutput);
    } else {
      attentionForwardSync(...inputs, DROPOUT).backwardSync(gradOutput);
    }
  }
}
