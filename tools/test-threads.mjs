// Runs test/native/threads.cpp, which drives the thread pool and the kernels, under ThreadSanitizer.
// Its planted races have to be reported: on each backend, in a task and in what kernels store.
//
// On AMX the sanitizer sees what the vector units load and store, not what tiles do.
import { rmSync } from 'node:fs';
import path from 'node:path';
import { buildWithCmake, root, run, writeCounts } from './build-native.mjs';

const SCENARIOS = [
  'calls-and-resizes',
  'leaving-and-returning',
  'cancellation',
  'jobs',
  'full-queue',
];
const RACE_STATUS = 66; // with which a program that raced ends

const report = path.join(root, 'out/threads.json');
rmSync(report, { force: true });
const folder = path.join(root, 'build-tsan');
const build = buildWithCmake(folder, ['SDPA_SANITIZE=thread'], { target: 'threads' });
if (!build.ok) fail(build.output);

const program = path.join(folder, 'build/threads');
let command = [program];
let list = play('list');
if (list.output.includes('unexpected memory mapping')) {
  // Old sanitizers do not know where newer systems put things, unless told not to shuffle.
  command = ['setarch', '-R', program];
  list = play('list');
}
if (!list.ok) fail(list.output);
const backends = list.output.trim().split('\n');
console.log(`ThreadSanitizer, on ${backends.join(', ')}`);

let failed = 0;
for (const scenario of SCENARIOS) {
  const { ok, output } = play(scenario);
  judge(scenario, ok && !output.includes('ThreadSanitizer'), output);
}
expectRace('planted-in-a-task', /data race/);
for (const name of backends) {
  const kernels = name.replace('cpu:', 'sdpa::');
  expectRace('planted-in-results', new RegExp(`data race[^]*${kernels}::`), name);
}

const total = SCENARIOS.length + 1 + backends.length;
writeCounts(report, total - failed, failed);
console.log(`${total - failed} scenarios passed, ${failed} failed`);
process.exit(failed === 0 ? 0 : 1);

/** @param {string} scenario @param {...string} more */
function play(scenario, ...more) {
  const [file, ...args] = command;
  const env = { ...process.env, TSAN_OPTIONS: `exitcode=${RACE_STATUS}` };
  return run(file, [...args, scenario, ...more], { env });
}

/** @param {string} scenario @param {RegExp} wanted in the sanitizer's report @param {...string} more */
function expectRace(scenario, wanted, ...more) {
  const { status, output } = play(scenario, ...more);
  const seen = status === RACE_STATUS && wanted.test(output);
  judge([scenario, ...more, '(has to be reported)'].join(' '), seen, output);
}

/** @param {string} name @param {boolean} passed @param {string} output */
function judge(name, passed, output) {
  console.log(`${passed ? 'passed' : 'FAILED'}: ${name}`);
  if (passed) return;
  failed++;
  console.log(output.slice(0, 20_000));
}

/** @param {string} message @returns {never} */
function fail(message) {
  console.error(message);
  process.exit(1);
}
