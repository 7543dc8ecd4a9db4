// What every shipped binary has to be: small, and loadable on old systems, which means that it asks
// for few libraries and for no new version of them.
import { createHash } from 'node:crypto';
import { readdirSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { run } from './build-native.mjs';

/** The greatest size of an addon, in bytes. */
export const MOST_BYTES = 1_500_000;

/** The CUDA plugin: its greatest size, its only export, and the GPUs that it has machine code for. */
export const PLUGIN = {
  name: 'libsdpa_cuda.so',
  mostBytes: 20_000_000,
  exported: 'sdpa_cuda_plugin',
  machineCode: [75, 80, 86, 89, 90, 100, 120],
};

/** The oldest glibc that has to do: that of RHEL 8 and Debian 10, which Node 20 needs as well. */
export const GLIBC_FLOOR = '2.28';

/** What each kind of system brings; libraries of compilers are not among it. */
const LIBRARIES = {
  glibc: /^(libc|libm|libpthread|libdl|librt)\.so\.\d+$|^ld-linux-.*\.so\.\d+$/,
  musl: /^libc\.so$/,
  win32: /^(KERNEL32\.dll|msvcrt\.dll|node\.exe)$/,
  darwin: /^(\/usr\/lib\/libSystem\.B\.dylib|\/usr\/lib\/libc\+\+\.1\.dylib)$/,
};

/** All binaries below a folder, as paths relative to it. @param {string} folder */
function listBinaries(folder) {
  return readdirSync(folder, { recursive: true, encoding: 'utf8' })
    .filter((name) => /\.(node|so)$/.test(name))
    .sort();
}

/**
 * Prints a line for each binary of prebuilds/, and gives a line for each thing that is wrong.
 * @param {string} folder
 */
export function checkBinaries(folder) {
  const binaries = listBinaries(folder);
  const problems = binaries.length === 0 ? [`${folder} has no binaries`] : [];
  for (const name of binaries) {
    const file = path.join(folder, name);
    const { size } = statSync(file);
    if (name.endsWith('.node') && size > MOST_BYTES) {
      problems.push(`${name} has ${size} bytes, more than ${MOST_BYTES}`);
    }
    if (path.basename(name) === PLUGIN.name) problems.push(...checkPlugin(file, size));
    const kind = systemOf(name);
    const { libraries, versions } = requirementsOf(file, kind);
    const foreign = libraries.filter((library) => !LIBRARIES[kind].test(library));
    if (libraries.length === 0) problems.push(`${name}: its libraries could not be read`);
    if (foreign.length > 0) problems.push(`${name} needs ${foreign.join(', ')}`);
    if (kind === 'glibc' || kind === 'musl') {
      problems.push(...weaknessesOf(file).map((weakness) => `${name}: ${weakness}`));
    }
    const tooNew = newerThan(GLIBC_FLOOR, versions);
    if (tooNew.length > 0) problems.push(`${name} needs ${tooNew.join(', ')}`);
    const newest = versions.at(-1) ?? 'no versions';
    console.log(`${name}: ${size} bytes, ${libraries.join(' ')}, ${newest}`);
  }
  return problems;
}

/**
 * What is wrong with a CUDA plugin, but for the libraries that it needs.
 * @param {string} file
 * @param {number} size
 */
export function checkPlugin(file, size, machineCode = PLUGIN.machineCode) {
  const problems = [];
  if (size > PLUGIN.mostBytes) {
    problems.push(`${file} has ${size} bytes, more than ${PLUGIN.mostBytes}`);
  }
  const symbols = run('nm', ['--dynamic', '--defined-only', '--format=just-symbols', file]).output;
  const exported = symbols.trim().split('\n').join(', ');
  if (exported !== PLUGIN.exported) problems.push(`${file} exports ${exported}`);
  const { code, hasPtx } = listGpuCode(readFileSync(file));
  const missing = machineCode.filter((capability) => !code.has(capability));
  if (missing.length > 0) problems.push(`${file} has no code for sm_${missing.join(', sm_')}`);
  if (!hasPtx) problems.push(`${file} has no PTX for later GPUs`);
  return problems;
}

/**
 * What the fat binaries in a file are for, by the headers of their entries: a kind (1 PTX, 2 machine
 * code), the sizes of header and content, and the compute capability.
 * @param {Buffer} file
 */
function listGpuCode(file) {
  const MAGIC = Buffer.from([0x50, 0xed, 0x55, 0xba]);
  const code = new Set();
  let hasPtx = false;
  for (let at = file.indexOf(MAGIC); at !== -1; at = file.indexOf(MAGIC, at + 4)) {
    if (at + 16 > file.length || file.readUInt16LE(at + 6) !== 16) continue; // another use of it
    const end = Math.min(at + 16 + Number(file.readBigUInt64LE(at + 8)), file.length - 32);
    for (let entry = at + 16; entry < end; ) {
      const kind = file.readUInt16LE(entry);
      if (kind === 2) code.add(file.readUInt32LE(entry + 28));
      hasPtx ||= kind === 1;
      entry += file.readUInt32LE(entry + 4) + Number(file.readBigUInt64LE(entry + 8));
    }
  }
  return { code, hasPtx };
}

/** @param {string} name below prebuilds/ @returns {keyof typeof LIBRARIES} */
function systemOf(name) {
  const platform = /** @type {'linux' | 'win32' | 'darwin'} */ (name.split('-')[0]);
  if (platform !== 'linux') return platform;
  return name.includes('.musl.') ? 'musl' : 'glibc';
}

/**
 * The libraries that a binary asks the system for, and the versions of their symbols, in order.
 * @param {string} file
 * @param {keyof typeof LIBRARIES} kind
 */
export function requirementsOf(file, kind) {
  /** @type {Record<string, [program: string, args: string[], library: RegExp]>} */
  const readers = {
    glibc: ['readelf', ['-dVW', file], /\(NEEDED\).*\[(.*)\]/g],
    musl: ['readelf', ['-dVW', file], /\(NEEDED\).*\[(.*)\]/g],
    win32: ['x86_64-w64-mingw32-objdump', ['-p', file], /DLL Name: (.*)/g],
    darwin: ['otool', ['-L', file], /^\s+(\/.*?) \(/gm],
  };
  const [program, args, library] = readers[kind];
  const { output } = run(program, args, { env: { ...process.env, LC_ALL: 'C' } });
  const versions = [...output.matchAll(/Name: ((?:GLIBC|GLIBCXX|CXXABI|GCC)_[\w.]+)/g)];
  return {
    libraries: [...output.matchAll(library)].map(([, name]) => name.trim()),
    versions: [...new Set(versions.map(([, version]) => version))].sort(compareVersions),
  };
}

/**
 * What an attacker could use in a binary for Linux: tables of addresses that can be written, memory
 * that is both written and executed, buffers without a guard, other libraries' folders in the
 * search, functions that others can call or replace.
 * @param {string} file
 */
export function weaknessesOf(file) {
  const env = { ...process.env, LC_ALL: 'C' };
  const read = (/** @type {string} */ what) => run('readelf', [what, '-W', file], { env }).output;
  const [segments, dynamic, symbols] = ['-l', '-d', '--dyn-syms'].map(read);
  const exported = [...(symbols ?? '').matchAll(/(?:GLOBAL|WEAK) +DEFAULT +\d+ (\S+)$/gm)];
  const foreign = exported
    .map(([, name]) => name)
    .filter((name) => name !== PLUGIN.exported && !/^(napi|node_api)_/.test(name ?? ''));
  /** @type {[string, boolean][]} */
  const checks = [
    ['no GNU_RELRO segment', !/GNU_RELRO/.test(segments ?? '')],
    ['not bound when it loads (BIND_NOW)', !/BIND_NOW|Flags:.*\bNOW\b/.test(dynamic ?? '')],
    ['an executable stack, or none stated', !/GNU_STACK.* RW +0x/.test(segments ?? '')],
    ['a segment that is written and executed', /LOAD.* RWE /.test(segments ?? '')],
    ['code that is changed while it loads (TEXTREL)', /TEXTREL/.test(dynamic ?? '')],
    ['a search path for libraries of its own', /RPATH|RUNPATH/.test(dynamic ?? '')],
    ['no guard of the stack', !/__stack_chk_fail/.test(symbols ?? '')],
    [`exports ${foreign.join(', ')}`, foreign.length > 0],
  ];
  return checks.filter(([, isWeak]) => isWeak).map(([what]) => what);
}

/**
 * Those of the versions that a system with this glibc, and without libstdc++, lacks.
 * @param {string} floor
 * @param {string[]} versions
 */
export function newerThan(floor, versions) {
  const limit = `GLIBC_${floor}`;
  return versions.filter((v) => !v.startsWith('GLIBC_') || compareVersions(v, limit) > 0);
}

/** @param {string} a @param {string} b */
function compareVersions(a, b) {
  return a.localeCompare(b, 'en', { numeric: true });
}

/** Writes SHA256SUMS, as `sha256sum --check` reads it. @param {string} folder */
export function writeChecksums(folder) {
  const lines = listBinaries(folder).map((name) => {
    const hash = createHash('sha256').update(readFileSync(path.join(folder, name)));
    return `${hash.digest('hex')}  ${name.replaceAll(path.sep, '/')}\n`;
  });
  writeFileSync(path.join(folder, 'SHA256SUMS'), lines.join(''));
}
