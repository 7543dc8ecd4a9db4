// What only a GPU can show: masks of many positions, the same bits again and in any batch, large
// tensors, calls that overlap, and the first call's time.
import { describe, expect, test } from 'vitest';
import {
  attentionForward,
  attentionForwardSync,
  backendInfo,
  dropoutMask,
  scaledDotProductAttention,
  Tensor,
} from '../../lib/index';

const CUDA = { backend: 'cuda' } as const;
/** 1 for a dry run on the emulated plugin: every size shrinks. */
const SMALL = process.env.SDPA_TEST_SMALL === '1';
const shrink = (size: number) => (SMALL ? Math.max(1, Math.round(size / 32)) : size);

function wave(phase: number, dims: readonly number[]): Tensor {
  const length = dims.reduce((a, b) => a * b);
  const data = Float32Array.from({ length }, (_, i) => Math.sin(12.9898 * i + phase));
  return new Tensor('float32', data, dims);
}

function same(a: ArrayBufferView, b: ArrayBufferView): boolean {
  const bytes = (x: ArrayBufferView) => new Uint8Array(x.buffer, x.byteOffset, x.byteLength);
  return Buffer.compare(bytes(a), bytes(b)) === 0;
}

const DROPOUT = { dropoutP: 0.1, training: true, seed: 11, isCausal: true } as const;

describe('a GPU', () => {
  test('computes its first call', () => {
    const tensor = wave(1, [1, 1, 16, 64]);
    const start = performance.now();
    attentionForwardSync(tensor, tensor, tensor, CUDA);
    console.log(
      `first call: ${(performance.now() - start).toFixed(0)} ms (at most 300 are wanted)`,
    );
  });

  // 10^8 positions: 2 * 5 * 2500 * 4000
  test.each(['weights', 'scores'] as const)('has the mask of the CPU: %s', (placement) => {
    const dims = [2, 5, shrink(2500), shrink(4000)];
    const options = { p: 0.1, placement, seed: 5n, offset: 3n, keyOffset: 5 };
    const there = dropoutMask(dims, { ...options, ...CUDA });
    expect(there.length).toBe(dims.reduce((a, b) => a * b));
    expect(same(there, dropoutMask(dims, { ...options, backend: 'cpu' }))).toBe(true);
  });

  test('has the mask of the CPU: context', () => {
    const dims = [4, 8, shrink(24_000), 128];
    const options = { p: 0.37, placement: 'context', seed: 5n } as const;
    const there = dropoutMask(dims, { ...options, ...CUDA });
    expect(same(there, dropoutMask(dims, { ...options, backend: 'cpu' }))).toBe(true);
  });

  test.each(['float32', 'float16', 'bfloat16'] as const)(
    'gives the same bits again: %s',
    (type) => {
      const dims = [2, 4, shrink(1000), 64];
      const [query, key, value, gradOutput] = [0, 1, 2, 3].map((phase) =>
        stored(type, phase, dims),
      );
      const run = () => {
        const { output, lse, backwardSync } = attentionForwardSync(query, key, value, {
          ...DROPOUT,
          ...CUDA,
        });
        return { output, lse, ...backwardSync(gradOutput) };
      };
      const first = run();
      for (let again = 0; again < (SMALL ? 1 : 5); again++) {
        for (const [name, tensor] of Object.entries(run())) {
          expect(same(tensor.data, first[name as 'output'].data), name).toBe(true);
        }
      }
    },
  );

  test('gives an entry of a batch the bits that it has alone', () => {
    const dims = [3, 2, shrink(777), 64];
    const [query, key, value, gradOutput] = [0, 1, 2, 3].map((phase) => wave(phase, dims));
    const size = dims.slice(1).reduce((a, b) => a * b);
    const whole = attentionForwardSync(query, key, value, { ...DROPOUT, ...CUDA });
    const gradients = whole.backwardSync(gradOutput);
    for (let b = 0; b < 3; b++) {
      const part = ({ data }: Tensor) =>
        new Tensor('float32', data.slice(b * size, (b + 1) * size), [1, ...dims.slice(1)]);
      const options = { ...DROPOUT, ...CUDA, batchOffset: b };
      const alone = attentionForwardSync(part(query), part(key), part(value), options);
      const own = alone.backwardSync(part(gradOutput));
      expect(same(alone.output.data, part(whole.output).data), `output ${b}`).toBe(true);
      for (const name of ['gradQuery', 'gradKey', 'gradValue'] as const) {
        expect(same(own[name].data, part(gradients[name]).data), `${name} ${b}`).toBe(true);
      }
    }
  });

  test('takes tensors that stay there, call after call, and gives their memory back', async () => {
    const dims = [2, 8, shrink(2048), 128];
    const home = [0, 1, 2, 3].map((phase) => wave(phase, dims));
    const [q, k, v, g] = await Promise.all(home.map((tensor) => tensor.to('cuda')));
    const wanted = attentionForwardSync(home[0], home[1], home[2], { ...DROPOUT, ...CUDA });
    for (let i = 0; i < (SMALL ? 2 : 20); i++) {
      const result = await attentionForward(q, k, v, DROPOUT);
      const gradients = await result.backward(g);
      if (i === 0) expect(same(await result.output.getData(), wanted.output.data)).toBe(true);
      for (const tensor of [result.output, result.lse, ...Object.values(gradients)]) {
        (tensor as Tensor).dispose();
      }
      result.dispose();
    }
    for (const tensor of [q, k, v, g]) tensor.dispose();
    expect(backendInfo().gpus[0].usedBytes).toBe(0);
  });

  test('computes many calls at once, each with its own result', async () => {
    const dims = [1, 4, shrink(512), 64];
    const inputs = Array.from({ length: 16 }, (_, i) => wave(i, dims));
    const alone = inputs.map((t) => attentionForwardSync(t, t, t, CUDA).output.data);
    const together = await Promise.all(inputs.map((t) => scaledDotProductAttention(t, t, t, CUDA)));
    together.forEach(({ data }, i) => {
      expect(same(data, alone[i]), `call ${i}`).toBe(true);
    });
  });

  test('says when its memory is not enough, and goes on', async () => {
    const [{ memoryBytes }] = backendInfo().gpus;
    const tensor = wave(1, [1, 1, 1024, 1024]);
    const there: Tensor[] = [];
    const most = Math.ceil(memoryBytes / 2 ** 22) + 1;
    const filling = async () => {
      while (there.length < most) there.push(await tensor.to('cuda'));
    };
    if (SMALL) await expect(filling()).rejects.toMatchObject({ code: 'ERR_SDPA_OUT_OF_MEMORY' });
    else console.log('filling the memory of a real GPU is left out: others may use it');
    for (const held of there) held.dispose();
    expect((await tensor.to('cuda')).location).toBe('cuda');
  });
});

function stored(type: 'float32' | 'float16' | 'bfloat16', phase: number, dims: number[]) {
  const floats = wave(phase, dims);
  if (type === 'float32') return floats;
  const bits = new Uint32Array(Float32Array.from(floats.data).buffer);
  // Truncated to bfloat16; as float16 the same patterns, with another exponent, are other numbers.
  const halves = Uint16Array.from(bits, (word) => word >>> 16);
  return new Tensor(type, type === 'float16' ? halves.map(toSmallFloat16) : halves, dims);
}

function toSmallFloat16(bits: number): number {
  return (bits & 0x83ff) | 0x3800;
}
