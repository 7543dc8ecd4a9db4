// Starts calls on a GPU that takes its time, more than run at once, and ends in the way asked for.
import { once } from 'node:events';
import { isMainThread, parentPort, Worker } from 'node:worker_threads';
import { scaledDotProductAttention, Tensor } from 'node-sdpa';

const how = process.argv[2];
const tensor = new Tensor('float32', new Float32Array(256).fill(1), [1, 1, 16, 16]);
const start = () =>
  Array.from({ length: 10 }, () =>
    scaledDotProductAttention(tensor, tensor, tensor, { backend: 'cuda' }),
  );

if (!isMainThread) {
  start();
  parentPort?.postMessage('started');
} else if (how === 'terminate a worker') {
  const worker = new Worker(new URL(import.meta.url), { argv: ['worker'] });
  await once(worker, 'message');
  await worker.terminate();
  await Promise.all(start());
} else {
  const calls = start();
  if (how === 'exit') setTimeout(() => process.exit(7), 50);
  if (how === 'throw') {
    setTimeout(() => {
      throw new Error('thrown on purpose');
    }, 50);
  }
  await Promise.all(calls);
}
