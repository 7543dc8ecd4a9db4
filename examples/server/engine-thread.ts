// The thread that writes: an engine, told what to do by messages (threads.ts has the other end).
import { parentPort, workerData } from 'node:worker_threads';
import { Engine } from './engine';
import { type FromEngine, hearCalls, modelFrom, type ThreadData, type ToEngine } from './threads';

const { model, engine: sizes } = workerData as ThreadData;
const takeCalls = hearCalls();
const post = (message: FromEngine) => parentPort?.postMessage(message);
const engine = new Engine(modelFrom(model), sizes, (step) => post({ step, calls: takeCalls() }));
parentPort?.on('message', ({ add, cancel }: ToEngine) => {
  if (add !== undefined) engine.add(add);
  if (cancel !== undefined) engine.cancel(cancel);
});
