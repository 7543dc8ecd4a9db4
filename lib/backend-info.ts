// What computes here and why: backendInfo for people who wonder, setNumThreads for those who know.

import { checkInteger } from './arguments';
import { applyEnvironment, listCandidates, MOST_THREADS } from './backends';
import { loadBinding } from './binding';
import { deviceName, openCuda } from './cuda';
import type { SdpaErrorCode } from './errors';
import type { BackendName } from './problem';
import { PACKAGE_VERSION } from './version';

/**
 * One backend that was looked at, best first: usable, or passed over for a reason.
 *
 * @example
 * ```js
 * import { backendInfo } from 'node-sdpa';
 * import assert from 'node:assert';
 * const cuda = backendInfo().tried.find(({ backend }) => backend === 'cuda');
 * if (!cuda.ok) {
 *   assert.strictEqual(cuda.code, 'ERR_SDPA_BACKEND_UNAVAILABLE');
 *   assert.match(cuda.reason, /^cuda: /); // no driver, no GPU, ...
 * }
 * ```
 */
export interface TriedBackend {
  /** A name for the option `backend` */
  readonly backend: BackendName;
  /** Whether it can compute here */
  readonly ok: boolean;
  /** `ERR_SDPA_BACKEND_UNAVAILABLE` or `ERR_SDPA_LOAD_FAILED`, where it cannot */
  readonly code?: SdpaErrorCode;
  /** Why it cannot, and what to do about it */
  readonly reason?: string;
}

/**
 * A GPU that can compute here, and how much of its memory this process has taken.
 *
 * @example
 * ```js
 * import { backendInfo } from 'node-sdpa';
 * import assert from 'node:assert';
 * for (const { usedBytes, cachedBytes, limitBytes } of backendInfo().gpus) {
 *   assert.ok(usedBytes + cachedBytes <= limitBytes);
 * }
 * ```
 */
export interface GpuInfo {
  /** A name for the option `backend`, and a tensor's `location` */
  readonly backend: BackendName;
  /** As its maker calls it */
  readonly name: string;
  /** Such as 9 for Hopper */
  readonly computeCapability: number;
  /** All that it has */
  readonly memoryBytes: number;
  /** Held by tensors and running calls */
  readonly usedBytes: number;
  /** Kept for the next ones */
  readonly cachedBytes: number;
  /** Of both together: SDPA_CUDA_MEMORY_LIMIT, or all that the GPU has */
  readonly limitBytes: number;
}

/**
 * What {@link backendInfo} returns.
 *
 * @example
 * ```js
 * import { backendInfo } from 'node-sdpa';
 * import assert from 'node:assert';
 * const { selected, isa, tried } = backendInfo();
 * assert.ok(tried.some(({ backend, ok }) => ok && backend === selected));
 * assert.ok(isa === null || selected === `cpu:${isa}`);
 * ```
 */
export interface BackendInfo {
  /**
   * What `backend: 'auto'` means here, but for calls that are worth the way to a GPU; null where
   * SDPA_BACKEND names one that cannot run
   */
  readonly selected: string | null;
  /** The instruction set of a selected CPU backend, such as `'avx2'`; null for others */
  readonly isa: string | null;
  /** How many threads a call may use */
  readonly threads: number;
  /** Path of the native binary; null where none was found */
  readonly binary: string | null;
  /** Version of this package */
  readonly version: string;
  /** All backends, best first */
  readonly tried: readonly TriedBackend[];
  /** The GPUs that can be used */
  readonly gpus: readonly GpuInfo[];
}

/**
 * Says which backend computes, and what was tried and why it was passed over. Looks for GPUs, if
 * nothing has done so before.
 *
 * @throws RangeError `ERR_SDPA_INVALID_ARG_VALUE`: SDPA_BACKEND, SDPA_CPU_ISA, SDPA_NUM_THREADS,
 *   SDPA_CUDA_MEMORY_LIMIT or SDPA_CUDA_HOPPER has a value that means nothing
 *
 * @example
 * ```js
 * import { backendInfo } from 'node-sdpa';
 * import assert from 'node:assert';
 * const info = backendInfo();
 * assert.ok(info.threads >= 1);
 * assert.ok(info.tried.some(({ backend, ok }) => backend === 'js' && ok));
 * ```
 */
export function backendInfo(): BackendInfo {
  const { candidates, auto } = listCandidates();
  const { native, path } = loadBinding();
  const selected = auto.backend?.name ?? null;
  return {
    selected,
    isa: selected?.startsWith('cpu:') ? selected.slice('cpu:'.length) : null,
    threads: native === null ? 1 : native.getNumThreads(),
    binary: path,
    version: PACKAGE_VERSION,
    tried: candidates.map(({ name, error }) =>
      error === null
        ? { backend: name as BackendName, ok: true }
        : { backend: name as BackendName, ok: false, code: error.code, reason: error.message },
    ),
    gpus: listGpus(),
  };
}

function listGpus(): GpuInfo[] {
  const { native } = loadBinding();
  if (native === null) return [];
  return openCuda().gpus.flatMap(({ error, ...gpu }, device) =>
    error === null
      ? [{ backend: deviceName(device) as BackendName, ...gpu, ...native.deviceMemoryUse(device) }]
      : [],
  );
}

/**
 * Sets how many threads a call may use, in the whole process. Results do not depend on it, bit
 * for bit. The variable SDPA_NUM_THREADS sets it from outside. The js backend always uses one.
 *
 * @param count - 1 to 256
 * @throws TypeError `ERR_SDPA_INVALID_ARG_TYPE`: not a number
 * @throws RangeError `ERR_SDPA_INVALID_ARG_VALUE`: not an integer from 1 to 256
 *
 * @example
 * ```js
 * import { backendInfo, setNumThreads } from 'node-sdpa';
 * import assert from 'node:assert';
 * setNumThreads(1);
 * assert.strictEqual(backendInfo().threads, 1);
 * assert.throws(() => setNumThreads(0), { code: 'ERR_SDPA_INVALID_ARG_VALUE' });
 * ```
 */
export function setNumThreads(count: number): void {
  checkInteger('count', count, 1, MOST_THREADS);
  applyEnvironment(); // applies SDPA_NUM_THREADS first, so that it does not undo this later
  loadBinding().native?.setNumThreads(count);
}
