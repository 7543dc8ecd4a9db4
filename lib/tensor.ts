// Tensors: what callers may pass, how it is read and checked, and the package's own Tensor class.

import { describe, wrongWord } from './arguments';
import type { DeviceMemory } from './binding';
import { deviceName, HOST, type Location, readLocation, requireGpu } from './cuda';
import { disposedError, invalidType, invalidValue, shapeMismatch, wrongLocation } from './errors';
import { bfloat16sToFloats, halvesToFloats } from './float16';
import {
  allocateAt,
  allocateInt32,
  BFLOAT16,
  BOOL,
  copyArray,
  deviceOf,
  FLOAT16,
  FLOAT32,
} from './memory';

/**
 * What the elements of a tensor are: IEEE single or half precision, bfloat16, or booleans.
 *
 * @example
 * ```js
 * import { Tensor } from 'node-sdpa';
 * import assert from 'node:assert';
 * const one = new Tensor('bfloat16', Uint16Array.of(0x3f80), [1]);
 * assert.strictEqual(one.type, 'bfloat16');
 * assert.strictEqual(one.toFloat32Array()[0], 1);
 * ```
 */
export type TensorType = 'float32' | 'float16' | 'bfloat16' | 'bool';

/**
 * The array in which a tensor's elements are: Float32Array for float32, Uint16Array of bit
 * patterns for float16 and bfloat16, Uint8Array (0 or 1) for bool.
 *
 * @example
 * ```js
 * import { Tensor } from 'node-sdpa';
 * import assert from 'node:assert';
 * assert.ok(new Tensor('bool', Uint8Array.of(1, 0), [2]).data instanceof Uint8Array);
 * assert.ok(new Tensor('float16', Uint16Array.of(0x3c00), [1]).data instanceof Uint16Array);
 * ```
 */
export type TensorData = Float32Array | Uint16Array | Uint8Array;

/** A Float16Array of a runtime that has it, described so that no newer type library is needed. */
interface Float16ArrayLike {
  readonly [Symbol.toStringTag]: 'Float16Array';
  readonly buffer: ArrayBufferLike;
  readonly byteOffset: number;
  readonly length: number;
}

/**
 * Anything that can be passed as a tensor: an array and its shape, row-major and without gaps.
 * A {@link Tensor}, an onnxruntime tensor (`data`, `dims`) or any `{data, shape}` goes in as it is.
 *
 * `type` follows from the array, except that a Uint16Array needs `'float16'` or `'bfloat16'`.
 * The array's buffer must be neither detached nor resizable.
 *
 * @example
 * ```js
 * import { scaledDotProductAttentionSync } from 'node-sdpa';
 * import assert from 'node:assert';
 * const query = { data: Float32Array.of(1, 2), dims: [1, 1, 1, 2] };
 * const value = { data: Float32Array.of(3, 4), shape: [1, 1, 1, 2] };
 * const output = scaledDotProductAttentionSync(query, query, value);
 * assert.deepStrictEqual([...output.data], [3, 4]); // the only key has all the weight
 * ```
 */
export interface TensorLike {
  /** The elements */
  readonly data: TensorData | Float16ArrayLike;
  /** The size of every axis */
  readonly dims?: readonly number[];
  /** The size of every axis; read where `dims` is missing */
  readonly shape?: readonly number[];
  /** Default: by the class of `data`; a Uint16Array has to be named `'float16'` or `'bfloat16'` */
  readonly type?: TensorType;
}

/** A tensor as read and checked: no getter of the caller's is behind it any more. */
export class TensorView {
  constructor(
    /** FLOAT32, FLOAT16, BFLOAT16 or BOOL */
    readonly type: number,
    /** See allocateAt for what is on a GPU */
    readonly data: TensorData,
    readonly dims: readonly number[],
    /** The memory is a Tensor's: nobody can detach it, and it may be read without a copy */
    readonly isOwned: boolean,
  ) {}

  /** HOST, or the number of a GPU */
  get device(): number {
    return deviceOf(this.data);
  }
}

