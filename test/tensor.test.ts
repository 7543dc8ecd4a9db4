// Tensors: what they copy, hold and give back, and what they refuse.
import { inspect } from 'node:util';
import { describe, expect, test } from 'vitest';
import { scaledDotProductAttentionSync, Tensor, type TensorType } from '../lib/index';

describe('Tensor', () => {
  test.each([
    ['float32', Float32Array.of(1.5, -2, 0, 4, 5, 6), [1.5, -2, 0, 4, 5, 6]],
    [
      'float16',
      Uint16Array.of(0x3c00, 0xc000, 0, 0x7c00, 1, 0x8001),
      [1, -2, 0, Infinity, 2 ** -24, -(2 ** -24)],
    ],
    [
      'bfloat16',
      Uint16Array.of(0x3f80, 0xc000, 0, 0x7f80, 0x4049, 0xff80),
      [1, -2, 0, Infinity, 3.140625, -Infinity],
    ],
    ['bool', Uint8Array.of(1, 0, 1, 1, 0, 0), [1, 0, 1, 1, 0, 0]],
  ] as const)('%s holds a copy, and gives numbers', async (type, source, values) => {
    const before = source.slice();
    const tensor = new Tensor(type, source, [2, 3]);
    source.fill(0);
    expect(tensor.type).toBe(type);
    expect(tensor.dims).toEqual([2, 3]);
    expect(tensor.shape).toEqual([2, 3]);
    expect(tensor.location).toBe('cpu');
    expect(tensor.data).toEqual(before);
    expect(tensor.data.constructor).toBe(source.constructor);
    expect(await tensor.getData()).toBe(tensor.data);
    const floats = tensor.toFloat32Array();
    expect([...floats]).toEqual(values);
    expect(floats.buffer).toBeInstanceOf(ArrayBuffer);
    expect(await tensor.to('cpu')).toBe(tensor);
  });

  test('takes a view into the middle of a buffer', () => {
    const source = Float32Array.of(1, 2, 3, 4);
    expect([...new Tensor('float32', source.subarray(1, 3), [2]).data]).toEqual([2, 3]);
  });

  test('takes a scalar shape and a rank up to 8', () => {
    expect(new Tensor('float32', new Float32Array(1), []).dims).toEqual([]);
    expect(new Tensor('float32', new Float32Array(2), [1, 1, 1, 2, 1, 1, 1, 1]).dims).toHaveLength(
      8,
    );
  });

  test('keeps a shape of its own', () => {
    const dims = [2, 3];
    const tensor = new Tensor('float32', new Float32Array(6), dims);
    dims[0] = 9;
    expect(tensor.dims).toEqual([2, 3]);
    expect(() => (tensor.dims as number[]).push(1)).toThrow(TypeError);
  });

  test('takes a Float16Array where the runtime has one', () => {
    const make = (globalThis as { Float16Array?: Float32ArrayConstructor }).Float16Array;
    if (!make) return;
    const tensor = new Tensor('float16', make.of(1, -2) as never, [2]);
    expect(tensor.data).toEqual(Uint16Array.of(0x3c00, 0xc000));
  });

  test('goes into a call as input, boolean mask and explicit decisions', () => {
    const ones = new Tensor('float32', new Float32Array(8).fill(1), [1, 1, 4, 2]);
    const attnMask = new Tensor('bool', Uint8Array.of(1, 1, 0, 0), [4]);
    const keep = Uint8Array.from({ length: 16 }, (_, at) => (at % 4 === 0 ? 1 : 0));
    const keepMask = new Tensor('bool', keep, [1, 1, 4, 4]);
    const options = { attnMask, keepMask, dropoutP: 0.25, training: true };
    const output = scaledDotProductAttentionSync(ones, ones, ones, options);
    // Two keys are seen with half the weight each; the first is kept, and rescaled by 4 / 3.
    for (const x of output.data) expect(x).toBeCloseTo(2 / 3, 6);
  });

  test('cannot be detached', () => {
    const { buffer } = new Tensor('float32', new Float32Array(4), [4]).data;
    expect(() => structuredClone(buffer, { transfer: [buffer as ArrayBuffer] })).toThrow();
  });

  test('shows itself in short', () => {
    const tensor = new Tensor('float32', new Float32Array(6), [2, 3]);
    expect(inspect(tensor)).toBe('Tensor(float32, [2, 3])');
    tensor.dispose();
    expect(inspect(tensor)).toContain('disposed');
  });

  test('is refused after dispose(), which may come twice, also through `using`', async () => {
    const tensor = new Tensor('float32', new Float32Array(6), [1, 1, 2, 3]);
    tensor[Symbol.dispose]();
    tensor.dispose();
    const disposed = { code: 'ERR_SDPA_DISPOSED' };
    expect(() => tensor.data).toThrow(expect.objectContaining(disposed));
    expect(() => tensor.toFloat32Array()).toThrow(expect.objectContaining(disposed));
    await expect(tensor.getData()).rejects.toMatchObject(disposed);
    await expect(tensor.to('cpu')).rejects.toMatchObject(disposed);
    expect(() => scaledDotProductAttentionSync(tensor, tensor, tensor)).toThrow(
      expect.objectContaining(disposed),
    );
  });

  test('moves to cuda only where there is one', async () => {
    const tensor = new Tensor('float32', new Float32Array(1), [1]);
    await expect(tensor.to('cuda')).rejects.toMatchObject({ code: 'ERR_SDPA_BACKEND_UNAVAILABLE' });
    await expect(tensor.to('tpu' as 'cpu')).rejects.toMatchObject({
      code: 'ERR_SDPA_INVALID_ARG_VALUE',
    });
  });
});

