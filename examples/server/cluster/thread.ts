// What is computed beside the event loop, which must stay free: a worker renews its lock there, and
// the server answers.
import path from 'node:path';
import Piscina, { workerData } from 'piscina';
import type { Gpt } from '../../gpt/model';
import { modelFrom, type SentModel } from '../threads';
import {
  computeSamples,
  joinShards,
  type SampleShard,
  type Uncertainty,
  type UncertaintyJob,
} from '../uncertainty';
import type { ShardTask } from './shards';

/** What was computed by workers, to be put together. */
export interface JoinTask {
  readonly job: UncertaintyJob;
  readonly vocabulary: number;
  /** Each a SampleShard in JSON */
  readonly shards: readonly string[];
}

/** One thread that runs the functions below. @param model - what `compute` is to use */
export function startThread(model?: SentModel): Piscina {
  const filename = path.join(__dirname, 'thread.cjs');
  return new Piscina({ filename, execArgv: [], workerData: model, minThreads: 1, maxThreads: 1 });
}

let model: Gpt | undefined;

/** @returns a SampleShard in JSON */
export async function compute({ job, first, count }: ShardTask): Promise<string> {
  model ??= modelFrom(workerData as SentModel);
  return JSON.stringify(await computeSamples(model, job, first, count));
}

export function join({ job, vocabulary, shards }: JoinTask): Uncertainty {
  const parsed = shards.map((shard) => JSON.parse(shard) as SampleShard);
  return joinShards(job, vocabulary, parsed);
}
