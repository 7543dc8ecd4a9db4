// By import, in the main thread and then in a worker; prints what was loaded.
import { isMainThread, parentPort, Worker } from 'node:worker_threads';
import * as sdpa from 'node-sdpa';
import { check } from './checks.mjs';

const found = await check(sdpa);
if (isMainThread) {
  const worker = new Worker(new URL(import.meta.url));
  worker.on('message', (inWorker) => console.log(JSON.stringify([found, inWorker])));
  worker.on('error', (error) => {
    throw error;
  });
} else {
  parentPort?.postMessage(found);
}
