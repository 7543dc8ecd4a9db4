// Dropout samples on the workers of examples/server/cluster, through a real Redis: the bits of one
// machine, whatever happens to workers and to Redis meanwhile.
import { dirname, join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { Queue } from 'bullmq';
import { backendInfo } from 'node-sdpa';
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import { loadModel } from '../../examples/gpt/checkpoint';
import type { Gpt } from '../../examples/gpt/model';
import { readSafetensors, writeSafetensors } from '../../examples/gpt/safetensors';
import { Cluster, type ClusterOptions } from '../../examples/server/cluster/coordinator';
import { connectionTo, queueOf, type ShardTask } from '../../examples/server/cluster/shards';
import {
  computeSamples,
  joinShards,
  type Prediction,
  type Uncertainty,
  type UncertaintyJob,
} from '../../examples/server/uncertainty';
import { ROOT, runNode } from '../child';
import { PLACEMENTS } from '../reference';
import { createHosts, type Host, hasRedis, Redis, until, WorkerProcess } from './cluster-machines';
import { createCheckpoint, serve } from './server-model';

const isThere = hasRedis();
if (!isThere && process.env.CI) throw new Error('redis-server is missing');
if (!isThere) console.log('skipped: cluster, for want of redis-server');

const { file: checkpoint, remove: removeCheckpoint } = createCheckpoint();
const { model, vocabulary } = loadModel(checkpoint);
if (!isThere) removeCheckpoint();
const TEXT = 'Call me Ishmael. Some years ago, never mind how long precisely, having little';
const JOB: UncertaintyJob = {
  tokens: [...vocabulary.encode(TEXT)],
  placement: 'weights',
  p: 0.2,
  seed: '18446744073709551615',
  samples: 11,
};
/** Long enough to be interrupted. */
const LONG = { ...JOB, samples: 256 };

/** What one machine gives. */
async function compute(job: UncertaintyJob): Promise<Uncertainty> {
  const shard = await computeSamples(model, job, 0, job.samples);
  return joinShards(job, model.sizes.vocabulary, [shard]);
}

describe.skipIf(!isThere)('a cluster', () => {
  let hosts: Host[];
  let isApart: boolean;
  let removeHosts: () => void;
  let redis: Redis;
  const started: WorkerProcess[] = [];
  const clusters: Cluster[] = [];

  const startWorker = (host = hosts[0], file = checkpoint, env = {}) => {
    const worker = new WorkerProcess(redis, host, file, env);
    started.push(worker);
    return worker;
  };
  const createCluster = (options: Partial<ClusterOptions> = {}, of: Gpt = model) => {
    const cluster = new Cluster(of, { redis: redis.url(), ...options });
    clusters.push(cluster);
    return cluster;
  };

  /** All keys of the Redis. */
  async function scan(client: Awaited<typeof queue.client>): Promise<string[]> {
    const keys: string[] = [];
    for await (const some of client.scanStream({ match: '*' })) keys.push(...some);
    return keys;
  }

  let longResult: Uncertainty;
  let workers: WorkerProcess[];
  let queue: Queue<ShardTask>;
  beforeAll(async () => {
    ({ hosts, isApart, remove: removeHosts } = createHosts());
    if (!isApart) console.log('the hosts of the cluster are processes: no network namespaces');
    redis = new Redis(hosts);
    await redis.start();
    workers = hosts.map((host) => startWorker(host));
    const { signal } = new AbortController();
    const { identity } = createCluster();
    queue = new Queue(queueOf(identity), { connection: connectionTo(redis.url(), signal) });
    queue.on('error', () => {}); // while Redis is stopped
    longResult = await compute(LONG);
    await Promise.all(workers.map((worker) => worker.ready()));
  });
  afterEach(async () => {
    await redis.start(); // where a test has failed meanwhile
    await Promise.all(clusters.splice(0).map((cluster) => cluster.close()));
  });
  afterAll(async () => {
    await Promise.all(started.map((worker) => worker.stop('SIGKILL')));
    await queue?.close();
    await redis.stop();
    removeHosts();
    removeCheckpoint();
  });

  /** Lets a job begin, and gives the worker that has one of its shards, which stands still. */
  async function catchWorker(candidates: WorkerProcess[]): Promise<WorkerProcess> {
    const has = async ({ pid }: WorkerProcess) =>
      (await queue.getActive()).some(({ processedBy }) => processedBy?.endsWith(`:${pid}`));
    for (const end = Date.now() + 10_000; Date.now() < end; ) {
      for (const worker of candidates) {
        if (!(await has(worker))) continue;
        worker.signal('SIGSTOP');
        if (await has(worker)) return worker;
        worker.signal('SIGCONT');
      }
      await sleep(1);
    }
    throw new Error('no worker has a shard');
  }

  describe.each(PLACEMENTS)('dropout of %s', (placement) => {
    test.each([1, 4, 11])('in shards of %i samples: the bits of one machine', async (size) => {
      const job = { ...JOB, placement };
      const cluster = createCluster({ samplesPerShard: size });
      expect(await cluster.uncertainty(job)).toEqual(await compute(job));
    });
  });

  test('jobs of several servers at once, on all workers', async () => {
    const before = workers.map(({ shards }) => shards);
    const servers = [createCluster({ samplesPerShard: 2 }), createCluster({ samplesPerShard: 5 })];
    const jobs = ['1', '2', '3', '4', '5', '6'].map((seed) => ({ ...JOB, seed, samples: 40 }));
    const results = await Promise.all(jobs.map((job, i) => servers[i % 2].uncertainty(job)));
    for (const [i, job] of jobs.entries()) expect(results[i]).toEqual(await compute(job));
    workers.forEach(({ shards }, i) => {
      expect(shards).toBeGreaterThan(before[i]);
    });
  });

  test('a worker killed half-way loses nothing', async () => {
    const result = createCluster().uncertainty(LONG);
    const victim = await catchWorker(workers);
    await victim.stop('SIGKILL');
    expect(await result).toEqual(longResult);

    const i = workers.indexOf(victim);
    workers[i] = startWorker(hosts[i]);
    await workers[i].ready();
  });

  test('a worker that is cut off half-way loses nothing, and comes back', async () => {
    const cluster = createCluster();
    const result = cluster.uncertainty(LONG);
    const lost = await catchWorker(workers);
    const { host } = lost;
    host.setLink?.('down');
    if (isApart) lost.signal('SIGCONT'); // it computes, and nobody hears of it
    expect(await result).toEqual(longResult);

    host.setLink?.('up');
    lost.signal('SIGCONT');
    const before = lost.shards;
    await until(async () => {
      await cluster.uncertainty({ ...JOB, samples: 200 });
      return lost.shards > before;
    });
  });

  test('jobs wait while Redis is gone, and lose nothing even if Redis has', async () => {
    const cluster = createCluster();
    const before = cluster.uncertainty(LONG);
    await until(async () => (await queue.getActiveCount()) > 0);
    await redis.stop();
    await until(async () => /ECONNREFUSED/.test((await cluster.health()).error ?? ''));
    expect((await cluster.health()).redis).toBe('gone');
    const meanwhile = cluster.uncertainty(JOB);
    const first = await Promise.race([before, meanwhile, sleep(500, 'nothing')]);
    expect(first).toBe('nothing');

    await redis.start();
    expect(await meanwhile).toEqual(await compute(JOB));
    expect(await before).toEqual(longResult);
    expect(await cluster.health()).toMatchObject({ redis: 'ready', waiting: 0, active: 0 });
  });

  test('where Redis stays away, a job is given up with the reason', async () => {
    const cluster = createCluster({ redis: 'redis://127.0.0.1:1', patienceMs: 300 });
    await expect(cluster.uncertainty(JOB)).rejects.toMatchObject({
      ...{ status: 503, code: 'REDIS_GONE', message: 'no Redis for 0.3 s' },
    });
    expect(await cluster.health()).toMatchObject({ redis: 'gone', error: /./ });
  });

  test('a job is only for workers with its weights, backend and versions', async () => {
    const other = join(dirname(checkpoint), 'other.safetensors');
    const { tensors, metadata } = readSafetensors(checkpoint);
    tensors.get('head.bias')!.data[3] += 1e-6;
    writeSafetensors(other, { tensors, metadata });
    const backend = backendInfo().selected === 'js' ? 'cpu' : 'js';
    const others = createCluster({ patienceMs: 1000 }, loadModel(other).model);
    const strangers = [startWorker(hosts[0], checkpoint, { SDPA_BACKEND: backend })];
    await strangers[0].ready();

    const { identity } = others;
    expect(identity).toMatchObject({ backend: backendInfo().selected, v8: process.versions.v8 });
    const result = others.uncertainty(JOB);
    await until(async () => (await others.health()).waiting === 2);
    expect((await others.health()).workers).toBe(0);
    await expect(result).rejects.toMatchObject({
      status: 503,
      code: 'NO_WORKER',
      message: expect.stringContaining(`weights ${identity.weights.slice(0, 12)} on`),
    });
    const right = createCluster();
    await until(async () => (await right.health()).workers === 2);
    expect(await right.uncertainty(LONG)).toEqual(longResult);
    expect(strangers[0].output).toMatch(/^Computing for weights \w{12} on (js|cpu:\w+), node-sdpa/);
    expect(strangers[0].shards).toBe(0);
    expect(await strangers[0].stop()).toBe(0);
  });

  test('a job that nobody wants any more leaves the queue', async () => {
    const cluster = createCluster({ samplesPerShard: 1 });
    for (const worker of workers) worker.signal('SIGSTOP');
    const gone = new AbortController();
    const begun: true[] = [];
    const result = cluster.uncertainty(LONG, gone.signal, () => begun.push(true));
    await until(async () => (await cluster.health()).waiting! > 200);
    gone.abort();
    await expect(result).rejects.toMatchObject({ name: 'AbortError' });
    await until(async () => (await cluster.health()).waiting === 0);
    expect(begun.length).toBeLessThanOrEqual(workers.length);
    for (const worker of workers) worker.signal('SIGCONT');
    expect(await cluster.uncertainty(JOB)).toEqual(await compute(JOB));
    await expect(cluster.uncertainty(JOB, gone.signal)).rejects.toThrow('aborted');
  });

  test('what a worker cannot do is told, and it goes on', async () => {
    const cluster = createCluster();
    await queue.pause();
    const result = cluster.uncertainty(JOB);
    await until(async () => (await queue.getJobs(['paused'])).length === 2);
    const [task] = (await queue.getJobs(['paused'])).filter(({ data }) => data.first === 8);
    await task.updateData({ ...task.data, count: 9 });
    await queue.add('shard', 'nonsense' as never, { jobId: 'nonsense', removeOnFail: true });
    await queue.resume();
    await expect(result).rejects.toMatchObject({
      ...{
        status: 500,
        code: 'WORKER_FAILED',
        message: 'samples 8 to 10: no samples 8 to 17 in 11',
      },
    });
    await until(() => workers.some(({ output }) => /^nonsense: failed, /m.test(output)));
    expect(await cluster.uncertainty(JOB)).toEqual(await compute(JOB));
  });

  test.each([
    [{ tokens: [0, 1e6] }, /tokens: expected integers/],
    [{ samples: 2000 }, /samples: expected/],
    [{ seed: '-1' }, /seed: expected/],
  ])('the job %j never reaches Redis', async (wrong, message) => {
    const job = createCluster().uncertainty({ ...JOB, ...wrong });
    await expect(job).rejects.toMatchObject({ status: 400, message });
  });

  test('Redis does not grow', async () => {
    const client = await queue.client;
    const cluster = createCluster({ samplesPerShard: 2 });
    await Promise.all(
      Array.from({ length: 20 }, (_, i) => cluster.uncertainty({ ...JOB, seed: `${i}` })),
    );
    // A queue's settings, a counter, and the last events, which BullMQ bounds by their number.
    const lasting = /^bull:samples-\w+:(events|id|marker|meta|stalled-check)$/;
    await until(async () => (await scan(client)).every((key) => lasting.test(key)));
    expect(await scan(client)).toContain(`bull:${queue.name}:events`);
  });

  test('the server asks the cluster, and says how it is', async () => {
    const { app, url } = await serve({ checkpoint, redis: redis.url() });
    const ask = () =>
      fetch(`${url}/uncertainty`, {
        method: 'POST',
        headers: { 'content-type': 'application/json' },
        body: JSON.stringify({ text: TEXT, p: 0.2, seed: JOB.seed, samples: 40 }),
      });
    const health = async () => (await fetch(`${url}/healthz`)).json();
    try {
      await until(async () => (await health()).status === 'ok');
      expect((await health()).cluster).toMatchObject({ redis: 'ready', workers: 2 });
      const before = workers.reduce((sum, { shards }) => sum + shards, 0);
      const { predictions, backends } = await (await ask()).json();
      const wanted = await compute({ ...JOB, samples: 40 });
      const numbers = ({ mean, spread, entropy, mutualInformation }: Prediction) => [
        ...[mean, spread, entropy, mutualInformation],
      ];
      expect(predictions.map(numbers)).toEqual(wanted.predictions.map(numbers));
      expect(backends).toEqual([backendInfo().selected]);
      await until(() => workers.reduce((sum, { shards }) => sum + shards, 0) === before + 5);

      await redis.stop();
      await until(async () => (await health()).status === 'degraded');
      const answer = ask();
      await redis.start();
      expect((await (await answer).json()).predictions).toEqual(predictions);
      await until(async () => (await health()).status === 'ok');
    } finally {
      await app.close();
    }
  });

  test('a worker that is told to stop finishes its shard', async () => {
    const result = createCluster().uncertainty(LONG);
    const worker = await catchWorker(workers);
    worker.signal('SIGCONT');
    expect(await worker.stop()).toBe(0);
    expect(worker.output).toMatch(/Stopping after this shard\.\n.*: 8 from \d+ on\n$/);
    expect(await result).toEqual(longResult);
  });

  test.concurrent.each([
    [[], '--redis is missing'],
    [
      ['--redis', 'http://127.0.0.1'],
      '--redis: expected redis://HOST:PORT, got "http://127.0.0.1"',
    ],
    [['--redis', 'redis://127.0.0.1', '--lock', '0'], '--lock: expected a number from 0.5 to 3600'],
    [['--redis', 'redis://127.0.0.1', '--model', 'absent'], 'absent is not there yet'],
  ])('the command with %j says what is wrong', async (args, message) => {
    const program = join(ROOT, 'examples/server/cluster/main.ts');
    const finished = await runNode({
      args: ['--import', 'tsx', program, '--model', checkpoint, ...args],
    });
    expect(finished).toMatchObject({ status: 1, stdout: '' });
    expect(finished.stderr).toContain(message);
    expect(finished.stderr.trim()).not.toContain('\n');
  });
});
