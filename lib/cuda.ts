// The GPUs of this machine. The plugin that reaches them is opened when something first asks: for a
// backend or a tensor on a GPU, for backendInfo(), or for a call that may be worth one.

import { existsSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { describe } from './arguments';
import { debug, loadBinding, type NativeBinding } from './binding';
import { invalidValue, type SdpaError, sdpaError } from './errors';
import { checkFile } from './load-failure';

/**
 * Where a tensor is: in host memory, on the first GPU, or on one by its number.
 *
 * @example
 * ```js
 * import { Tensor } from 'node-sdpa';
 * import assert from 'node:assert';
 * const tensor = new Tensor('float32', new Float32Array(1), [1]);
 * assert.strictEqual(tensor.location, 'cpu');
 * await assert.rejects(tensor.to('cuda:99'), { code: 'ERR_SDPA_BACKEND_UNAVAILABLE' });
 * ```
 */
export type Location = 'cpu' | 'cuda' | `cuda:${number}`;

/** One GPU that the driver knows, and why it cannot be used where it cannot. */
export interface Gpu {
  readonly name: string;
  /** 9 for Hopper */
  readonly computeCapability: number;
  readonly memoryBytes: number;
  readonly error: SdpaError | null;
}

interface Cuda {
  readonly gpus: readonly Gpu[];
  /** Why there is none */
  readonly error: SdpaError | null;
}

const PLUGIN = 'libsdpa_cuda.so';

let opened: Cuda | undefined;

/** The GPUs. Throws only where a setting of the environment means nothing. */
export function openCuda(): Cuda {
  if (opened === undefined) {
    opened = tryOpen(readMemoryLimit(), readHopper());
    debug('cuda %s', opened.error?.message ?? opened.gpus.map(({ name }) => name).join(', '));
  }
  return opened;
}

function tryOpen(memoryLimit: number, hopper: boolean): Cuda {
  const { native, path, error } = loadBinding();
  if (native === null) return noCuda(error?.message ?? 'there is no native addon', error);
  const plugin = join(dirname(path as string), PLUGIN);
  if (!existsSync(plugin)) {
    const hint = 'it is in the package for Linux on x64 with glibc; "npm run build:cuda" builds it';
    return noCuda(`there is no ${plugin}: ${hint}`);
  }
  try {
    checkFile(plugin); // a library that is cut off would end the process
  } catch (failure) {
    return noCuda((failure as Error).message, failure);
  }
  const { devices, reason } = native.openCuda(plugin, memoryLimit, hopper);
  if (reason !== '') return noCuda(reason);
  const gpus = devices.map(({ reason, ...gpu }, device) => ({
    ...gpu,
    error: reason === '' ? null : unavailable(`${deviceName(device)}: ${reason}`),
  }));
  return { gpus, error: null };
}

function noCuda(reason: string, cause?: unknown): Cuda {
  return { gpus: [], error: unavailable(`cuda: ${reason}`, cause) };
}

function unavailable(message: string, cause?: unknown): SdpaError {
  return sdpaError('ERR_SDPA_BACKEND_UNAVAILABLE', message, cause);
}

/** Bytes that the package may take on each GPU; 0: all. */
function readMemoryLimit(): number {
  const text = process.env.SDPA_CUDA_MEMORY_LIMIT;
  if (text === undefined || text === '') return 0;
  const bytes = Number(text);
  if (Number.isSafeInteger(bytes) && bytes > 0) return bytes;
  throw invalidValue('SDPA_CUDA_MEMORY_LIMIT', 'a number of bytes', JSON.stringify(text));
}

/** Whether GPUs of compute capability 9.0 use the kernels made for them. */
function readHopper(): boolean {
  const text = process.env.SDPA_CUDA_HOPPER || '0';
  if (text === '0' || text === '1') return text === '1';
  throw invalidValue('SDPA_CUDA_HOPPER', '0 or 1', JSON.stringify(text));
}

/** The number of the device in host memory's place. */
export const HOST = -1;

/** 'cpu', 'cuda', 'cuda:1' and so on. */
export function deviceName(device: number): Location {
  if (device === HOST) return 'cpu';
  return device === 0 ? 'cuda' : `cuda:${device}`;
}

/** The number of a GPU by its name; undefined for all else. */
export function parseDevice(name: unknown): number | undefined {
  const match = typeof name === 'string' ? /^cuda(?::(\d{1,4}))?$/.exec(name) : null;
  return match === null ? undefined : Number(match[1] ?? 0);
}

/** Where an argument says that a tensor should be. */
export function readLocation(argument: string, value: unknown): number {
  if (value === 'cpu') return HOST;
  const device = parseDevice(value);
  if (device !== undefined) return device;
  throw invalidValue(argument, '"cpu", "cuda" or "cuda:1" and so on', describe(value));
}

/** The native addon, where it can use this GPU; throws the reason where it cannot. */
export function requireGpu(device: number): NativeBinding {
  const { error } = findGpu(device);
  if (error !== null) throw error;
  return loadBinding().native as NativeBinding;
}

/** The GPU of a number, or why there is none. */
export function findGpu(device: number): { error: SdpaError | null } {
  const { gpus, error } = openCuda();
  if (error !== null) return { error };
  if (device < gpus.length) return gpus[device];
  const count = gpus.length === 1 ? 'is one GPU' : `are ${gpus.length} GPUs`;
  return { error: unavailable(`${deviceName(device)}: there ${count}, numbered from 0`) };
}
