// The thread that answers questions about texts, one after the other (threads.ts asks).
import { parentPort, workerData } from 'node:worker_threads';
import { attentionMaps } from './attention-maps';
import {
  type FromAnalysis,
  hearCalls,
  modelFrom,
  type Question,
  type ThreadData,
  type ToAnalysis,
} from './threads';
import { computeSamples, joinShards } from './uncertainty';

const model = modelFrom((workerData as ThreadData).model);
const takeCalls = hearCalls();
const open = new Map<number, AbortController>();
let last: Promise<void> = Promise.resolve();

async function answer({ job, tokens }: Question, signal: AbortSignal) {
  signal.throwIfAborted();
  if (job === undefined) return attentionMaps(model, tokens, signal);
  const shard = await computeSamples(model, job, 0, job.samples, signal);
  return joinShards(job, model.sizes.vocabulary, [shard]);
}

async function work(id: number, question: Question, signal: AbortSignal): Promise<void> {
  const post = (message: FromAnalysis) => parentPort?.postMessage(message);
  try {
    post({ id, begun: true });
    const result = await answer(question, signal);
    post({ id, result, calls: takeCalls() });
  } catch (error) {
    const { message, code } = error as NodeJS.ErrnoException;
    post({ id, error: { message, code }, calls: takeCalls() });
  }
  open.delete(id);
}

parentPort?.on('message', ({ id, question }: ToAnalysis) => {
  if (question === undefined) {
    open.get(id)?.abort();
    return;
  }
  const controller = new AbortController();
  open.set(id, controller);
  last = last.then(() => work(id, question, controller.signal));
});
