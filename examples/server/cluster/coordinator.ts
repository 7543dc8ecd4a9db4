// The server's end of a cluster: cuts a job into shards, lets workers compute them through Redis,
// and joins what they found. What was asked is remembered here alone, so that Redis may lose all
// that it has: a shard has the same bits however often and wherever it is computed.
import { randomUUID } from 'node:crypto';
import { setTimeout as delay } from 'node:timers/promises';
import { Queue, QueueEvents } from 'bullmq';
import type { Gpt, ModelSizes } from '../../gpt/model';
import { RequestError } from '../errors';
import { checkJob, type Uncertainty, type UncertaintyJob } from '../uncertainty';
import {
  connectionTo,
  describe,
  type Identity,
  identityOf,
  queueOf,
  resultKey,
  type ShardTask,
} from './shards';
import { type JoinTask, startThread } from './thread';

export interface ClusterOptions {
  /** See `connectionTo` */
  readonly redis: string;
  /** Default: 8, as many as go through the model at once */
  readonly samplesPerShard?: number;
  /** Milliseconds without a sign of any worker, after which a job is given up. Default: 30000 */
  readonly patienceMs?: number;
}

export interface ClusterHealth {
  readonly redis: 'ready' | 'gone';
  /** Why Redis is gone */
  readonly error?: string;
  /** What a worker has to be like */
  readonly identity: Identity;
  /** How many such workers there are; absent while Redis is gone, as are the next two */
  readonly workers?: number;
  /** Shards of all servers that no worker has taken yet */
  readonly waiting?: number;
  /** Shards that workers have taken */
  readonly active?: number;
}

/** A shard that is being waited for. */
interface OpenShard {
  readonly task: ShardTask;
  readonly onBegin: () => void;
  /** @param shard - a SampleShard in JSON */
  readonly resolve: (shard: string) => void;
  readonly reject: (error: Error) => void;
}

/** Of a task in Redis: tried three times, and gone when it is done. */
const TASK_OPTIONS = {
  attempts: 3,
  backoff: { type: 'fixed', delay: 200 },
  removeOnComplete: true,
  removeOnFail: true,
} as const;
/** How often what is open is compared with what Redis has, should an event have been lost. */
const COMPARE_MS = 5000;
/** Redis is gone if it takes longer to say how it is. */
const HEALTH_MS = 1000;
const NOT_CONNECTED = 'not connected';

export class Cluster {
  readonly identity: Identity;
  readonly #sizes: ModelSizes;
  readonly #samplesPerShard: number;
  readonly #patienceMs: number;
  readonly #queue: Queue<ShardTask, void>;
  readonly #events: QueueEvents;
  readonly #thread = startThread();
  /** Begins the names of this coordinator's shards */
  readonly #name = randomUUID();
  #jobs = 0;
  readonly #open = new Map<string, OpenShard>();
  /** One for each job; a sign of any worker starts them again */
  readonly #patience = new Set<NodeJS.Timeout>();
  readonly #comparing: NodeJS.Timeout;
  #isComparing = false;
  #isReady = false;
  readonly #closing = new AbortController();
  #error = NOT_CONNECTED;

