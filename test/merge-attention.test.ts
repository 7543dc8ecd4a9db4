// Parts of the keys, joined, are the whole: against attention in float64 over all keys.
import { describe, expect, test } from 'vitest';
import { type AttentionPart, mergeAttention, type TensorLike } from '../lib/index';
import { randomNormals, randomTensor, swapAxes, uniform } from './cases';
import { roundToHalf } from './half';
import {
  BACKENDS,
  type Call,
  expectBounded,
  expected,
  expectSame,
  forward,
  type Layout,
  logical,
  namedCall,
  numbers,
  stored,
} from './harness';
import { PLACEMENTS, type ReferenceOptions, type ReferenceTensor } from './reference';

const [batch, heads, kvHeads, queries, keys] = [2, 4, 2, 21, 90];
const shape = [batch, heads, kvHeads, queries, keys, 16, 24] as const;

const VARIANTS: [string, ReferenceOptions][] = [
  ['plain', {}],
  ['causal window', { isCausal: true, causalOffset: 40, windowSize: [30, -1] }],
  ...PLACEMENTS.map((dropoutPlacement): [string, ReferenceOptions] => [
    `dropout of ${dropoutPlacement}`,
    { dropoutP: 0.4, dropoutPlacement, seed: 5, offset: 9, isCausal: true, causalOffset: 30 },
  ]),
];

/** Where keys are cut: from one part to one part a key, at places that a seed chooses. */
function randomCuts(seed: number, parts: number): number[] {
  const next = uniform(seed);
  const inner = Array.from({ length: parts - 1 }, () => 1 + Math.floor(next() * (keys - 1)));
  return [...new Set([0, ...inner, keys])].sort((a, b) => a - b);
}

/** The call over keys `from` to `to` alone. */
function part(call: Call, from: number, to: number): Call {
  const cut = ({ data, dims }: ReferenceTensor): ReferenceTensor => {
    const width = dims[3];
    const rows = Array.from({ length: dims[0] * dims[1] }, (_, plane) =>
      Array.from(data).slice((plane * keys + from) * width, (plane * keys + to) * width),
    );
    return { data: rows.flat(), dims: [dims[0], dims[1], to - from, width] };
  };
  const options = { ...call.options, keyOffset: (call.options.keyOffset ?? 0) + from };
  return { ...call, key: cut(call.key), value: cut(call.value), options };
}

describe.each(BACKENDS)('%s, against the whole in float64', (backend) => {
  describe.each(VARIANTS)('%s', (_, options) => {
    const call = namedCall({ name: '', seed: 41, shape, options });
    const want = expected(call);

    test.each([1, 2, 3, 7, 60])('%i parts at random places', (count) => {
      const cuts = randomCuts(count, count);
      const parts = cuts
        .slice(1)
        .map((to, i) => forward(backend, part(call, cuts[i], to)) as AttentionPart);
      const { output, lse } = mergeAttention(parts);
      // A part errs by no more than the whole; its lse enters twice more, as power and in the sum.
      const looser = (name: 'output' | 'lse') => want[name].error.map((x) => 3 * x);
      expectBounded('output', numbers(output), { ...want.output, error: looser('output') });
      expectBounded('lse', numbers(lse), { ...want.lse, error: looser('lse') });
    });
  });

  test.each<Layout>(['bhsd', 'bshd'])('in layout %s', (layout) => {
    const call = { ...namedCall({ name: '', seed: 43, shape, options: {} }), layout };
    const parts = [0, 30, 60].map((from) => forward(backend, part(call, from, from + 30)));
    const { output } = mergeAttention(parts, { layout });
    const want = expected(call).output;
    expectBounded('output', logical(output, layout), {
      ...want,
      error: want.error.map((x) => 3 * x),
    });
  });
});

/** Merged by the definition, in float64. */
function merged(outputs: ArrayLike<number>[], lses: ArrayLike<number>[], width: number) {
  const rows = lses[0].length;
  return Float64Array.from({ length: rows * width }, (_, at) => {
    const row = Math.floor(at / width);
    const powers = lses.map((lse) => Math.exp(lse[row]));
    const sum = powers.reduce((a, x) => a + x, 0);
    return powers.reduce((total, x, i) => total + (x / sum) * outputs[i][at], 0);
  });
}

