// Runs test/native/memory.cpp, which drives the kernels, under a tool that watches memory:
//   node tools/test-memory.mjs sanitizers   AddressSanitizer, UndefinedBehaviorSanitizer and
//                                           LeakSanitizer, on every backend
//   node tools/test-memory.mjs memcheck     valgrind, on the backends that it can play
// The planted faults have to be reported: each shows that the tool would see one of ours.
import { rmSync } from 'node:fs';
import path from 'node:path';
import { buildWithCmake, root, run, writeCounts } from './build-native.mjs';

/** With which a program that had a fault ends. */
const FAULT_STATUS = 66;

/** The pool's threads never end, and what the C library holds for them counts as possibly lost. */
const LEAKS = [
  '--leak-check=full',
  '--show-leak-kinds=definite',
  '--errors-for-leak-kinds=definite',
];

const tools = {
  sanitizers: {
    folder: path.join(root, 'build-asan'),
    settings: ['SDPA_SANITIZE=address,undefined'],
    command: [],
    env: {
      ASAN_OPTIONS: `detect_leaks=1:exitcode=${FAULT_STATUS}`,
      LSAN_OPTIONS: `exitcode=${FAULT_STATUS}`,
      UBSAN_OPTIONS: `print_stacktrace=1:exitcode=${FAULT_STATUS}`,
    },
    planted: [
      { scenario: 'planted-short-tensor', report: /heap-buffer-overflow/, perBackend: true },
      { scenario: 'planted-leak', report: /LeakSanitizer: detected memory leaks/ },
      { scenario: 'planted-overflow', report: /signed integer overflow/ },
    ],
  },
  memcheck: {
    folder: root, // the kernels that are shipped
    settings: [],
    command: ['valgrind', '--quiet', `--error-exitcode=${FAULT_STATUS}`, ...LEAKS],
    env: {},
    planted: [
      { scenario: 'planted-short-tensor', report: /Invalid read of size/, perBackend: true },
      { scenario: 'planted-uninitialised', report: /uninitialised value/, perBackend: true },
      { scenario: 'planted-leak', report: /definitely lost/ },
    ],
  },
};

const name = process.argv[2];
if (name !== 'sanitizers' && name !== 'memcheck') {
  fail('node tools/test-memory.mjs sanitizers, or memcheck');
}
const tool = tools[name];
const report = path.join(root, `out/${name}.json`);
rmSync(report, { force: true });
if (name === 'memcheck' && !run('valgrind', ['--version']).ok) {
  fail('valgrind is needed: apt-get install valgrind');
}
const build = buildWithCmake(tool.folder, tool.settings, { target: 'memory' });
if (!build.ok) fail(build.output);
const program = path.join(tool.folder, 'build/memory');
let passed = 0;
let failed = 0;

const list = play('list');
if (!list.ok) fail(list.output);
const backends = list.output.trim().split('\n');
console.log(`${name}, on ${backends.join(', ')}`);
for (const backend of backends) {
  const { ok, output } = play('calls', backend);
  judge(`calls ${backend}`, ok && /^\d+ calls/m.test(output), output);
}
for (const { scenario, report, perBackend } of tool.planted) {
  for (const backend of perBackend ? backends : ['']) {
    const { status, output } = play(scenario, backend);
    const seen = status === FAULT_STATUS && report.test(output);
    judge(`${scenario} ${backend} (has to be reported)`, seen, output);
  }
}
writeCounts(report, passed, failed);
console.log(`${passed} scenarios passed, ${failed} failed`);
process.exit(failed === 0 ? 0 : 1);

/** @param {...string} args */
function play(...args) {
  const [file, ...before] = [...tool.command, program];
  return run(file, [...before, ...args], { env: { ...process.env, ...tool.env } });
}

/** @param {string} what @param {boolean} isPassed @param {string} output */
function judge(what, isPassed, output) {
  console.log(`${isPassed ? 'passed' : 'FAILED'}: ${what}`);
  if (isPassed) passed++;
  else {
    failed++;
    console.log(output.slice(0, 10_000));
  }
}

/** @param {string} message @returns {never} */
function fail(message) {
  console.error(message);
  process.exit(1);
}
