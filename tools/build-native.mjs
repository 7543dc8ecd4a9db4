// Builds the addon: with CMake (through cmake-js) or, where there is no CMake, with node-gyp.
import { spawnSync } from 'node:child_process';
import { cpSync, existsSync, mkdirSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';

export const root = path.dirname(path.dirname(fileURLToPath(import.meta.url)));

/** What a C++ build needs, by the names that each system's package manager knows. */
const PACKAGES = [
  ['Debian, Ubuntu', 'apt-get install g++ make cmake'],
  ['Fedora, RHEL', 'dnf install gcc-c++ libstdc++-static make cmake'],
  ['Alpine', 'apk add g++ make cmake linux-headers'],
  ['macOS', 'xcode-select --install    (and: brew install cmake)'],
  ['Windows', '(not built there: binaries for it are made on Linux, with MinGW-w64)'],
];

/** @param {string} missing what was not found */
export function compilerAdvice(missing) {
  const rows = PACKAGES.map(([system, command]) => `  ${(system ?? '').padEnd(15)} ${command}`);
  return [`The native addon needs a C++17 compiler: ${missing}.`, ...rows].join('\n');
}

/**
 * Runs a program and gives its status and what it printed.
 * @param {string} program
 * @param {string[]} args
 * @param {{cwd?: string, env?: NodeJS.ProcessEnv, print?: boolean}} [options]
 */
export function run(program, args, { cwd = root, env = process.env, print = false } = {}) {
  const stdio = print ? 'inherit' : 'pipe';
  const limits = { maxBuffer: 1 << 28, encoding: /** @type {const} */ ('utf8') };
  const result = spawnSync(program, args, { cwd, env, stdio, ...limits });
  const output = `${result.stdout ?? ''}${result.stderr ?? ''}${result.error?.message ?? ''}`;
  return { ok: result.status === 0, status: result.status ?? 1, output };
}

/** @param {string} program */
function has(program) {
  return run(program, ['--version']).ok;
}

/** The build system to use here, or why there is none. */
export function findBuildSystem() {
  const onWindows = process.platform === 'win32'; // Visual Studio is found by the build systems
  const compilers = [process.env.CXX, 'c++', 'g++', 'clang++'];
  if (!onWindows && !compilers.some((name) => name && has(name))) {
    return { name: null, missing: 'none was found (c++, g++ or clang++)' };
  }
  const hasMake = onWindows || has('make');
  if (has('cmake') && (hasMake || has('ninja'))) return { name: 'cmake', missing: '' };
  if (hasMake && (has('python3') || has('python'))) return { name: 'node-gyp', missing: '' };
  return { name: null, missing: 'there is one, but neither CMake with make, nor Python with make' };
}

/**
 * Copies the checkout to try something that must not touch this one: all but what is generated.
 * @param {string} folder
 */
export function copyCheckout(folder) {
  const generated = /^(node_modules|build.*|dist|prebuilds|out|coverage|\.git)$/;
  const filter = (/** @type {string} */ file) => !generated.test(path.relative(root, file));
  cpSync(root, folder, { recursive: true, preserveTimestamps: true, filter });
  symlinkSync(path.join(root, 'node_modules'), path.join(folder, 'node_modules'), 'junction');
}

/**
 * Builds <folder>/build/Release/node_sdpa.node with CMake, or <folder>/build/<target>.
 * @param {string} folder
 * @param {string[]} [settings] CMake cache entries, such as SDPA_SANITIZE=address
 * @param {{target?: string, source?: string}} [more] a program of CMakeLists.txt; the folder of the
 *   sources, with cmake-js in its node_modules
 */
export function buildWithCmake(
  folder,
  settings = [],
  { target = 'node_sdpa', source = root } = {},
) {
  const program = path.join(source, 'node_modules/cmake-js/bin/cmake-js');
  const out = path.join(folder, 'build');
  const args = ['--directory', source, '--out', out, '--target', target];
  args.push(...settings.map((entry) => `--CD${entry}`));
  const isConfigured = existsSync(path.join(out, 'CMakeCache.txt')); // perhaps with other settings
  if (isConfigured && settings.length > 0) {
    const configured = run(process.execPath, [program, 'configure', ...args]);
    if (!configured.ok) return configured;
  }
  return run(process.execPath, [program, 'compile', ...args]);
}

/**
 * Builds a program of CMakeLists.txt with clang, AddressSanitizer and UndefinedBehaviorSanitizer,
 * its kernels instrumented for libFuzzer, and gives its path. Without clang it ends the process.
 * @param {string} target
 */
export function buildWithClang(target) {
  const library = 'libclang_rt.fuzzer-x86_64.a';
  const found = run('clang++', [`-print-file-name=${library}`]);
  if (!found.ok || !existsSync(found.output.trim())) {
    console.error('clang++ with libFuzzer is needed: apt-get install clang libclang-rt-dev');
    process.exit(1);
  }
  const folder = path.join(root, 'build-fuzz');
  const settings = ['SDPA_SANITIZE=fuzzer-no-link,address,undefined', 'CMAKE_CXX_COMPILER=clang++'];
  const build = buildWithCmake(folder, settings, { target });
  if (!build.ok) {
    console.error(build.output);
    process.exit(1);
  }
  return path.join(folder, 'build', target);
}

/**
 * Writes what tools/ci-report.mjs reads of a report of vitest.
 * @param {string} file
 * @param {number} passed
 * @param {number} failed
 */
export function writeCounts(file, passed, failed) {
  mkdirSync(path.dirname(file), { recursive: true });
  const counts = { numPassedTests: passed, numFailedTests: failed, numFailedTestSuites: 0 };
  writeFileSync(file, JSON.stringify(counts));
}

/**
 * Builds <folder>/build/Release/node_sdpa.node with node-gyp; a folder other than the root gets a
 * copy of the sources, because node-gyp builds only beside binding.gyp.
 * @param {string} folder
 */
export function buildWithGyp(folder) {
  const modules = path.join(folder, 'node_modules');
  if (path.resolve(folder) !== root) copySources(folder);
  if (!existsSync(modules)) symlinkSync(path.join(root, 'node_modules'), modules, 'junction');
  const args = [path.join(modules, 'node-gyp/bin/node-gyp.js'), 'rebuild'];
  // An installed Node brings its headers: no download then.
  const prefix = path.dirname(path.dirname(process.execPath));
  const hasHeaders = existsSync(path.join(prefix, 'include', 'node', 'node_version.h'));
  if (hasHeaders) args.push(`--nodedir=${prefix}`);
  return run(process.execPath, args, { cwd: folder });
}

/**
 * Copies what the addon is built from. The shipped package has no binding.gyp: with one, package
 * managers would compile whenever they install it.
 * @param {string} folder
 */
export function copySources(folder) {
  rmSync(path.join(folder, 'native'), { recursive: true, force: true });
  mkdirSync(folder, { recursive: true });
  for (const name of ['native', 'CMakeLists.txt', 'package.json']) {
    cpSync(path.join(root, name), path.join(folder, name), { recursive: true });
  }
  writeFileSync(path.join(folder, 'binding.gyp'), "{ 'includes': ['native/addon.gypi'] }\n");
}
