// Runs the tests that enter native code against an addon built with AddressSanitizer and
// UndefinedBehaviorSanitizer. Each test file then proves that this addon was the one in use.
import { readdirSync } from 'node:fs';
import path from 'node:path';
import { buildWithCmake, root, run } from './build-native.mjs';

/**
 * Their own process never enters the addon, or they measure what sanitizers change: memory, and
 * what the binary needs.
 */
const LEFT_OUT = new Set([
  'binary.test.ts',
  'cpu-features.test.ts',
  'examples.test.ts',
  path.join('hostile', 'machine.test.ts'),
  path.join('hostile', 'processes.test.ts'),
  'soak.test.ts',
  'package.test.ts',
  'reference.test.ts',
]);

/** Long training in JavaScript, around calls that other tests make too. */
const isOfExamples = (/** @type {string} */ name) => name.startsWith(`examples${path.sep}`);

const folder = path.join(root, 'build-asan');
const build = buildWithCmake(folder, ['SDPA_SANITIZE=address,undefined']);
if (!build.ok) {
  console.error(build.output);
  process.exit(1);
}

// Node itself is not instrumented, so the run-time libraries have to be there before it starts.
const compiler = process.env.CXX || 'c++';
const libraries = ['libasan.so', 'libubsan.so', 'libstdc++.so'].map((name) =>
  path.resolve(run(compiler, [`-print-file-name=${name}`]).output.trim()),
);
const files = readdirSync(path.join(root, 'test'), { recursive: true, encoding: 'utf8' })
  .filter((name) => name.endsWith('.test.ts') && !LEFT_OUT.has(name) && !isOfExamples(name))
  .map((name) => path.join('test', name));

const vitest = path.join(root, 'node_modules/vitest/vitest.mjs');
const reports = ['--reporter=default', '--reporter=json', '--outputFile=out/sanitize.json'];
const args = [vitest, 'run', ...files, ...reports];
const tests = run(process.execPath, args, {
  print: true,
  env: {
    ...process.env,
    NODE_SDPA_PREBUILD: folder, // vitest.config.mts then adds the proof
    LD_PRELOAD: libraries.join(':'),
    ASAN_OPTIONS: 'detect_leaks=0', // V8 frees nothing at exit
    UBSAN_OPTIONS: 'print_stacktrace=1',
  },
});
process.exit(tests.status);
