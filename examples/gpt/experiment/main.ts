// The experiment: trains the same model with each dropout placement and probability, seed by seed,
// in processes side by side. Each run's row is written as it ends; started again, it goes on.
//
//   npm run experiment -- [options]
//     --out FOLDER        where the results go (default: out/experiment)
//     --seeds COUNT       (5)
//     --placements NAMES  only these, separated by commas (none,weights,context,scores)
//     --jobs COUNT        processes side by side (default: one for each core)
//     --steps COUNT       of each run (1200); fewer, to see that all works
import { fork } from 'node:child_process';
import { existsSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { readCount, runCommand } from '../command';
import { UsageError } from '../text';
import { measureNoise } from './noise';
import { type Job, listJobs, PLACEMENTS, RUN } from './plan';
import { appendRow, NOISE_FILE, nameJob, openResults, type Row } from './results';

/** A run that takes so long hangs: it is ended and done again. */
const LONGEST_RUN_MS = 20 * 60_000;
const ATTEMPTS = 2;

runCommand(async () => {
  const { values: given } = parseArgs({
    options: {
      out: { type: 'string', default: 'out/experiment' },
      seeds: { type: 'string', default: '5' },
      placements: { type: 'string', default: ['none', ...PLACEMENTS].join() },
      jobs: { type: 'string', default: `${availableParallelism()}` },
      steps: { type: 'string', default: `${RUN.steps}` },
    },
  });
  const folder = path.resolve(process.env.INIT_CWD ?? '', given.out);
  const seeds = readCount('seeds', given.seeds, 1, 1000);
  const steps = readCount('steps', given.steps, RUN.warmup);
  const placements = given.placements.split(',');
  const jobs = listJobs(seeds).filter(({ placement }) => placements.includes(placement));
  if (jobs.length === 0) throw new UsageError(`--placements: ${given.placements} names none`);
  await runAll(folder, jobs, steps, readCount('jobs', given.jobs, 1, 256));
  if (process.exitCode !== undefined) return;
  if (!existsSync(path.join(folder, NOISE_FILE))) {
    console.log('Noise of each placement, measured and by theory');
    measureNoise(folder);
  }
  console.log(`All results are in ${path.relative('', folder)}. Now: npm run report`);
});

async function runAll(folder: string, all: Job[], steps: number, width: number): Promise<void> {
  const done = new Set(openResults(folder, steps).map(nameJob));
  const queue = all.filter((job) => !done.has(nameJob(job)));
  console.log(`${all.length} runs, of which ${all.length - queue.length} are done; ${width} jobs`);
  const stopped = new AbortController();
  const stop = () => {
    console.log('Stopped; what has ended is kept, and a rerun goes on.');
    process.exitCode = 130;
    stopped.abort();
  };
  process.once('SIGINT', stop).once('SIGTERM', stop);

  const start = performance.now();
  let ended = 0;
  const total = queue.length;
  const work = async () => {
    for (let job = queue.shift(); job !== undefined; job = queue.shift()) {
      const row = await attempt(job, steps, stopped.signal);
      if (stopped.signal.aborted) return;
      ended++;
      if (row === null) continue;
      appendRow(folder, row);
      const left = ((performance.now() - start) / 60_000 / ended) * (total - ended);
      console.log(`${describeRow(row)}; ${total - ended} runs, ${left.toFixed(0)} minutes left`);
    }
  };
  await Promise.all(Array.from({ length: width }, work));
  process.off('SIGINT', stop).off('SIGTERM', stop);
}

/** A job's row; null where it failed more than once, which the exit status then tells. */
async function attempt(job: Job, steps: number, signal: AbortSignal): Promise<Row | null> {
  for (let i = 0; i < ATTEMPTS && !signal.aborted; i++) {
    try {
      return await runInProcess(job, steps, signal);
    } catch (error) {
      if (!signal.aborted) console.error(`${nameJob(job)}: ${(error as Error).message}`);
    }
  }
  process.exitCode ??= 1;
  return null;
}

function runInProcess(job: Job, steps: number, signal: AbortSignal): Promise<Row> {
  return new Promise((resolve, reject) => {
    // One thread each: the runs themselves are what keeps the cores busy.
    const child = fork(path.join(__dirname, 'run.ts'), {
      env: { ...process.env, SDPA_NUM_THREADS: '1' },
      timeout: LONGEST_RUN_MS,
      signal,
    });
    let row: Row | undefined;
    child.once('message', (message) => {
      row = message as Row;
    });
    child.once('error', reject);
    child.once('close', (status, name) => {
      if (row !== undefined) resolve(row);
      else reject(new Error(`the run ended without a result (${name ?? `status ${status}`})`));
    });
    child.send({ job, steps });
  });
}

function describeRow(row: Row): string {
  const best = row.curve.reduce((a, b) => (b.validation < a.validation ? b : a));
  const last = row.curve[row.curve.length - 1];
  return (
    `${nameJob(row)}: best ${best.validation.toFixed(3)} after ${best.step} steps, ` +
    `last ${last.validation.toFixed(3)}, ${row.seconds.toFixed(0)} s`
  );
}
