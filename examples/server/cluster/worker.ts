// A worker: takes shards of its model and backend from Redis, computes them, leaves the results.
import { hostname } from 'node:os';
import { Worker } from 'bullmq';
import { loadModel } from '../../gpt/checkpoint';
import { sentModel } from '../threads';
import {
  connectionTo,
  type Identity,
  identityOf,
  queueOf,
  RESULT_MS,
  resultKey,
  type ShardTask,
} from './shards';
import { startThread } from './thread';

export interface WorkerOptions {
  /** A safetensors file of examples/gpt */
  readonly checkpoint: string;
  /** See `connectionTo` */
  readonly redis: string;
  /** Milliseconds after which a worker that is not heard of has lost its shard */
  readonly lockMs: number;
  /** Is told what happens, in one line each */
  readonly log: (line: string) => void;
}

export interface StartedWorker {
  readonly identity: Identity;
  /** Finishes the shard that is being computed, and takes no other */
  close(): Promise<void>;
}

/** A shard that has cost more workers their lives than this is the cause, and fails. */
const MOST_STALLED = 3;

/** @throws UsageError, SafetensorsError where the checkpoint is none or the address is wrong */
export function startWorker({ checkpoint, redis, lockMs, log }: WorkerOptions): StartedWorker {
  const { model } = loadModel(checkpoint);
  const identity = identityOf(model);
  const closing = new AbortController();
  const connection = connectionTo(redis, closing.signal);
  const thread = startThread(sentModel(model));
  const worker = new Worker<ShardTask, void>(
    queueOf(identity),
    async ({ id = '', data }) => {
      const result = await thread.run(data, { name: 'compute' });
      // Before the shard is done: a worker that dies in between leaves it to another.
      await (await worker.client).set(resultKey(id), result, { PX: RESULT_MS });
    },
    {
      connection,
      name: `${hostname()}:${process.pid}`,
      lockDuration: lockMs, // renewed at half of it
      stalledInterval: lockMs / 2,
      maxStalledCount: MOST_STALLED,
    },
  );
  let lastError = '';
  worker.on('error', ({ message }) => {
    if (message !== lastError) log(message); // a connection that fails, fails many times
    lastError = message;
  });
  worker.on('ready', () => {
    lastError = '';
    log('Redis is there');
  });
  worker.on('completed', ({ id, data: { first, count } }) =>
    log(`${id}: ${count} from ${first} on`),
  );
  worker.on('failed', (task, { message }) => log(`${task?.id}: failed, ${message}`));
  const close = async () => {
    closing.abort();
    await worker.close();
    await thread.destroy();
  };
  return { identity, close };
}
