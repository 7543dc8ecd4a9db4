// The native addon as JavaScript sees it: finds the .node file, checks that it belongs to this
// package, and keeps the reason where it cannot be used.

import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { debuglog } from 'node:util';
import { type SdpaError, sdpaError } from './errors';
import { PROBLEM_FIELDS } from './problem-header';

/** An array that a native call reads or writes; null where the call has none. */
type ArrayOrNull = Float32Array | Uint16Array | Uint8Array | Int32Array | null;

/** query, key, value, mask, keepMask, causalOffsets, kvLengths; then what is written. */
type ForwardArrays = [
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
 * `backends`. Arrays of an Async call must be views of SharedArrayBuffers.
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
  /** Writes 1 where the dropout of the header keeps, 0 where it drops */
  dropoutMask(header: Float64Array, mask: Uint8Array): void;
  setNumThreads(count: number): void;
  /** 0 until the first setNumThreads in the process */
  getNumThreads(): number;
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

/** lib/ and dist/ both lie directly in the package's root. */
const PACKAGE_ROOT = join(__dirname, '..');
const NEEDED_NODE_API = 9;
const REMEDY =
  'Build it by "npm run build" in a checkout of node-sdpa (this needs a C++ compiler), or use ' +
  'the backend "js"';

/** Why the cuda backend cannot be had. */
export const NO_CUDA = 'cuda: this version of node-sdpa has no CUDA backend; use "cpu" or "auto"';

const requireFromHere = createRequire(__filename);

/** Version of this package. */
export const PACKAGE_VERSION: string = requireFromHere('../package.json').version;

/** Prints where NODE_DEBUG names sdpa. */
export const debug = debuglog('sdpa');

let loaded: LoadedBinding | undefined;

/** The native addon, loaded at the first call. Never throws: `error` says what went wrong. */
export function loadBinding(): LoadedBinding {
  if (loaded === undefined) {
    loaded = tryLoad();
    debug('binary %s %s', loaded.path ?? 'none', loaded.error?.message ?? 'loaded');
  }
  return loaded;
}

function tryLoad(): LoadedBinding {
  let path: string | null = null;
  try {
    checkNodeApi();
    path = findBinary();
    const native = requireFromHere(path) as NativeBinding;
    checkBelongs(native, path);
    return { native, path, error: null };
  } catch (cause) {
    const reason = (cause instanceof Error ? cause.message : String(cause)).trim();
    const message = `The native addon cannot be used: ${reason}. ${REMEDY}`;
    return { native: null, path, error: sdpaError('ERR_SDPA_LOAD_FAILED', message, cause) };
  }
}

/** An addon built for a newer Node-API may crash an older runtime rather than fail to load. */
function checkNodeApi(): void {
  const nodeApi = Number(process.versions.napi);
  if (!(nodeApi >= NEEDED_NODE_API)) {
    throw new Error(`it needs Node-API ${NEEDED_NODE_API}, and this runtime has ${nodeApi}`);
  }
}

/** node-gyp-build's order: NODE_SDPA_PREBUILD, build/Release, build/Debug, prebuilds/. */
function findBinary(): string {
  const libcBefore = process.env.LIBC;
  const libc = libcBefore ?? detectLibc();
  try {
    if (libc !== undefined) process.env.LIBC = libc; // read while the module loads
    const nodeGypBuild = requireFromHere('node-gyp-build') as { resolve(root: string): string };
    return nodeGypBuild.resolve(PACKAGE_ROOT);
  } finally {
    if (libc !== libcBefore) delete process.env.LIBC;
  }
}

/** node-gyp-build takes only Alpine for musl; the loader that this process has mapped knows. */
function detectLibc(): string | undefined {
  if (process.platform !== 'linux') return undefined;
  try {
    return readFileSync('/proc/self/maps', 'latin1').includes('/ld-musl-') ? 'musl' : 'glibc';
  } catch {
    return undefined;
  }
}

/** A stale binary from another version of the package would misread every call. */
function checkBelongs(native: NativeBinding, path: string): void {
  if (native.version !== PACKAGE_VERSION) {
    throw new Error(
      `${path} was built from version ${native.version}, and this is version ${PACKAGE_VERSION}`,
    );
  }
  const expected = PROBLEM_FIELDS.map(snakeCase).join(',');
  if (native.problemFields !== expected) {
    throw new Error(`${path} has other fields of a call: ${native.problemFields}, not ${expected}`);
  }
}

function snakeCase(name: string): string {
  return name.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);
}
