// npm run fuzz: random problems on every backend against float64, until the time is over or one of
// them fails. It is then printed as small as it could be made, with the line that replays it.
//
//   npm run fuzz -- --seconds 60 --seed 7        (the seed is drawn and printed by default)
//                   --count 1000                 stop after so many problems
//                   --backend cpu:avx2           one backend alone
//                   --replay '{"problem":...}'   one problem alone
import { spawn } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { uniform } from '../cases';
import { BACKENDS, X64_BACKENDS } from '../harness';
import type { FuzzCase } from './check';
import type { Assignment, Verdict } from './worker';

const { values: flags } = parseArgs({
  options: {
    seconds: { type: 'string', default: '60' },
    seed: { type: 'string' },
    count: { type: 'string' },
    backend: { type: 'string' },
    replay: { type: 'string' },
  },
});

/** Each process lasts so long, and the next one lacks other features of the processor. */
const SECONDS_A_PROCESS = 20;
/** No problem takes this long; one that does hangs. */
const SECONDS_AT_REST = 120;

const folder = mkdtempSync(join(tmpdir(), 'sdpa-fuzz-'));
const noteFile = join(folder, 'problem.json');
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));
main();

async function main(): Promise<void> {
  if (flags.backend && !BACKENDS.includes(flags.backend)) {
    console.error(`${flags.backend} does not run here; there are ${BACKENDS.join(', ')}`);
    process.exit(2);
  }
  const seed = numberOf('seed', Math.floor(Math.random() * 2 ** 31));
  const common = { seed, backends: flags.backend ? [flags.backend] : null, noteFile };
  if (flags.replay) {
    const replay: FuzzCase = JSON.parse(flags.replay);
    await runWorker({ ...common, seconds: 0, count: 1, replay, selected: null }, '');
    console.log('no failure');
    return;
  }
  const seconds = numberOf('seconds', 60);
  const count = numberOf('count', Infinity);
  console.log(`seed ${seed}, backends ${flags.backend ?? BACKENDS.join(', ')}`);
  const start = Date.now();
  const next = uniform(seed);
  let problems = 0;
  for (let round = 0; problems < count; round++) {
    const left = seconds - (Date.now() - start) / 1000;
    if (left <= 0) break;
    const missing = round % 2 === 0 || flags.backend ? [] : someFeatures(next);
    const assignment = {
      ...common,
      seed: Math.floor(next() * 2 ** 31),
      seconds: Math.min(left, SECONDS_A_PROCESS),
      count: Math.min(count - problems, Number.MAX_SAFE_INTEGER),
      replay: null,
      selected: selectedWithout(missing),
    };
    problems += await runWorker(assignment, missing.join(','));
  }
  const took = (Date.now() - start) / 1000;
  console.log(
    `${problems} problems in ${took.toFixed(0)} s (${(problems / took).toFixed(0)} a second), no failure`,
  );
}

function numberOf(name: 'seconds' | 'seed' | 'count', otherwise: number): number {
  const text = flags[name];
  if (text === undefined) return otherwise;
  if (!/^\d+$/.test(text)) {
    console.error(`--${name}: expected a number, got ${text}`);
    process.exit(2);
  }
  return Number(text);
}

/** Each feature is missing one time in six. */
function someFeatures(next: () => number): string[] {
  const all = new Set(X64_BACKENDS.flatMap(({ needs, system }) => [...needs, ...system]));
  return process.arch === 'x64' ? [...all].filter(() => next() < 1 / 6) : [];
}

/** The best backend of those that run here and need none of these features. */
function selectedWithout(missing: readonly string[]): string {
  const lacks = (backend: string) =>
    X64_BACKENDS.find(({ name }) => name === backend)?.needs.some((f) => missing.includes(f)) ||
    X64_BACKENDS.find(({ name }) => name === backend)?.system.some((f) => missing.includes(f));
  return BACKENDS.find((backend) => !lacks(backend))!;
}

/** Runs a worker to its end; says what failed, if something did, and ends this process then. */
async function runWorker(assignment: Assignment, featuresOff: string): Promise<number> {
  const worker = join(__dirname, 'worker.ts');
  const child = spawn(process.execPath, ['--import', 'tsx', worker, JSON.stringify(assignment)], {
    env: { ...process.env, SDPA_CPU_FEATURES_OFF: featuresOff },
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  let printed = '';
  child.stdout.setEncoding('utf8').on('data', (text) => {
    printed += text;
  });
  const limit = (assignment.seconds + SECONDS_AT_REST) * 1000;
  const timer = setTimeout(() => child.kill('SIGKILL'), limit);
  const [status, signal] = await new Promise<[number | null, NodeJS.Signals | null]>((resolve) => {
    child.on('close', (status, signal) => resolve([status, signal]));
  });
  clearTimeout(timer);
  if (status !== 0) {
    const how = signal === 'SIGKILL' ? 'did not end' : `ended with ${signal ?? status}`;
    const problem = readNote();
    report(`the process ${how}${problem ? '' : ' before its first problem'}`, problem, featuresOff);
  }
  const verdict: Verdict = JSON.parse(printed.trim().split('\n').pop()!);
  const { failure } = verdict;
  if (failure) report(failure.message, JSON.stringify(failure.problem), featuresOff);
  return verdict.problems;
}

function readNote(): string {
  try {
    return readFileSync(noteFile, 'utf8').trim();
  } catch {
    return '';
  }
}

function report(message: string, problem: string, featuresOff: string): never {
  console.log(`FAILED: ${message}`);
  if (featuresOff) console.log(`with SDPA_CPU_FEATURES_OFF=${featuresOff}`);
  if (problem) console.log(`replay: npm run fuzz -- --replay '${problem}'`);
  process.exit(1);
}
