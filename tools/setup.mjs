// Makes a fresh clone ready and does only what is needed: dependencies, dist/, the native addon.
import { existsSync, readdirSync, readFileSync, rmSync, statSync, utimesSync } from 'node:fs';
import path from 'node:path';
import { parseArgs } from 'node:util';
import {
  buildWithCmake,
  buildWithGyp,
  compilerAdvice,
  findBuildSystem,
  root,
  run,
} from './build-native.mjs';

const { values: flags } = parseArgs({
  options: {
    'allow-javascript': { type: 'boolean' },
    'emulated-gpu': { type: 'boolean' }, // what the tests of the CUDA backend run on
  },
});

checkNode();
installDependencies();
compileTypeScript();
buildAddon();
if (flags['emulated-gpu']) buildEmulatedGpu();

/** @param {string} message */
function fail(message) {
  console.error(message);
  process.exit(1);
}

function checkNode() {
  const { engines } = JSON.parse(readFileSync(path.join(root, 'package.json'), 'utf8'));
  const wanted = engines.node.replace('>=', '').split('.').map(Number);
  const present = process.versions.node.split('.').map(Number);
  const isOld = present[0] < wanted[0] || (present[0] === wanted[0] && present[1] < wanted[1]);
  if (isOld) fail(`Node.js ${engines.node} is needed, this is ${process.versions.node}.`);
}

/**
 * When the newest of the files, or of the files in the folders, changed; 0 if there are none.
 * @param {string[]} names relative to the root
 * @returns {number}
 */
function newest(...names) {
  const times = names.map((name) => {
    const file = path.join(root, name);
    if (!existsSync(file)) return 0;
    const status = statSync(file);
    if (!status.isDirectory()) return status.mtimeMs;
    return newest(...readdirSync(file).map((entry) => path.join(name, entry)));
  });
  return Math.max(0, ...times);
}

/**
 * Says what is being done, does it, and says how long it took.
 * @param {string} what
 * @param {() => {ok: boolean, output: string}} work
 */
function step(what, work) {
  process.stdout.write(`setup: ${what} ... `);
  const start = performance.now();
  const result = work();
  const seconds = ((performance.now() - start) / 1000).toFixed(0);
  console.log(result.ok ? `done (${seconds} s)` : 'failed');
  return result;
}

function installDependencies() {
  if (newest('node_modules/.package-lock.json') >= newest('package-lock.json')) return;
  const npm = process.env.npm_execpath;
  const result = step('installing the dependencies', () =>
    npm ? run(process.execPath, [npm, 'ci']) : run('npm', ['ci']),
  );
  if (!result.ok) fail(result.output);
  const now = new Date(); // npm keeps an older time where the lockfile did not change
  utimesSync(path.join(root, 'node_modules/.package-lock.json'), now, now);
}

function compileTypeScript() {
  if (newest('dist/index.js') > newest('lib', 'tsconfig.json', 'package-lock.json')) return;
  const start = Date.now();
  const tsc = path.join(root, 'node_modules/typescript/bin/tsc');
  const result = step('compiling the TypeScript', () => run(process.execPath, [tsc]));
  if (!result.ok) fail(result.output);
  for (const name of readdirSync(path.join(root, 'dist'))) {
    const isLeftOver = newest(path.join('dist', name)) < start; // its source is gone
    if (isLeftOver) rmSync(path.join(root, 'dist', name));
  }
}

function buildAddon() {
  const binary = 'build/Release/node_sdpa.node';
  const sources = ['native', 'CMakeLists.txt', 'binding.gyp', 'package.json'];
  if (newest(binary) > newest(...sources)) return;
  const system = findBuildSystem();
  if (system.name === null) return goOnWithout(compilerAdvice(system.missing));
  const build = system.name === 'cmake' ? buildWithCmake : buildWithGyp;
  const result = step(`building the native addon with ${system.name}`, () => build(root));
  if (!result.ok) return goOnWithout(result.output);
  const now = new Date(); // a build that had nothing to do leaves the binary's time as it was
  utimesSync(path.join(root, binary), now, now);
}

/** Only CMake on Linux can: elsewhere the tests on it are left out, as vitest.config.mts says. */
function buildEmulatedGpu() {
  const plugin = 'build/emulated/build/Release/libsdpa_cuda.so';
  if (process.platform !== 'linux' || newest(plugin) > newest('native', 'CMakeLists.txt')) return;
  if (findBuildSystem().name !== 'cmake') return;
  const target = { target: 'sdpa_cuda_emulated' };
  const result = step('building the emulated GPU', () => buildWithCmake(root, [], target));
  if (!result.ok) fail(result.output);
  const now = new Date();
  utimesSync(path.join(root, plugin), now, now);
}

/** @param {string} reason there is no addon */
function goOnWithout(reason) {
  // A binary of older sources must not pass for one of these.
  rmSync(path.join(root, 'build'), { recursive: true, force: true });
  if (!flags['allow-javascript']) fail(reason);
  console.log(`${reason}\n\nGoing on with the JavaScript backend, which is slower.\n`);
}
