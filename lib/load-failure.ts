// Why a native binary does not load and what to do about it, read from the file itself: what
// systems say of such files is short, and at times misleading.

import { closeSync, fstatSync, openSync, readdirSync, readFileSync, readSync } from 'node:fs';
import { join } from 'node:path';

/** Why there is no native addon, and the remedy: the end of a sentence, and a sentence. */
export class LoadFailure extends Error {
  constructor(
    reason: string,
    readonly remedy: string,
    cause?: unknown,
  ) {
    super(reason, { cause });
  }
}

const BUILD = 'Build one for this machine by "npx node-sdpa build" (this needs a C++ compiler)';
const REINSTALL = 'Reinstall node-sdpa on this machine, or build it by "npx node-sdpa build"';

/** The runtime is older than the addon: loading it could crash. */
export function oldRuntime(needed: number): LoadFailure {
  const { napi = 'none', node } = process.versions;
  return new LoadFailure(
    `it needs Node-API ${needed}, and this runtime (Node.js ${node}) has ${napi}`,
    'Update to Node.js 20.19 or later',
  );
}

/**
 * No file was found below `root`.
 * @param libc - `'glibc'` or `'musl'`; undefined on other systems than Linux
 */
export function missingBinary(root: string, libc: string | undefined): LoadFailure {
  const system = `${process.platform}-${process.arch}${libc === undefined ? '' : ` (${libc})`}`;
  const folder = join(root, 'prebuilds');
  let present: string[];
  try {
    present = readdirSync(folder, { recursive: true, encoding: 'utf8' });
  } catch (cause) {
    return new LoadFailure(
      `there is no folder ${folder}`,
      'If a bundler packed this code, mark node-sdpa as external, or copy the folder prebuilds of ' +
        `the package there. Else: ${REINSTALL}`,
      cause,
    );
  }
  const binaries = present.filter((name) => name.endsWith('.node')).join(', ') || 'none at all';
  return new LoadFailure(`${folder} has no binary for ${system}, but ${binaries}`, BUILD);
}

/** The file at `path` belongs to another version of this package. */
export function foreignBinary(path: string, difference: string): LoadFailure {
  return new LoadFailure(
    `${path} ${difference}`,
    'Delete it, or build it anew by "npx node-sdpa build"',
  );
}

/** Throws where the file at `path` is not one to load: a file that is cut off can end the process. */
export function checkFile(path: string): void {
  const { header, size } = readHeader(path);
  const found = describeBinary(header);
  if (found === null) throw new LoadFailure(`${path} is no native addon`, REINSTALL);
  const here = `${process.platform}-${process.arch}`;
  if (found.system !== here) {
    throw new LoadFailure(`${path} is for ${found.system}, and this is ${here}`, REINSTALL);
  }
  if (size < found.size) {
    throw new LoadFailure(`${path} is cut off after ${size} of ${found.size} bytes`, REINSTALL);
  }
}

/** The file at `path` did not load, for the reason that the system gave as `cause`. */
export function unloadableBinary(
  path: string,
  libc: string | undefined,
  cause: unknown,
): LoadFailure {
  const wanted = libcOf(path);
  if (wanted !== undefined && libc !== undefined && wanted !== libc) {
    const reason = `${path} is for Linux with ${wanted}, and this system has ${libc}`;
    return new LoadFailure(reason, REINSTALL, cause);
  }
  const said = cause instanceof Error ? cause.message : String(cause);
  return new LoadFailure(said.trim().replace(/\.$/, ''), BUILD, cause);
}

/** A C library's name, by the libraries that the file asks for; undefined where it names none. */
function libcOf(path: string): string | undefined {
  try {
    const bytes = readFileSync(path);
    if (bytes.includes('\0libc.so.6\0')) return 'glibc';
    return bytes.includes('\0libc.so\0') || bytes.includes('\0libc.musl-') ? 'musl' : undefined;
  } catch {
    return undefined;
  }
}

/** The first bytes of a file, with zeros after its end. */
function readHeader(path: string): { header: Buffer; size: number } {
  const header = Buffer.alloc(4096);
  const file = openSync(path, 'r');
  try {
    readSync(file, header, 0, header.length, 0);
    return { header, size: fstatSync(file).size };
  } finally {
    closeSync(file);
  }
}

const ELF_MACHINES = new Map([
  [3, 'ia32'],
  [40, 'arm'],
  [62, 'x64'],
  [183, 'arm64'],
  [243, 'riscv64'],
]);
const PE_MACHINES = new Map([
  [0x014c, 'ia32'],
  [0x8664, 'x64'],
  [0xaa64, 'arm64'],
]);
const MACH_MACHINES = new Map([
  [0x01000007, 'x64'],
  [0x0100000c, 'arm64'],
]);

/**
 * What the headers of the formats ELF (Linux), PE (Windows) and Mach-O (macOS) say: the system that
 * the file is for, and how many bytes it has at least. Null for any other file.
 */
function describeBinary(header: Buffer): { system: string; size: number } | null {
  const magic = header.readUInt32BE(0);
  if (magic === 0x7f454c46) {
    const tableStart = Number(header.readBigUInt64LE(40));
    const tableLength = header.readUInt16LE(58) * header.readUInt16LE(60);
    const machine = header.readUInt16LE(18);
    return { system: nameSystem('linux', ELF_MACHINES, machine), size: tableStart + tableLength };
  }
  if (header.toString('latin1', 0, 2) === 'MZ') {
    const start = Math.min(header.readUInt32LE(60), header.length - 6);
    return { system: nameSystem('win32', PE_MACHINES, header.readUInt16LE(start + 4)), size: 0 };
  }
  if (magic === 0xcffaedfe) {
    return { system: nameSystem('darwin', MACH_MACHINES, header.readUInt32LE(4)), size: 0 };
  }
  return null;
}

function nameSystem(platform: string, machines: Map<number, string>, machine: number): string {
  return `${platform}-${machines.get(machine) ?? `machine ${machine}`}`;
}
