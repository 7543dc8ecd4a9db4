// Makes the binaries that the package ships, in prebuilds/: this machine's own and, by cross
// compilers, those of others. prebuildify drives cmake-js; then every binary is checked. Where nvcc
// is, linux-x64 comes with the CUDA plugin.
//
//   npm run prebuild               this machine's, and all others whose compiler is here
//   npm run prebuild -- TARGET...  these; a missing compiler is an error then
import { existsSync, mkdirSync, rmSync } from 'node:fs';
import { createRequire } from 'node:module';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs, promisify } from 'node:util';
import { root, run } from './build-native.mjs';
import { checkBinaries, writeChecksums } from './check-binaries.mjs';

const prebuildify = promisify(createRequire(import.meta.url)('prebuildify'));
const PREBUILDS = path.join(root, 'prebuilds');

/**
 * @typedef {object} Target
 * @property {string} platform
 * @property {string} arch
 * @property {string} [libc]
 * @property {string} build folder; other tools build the same there
 * @property {string} [toolchain] CMake's file in tools/, without its ending
 * @property {string[]} needs programs, and files by their whole path
 * @property {string} [packages] of Debian that have them
 * @property {string} [strip] a program
 * @property {boolean} [cuda] with the plugin
 */

/** Needs an x86-64 Linux machine. @type {Record<string, Target>} */
const CROSS_TARGETS = {
  'linux-arm64': {
    ...{ platform: 'linux', arch: 'arm64', libc: 'glibc', build: 'build-arm64' },
    ...{ toolchain: 'aarch64-linux-gnu', strip: 'aarch64-linux-gnu-strip' },
    ...{ needs: ['aarch64-linux-gnu-g++'], packages: 'g++-aarch64-linux-gnu' },
  },
  'linux-x64-musl': {
    ...{ platform: 'linux', arch: 'x64', libc: 'musl', build: 'build-musl' },
    ...{ toolchain: 'x86_64-linux-musl' },
    ...{ needs: ['g++', '/usr/lib/x86_64-linux-musl/libc.so'], packages: 'g++ musl-dev' },
  },
  'win32-x64': {
    ...{ platform: 'win32', arch: 'x64', build: 'build-win32' },
    toolchain: 'x86_64-w64-mingw32',
    ...{ needs: ['x86_64-w64-mingw32-g++-posix'], packages: 'g++-mingw-w64-x86-64-posix' },
  },
};

const TARGETS = findTargets();
const { positionals: asked } = parseArgs({ allowPositionals: true });
const unknown = asked.filter((name) => !Object.hasOwn(TARGETS, name));
if (unknown.length > 0) fail(`No such target here: ${unknown}. There are ${names(TARGETS)}.`);

if (asked.length === 0) rmSync(PREBUILDS, { recursive: true, force: true });
for (const name of asked.length > 0 ? asked : Object.keys(TARGETS)) {
  const target = TARGETS[name];
  const missing = target.needs.filter((need) => !has(need));
  if (missing.length > 0) {
    const message = `${name}: no ${missing.join(', no ')} here (Debian: ${target.packages})`;
    if (asked.length > 0) fail(message);
    console.log(message);
    continue;
  }
  await build(target);
}
const problems = checkBinaries(PREBUILDS);
if (problems.length > 0) fail(problems.join('\n'));
writeChecksums(PREBUILDS);

/**
 * This machine's own target, and those that it has toolchain files for.
 * @returns {Record<string, Target>}
 */
function findTargets() {
  const { platform, arch } = process;
  const own = { platform, arch, build: 'build-cmake', needs: [] };
  if (platform !== 'linux') return { [`${platform}-${arch}`]: own };
  const header = /** @type {any} */ (process.report.getReport()).header;
  const isMusl = header.glibcVersionRuntime === undefined;
  const name = `linux-${arch}${isMusl ? '-musl' : ''}`;
  const isMain = arch === 'x64' && !isMusl;
  const cuda = isMain && has('nvcc');
  if (isMain && !cuda) console.log('linux-x64: no nvcc here, and so no CUDA plugin');
  const libc = isMusl ? 'musl' : 'glibc';
  return { [name]: { ...own, libc, cuda }, ...(isMain ? CROSS_TARGETS : {}) };
}

/** @param {Record<string, Target>} targets */
function names(targets) {
  return Object.keys(targets).join(', ');
}

/** @param {string} need a program's name, or the path of a file */
function has(need) {
  return path.isAbsolute(need) ? existsSync(need) : run(need, ['--version']).ok;
}

/** @param {Target} target */
async function build({ platform, arch, libc, build, toolchain, strip, cuda }) {
  const folder = path.join(root, build);
  mkdirSync(folder, { recursive: true });
  process.env.SDPA_TOOLCHAIN = toolchain ? path.join(root, 'tools', `${toolchain}.cmake`) : '';
  process.env.SDPA_CUDA = cuda ? 'ON' : '';
  await prebuildify({
    ...{ platform, arch, libc, tagLibc: libc !== undefined, name: 'node-sdpa', napi: true },
    ...{ cwd: folder, out: root, strip: platform !== 'win32', stripBin: strip ?? 'strip' },
    nodeGyp: fileURLToPath(new URL('prebuildify-cmake.mjs', import.meta.url)),
  });
}

/**
 * @param {string} message
 * @returns {never}
 */
function fail(message) {
  console.error(message);
  process.exit(1);
}
