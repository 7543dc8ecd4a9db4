// By require, in the main thread and then in a worker; prints what was loaded.
const { isMainThread, parentPort, Worker } = require('node:worker_threads');
const sdpa = require('node-sdpa');

(async () => {
  const { check } = await import('./checks.mjs');
  const found = await check(sdpa);
  if (!isMainThread) return parentPort?.postMessage(found);
  const worker = new Worker(__filename);
  worker.on('message', (inWorker) => console.log(JSON.stringify([found, inWorker])));
  worker.on('error', (error) => {
    throw error;
  });
})();