/** Type names by type code. */
export const TYPE_NAMES: readonly TensorType[] = ['float32', 'float16', 'bfloat16', 'bool'];
const LARGEST_DIM = 2 ** 31 - 1;
const MOST_AXES = 8;

// What reaches into a Tensor's private fields; the class assigns them.
let viewIfTensor: (value: object) => TensorView | undefined;
let isTensorObject: (value: object) => boolean;

/**
 * A tensor whose memory the package owns: results are Tensors, and asynchronous calls read a
 * Tensor without copying it, because its memory is shared (a SharedArrayBuffer, which no one can
 * detach; an ordinary ArrayBuffer where no native addon loads and so nobody shares it). Leave a
 * Tensor unchanged while a call or a later `backward` still reads it.
 *
 * The interface follows onnxruntime's Tensor.
 *
 * @example
 * ```js
 * import { Tensor } from 'node-sdpa';
 * import assert from 'node:assert';
 * const tensor = new Tensor('float32', Float32Array.of(1, 2, 3, 4), [2, 2]);
 * assert.deepStrictEqual(tensor.dims, [2, 2]);
 * assert.strictEqual(tensor.data[3], 4);
 * assert.strictEqual(tensor.location, 'cpu');
 * ```
 */
export class Tensor implements TensorLike {
  #view: TensorView;
  #data: TensorData | undefined; // what callers see, and may change the properties of
  #isDisposed = false;

  /**
   * Copies elements into memory of the tensor's own.
   *
   * @param type - what the elements are
   * @param data - the elements: Float32Array for `'float32'`, Uint16Array of bit patterns (or
   *   Float16Array, for `'float16'`) for the 16-bit types, Uint8Array of 0 and 1 for `'bool'`
   * @param dims - the size of each axis: up to 8 integers from 1 to 2^31 - 1; their product is
   *   the number of elements
   * @throws TypeError `ERR_SDPA_INVALID_ARG_TYPE`: an unfitting array, or one that is detached
   *   or resizable
   * @throws RangeError `ERR_SDPA_INVALID_ARG_VALUE`: an unknown type, or sizes out of range
   * @throws RangeError `ERR_SDPA_SHAPE_MISMATCH`: data and dims differ in their element count
   *
   * @example
   * ```js
   * import { Tensor } from 'node-sdpa';
   * import assert from 'node:assert';
   * const source = Float32Array.of(1, 2);
   * const tensor = new Tensor('float32', source, [1, 2]);
   * source.fill(0);
   * assert.deepStrictEqual([...tensor.data], [1, 2]);
   * assert.throws(() => new Tensor('float32', source, [3]), { code: 'ERR_SDPA_SHAPE_MISMATCH' });
   * ```
   */
  constructor(type: TensorType, data: TensorLike['data'], dims: readonly number[]) {
    const given: unknown = type; // adoptTensor passes a finished view
    this.#view = given instanceof TensorView ? given : copyView(type, data, dims);
  }

