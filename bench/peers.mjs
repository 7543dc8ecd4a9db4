// Times this package against other libraries, side by side, each in a process of its own: checked
// against float64 first, then in turns, in a new order each round. All of it takes about an hour,
// most of it for the two cases of length 8192.
//
//   npm run bench:peers -- [options]
//     --shapes NAMES     only the cases with any of these (comma-separated) in their names
//     --subjects NAMES   only the subjects with any of these in their names: amx,onnxruntime
//     --threads COUNTS   (default: 1,2)
//     --rounds COUNT     turns of each subject (default: 15; fewer where calls take seconds)
//     --reuse-output     each library that can writes into an array that the caller keeps
//     --quick            two rounds, to see that all work
//     --out FOLDER       (default: bench/results/<date>-<machine>; quick: out/bench-peers)
//
// PyTorch takes part, as a reference, where the Python that TORCH_PYTHON names, or else python3,
// can import torch.
import path from 'node:path';
import { parseArgs } from 'node:util';
import { backendInfo } from 'node-sdpa';
import { root } from '../tools/build-native.mjs';
import { PEER_CASES } from './cases.mjs';
import {
  compare,
  measureMemory,
  nameProcess,
  startLibraries,
  withInputs,
} from './peers/compare.mjs';
import { installPeers } from './peers/install.mjs';
import { measurePeaks, measureRead } from './peers/peak.mjs';
import { describeRun, writeResults } from './peers/results.mjs';
import { asksMemory, isThreaded, listKinds, nameSubject } from './peers/subjects.mjs';
import { caseTable } from './peers/tables.mjs';
import { describeMachine } from './report.mjs';

/** @typedef {import('./cases.mjs').Case} Case */

const THOROUGH = { rounds: 15, leastRounds: 3, seconds: 20 };
const QUICK = { rounds: 2, leastRounds: 1, seconds: 1 };

const { values: options } = parseArgs({
  options: {
    shapes: { type: 'string', default: '' },
    subjects: { type: 'string', default: '' },
    threads: { type: 'string', default: '1,2' },
    rounds: { type: 'string' },
    'reuse-output': { type: 'boolean', default: false },
    quick: { type: 'boolean', default: false },
    out: { type: 'string' },
  },
});
const { 'reuse-output': reusesOutput } = options;
const threadCounts = options.threads.split(',').map(Number);
const effort = { ...(options.quick ? QUICK : THOROUGH) };
if (options.rounds !== undefined) effort.rounds = Number(options.rounds);
const cases = PEER_CASES.filter(({ name }) => isNamed(name, options.shapes));
const kinds = listKinds().filter((kind) => isNamed(nameSubject(kind), options.subjects));
if (cases.length === 0 || kinds.length === 0) {
  const names = [...PEER_CASES.map(({ name }) => name), '', ...listKinds().map(nameSubject)];
  console.error(`Nothing has such a name. There are:\n  ${names.join('\n  ')}`);
  process.exit(1);
}

installPeers();
const { libraries, versions } = await startLibraries(kinds);
const machine = describeMachine(backendInfo().version);
const run = { machine, versions, peaks: measurePeaks(), effort, reusesOutput };
console.log(`${describeRun(run).join('\n')}\n`);
const found = await measureAll();
for (const library of libraries.values()) library.stop();
const memory = await measureAllMemory();
await writeResults(options.out ?? defaultFolder(), { ...run, ...found, memory });
if (found.failures.length > 0) process.exitCode = 1;

function defaultFolder() {
  if (options.quick) return path.join(root, 'out', 'bench-peers');
  const cpu = machine.cpu.replace(/\((R|TM)\)/gi, '');
  const name = `${machine.date.slice(0, 10)} ${cpu} ${machine.cores} cores`;
  return path.join(root, 'bench', 'results', name.replace(/\W+/g, '-').toLowerCase());
}

/** Whether a name has any of the parts in it. @param {string} name @param {string} parts */
function isNamed(name, parts) {
  return parts.split(',').some((part) => name.includes(part.trim()));
}

/** @param {Case} problem */
function subjectsOf(problem) {
  const here = kinds.filter((kind) => kind.fits(problem) && libraries.has(nameProcess(kind)));
  return here.flatMap(({ fits: _, ...kind }) =>
    (isThreaded(kind) ? threadCounts : [1]).map((threads) => ({
      ...kind,
      threads,
      reusesOutput,
    })),
  );
}

async function measureAll() {
  /** @type {Omit<import('./peers/results.mjs').Found, 'memory'>} */
  const all = { results: [], reads: [], failures: [] };
  for (const problem of cases) {
    const subjects = subjectsOf(problem);
    if (subjects.length === 0) continue;
    if (problem.queryLength === 1) all.reads.push(...measureReads(problem));
    const { results, failures } = await compare(problem, subjects, libraries, effort);
    if (results.length > 0) console.log(`${caseTable(results)}\n`);
    for (const failure of failures) console.log(`Left out: ${failure}`);
    all.results.push(...results);
    all.failures.push(...failures);
  }
  return all;
}

/** @param {Case} problem */
function measureReads(problem) {
  return threadCounts.flatMap((threads) => {
    const gigabytes = measureRead(problem, threads);
    return gigabytes === null ? [] : [{ case: problem.name, threads, gigabytes }];
  });
}

/** With the most threads, which need the most memory; a setting makes no difference. */
async function measureAllMemory() {
  const most = Math.max(...threadCounts);
  /** @type {import('./peers/compare.mjs').Memory[]} */
  const all = [];
  for (const problem of cases.filter(asksMemory)) {
    const subjects = subjectsOf(problem).filter(
      ({ setting, threads }) => setting === '' && threads === most,
    );
    await withInputs(problem, async (folder) => {
      for (const subject of subjects) all.push(await measureMemory(problem, subject, folder));
    });
  }
  return all;
}