describe('tensors that came from elsewhere', () => {
  const dims = [2, 3, 5, 7];
  const lse = (seed: number) => ({
    data: Float32Array.from(randomNormals(seed, 30)),
    dims: [2, 3, 5],
  });

  test.each(['float16', 'bfloat16'] as const)('%s is rounded once', (type) => {
    const parts = [1, 2, 3].map((seed) => {
      const { data } = randomTensor(seed, dims);
      return { output: stored({ data, dims }, type), lse: lse(seed + 10), data };
    });
    const rounded = parts.map(({ data }) => data.map((x) => roundToHalf(type, x)));
    const { output } = mergeAttention(parts);
    expect(output.type).toBe(type);
    const exact = merged(
      rounded,
      parts.map((p) => p.lse.data),
      7,
    );
    const unit = type === 'float16' ? 2 ** -11 : 2 ** -8;
    const error = exact.map((x) => unit * 1.0001 * Math.abs(x) + 2 ** -25);
    expectBounded('output', numbers(output), { values: exact, error });
  });

  test('the layout bshd has the rows of the other, in its order', () => {
    const parts = [4, 5].map((seed) => ({ ...randomTensor(seed, dims), lse: lse(seed) }));
    const plain = mergeAttention(parts.map((p) => ({ output: stored(p), lse: p.lse })));
    const turned = mergeAttention(
      parts.map((p) => ({ output: stored(swapAxes(p)), lse: p.lse })),
      { layout: 'bshd' },
    );
    expect(turned.output.dims).toEqual([2, 5, 3, 7]);
    expectSame('output', logical(turned.output, 'bshd'), numbers(plain.output));
    expectSame('lse', turned.lse.data, plain.lse.data);
  });

  test('a packed batch is a bshd one without its batch', () => {
    const parts = [6, 7].map((seed) => ({
      output: stored(randomTensor(seed, [5, 3, 7])),
      lse: { data: lse(seed).data.slice(0, 15), dims: [3, 5] },
    }));
    const packed = mergeAttention(parts);
    const whole = mergeAttention(
      parts.map((p) => ({
        output: { data: p.output.data as Float32Array, dims: [1, 5, 3, 7] },
        lse: { ...p.lse, dims: [1, 3, 5] },
      })),
      { layout: 'bshd' },
    );
    expect(packed.output.dims).toEqual([5, 3, 7]);
    expect(packed.lse.dims).toEqual([3, 5]);
    expectSame('output', packed.output.data, whole.output.data);
  });

  test('lse far beyond the range of exp', () => {
    const row = (output: number, lse: number) => ({
      output: { data: Float32Array.of(output), dims: [1, 1, 1, 1] },
      lse: { data: Float32Array.of(lse), dims: [1, 1, 1] },
    });
    const { output, lse } = mergeAttention([row(1, 1e4), row(5, 1e4), row(9, -1e4)]);
    expect(output.data[0]).toBe(3);
    expect(lse.data[0]).toBe(Math.fround(1e4 + Math.log(2)));
  });
});

describe('special values', () => {
  const tensor = (data: number[], dims: number[]): TensorLike => ({
    data: Float32Array.from(data),
    dims,
  });
  /** Three rows of one head, two channels. */
  const rows = (output: number[], lse: number[]): AttentionPart => ({
    output: tensor(output, [1, 1, 3, 2]),
    lse: tensor(lse, [1, 1, 3]),
  });

  test('a part without keys adds nothing, whatever it holds', () => {
    const none = rows([NaN, Infinity, 7, 7, NaN, 1], [-Infinity, -Infinity, -Infinity]);
    const some = rows([1, 2, 3, 4, 5, 6], [0, 1, -Infinity]);
    const { output, lse } = mergeAttention([none, some]);
    expect([...output.data]).toEqual([1, 2, 3, 4, 0, 0]);
    expect([...lse.data]).toEqual([0, 1, -Infinity]);
  });

  test('NaN stays where it is', () => {
    const a = rows([NaN, 2, 1, 1, 1, 1], [0, 0, NaN]);
    const b = rows([4, 4, 3, 3, 3, 3], [0, 0, 0]);
    const { output, lse } = mergeAttention([a, b]);
    expect([...output.data]).toEqual([NaN, 3, 2, 2, NaN, NaN]);
    expect([...lse.data]).toEqual([Math.fround(Math.log(2)), Math.fround(Math.log(2)), NaN]);
  });

  test('the parts are left as they are', () => {
    const a = rows([1, 2, 3, 4, 5, 6], [0, 0, 0]);
    const { output } = mergeAttention([a]);
    (output.data as Float32Array).fill(9);
    expect([...(a.output.data as Float32Array)]).toEqual([1, 2, 3, 4, 5, 6]);
  });
});