  /**
   * @param model - what workers must have too
   * @throws UsageError where the address is none
   */
  constructor(model: Gpt, { redis, samplesPerShard = 8, patienceMs = 30_000 }: ClusterOptions) {
    this.identity = identityOf(model);
    this.#sizes = model.sizes;
    this.#samplesPerShard = samplesPerShard;
    this.#patienceMs = patienceMs;
    const name = queueOf(this.identity);
    const connection = connectionTo(redis, this.#closing.signal);
    this.#queue = new Queue(name, { connection });
    // From the first event that Redis has, so that none is missed before the first read.
    this.#events = new QueueEvents(name, { connection, lastEventId: '0-0' });
    this.#listen();
    this.#comparing = setInterval(() => this.#attempt(this.#compare()), COMPARE_MS).unref();
  }

  #listen(): void {
    const failed = ({ message }: Error) => {
      this.#error = message;
    };
    this.#queue.on('error', failed);
    this.#events.on('error', failed);
    this.#events.on('active', ({ jobId }) => {
      this.#heard();
      this.#open.get(jobId)?.onBegin();
    });
    this.#events.on('completed', ({ jobId }) => {
      this.#heard();
      this.#attempt(this.#collect(jobId));
    });
    this.#events.on('failed', ({ jobId, failedReason }) => {
      const shard = this.#open.get(jobId);
      if (shard === undefined) return;
      const { first, count } = shard.task;
      const message = `samples ${first} to ${first + count - 1}: ${failedReason}`;
      shard.reject(new RequestError(500, 'WORKER_FAILED', message));
    });
    const watch = async () => {
      const client = await this.#queue.client;
      const ready = () => {
        this.#isReady = true;
        this.#error = NOT_CONNECTED;
        this.#attempt(this.#compare());
      };
      client.on('ready', ready);
      client.on('close', () => {
        this.#isReady = false;
      });
      ready();
    };
    this.#attempt(watch());
  }

  /**
   * Computes a job on the cluster's workers: to the bit what one machine of its identity gives. It
   * waits while Redis or the workers are gone.
   * @param signal - removes what waits of it, and rejects with the signal's reason
   * @param onBegin - is called when a worker takes a shard of it
   * @throws RequestError where a field does not fit the model, where no worker was heard of for too
   * long (`REDIS_GONE`, `NO_WORKER`), or where workers failed at it (`WORKER_FAILED`)
   */
  async uncertainty(
    job: UncertaintyJob,
    signal?: AbortSignal,
    onBegin: () => void = () => {},
  ): Promise<Uncertainty> {
    checkJob(job, this.#sizes);
    signal?.throwIfAborted();
    const tasks = this.#tasksOf(job);
    let stop = (_reason: Error): void => {};
    const stopped = new Promise<never>((_, reject) => {
      stop = reject;
    });
    const abort = () => stop(signal?.reason);
    signal?.addEventListener('abort', abort);
    const patience = setTimeout(() => stop(this.#reasonToGiveUp()), this.#patienceMs);
    this.#patience.add(patience);
    try {
      const results = [...tasks].map(
        ([id, task]) =>
          new Promise<string>((resolve, reject) => {
            this.#open.set(id, { task, onBegin, resolve, reject });
          }),
      );
      this.#attempt(this.#enqueue(tasks));
      const shards = await Promise.race([stopped, Promise.all(results)]);
      const { vocabulary } = this.#sizes;
      return await this.#thread.run({ job, vocabulary, shards } as JoinTask, { name: 'join' });
    } finally {
      signal?.removeEventListener('abort', abort);
      clearTimeout(patience);
      this.#patience.delete(patience);
      for (const id of tasks.keys()) this.#drop(id);
    }
  }

  /** How the cluster is, as far as it can be seen from here; takes a second at most. */
  async health(): Promise<ClusterHealth> {
    const { identity } = this;
    const ask = async () => {
      const [workers, counts] = await Promise.all([
        this.#queue.getWorkersCount(),
        this.#queue.getJobCounts('waiting', 'delayed', 'active'),
      ]);
      const waiting = counts.waiting + counts.delayed;
      return { redis: 'ready', identity, workers, waiting, active: counts.active } as const;
    };
    const gone = { redis: 'gone', error: this.#error, identity } as const;
    if (!this.#isReady) return gone;
    const late = delay(HEALTH_MS, { ...gone, error: `no answer in ${HEALTH_MS} ms` });
    return Promise.race([ask(), late]).catch(({ message }) => ({ ...gone, error: message }));
  }

  /** Ends what is still open, and the connections. */
  async close(): Promise<void> {
    clearInterval(this.#comparing);
    this.#closing.abort();
    const error = new RequestError(503, 'STOPPING', 'the server is stopping');
    for (const { reject } of this.#open.values()) reject(error);
    // What was never connected rejects.
    await Promise.allSettled([this.#queue.close(), this.#events.close()]);
    await this.#thread.destroy();
  }

  /** The shards of a job, by their names. */
  #tasksOf(job: UncertaintyJob): Map<string, ShardTask> {
    const tasks = new Map<string, ShardTask>();
    const number = this.#jobs++;
    for (let first = 0; first < job.samples; first += this.#samplesPerShard) {
      const count = Math.min(this.#samplesPerShard, job.samples - first);
      tasks.set(`${this.#name}-${number}-${first}`, { job, first, count });
    }
    return tasks;
  }

  /** Does nothing for a shard that Redis has, by its name. */
  async #enqueue(tasks: ReadonlyMap<string, ShardTask>): Promise<void> {
    if (!this.#isReady) return; // #compare does it when Redis is back
    await this.#queue.addBulk(
      [...tasks].map(([jobId, data]) => ({
        name: 'shard',
        data,
        opts: { ...TASK_OPTIONS, jobId },
      })),
    );
  }

  /** Takes a result out of Redis, even if nobody waits for it any more. */
  async #collect(id: string): Promise<void> {
    if (!id.startsWith(this.#name)) return; // of another server
    const client = await this.#queue.client;
    const shard = await client.get(resultKey(id));
    if (shard === null) return;
    this.#open.get(id)?.resolve(shard);
    this.#open.delete(id);
    await client.del(resultKey(id));
  }

  /** Collects what was done unheard, and asks again for what Redis has lost. */
  async #compare(): Promise<void> {
    if (this.#isComparing || !this.#isReady) return;
    this.#isComparing = true;
    try {
      for (const [id, { task }] of this.#open) {
        // In this order: a task that is done has left its result before.
        if ((await this.#queue.getJobState(id)) !== 'unknown') continue;
        await this.#collect(id);
        if (this.#open.has(id)) await this.#enqueue(new Map([[id, task]]));
      }
    } finally {
      this.#isComparing = false;
    }
  }

  /** Forgets a shard; one that a worker computes just now goes on, and its result is dropped. */
  #drop(id: string): void {
    if (this.#open.delete(id) && this.#isReady) this.#attempt(this.#queue.remove(id));
  }

  #heard(): void {
    for (const timer of this.#patience) timer.refresh();
  }

  #reasonToGiveUp(): RequestError {
    const waited = `for ${this.#patienceMs / 1000} s`;
    if (!this.#isReady) return new RequestError(503, 'REDIS_GONE', `no Redis ${waited}`);
    const wanted = describe(this.identity);
    return new RequestError(503, 'NO_WORKER', `no sign ${waited} of a worker with ${wanted}`);
  }

  /** For what is tried again by #compare, should it fail. */
  #attempt(work: Promise<unknown>): void {
    work.catch(({ message }) => {
      this.#error = message;
    });
  }
}
