// What a coordinator and its workers agree on: who computes what, and what lies in Redis for it.
import { createHash } from 'node:crypto';
import type { RedisOptions } from 'bullmq';
import { backendInfo } from 'node-sdpa';
import type { Gpt } from '../../gpt/model';
import { UsageError } from '../../gpt/text';
import type { UncertaintyJob } from '../uncertainty';

/** The samples [first, first + count) of a job: what a worker is given, as JSON. */
export interface ShardTask {
  readonly job: UncertaintyJob;
  readonly first: number;
  readonly count: number;
}

/** What the bits of a sample depend on besides its job. */
export interface Identity {
  /** SHA-256 of the model's sizes and weights */
  readonly weights: string;
  /** What computes attention */
  readonly backend: string;
  readonly sdpa: string;
  /** Has the Math.exp and Math.tanh of the other layers */
  readonly v8: string;
}

/** @throws Error where the environment asks for a backend that cannot run here */
export function identityOf({ sizes, parameters }: Gpt): Identity {
  const { selected, version } = backendInfo();
  if (selected === null) throw new UsageError('SDPA_BACKEND names a backend that cannot run here');
  const { layers, heads, width, length, vocabulary } = sizes;
  const hash = createHash('sha256');
  hash.update(JSON.stringify([layers, heads, width, length, vocabulary]));
  for (const { value } of parameters) {
    hash.update(new Uint8Array(value.buffer, value.byteOffset, value.byteLength));
  }
  const { v8 } = process.versions;
  return { weights: hash.digest('hex'), backend: selected, sdpa: version, v8 };
}

/** An identity for people. */
export function describe({ weights, backend, sdpa, v8 }: Identity): string {
  return `weights ${weights.slice(0, 12)} on ${backend}, node-sdpa ${sdpa}, V8 ${v8}`;
}

/**
 * The queue of an identity. Each has one of its own, so that samples only ever come to a worker that
 * gives the very bits, and models may be exchanged while both the old and the new one are asked.
 */
export function queueOf(identity: Identity): string {
  const digest = createHash('sha256').update(JSON.stringify(identity)).digest('hex');
  return `samples-${digest.slice(0, 32)}`;
}

/** Where a worker leaves the SampleShard of a task, as JSON. */
export function resultKey(id: string): string {
  return `samples:${id}`;
}

/** A result that nobody has taken by then is dropped: its coordinator has ended. */
export const RESULT_MS = 5 * 60_000;

/**
 * A connection that is made again and again, and commands that wait for it.
 * @param redis - redis://[USER:PASSWORD@]HOST[:PORT][/DATABASE], or rediss:// for TLS
 * @param closing - when aborted, it is not made again
 * @throws UsageError for another address
 */
export function connectionTo(redis: string, closing: AbortSignal): RedisOptions {
  if (!URL.canParse(redis) || !/^rediss?:$/.test(new URL(redis).protocol)) {
    throw new UsageError(`--redis: expected redis://HOST:PORT, got ${JSON.stringify(redis)}`);
  }
  const retryStrategy = (times: number) => (closing.aborted ? null : Math.min(100 * times, 1000));
  return { url: redis, maxRetriesPerRequest: null, retryStrategy };
}
