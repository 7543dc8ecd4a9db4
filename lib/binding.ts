// The native addon as JavaScript sees it: finds the .node file, checks that it belongs to this
// package, and keeps the reason where it cannot be used.

import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { debuglog } from 'node:util';
import { type SdpaError, sdpaError } from './errors';
import {
  checkFile,
  foreignBinary,
  type LoadFailure,
  missingBinary,
  oldRuntime,
  unloadableBinary,
} from './load-failure';
import { PROBLEM_FIELDS } from './problem-header';
import { PACKAGE_VERSION } from './version';

/** Memory of a GPU, made by the addon. Its finalizer frees it where nobody has released it. */
export interface DeviceMemory {
  readonly device: number;
  readonly bytes: number;
}

/**
 * An array that a native call reads or writes; null where the call has none. Tensors are typed arrays
 * all, or memory of the GPU that computes.
 */
type ArrayOrNull = Float32Array | Uint16Array | Uint8Array | Int32Array | DeviceMemory | null;

/** What a call reads, from queryStarts to kvLengths; then what is written. */
type ForwardArrays = [
  queryStarts: ArrayOrNull,
  keyStarts: ArrayOrNull,
  keyBlocks: ArrayOrNull,
  query: ArrayOrNull,
  key: ArrayOrNull,
  value: ArrayOrNull,
  mask: ArrayOrNull,
  keepMask: ArrayOrNull,
  causalOffsets: ArrayOrNull,
  kvLengths: ArrayOrNull,
  output: ArrayOrNull,
  lse: ArrayOrNull,
  scores: ArrayOrNull,
  weights: ArrayOrNull,
  droppedWeights: ArrayOrNull,
  mean: ArrayOrNull,
  variance: ArrayOrNull,
];

/** As for forward up to kvLengths; then output, lse and gradOutput; then what is written. */
type BackwardArrays = [
  queryStarts: ArrayOrNull,
  keyStarts: ArrayOrNull,
  keyBlocks: ArrayOrNull,
  query: ArrayOrNull,
  key: ArrayOrNull,
  value: ArrayOrNull,
  mask: ArrayOrNull,
  keepMask: ArrayOrNull,
  causalOffsets: ArrayOrNull,
  kvLengths: ArrayOrNull,
  output: ArrayOrNull,
  lse: ArrayOrNull,
  gradOutput: ArrayOrNull,
  gradQuery: ArrayOrNull,
  gradKey: ArrayOrNull,
  gradValue: ArrayOrNull,
  gradMask: ArrayOrNull,
];

/**
 * The exports of native/addon/addon.cpp. `header` is an encoded Problem, `backend` an index into
 * `backends`, or their number and a GPU's. Arrays of an Async call must be views of SharedArrayBuffers.
 */
export interface NativeBinding {
  /** Version of the package that the binary was built from */
  readonly version: string;
  /** The fields of native/core/problem.h in header order: "batch,query_heads,..." */
  readonly problemFields: string;
  /** Best first */
  readonly backends: readonly { name: string; available: boolean; reason: string }[];
  forwardSync(header: Float64Array, backend: number, ...arrays: ForwardArrays): void;
  backwardSync(header: Float64Array, backend: number, ...arrays: BackwardArrays): void;
  /** `cancel`: one element; storing 1 stops the call */
  forwardAsync(
    cancel: Int32Array | null,
    header: Float64Array,
    backend: number,
    ...arrays: ForwardArrays
  ): Promise<void>;
  backwardAsync(
    cancel: Int32Array | null,
    header: Float64Array,
    backend: number,
    ...arrays: BackwardArrays
  ): Promise<void>;
  /** Writes 1 where the dropout of the header keeps, 0 where it drops; on a GPU, or -1 */
  dropoutMask(header: Float64Array, device: number, mask: Uint8Array): void;
  /** Opens the plugin at a path, once in the process; `reason` is empty where it can be used */
  openCuda(
    path: string,
    memoryLimit: number,
    hopper: boolean,
  ): {
    reason: string;
    devices: { name: string; computeCapability: number; memoryBytes: number; reason: string }[];
  };
  deviceAllocate(device: number, bytes: number): DeviceMemory;
  /** A further object for the same memory, which lives until the last of them is released */
  deviceShare(memory: DeviceMemory): DeviceMemory;
  /** Running calls keep what they use */
  deviceRelease(memory: DeviceMemory): void;
  deviceMemoryUse(device: number): { usedBytes: number; cachedBytes: number; limitBytes: number };
  /** From an array to a GPU, back, or between GPUs; both of as many bytes */
  copySync(from: ArrayOrNull, to: ArrayOrNull): void;
  copyAsync(from: ArrayOrNull, to: ArrayOrNull): Promise<void>;
  setNumThreads(count: number): void;
  /** 0 until the first setNumThreads in the process */
  getNumThreads(): number;
  /** The most bytes of results and working buffers that a call may have, in the whole process */
  setMostBytes(bytes: number): void;
  /** Makes the garbage collector count fresh shared memory, which it does not by itself */
  adoptMemory(bytes: Uint8Array): void;
  /** Ends what adoptMemory began; the number of bytes */
  releaseMemory(bytes: number): void;
}

