// Times the native backends against plain JavaScript, after checking both.
//
//   npm run bench -- [options]
//     --shapes NAMES     only the cases with any of these (comma-separated) in their names
//     --backends NAMES   instead of all that run here: cpu:avx2,js
//     --threads COUNTS   of native backends (default: 1,2)
//     --quick            fewer repeats
//     --out FOLDER       for results.json and the chart (default: out/bench)
import { existsSync } from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { backendInfo } from 'node-sdpa';
import { CASES } from './cases.mjs';
import { measure } from './measure.mjs';
import { describeMachine, printCase, printHeader, writeFiles } from './report.mjs';

const DEFAULT_OUT = fileURLToPath(new URL('../out/bench', import.meta.url));
const THOROUGH = { seconds: 6, turns: 5 };
const QUICK = { seconds: 1, turns: 3 };

const { values: options } = parseArgs({
  options: {
    shapes: { type: 'string', default: '' },
    backends: { type: 'string' },
    threads: { type: 'string', default: '1,2' },
    quick: { type: 'boolean', default: false },
    out: { type: 'string', default: DEFAULT_OUT },
  },
});

const info = backendInfo();
const machine = describeMachine(info.version);
const parts = options.shapes.split(',');
const cases = CASES.filter(({ name }) => parts.some((part) => name.includes(part.trim())));
if (cases.length === 0) {
  const names = CASES.map(({ name }) => `  ${name}`).join('\n');
  console.error(`--shapes ${options.shapes}: no case has that in its name. There are:\n${names}`);
  process.exit(1);
}

console.log(`node-sdpa ${machine.package}, Node.js ${machine.node} (V8 ${machine.v8})`);
console.log(`${machine.cpu}, ${machine.cores} cores, ${machine.platform}, ${machine.date}\n`);
printHeader();
const results = [];
for (const problem of cases) {
  const measured = await measure(problem, subjects(), options.quick ? QUICK : THOROUGH);
  printCase(measured);
  results.push(...measured);
}
// The installed package has no libraries that draw: there the table is all.
if (existsSync(new URL('../examples', import.meta.url))) {
  await writeFiles(options.out, machine, results);
  console.log(`results.json, chart.svg and chart.png are in ${path.relative('', options.out)}`);
}

/** Every backend with every number of threads that concerns it. */
function subjects() {
  const usable = info.tried.flatMap(({ backend, ok }) => (ok ? [backend] : []));
  const backends = options.backends?.split(',') ?? usable;
  const counts = options.threads.split(',').map(Number);
  return backends.flatMap((name) => {
    const backend = /** @type {import('node-sdpa').BackendName} */ (name);
    return (name === 'js' ? [1] : counts).map((threads) => ({ backend, threads }));
  });
}