  static {
    isTensorObject = (value) => #view in value;
    viewIfTensor = (value) => {
      if (!(#view in value)) return undefined;
      if (value.#isDisposed) throw disposedError('Tensor');
      return value.#view;
    };
  }

  /**
   * What the elements are.
   *
   * @example
   * ```js
   * import { Tensor } from 'node-sdpa';
   * import assert from 'node:assert';
   * assert.strictEqual(new Tensor('bool', new Uint8Array(3), [3]).type, 'bool');
   * ```
   */
  get type(): TensorType {
    return TYPE_NAMES[this.#view.type];
  }

  /**
   * The elements: a view of the tensor's own memory, not a copy.
   *
   * @throws Error `ERR_SDPA_DISPOSED`: after `dispose()`
   * @throws RangeError `ERR_SDPA_WRONG_LOCATION`: the tensor is on a GPU; `getData()` fetches it
   *
   * @example
   * ```js
   * import { Tensor } from 'node-sdpa';
   * import assert from 'node:assert';
   * const tensor = new Tensor('float32', new Float32Array(2), [2]);
   * tensor.data[1] = 5;
   * assert.deepStrictEqual([...tensor.data], [0, 5]);
   * ```
   */
  get data(): TensorData {
    const { type, data, device } = this.#current();
    if (device !== HOST) {
      throw wrongLocation('data', 'a tensor in host memory (getData() fetches it)', this.location);
    }
    this.#data ??= viewOf(type, data.buffer, data.byteOffset, data.length);
    return this.#data;
  }

  #current(): TensorView {
    if (this.#isDisposed) throw disposedError('Tensor');
    return this.#view;
  }

  /**
   * The size of each axis, outermost first; cannot be changed.
   *
   * @example
   * ```js
   * import { Tensor } from 'node-sdpa';
   * import assert from 'node:assert';
   * assert.deepStrictEqual(new Tensor('float32', new Float32Array(6), [2, 3]).dims, [2, 3]);
   * ```
   */
  get dims(): readonly number[] {
    return Object.freeze(this.#view.dims);
  }

  /**
   * The same as `dims`, under the name that other libraries use.
   *
   * @example
   * ```js
   * import { Tensor } from 'node-sdpa';
   * import assert from 'node:assert';
   * assert.deepStrictEqual(new Tensor('float32', new Float32Array(6), [2, 3]).shape, [2, 3]);
   * ```
   */
  get shape(): readonly number[] {
    return this.dims;
  }

  /**
   * Where the elements are: `'cpu'` (host memory), `'cuda'` (the first GPU), `'cuda:1'` and so on.
   *
   * @example
   * ```js
   * import { Tensor } from 'node-sdpa';
   * import assert from 'node:assert';
   * assert.strictEqual(new Tensor('float32', new Float32Array(1), [1]).location, 'cpu');
   * ```
   */
  get location(): Location {
    return deviceName(this.#view.device);
  }

  /**
   * The elements, from wherever the tensor is: in host memory the same view as `data`, from a GPU a
   * copy.
   *
   * @returns rejects with `ERR_SDPA_DISPOSED` after `dispose()`, and with `ERR_SDPA_DEVICE_LOST`,
   *   `ERR_SDPA_OUT_OF_MEMORY`
   *
   * @example
   * ```js
   * import { Tensor } from 'node-sdpa';
   * import assert from 'node:assert';
   * const tensor = new Tensor('float32', Float32Array.of(7), [1]);
   * assert.strictEqual(await tensor.getData(), tensor.data);
   * ```
   */
  async getData(): Promise<TensorData> {
    const view = this.#current();
    return view.device === HOST ? this.data : (await copyTo(HOST, view)).data;
  }

  /**
   * The tensor at another place, a copy; itself where it is there already.
   *
   * @param location - `'cpu'`, `'cuda'` (the first GPU), `'cuda:1'` and so on
   * @returns rejects with `ERR_SDPA_BACKEND_UNAVAILABLE` where there is no such GPU,
   *   `ERR_SDPA_OUT_OF_MEMORY` where it has no room, `ERR_SDPA_DEVICE_LOST`, `ERR_SDPA_DISPOSED`
   *
   * @example
   * ```js
   * import { backendInfo, Tensor } from 'node-sdpa';
   * import assert from 'node:assert';
   * const tensor = new Tensor('float32', Float32Array.of(7), [1]);
   * assert.strictEqual(await tensor.to('cpu'), tensor);
   * if (backendInfo().tried.some(({ backend, ok }) => backend === 'cuda' && ok)) {
   *   const moved = await tensor.to('cuda');
   *   assert.deepStrictEqual(await moved.getData(), tensor.data);
   *   moved.dispose();
   * }
   * ```
   */
  async to(location: Location): Promise<Tensor> {
    const view = this.#current();
    const device = readLocation('location', location);
    if (device === view.device) return this;
    const { type, data, dims } = await copyTo(device, view);
    return adoptTensor(type, data, dims);
  }

  /**
   * The elements as numbers, in a new and unshared Float32Array: 16-bit floats are widened
   * exactly, booleans become 0 and 1. For consumers that refuse views of shared memory. What is on a
   * GPU is fetched while the calling thread waits.
   *
   * @throws Error `ERR_SDPA_DISPOSED`: after `dispose()`
   *
   * @example
   * ```js
   * import { Tensor } from 'node-sdpa';
   * import assert from 'node:assert';
   * const half = new Tensor('float16', Uint16Array.of(0x3c00, 0xc000), [2]);
   * assert.deepStrictEqual(half.toFloat32Array(), Float32Array.of(1, -2));
   * ```
   */
  toFloat32Array(): Float32Array<ArrayBuffer> {
    const view = this.#current();
    const data = view.device === HOST ? view.data : fetchSync(view);
    const floats = new Float32Array(data.length);
    if (this.#view.type === FLOAT16) halvesToFloats(data as Uint16Array, floats);
    else if (this.#view.type === BFLOAT16) bfloat16sToFloats(data as Uint16Array, floats);
    else floats.set(data);
    return floats;
  }

  /**
   * Lets go of the memory, at once where it is on a GPU. Every later use of the elements throws
   * `ERR_SDPA_DISPOSED`; calls and results that read the tensor already are not disturbed. Disposing
   * twice is allowed.
   *
   * @example
   * ```js
   * import { Tensor } from 'node-sdpa';
   * import assert from 'node:assert';
   * const tensor = new Tensor('float32', new Float32Array(1), [1]);
   * tensor.dispose();
   * assert.throws(() => tensor.data, { code: 'ERR_SDPA_DISPOSED' });
   * ```
   */
  dispose(): void {
    this.#isDisposed = true;
    release(this.#view);
    this.#data = undefined;
    this.#view = new TensorView(this.#view.type, new Uint8Array(0), this.#view.dims, true);
  }

  /**
   * Calls `dispose()` at the end of a `using` block.
   *
   * @example
   * ```js
   * import { Tensor } from 'node-sdpa';
   * import assert from 'node:assert';
   * const tensor = new Tensor('float32', new Float32Array(1), [1]);
   * tensor[Symbol.dispose](); // what `using tensor = ...` does at the end of its block
   * assert.throws(() => tensor.data, { code: 'ERR_SDPA_DISPOSED' });
   * ```
   */
  [Symbol.dispose](): void {
    this.dispose();
  }

  /** What console.log shows. */
  [Symbol.for('nodejs.util.inspect.custom')](): string {
    const place = this.#view.device === HOST ? '' : `, ${this.location}`;
    const state = this.#isDisposed ? ', disposed' : place;
    return `Tensor(${this.type}, ${formatShape(this.#view.dims)}${state})`;
  }
}

/** A Tensor of memory that the package has allocated: nothing is checked or copied. */
export function adoptTensor(type: number, data: TensorData, dims: readonly number[]): Tensor {
  const OfView = Tensor as unknown as new (view: TensorView) => Tensor;
  return new OfView(new TensorView(type, data, dims, true));
}

/** A copy of a tensor's elements on another device. */
async function copyTo(device: number, view: TensorView): Promise<TensorView> {
  const gpu = device === HOST ? view.device : device;
  const data: TensorData = allocateAt(device, view.type, elementCount('Tensor', view.dims));
  await requireGpu(gpu).copyAsync(view.data, data);
  return new TensorView(view.type, data, view.dims, true);
}

function fetchSync(view: TensorView): TensorData {
  const data: TensorData = allocateAt(HOST, view.type, elementCount('Tensor', view.dims));
  requireGpu(view.device).copySync(view.data, data);
  return data;
}

/** A view that outlives the Tensor: its memory on a GPU is held until `release`. */
export function retain(view: TensorView): TensorView {
  if (view.device === HOST) return view;
  const memory = requireGpu(view.device).deviceShare(view.data as unknown as DeviceMemory);
  return new TensorView(view.type, memory as unknown as TensorData, view.dims, true);
}

/** Gives memory on a GPU back, once running calls are done with it; host memory is collected. */
export function release(view: TensorView): void {
  if (view.device === HOST) return;
  requireGpu(view.device).deviceRelease(view.data as unknown as DeviceMemory);
}

/** Whether a value is a Tensor of this package. */
export function isTensor(value: unknown): value is Tensor {
  return typeof value === 'object' && value !== null && isTensorObject(value);
}

/** As {@link readTensor}, for what is only computed in host memory. */
export function readHostTensor(argument: string, value: unknown): TensorView {
  const view = readTensor(argument, value);
  if (view.device === HOST) return view;
  throw wrongLocation(argument, 'a tensor on cpu', `one on ${deviceName(view.device)}`);
}

/**
 * Reads an argument that must be a tensor, each of its properties once, and checks all but its
 * length: that is `checkLength`'s task, after the last code of the caller's has run.
 */
export function readTensor(argument: string, value: unknown): TensorView {
  if (typeof value !== 'object' || value === null) {
    throw invalidType(argument, 'a tensor ({data, dims})', describe(value));
  }
  const view = viewIfTensor(value);
  if (view !== undefined) return view;
  const { type, data, dims } = value as TensorLike;
  if (data === undefined && ArrayBuffer.isView(value)) {
    throw invalidType(
      argument,
      'a tensor ({data, dims}), as an array has no shape',
      describe(value),
    );
  }
  const shape = dims === undefined ? (value as TensorLike).shape : dims;
  return createView(argument, type, data, shape);
}

/** Requires a tensor's data to be as long as its shape says. */
export function checkLength(argument: string, view: TensorView): void {
  const expected = elementCount(argument, view.dims);
  if (view.device !== HOST || view.data.length === expected) return;
  if (isDetached(view.data.buffer)) throw detachedError(argument);
  const words = `${expected} elements for ${formatShape(view.dims)}`;
  throw shapeMismatch(`${argument}.data`, words, String(view.data.length));
}

/** The product of the sizes; RangeError where no number holds it exactly. */
export function elementCount(argument: string, dims: readonly number[]): number {
  let count = 1;
  for (let i = 0; i < dims.length; i++) count *= dims[i];
  if (count > Number.MAX_SAFE_INTEGER) {
    throw invalidValue(argument, 'at most 2^53 - 1 elements', formatShape(dims));
  }
  return count;
}

/** A shape as messages show it: [2, 8, 128, 64]. */
export function formatShape(dims: readonly (number | string)[]): string {
  return `[${dims.join(', ')}]`;
}

function copyView(type: unknown, data: unknown, dims: unknown): TensorView {
  if (typeof type !== 'string' || !TYPE_NAMES.includes(type as TensorType)) {
    throw wrongWord('type', type, TYPE_NAMES);
  }
  const view = createView('Tensor', type, data, dims);
  checkLength('Tensor', view);
  return new TensorView(view.type, copyArray(view.type, view.data), view.dims, true);
}

function createView(argument: string, type: unknown, data: unknown, dims: unknown): TensorView {
  const tag = tagOf(data);
  let code: number;
  if (tag === 'Float32Array' && (type === undefined || type === 'float32')) code = FLOAT32;
  else if (tag === 'Uint8Array' && (type === undefined || type === 'bool')) code = BOOL;
  else if (tag === 'Uint16Array' && type === 'float16') code = FLOAT16;
  else if (tag === 'Uint16Array' && type === 'bfloat16') code = BFLOAT16;
  else if (tag === 'Float16Array' && (type === undefined || type === 'float16')) code = FLOAT16;
  else throw wrongData(argument, tag, type, data);
  const sizes = readDims(dims, argument, '.dims');
  return new TensorView(code, plainView(argument, code, data), sizes, false);
}

/** A view of the same elements whose properties nobody else can reach. */
function plainView(argument: string, code: number, data: unknown): TensorData {
  const buffer = bufferOf(data);
  checkBuffer(argument, buffer);
  return viewOf(code, buffer, byteOffsetOf(data), lengthOf(data));
}

function viewOf(code: number, buffer: ArrayBufferLike, offset: number, length: number): TensorData {
  if (code === FLOAT32) return new Float32Array(buffer, offset, length);
  if (code === BOOL) return new Uint8Array(buffer, offset, length);
  return new Uint16Array(buffer, offset, length); // bit patterns, of a Float16Array too
}

// What an array is, asked of itself and not of the properties that a caller may have put before
// its own: whatever realm or subclass it is of.
const ARRAY_PROPERTIES = Object.getOwnPropertyDescriptors(
  Object.getPrototypeOf(Uint8Array.prototype),
) as Record<PropertyKey, PropertyDescriptor>;
const tagOf = getterOf<string | undefined>(Symbol.toStringTag); // undefined for all but arrays
const bufferOf = getterOf<ArrayBufferLike>('buffer');
const byteOffsetOf = getterOf<number>('byteOffset');
const lengthOf = getterOf<number>('length');

function getterOf<T>(name: PropertyKey): (array: unknown) => T {
  const getter = ARRAY_PROPERTIES[name].get as () => T;
  return (array) => getter.call(array);
}

/** The elements of an Int32Array in an array of our own; null for all else. */
export function copyInt32Array(value: unknown): Int32Array | null {
  if (tagOf(value) !== 'Int32Array') return null;
  const length = lengthOf(value); // 0 where it is detached
  const copy = allocateInt32(length);
  if (length > 0) copy.set(new Int32Array(bufferOf(value), byteOffsetOf(value), length));
  return copy;
}

function wrongData(argument: string, tag: string | undefined, type: unknown, data: unknown): Error {
  if (tag === 'Uint16Array' && type === undefined) {
    return invalidType(`${argument}.type`, '"float16" or "bfloat16" for Uint16Array data', 'none');
  }
  if (type !== undefined && !TYPE_NAMES.includes(type as TensorType)) {
    return wrongWord(`${argument}.type`, type, TYPE_NAMES);
  }
  const arrays = ['Float32Array', 'Uint16Array', 'Uint16Array', 'Uint8Array'];
  const expected =
    type === undefined
      ? 'a Float32Array, Uint16Array or Uint8Array'
      : `a ${arrays[TYPE_NAMES.indexOf(type as TensorType)]} for type "${type}"`;
  return invalidType(`${argument}.data`, expected, describe(data));
}

/** Newer properties of buffers than the type library knows. */
interface BufferState {
  readonly resizable?: boolean;
  readonly growable?: boolean;
}

/** An array that is detached is refused, and one whose length may change while it is computed on. */
function checkBuffer(argument: string, buffer: ArrayBufferLike & BufferState): void {
  if (isDetached(buffer)) throw detachedError(argument);
  if (buffer.resizable === true || buffer.growable === true) {
    const kind = buffer.resizable === true ? 'resizable' : 'growable';
    throw invalidType(`${argument}.data`, 'a buffer of fixed length', `a ${kind} one`);
  }
}

function detachedError(argument: string): Error {
  return invalidType(`${argument}.data`, 'an attached buffer', 'a detached one');
}

function isDetached(buffer: ArrayBufferLike): boolean {
  if (buffer.byteLength !== 0) return false;
  try {
    new Uint8Array(buffer); // a detached buffer refuses new views
    return false;
  } catch {
    return true;
  }
}

/** A copy of a shape, each size checked; errors name `argument` and `property`. */
export function readDims(dims: unknown, argument: string, property = ''): number[] {
  if (!Array.isArray(dims)) {
    throw invalidType(argument + property, 'an array of integers', describe(dims));
  }
  const rank = dims.length;
  if (rank > MOST_AXES) {
    throw invalidValue(argument + property, `at most ${MOST_AXES} sizes`, String(rank));
  }
  const copy: number[] = [];
  for (let i = 0; i < rank; i++) {
    const size: unknown = dims[i];
    if (typeof size !== 'number' || !(size >= 1 && size <= LARGEST_DIM) || size % 1 !== 0) {
      throw wrongDim(`${argument}${property}[${i}]`, size);
    }
    copy.push(size);
  }
  return copy;
}

function wrongDim(argument: string, size: unknown): Error {
  const expected = `an integer from 1 to ${LARGEST_DIM}`;
  return typeof size === 'number'
    ? invalidValue(argument, expected, describe(size))
    : invalidType(argument, expected, describe(size));
}
