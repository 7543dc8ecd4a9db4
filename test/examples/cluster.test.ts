// Dropout samples on the workers of examples/server/cluster, through a real Redis: the bits of one
// machine, whatever happens to workers and to Redis meanwhile.
import { join } from 'node:path';
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
  type Uncertainty,
  type UncertaintyJob,
} from '../../examples/server/uncertainty';
import { PLACEMENTS } from '../reference';
import { createHosts, hasRedis, Redis, until, WorkerProcess } from './cluster-machines';
import { createCheckpoint, serve } from './server-model';

const isThere = hasRedis();
if (!isThere && process.env.CI) throw new Error('redis-server is missing');
if (!isThere) console.log('skipped: cluster, for want of redis-server');

const { file: checkpoint, remove: removeCheckpoint } = createCheckpoint();
const { model, vocabulary } = loadModel(checkpoint);
const TEXT = 'Call me Ishmael. Some years ago, never mind how long precisely, having little';
const JOB: UncertaintyJob = {
  tokens: [...vocabulary.encode(TEXT)],
  placement: 'weights',
  p: 0.2,
  seed: '18446744073709551615',
  samples: 11,
};
/** Long enough to be interrupted. */
const LONG = { ...JOB, samples: 768 };

/** What one machine gives. */
async function compute(job: UncertaintyJob): Promise<Uncertainty> {
  const shard = await computeSamples(model, job, 0, job.samples);
  return joinShards(job, model.sizes.vocabulary, [shard]);
}

describe.skipIf(!isThere)('a cluster', () => {
  const { hosts, isApart, remove: removeHosts } = createHosts();
  if (!isApart) console.log('the hosts of the cluster are processes: no network namespaces here');
  const redis = new Redis(hosts);
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

  let workers: WorkerProcess[];
  let queue: Queue<ShardTask>;
  beforeAll(async () => {
    await redis.start();
    workers = hosts.map((host) => startWorker(host));
    const { signal } = new AbortController();
    const { identity } = createCluster();
    queue = new Queue(queueOf(identity), { connection: connectionTo(redis.url(), signal) });
    queue.on('error', () => {}); // while Redis is stopped
    await Promise.all(workers.map((worker) => worker.ready()));
  });
  afterEach(async () => {
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
    }
    throw new Error('no worker has a shard');
  }

  describe.each(PLACEMENTS)('dropout of %s', (placement) => {
    test.each([1, 3, 4, 11])('in shards of %i samples: the bits of one machine', async (size) => {
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
});
