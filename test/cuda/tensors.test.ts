// Tensors on a GPU: they go there and come back, calls leave results with them, and memory is given
// back when it should be.
import { inspect } from 'node:util';
import { afterEach, describe, expect, test } from 'vitest';
import {
  type AttentionOptions,
  attentionForward,
  attentionForwardSync,
  backendInfo,
  KVCache,
  mergeAttention,
  scaledDotProductAttention,
  scaledDotProductAttentionSync,
  Tensor,
} from '../../lib/index';
import { code, usedBytes, wave, waves } from './gpu';

const DROPOUT = { dropoutP: 0.3, training: true, seed: 4 } as const;

afterEach(() => {
  expect([usedBytes(0), usedBytes(1)], 'memory that nobody gave back').toEqual([0, 0]);
});

function dispose(...tensors: (Tensor | undefined)[]): void {
  for (const tensor of tensors) tensor?.dispose();
}

async function move(tensors: readonly Tensor[], to: 'cuda' | 'cuda:1' = 'cuda'): Promise<Tensor[]> {
  return Promise.all(tensors.map((tensor) => tensor.to(to)));
}

describe('a tensor', () => {
  test.each([
    ['float32', Float32Array.of(1, -2, 3.5)],
    ['float16', Uint16Array.of(0x3c00, 0xc000, 0x7c00)],
    ['bfloat16', Uint16Array.of(0x3f80, 0xc000, 0x4060)],
    ['bool', Uint8Array.of(1, 0, 1)],
  ] as const)('of %s goes to a GPU and comes back the same', async (type, data) => {
    const home = new Tensor(type, data, [3]);
    const there = await home.to('cuda');
    expect([there.type, there.dims, there.location]).toEqual([type, [3], 'cuda']);
    expect(await there.getData()).toEqual(data);
    expect(there.toFloat32Array()).toEqual(home.toFloat32Array());
    const back = await there.to('cpu');
    expect(back.location).toBe('cpu');
    expect(back.data).toEqual(data);
    dispose(there);
  });

  test('larger than the buffers that copies go through arrives whole', async () => {
    const home = wave(5, [1, 3, 1000, 1000]); // 12 MB; a buffer has 4 MiB
    const there = await home.to('cuda');
    expect(Buffer.compare(bytes(await there.getData()), bytes(home.data))).toBe(0);
    dispose(there);
  });

  test('goes from one GPU to another', async () => {
    const home = wave(1);
    const first = await home.to('cuda');
    const second = await first.to('cuda:1');
    expect([first.location, second.location]).toEqual(['cuda', 'cuda:1']);
    expect(usedBytes(1)).toBeGreaterThan(0);
    expect(await second.getData()).toEqual(home.data);
    expect(await second.to('cuda:1')).toBe(second);
    expect(await first.to('cuda:0' as 'cuda')).toBe(first);
    dispose(first, second);
  });

  test('shows its place, and its elements only by getData()', async () => {
    const there = await wave(1).to('cuda');
    expect(() => there.data).toThrow(code('WRONG_LOCATION'));
    expect(() => there.data).toThrow('data: expected a tensor in host memory');
    expect(inspect(there)).toBe('Tensor(float32, [1, 2, 9, 8], cuda)');
    dispose(there);
  });

  test('cannot be used after dispose()', async () => {
    const there = await wave(1).to('cuda');
    dispose(there, there);
    await expect(there.getData()).rejects.toEqual(code('DISPOSED'));
    await expect(there.to('cpu')).rejects.toEqual(code('DISPOSED'));
    expect(() => there.toFloat32Array()).toThrow(code('DISPOSED'));
    expect(() => scaledDotProductAttentionSync(there, there, there)).toThrow(code('DISPOSED'));
  });

  test.each([
    ['cuda:2', 'BACKEND_UNAVAILABLE', 'cuda:2: there are 2 GPUs, numbered from 0'],
    ['cuda:x', 'INVALID_ARG_VALUE', 'location: expected "cpu", "cuda"'],
    ['gpu', 'INVALID_ARG_VALUE', 'location: expected "cpu", "cuda"'],
  ])('does not go to %s', async (location, name, message) => {
    const moved = wave(1).to(location as 'cuda');
    await expect(moved).rejects.toEqual(code(name));
    await expect(moved).rejects.toThrow(message);
  });
});

