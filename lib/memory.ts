// Memory for tensors: shared with the native threads, and counted by the garbage collector.

import { constants } from 'node:buffer';
import { type DeviceMemory, loadBinding } from './binding';
import { HOST, requireGpu } from './cuda';
import { invalidValue, sdpaError } from './errors';
import type { FloatArray } from './problem-header';

/** The code of an element type: float32, float16 and bfloat16 as in Problem.type, then bool. */
export const FLOAT32 = 0;
export const FLOAT16 = 1;
export const BFLOAT16 = 2;
export const BOOL = 3;

type TensorArray = Float32Array | Uint16Array | Uint8Array;

let mostBytes: number | undefined;

/** What SDPA_MAX_BYTES says that one call may take; Infinity where it says nothing. */
export function readMostBytes(): number {
  if (mostBytes === undefined) {
    const { SDPA_MAX_BYTES: text } = process.env;
    const bytes = text === undefined || text === '' ? Number.POSITIVE_INFINITY : Number(text);
    if (bytes !== Number.POSITIVE_INFINITY && !(Number.isSafeInteger(bytes) && bytes > 0)) {
      const expected = `an integer from 1 to ${Number.MAX_SAFE_INTEGER}`;
      throw invalidValue('SDPA_MAX_BYTES', expected, JSON.stringify(text));
    }
    mostBytes = bytes;
  }
  return mostBytes;
}

/**
 * Throws where the results of a call, and what it needs of their size besides, are more than it may
 * take. Before anything is allocated; native code keeps its working buffers within what is left.
 */
export function checkBytes(bytes: number): void {
  const most = readMostBytes();
  if (bytes <= most) return;
  const message = `The call needs ${bytes} bytes, and SDPA_MAX_BYTES allows it ${most}`;
  throw sdpaError('ERR_SDPA_OUT_OF_MEMORY', message);
}

/** Bytes of `length` elements of a type. */
export function byteLength(type: number, length: number): number {
  return length * (type === FLOAT32 ? 4 : type === BOOL ? 1 : 2);
}

/** Makes `length` float64 zeros, which native code does not see. */
export function allocateFloat64(length: number): Float64Array {
  try {
    return new Float64Array(length);
  } catch (cause) {
    throw sdpaError('ERR_SDPA_OUT_OF_MEMORY', `No memory for ${8 * length} bytes of sums`, cause);
  }
}

/** Below this many bytes an array costs about as much as its JavaScript objects. */
const SMALLEST_COUNTED = 4096;

/**
 * Makes `length` zeros of an element type.
 *
 * Native threads read and write the memory while JavaScript goes on, so it must not be detached:
 * it is a SharedArrayBuffer. Without the native addon nobody shares it, and it is ordinary.
 */
export function allocate(type: number, length: number): TensorArray {
  if (type === FLOAT32) return new Float32Array(allocateBytes(length, 4));
  if (type === BOOL) return new Uint8Array(allocateBytes(length, 1));
  return new Uint16Array(allocateBytes(length, 2));
}

/** Makes `length` zeros of a floating-point type. */
export function allocateFloats(type: number, length: number): FloatArray {
  return allocate(type, length) as FloatArray;
}

/**
 * Makes room for `length` elements on a device: zeros in host memory, or anything in a GPU's.
 *
 * Nothing but native code can tell the two apart: what is on a GPU passes for an array, on its way
 * from here to a call and a tensor.
 */
export function allocateAt<T extends TensorArray>(device: number, type: number, length: number): T {
  if (device === HOST) return allocate(type, length) as T;
  const memory = requireGpu(device).deviceAllocate(device, byteLength(type, length));
  return memory as unknown as T;
}

/** Whether elements are in memory of a GPU. */
export function isOnDevice(data: TensorArray | DeviceMemory): data is DeviceMemory {
  return !ArrayBuffer.isView(data);
}

/** Where elements are: HOST, or the number of a GPU. */
export function deviceOf(data: TensorArray | DeviceMemory): number {
  return isOnDevice(data) ? data.device : HOST;
}

/** Makes `length` float32 zeros. */
export function allocateFloat32(length: number): Float32Array {
  return new Float32Array(allocateBytes(length, 4));
}

/** Makes `length` int32 zeros. */
export function allocateInt32(length: number): Int32Array {
  return new Int32Array(allocateBytes(length, 4));
}

/** Copies an array of an element type into memory that is not the caller's. */
export function copyArray<T extends TensorArray>(type: number, source: T): T {
  const copy = allocate(type, source.length) as T;
  copy.set(source);
  return copy;
}

function allocateBytes(length: number, bytesPerElement: number): ArrayBuffer {
  const { native } = loadBinding();
  const bytes = length * bytesPerElement;
  let buffer: ArrayBuffer | SharedArrayBuffer;
  try {
    if (length > constants.MAX_LENGTH) throw new RangeError('Longer than a typed array can be');
    buffer = native === null ? new ArrayBuffer(bytes) : new SharedArrayBuffer(bytes);
  } catch (cause) {
    throw sdpaError('ERR_SDPA_OUT_OF_MEMORY', `No memory for an array of ${bytes} bytes`, cause);
  }
  if (native !== null && bytes >= SMALLEST_COUNTED) {
    // V8 counts no SharedArrayBuffer: without this, garbage piles up by the gigabyte before a
    // collection starts. The buffer, not the Tensor, is watched: views may outlive the Tensor.
    native.adoptMemory(new Uint8Array(buffer));
    collected.register(buffer, bytes);
  }
  return buffer as ArrayBuffer;
}

const collected = new FinalizationRegistry((bytes: number) => {
  loadBinding().native?.releaseMemory(bytes);
});
