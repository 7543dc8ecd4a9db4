// Computes in so many workers on one GPU; prints what they gave, and what is held when they are gone.
import { once } from 'node:events';
import { isMainThread, parentPort, Worker } from 'node:worker_threads';
import { attentionForward, backendInfo, Tensor } from 'node-sdpa';

if (isMainThread) {
  const workers = Array.from(
    { length: Number(process.argv[2]) },
    () => new Worker(new URL(import.meta.url)),
  );
  const results = await Promise.all(
    workers.map(async (worker) => (await once(worker, 'message'))[0]),
  );
  await Promise.all(workers.map((worker) => worker.terminate()));
  const used = backendInfo().gpus[0].usedBytes;
  process.stdout.write(JSON.stringify({ results, used }));
} else {
  const data = Float32Array.from({ length: 144 }, (_, i) => Math.sin(12.9898 * i + 1));
  const there = await new Tensor('float32', data, [1, 2, 9, 8]).to('cuda');
  const { output } = await attentionForward(there, there, there);
  parentPort?.postMessage(Array.from(await output.getData()));
}