function bytes(data: ArrayBufferView): Uint8Array {
  return new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
}

describe('a call on tensors of a GPU', () => {
  const bias = wave(7, [1, 1, 9, 9]);
  const cases: [string, AttentionOptions][] = [
    ['plain', {}],
    ['causal, with dropout', { isCausal: true, ...DROPOUT }],
    ['of the second GPU', { isCausal: true }],
    ['with every output', { outputs: ['scores', 'weights', 'droppedWeights'], ...DROPOUT }],
    [
      'with lengths and offsets',
      { kvLengths: Int32Array.of(5), causalOffset: [-2], isCausal: true },
    ],
    ['with a bias', { attnMask: bias }],
  ];

  test.each(cases)('%s leaves results there, with the bits of arrays', async (name, options) => {
    const to = name.includes('second') ? 'cuda:1' : 'cuda';
    const [query, key, value, gradOutput] = waves();
    const arrays = attentionForwardSync(query, key, value, { ...options, backend: to });
    const wanted = { ...arrays, ...arrays.backwardSync(gradOutput) };
    const [q, k, v, g] = await move([query, key, value, gradOutput], to);
    const mask = options.attnMask === undefined ? undefined : await bias.to(to);
    const there = mask === undefined ? options : { ...options, attnMask: mask };
    for (const isSync of [true, false]) {
      const result = isSync
        ? attentionForwardSync(q, k, v, there)
        : await attentionForward(q, k, v, there);
      expect(result.backend).toBe(to);
      const gradients = isSync ? result.backwardSync(g) : await result.backward(g);
      for (const [part, tensor] of Object.entries({ ...result, ...gradients })) {
        if (!(tensor instanceof Tensor)) continue;
        expect(tensor.location, part).toBe(to);
        const home = wanted[part as 'output'];
        expect([tensor.type, tensor.dims], part).toEqual([home.type, home.dims]);
        expect(await tensor.getData(), part).toEqual(home.data);
        dispose(tensor);
      }
      result.dispose();
    }
    dispose(q, k, v, g, mask);
  });

  test.each([true, false])('writes into `out` there (sync: %s)', async (isSync) => {
    const [q, k, v, out] = await move(waves());
    const options = { out, backend: 'cuda' } as const;
    const output = isSync
      ? scaledDotProductAttentionSync(q, k, v, options)
      : await scaledDotProductAttention(q, k, v, options);
    expect(output).toBe(out);
    const home = scaledDotProductAttentionSync(...triple(), { backend: 'cuda' });
    expect(await out.getData()).toEqual(home.data);
    expect(() => scaledDotProductAttentionSync(q, k, v, { out: q })).toThrow('an overlap');
    dispose(q, k, v, out);
  });

  test('samples and their moments stay there', async () => {
    const [q, k, v] = await move(triple());
    const options = { ...DROPOUT, samples: 3 } as const;
    const home = attentionForwardSync(...triple(), { ...options, backend: 'cuda', moments: true });
    const there = await attentionForward(q, k, v, { ...options, moments: true });
    expect(await there.mean.getData()).toEqual(home.mean.data);
    expect(await there.variance.getData()).toEqual(home.variance.data);
    dispose(q, k, v, there.mean, there.variance, there.lse);
  });

  test('packed batches too', async () => {
    const packed = wave(1, [9, 2, 8]);
    const starts = Int32Array.of(0, 4, 4, 9);
    const options = { cuSeqlens: { query: starts, key: starts }, isCausal: true };
    const home = attentionForwardSync(packed, packed, packed, { ...options, backend: 'cuda' });
    const gradients = home.backwardSync(home.output);
    const there = await packed.to('cuda');
    const result = attentionForwardSync(there, there, there, options);
    const moved = result.backwardSync(result.output);
    expect(await result.output.getData()).toEqual(home.output.data);
    expect(await result.lse.getData()).toEqual(home.lse.data);
    expect(await moved.gradKey.getData()).toEqual(gradients.gradKey.data);
    dispose(there, result.output, result.lse, ...Object.values(moved));
    result.dispose();
  });

  test('needs all of them there', async () => {
    const [query, key, value, gradOutput] = waves();
    const [q, k, v] = await move([query, key, value]);
    const [other] = await move([key], 'cuda:1');
    const mask = wave(1, [9, 9]);
    const wrong = (work: () => unknown, message: string) => {
      expect(work).toThrow(code('WRONG_LOCATION'));
      expect(work).toThrow(message);
    };
    const run = (options?: AttentionOptions) => () => attentionForwardSync(q, k, v, options);
    wrong(() => attentionForwardSync(q, key, v), 'key: expected a tensor on cuda, as query');
    wrong(() => attentionForwardSync(query, k, value), 'key: expected a tensor on cpu, as query');
    wrong(() => attentionForwardSync(q, other, v), 'got one on cuda:1');
    wrong(run({ attnMask: mask }), 'attnMask: expected a tensor on cuda');
    wrong(run({ out: wave(0) }), 'out: expected a tensor on cuda');
    wrong(run({ backend: 'cpu' }), 'backend: expected "cuda" or "auto"');
    wrong(run({ backend: 'js' }), 'backend: expected "cuda" or "auto"');
    wrong(run({ backend: 'cuda:1' }), 'backend: expected "cuda" or "auto"');
    expect(run({ backend: 'tpu' as 'cuda' })).toThrow(code('INVALID_ARG_VALUE'));
    const result = attentionForwardSync(q, k, v);
    wrong(() => result.backwardSync(gradOutput), 'gradOutput: expected a tensor on cuda');
    const { output, lse } = result;
    wrong(() => mergeAttention([{ output, lse }]), 'parts[0].output: expected a tensor on cpu');
    using cache = new KVCache({ kvHeads: 2, headDim: 8, maxLength: 16 });
    wrong(() => cache.append(k, v), 'key: expected a tensor on cpu');
    cache.append(key, value);
    wrong(() => cache.attendSync(q), 'query: expected a tensor on cpu');
    result.dispose();
    dispose(q, k, v, other, output, lse);
  });
});