describe('refused', () => {
  const resizable = new (ArrayBuffer as unknown as new (n: number, o: object) => ArrayBuffer)(8, {
    maxByteLength: 16,
  });
  const detached = new Float32Array(2);
  structuredClone(detached.buffer, { transfer: [detached.buffer] });
  const floats = new Float32Array(2);

  const INVALID_TYPE = 'ERR_SDPA_INVALID_ARG_TYPE';
  const INVALID_VALUE = 'ERR_SDPA_INVALID_ARG_VALUE';
  test.each<[string, unknown, unknown, unknown, string, string]>([
    ['an unknown type', 'float64', floats, [2], INVALID_VALUE, 'type'],
    ['a type that is no string', 3, floats, [2], INVALID_TYPE, 'type'],
    ['an array', 'float32', [1, 2], [2], INVALID_TYPE, 'a Float32Array for type "float32"'],
    ['a Float64Array', 'float32', new Float64Array(2), [2], INVALID_TYPE, 'got Float64Array(2)'],
    ['an unfitting type', 'float16', floats, [2], INVALID_TYPE, 'a Uint16Array for type "float16"'],
    ['no dims', 'float32', floats, undefined, INVALID_TYPE, 'dims'],
    ['a fraction', 'float32', floats, [2.5], INVALID_VALUE, 'dims[0]'],
    ['zero', 'float32', floats, [2, 0], INVALID_VALUE, 'dims[1]'],
    ['a text', 'float32', floats, ['2'], INVALID_TYPE, 'dims[0]'],
    ['2^31', 'float32', floats, [2 ** 31], INVALID_VALUE, '2147483647'],
    ['NaN', 'float32', floats, [Number.NaN], INVALID_VALUE, 'got NaN'],
    ['a rank of 9', 'float32', floats, [2, 1, 1, 1, 1, 1, 1, 1, 1], INVALID_VALUE, 'at most 8'],
    ['too few elements', 'float32', floats, [3], 'ERR_SDPA_SHAPE_MISMATCH', '3 elements'],
    ['a product too large', 'float32', floats, [2 ** 30, 2 ** 30], INVALID_VALUE, '2^53'],
    ['a resizable buffer', 'float32', new Float32Array(resizable), [2], INVALID_TYPE, 'resizable'],
    ['a detached buffer', 'float32', detached, [2], INVALID_TYPE, 'detached'],
  ])('%s', (_, type, data, dims, code, fragment) => {
    const make = () => new Tensor(type as TensorType, data as Float32Array, dims as number[]);
    expect(make).toThrow(expect.objectContaining({ code }));
    expect(make).toThrow(code === INVALID_TYPE ? TypeError : RangeError);
    expect(make).toThrow(fragment);
  });
});