/** What loading gave: the addon and its file, or why there is none. */
export interface LoadedBinding {
  readonly native: NativeBinding | null;
  readonly path: string | null;
  readonly error: SdpaError | null;
}

const NEEDED_NODE_API = 9;

/** Of takeStack: what Node's loader and ours take together, and half as much again. */
const FRAMES_TO_LOAD = 1500;

/**
 * Where this code lies. A bundle for ES modules has no such name: its program's folder, and never
 * the current one, where anybody may have put a binary.
 */
const HERE =
  typeof __dirname === 'string' ? __dirname : dirname(process.argv[1] ?? process.execPath);
const requireFromHere = createRequire(join(HERE, 'binding.js'));

/** Prints where NODE_DEBUG names sdpa. */
export const debug = debuglog('sdpa');

let loaded: LoadedBinding | undefined;

/** The native addon, loaded at the first call; where it cannot be, `error` says why. */
export function loadBinding(): LoadedBinding {
  if (loaded === undefined) {
    takeStack(FRAMES_TO_LOAD);
    loaded = tryLoad();
    debug('binary %s %s', loaded.path ?? 'none', loaded.error?.message ?? 'loaded');
  }
  return loaded;
}

/**
 * Throws a RangeError where the stack is nearly used up. Loading would fail then in the middle of
 * something, for no fault of the binary's, and the failure would be remembered.
 */
function takeStack(frames: number): number {
  return frames === 0 ? 0 : 1 + takeStack(frames - 1);
}

function tryLoad(): LoadedBinding {
  let path: string | null = null;
  try {
    // An addon built for a newer Node-API may crash an older runtime rather than fail to load.
    const nodeApi = Number(process.versions.napi);
    if (!(nodeApi >= NEEDED_NODE_API)) throw oldRuntime(NEEDED_NODE_API);
    const libc = detectLibc();
    path = findBinary(libc);
    const native = loadBinary(path, libc);
    checkBelongs(native, path);
    return { native, path, error: null };
  } catch (failure) {
    const { message: reason, remedy = 'Reinstall node-sdpa' } = failure as LoadFailure;
    const message = `The native addon cannot be used: ${reason}. ${remedy}, or use the backend "js"`;
    return { native: null, path, error: sdpaError('ERR_SDPA_LOAD_FAILED', message, failure) };
  }
}

/** node-gyp-build's order: NODE_SDPA_PREBUILD, build/Release, build/Debug, prebuilds/. */
function findBinary(libc: string | undefined): string {
  const root = findRoot();
  const { resolve } = loadNodeGypBuild(libc);
  try {
    return resolve(root);
  } catch {
    throw missingBinary(process.env.NODE_SDPA_PREBUILD ?? root, libc);
  }
}

/** It takes only Alpine for musl, unless the variable LIBC names one while the module loads. */
function loadNodeGypBuild(libc: string | undefined): { resolve(root: string): string } {
  const libcBefore = process.env.LIBC;
  try {
    if (libc !== undefined) process.env.LIBC ??= libc;
    return require('node-gyp-build');
  } finally {
    if (libcBefore === undefined) delete process.env.LIBC;
  }
}

/** The package's folder: lib/ and dist/ lie directly in it, but a bundle of this code elsewhere. */
function findRoot(): string {
  const beside = join(HERE, '..');
  try {
    if (requireFromHere(join(beside, 'package.json')).name === 'node-sdpa') return beside;
  } catch {}
  try {
    return dirname(requireFromHere.resolve('node-sdpa/package.json'));
  } catch {
    return HERE; // where whoever deploys a bundle may put prebuilds/
  }
}

function loadBinary(path: string, libc: string | undefined): NativeBinding {
  checkFile(path);
  try {
    return requireFromHere(path) as NativeBinding;
  } catch (cause) {
    throw unloadableBinary(path, libc, cause);
  }
}

/** The C library that this process has mapped; undefined on other systems than Linux. */
function detectLibc(): string | undefined {
  if (process.platform !== 'linux') return undefined;
  try {
    const isMusl = /\/(ld-musl-.*|libc\.so)$/m.test(readFileSync('/proc/self/maps', 'latin1'));
    return isMusl ? 'musl' : 'glibc';
  } catch {
    return undefined;
  }
}

/** A stale binary from another version of the package would misread every call. */
function checkBelongs(native: NativeBinding, path: string): void {
  if (native.version !== PACKAGE_VERSION) {
    throw foreignBinary(
      path,
      `was built from version ${native.version}, and this is version ${PACKAGE_VERSION}`,
    );
  }
  const expected = PROBLEM_FIELDS.map(snakeCase).join(',');
  if (native.problemFields !== expected) {
    throw foreignBinary(path, `has other fields of a call: ${native.problemFields}`);
  }
}

function snakeCase(name: string): string {
  return name.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);
}