function triple(): [Tensor, Tensor, Tensor] {
  const [query, key, value] = waves();
  return [query, key, value];
}

describe('memory', () => {
  test('of inputs may be given up before backward, and during a call', async () => {
    const [query, key, value, gradOutput] = waves();
    const home = attentionForwardSync(query, key, value, { backend: 'cuda' });
    const wanted = home.backwardSync(gradOutput);
    const [q, k, v, g] = await move([query, key, value, gradOutput]);
    const pending = attentionForward(q, k, v);
    dispose(q, k, v);
    const result = await pending;
    dispose(result.output, result.lse);
    const gradients = result.backward(g);
    result.dispose();
    result.dispose();
    dispose(g);
    const { gradQuery, gradKey, gradValue } = await gradients;
    expect(await gradKey.getData()).toEqual(wanted.gradKey.data);
    dispose(gradQuery, gradKey, gradValue);
    await expect(result.backward(gradOutput)).rejects.toEqual(code('DISPOSED'));
  });

  test('that is given back serves the next call', async () => {
    const [gpu] = backendInfo().gpus;
    const there = await wave(1, [1, 1, 100, 100]).to('cuda');
    dispose(there);
    const after = backendInfo().gpus[0].cachedBytes;
    expect(after).toBeGreaterThanOrEqual(gpu.cachedBytes);
    dispose(await wave(2, [1, 1, 100, 100]).to('cuda'));
    expect(backendInfo().gpus[0].cachedBytes).toBe(after);
  });
});
