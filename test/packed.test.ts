// Packed batches (cuSeqlens): every sequence is what it is alone, and what a padded batch gives.
import { describe, expect, test } from 'vitest';
import {
  type AttentionOptions,
  attentionForward,
  attentionForwardSync,
  scaledDotProductAttention,
  scaledDotProductAttentionSync,
  Tensor,
} from '../lib/index';
import { randomTensor, swapAxes } from './cases';
import {
  BACKENDS,
  type Call,
  expectBounded,
  expected,
  expectSame,
  NATIVE_BACKENDS,
  numbers,
  publicOptions,
  type Runner,
  representable,
  runner,
  stored,
  withThreads,
} from './harness';
import { PLACEMENTS, type ReferenceOptions, type ReferenceTensor, type Storage } from './reference';

const [heads, kvHeads, headDim, valueDim] = [4, 2, 24, 16];

/** Queries and keys of each sequence. */
type Lengths = readonly (readonly [queries: number, keys: number])[];

interface Batch {
  readonly lengths: Lengths;
  readonly options: ReferenceOptions;
  readonly type: Storage;
  /** Each sequence as a call of its own; null where it has no queries or no keys. */
  readonly calls: readonly (Call | null)[];
  readonly query: ReferenceTensor;
  readonly key: ReferenceTensor;
  readonly value: ReferenceTensor;
  readonly gradOutput: ReferenceTensor;
}

const NAMES = ['query', 'key', 'value', 'gradOutput'] as const;

function batchOf(lengths: Lengths, options: ReferenceOptions, type: Storage = 'float32'): Batch {
  const tensors = lengths.map(([queries, keys], b) => ({
    query: randomTensor(10 * b + 1, [1, heads, queries, headDim]),
    key: randomTensor(10 * b + 2, [1, kvHeads, keys, headDim]),
    value: randomTensor(10 * b + 3, [1, kvHeads, keys, valueDim]),
    gradOutput: randomTensor(10 * b + 4, [1, heads, queries, valueDim]),
  }));
  const rounded = tensors.map((t) => representable({ ...t, options: {}, type }));
  const calls = lengths.map(([queries, keys], b) => {
    const own = ownOptions(options, b);
    return queries * keys === 0 ? null : { ...rounded[b], options: own, type };
  });
  const packed = Object.fromEntries(
    NAMES.map((name) => {
      const parts = rounded.map((t) => swapAxes(t[name] as ReferenceTensor));
      const data = Float64Array.from(parts.flatMap((part) => Array.from(part.data)));
      const [, , rows, width] = parts[0].dims;
      return [name, { data, dims: [data.length / (rows * width), rows, width] }];
    }),
  );
  return { lengths, options, type, calls, ...packed } as unknown as Batch;
}

/** What a sequence's own call is given where the batch's has one value for each. */
function ownOptions(options: ReferenceOptions, b: number): ReferenceOptions {
  const { kvLengths, causalOffset } = options;
  return {
    ...options,
    batchOffset: (options.batchOffset ?? 0) + b,
    ...(kvLengths && { kvLengths: [kvLengths[b]] }),
    ...(Array.isArray(causalOffset) && { causalOffset: causalOffset[b] }),
  };
}

function totals(lengths: readonly number[]): Int32Array {
  let total = 0;
  return Int32Array.from([0, ...lengths.map((length) => (total += length))]);
}

function argumentsOf({ query, key, value, lengths, options, type }: Batch, backend?: string) {
  const cuSeqlens = {
    query: totals(lengths.map(([queries]) => queries)),
    key: totals(lengths.map(([, keys]) => keys)),
  };
  return [
    ...[query, key, value].map((t) => stored(t, type)),
    { ...publicOptions({ query, key, value, options }), cuSeqlens, backend, enableGqa: true },
  ] as unknown as Parameters<typeof attentionForwardSync>;
}

/** What one sequence got out of a batch, in the order [heads, length, dim]. */
interface Results {
  output: Float64Array;
  lse: Float64Array;
  gradQuery: Float64Array;
  gradKey: Float64Array;
  gradValue: Float64Array;
}

function runPacked({ backend, threads }: Runner, batch: Batch): Results[] {
  const [result, gradients] = withThreads(threads, () => {
    const forward = attentionForwardSync(...argumentsOf(batch, backend));
    expect(forward.backend).toBe(backend);
    return [forward, forward.backwardSync(stored(batch.gradOutput, batch.type))] as const;
  });
  const [starts, keyStarts] = [0, 1].map((i) => totals(batch.lengths.map((l) => l[i])));
  const total = starts[batch.lengths.length];
  expect(result.output.dims).toEqual([total, heads, valueDim]);
  expect(result.lse.dims).toEqual([heads, total]);
  expect(gradients.gradQuery.dims).toEqual(batch.query.dims);
  expect(gradients.gradKey.dims).toEqual(batch.key.dims);
  expect(gradients.gradValue.dims).toEqual(batch.value.dims);
  const own = (tensor: Tensor, from: number, to: number) => {
    const [, rows, width] = tensor.dims;
    const data = numbers(tensor).slice(from * rows * width, to * rows * width);
    return swapAxes({ data, dims: [1, to - from, rows, width] }).data;
  };
  return batch.lengths.map((_, b) => {
    const [from, to] = [starts[b], starts[b + 1]];
    const rows = Array.from({ length: heads }, (_, head) =>
      Array.from(result.lse.data.slice(head * total + from, head * total + to)),
    );
    return {
      output: own(result.output, from, to),
      lse: Float64Array.from(rows.flat()),
      gradQuery: own(gradients.gradQuery, from, to),
      gradKey: own(gradients.gradKey, keyStarts[b], keyStarts[b + 1]),
      gradValue: own(gradients.gradValue, keyStarts[b], keyStarts[b + 1]),
    };
  });
}

/** A call of four axes, forward and backward. */
function runPlain(backend: string, call: Call): Results {
  const result = attentionForwardSync(
    stored(call.query, call.type),
    stored(call.key, call.type),
    stored(call.value, call.type),
    { ...publicOptions(call), backend: backend as AttentionOptions['backend'] },
  );
  const gradients = result.backwardSync(stored(call.gradOutput!, call.type));
  return {
    output: numbers(result.output),
    lse: numbers(result.lse),
    gradQuery: numbers(gradients.gradQuery),
    gradKey: numbers(gradients.gradKey),
    gradValue: numbers(gradients.gradValue),
  };
}

const RESULT_NAMES = ['output', 'lse', 'gradQuery', 'gradKey', 'gradValue'] as const;

/** Around the kernels for few queries, blocks, tiles and chunks; and sequences without any. */
const LENGTHS: Lengths = [
  [1, 70],
  [17, 17],
  [0, 5],
  [65, 300],
  [3, 0],
  [4, 129],
  [40, 1],
  [0, 0],
  [16, 64],
];
const KV_LENGTHS = [64, 17, 5, 250, 0, 0, 1, 0, 33];
const DROPOUT = { dropoutP: 0.3, seed: 3, offset: 8, training: true };

const VARIANTS: [string, ReferenceOptions][] = [
  ['plain', {}],
  ['causal, bottom-right', { isCausal: true, causalOffset: 'bottom-right' }],
  [
    'window, each its own diagonal, key lengths',
    {
      ...{ windowSize: [20, 3], causalOffset: LENGTHS.map((_, b) => 5 * b), softcap: 4 },
      kvLengths: KV_LENGTHS,
    },
  ],
  ...PLACEMENTS.map((dropoutPlacement): [string, ReferenceOptions] => [
    `dropout of ${dropoutPlacement}`,
    { ...DROPOUT, dropoutPlacement, isCausal: true, causalOffset: 'bottom-right' },
  ]),
  [
    'dropout shared by the batch, from an odd place',
    { ...DROPOUT, dropoutBroadcast: ['batch'], batchOffset: 5, queryOffset: 3, keyOffset: 1 },
  ],
];

describe.each<Storage>(['float32', 'float16', 'bfloat16'])('%s, against float64', (type) => {
  describe.each(VARIANTS)('%s', (_, options) => {
    const batch = batchOf(LENGTHS, options, type);
    const wanted = batch.calls.map((call) => {
      if (call === null) return null;
      const want = expected(call);
      return { output: want.output, lse: want.lse, ...want.backward(call.gradOutput!.data) };
    });

    test.each(BACKENDS)('%s', (backend) => {
      for (const [b, got] of runPacked(runner(backend, 2), batch).entries()) {
        const want = wanted[b];
        for (const name of RESULT_NAMES) {
          if (want !== null) {
            expectBounded(`${name} ${b}`, got[name], want[name]);
          } else {
            const nothing = name === 'lse' ? -Infinity : 0;
            const row = new Float64Array(got[name].length).fill(nothing);
            expectSame(`${name} ${b}`, got[name], row);
          }
        }
      }
    });
  });
});

describe.each(BACKENDS)('%s, bit for bit', (backend) => {
  test.each(VARIANTS)('each sequence as it is alone, with 1, 2 and 5 threads: %s', (_, options) => {
    const batch = batchOf(LENGTHS, options);
    const packed = runPacked(runner(backend, 2), batch);
    for (const threads of backend === 'js' ? [] : [1, 5]) {
      for (const [b, other] of runPacked(runner(backend, threads), batch).entries()) {
        for (const name of RESULT_NAMES) expectSame(`${name} ${b}`, other[name], packed[b][name]);
      }
    }
    for (const [b, call] of batch.calls.entries()) {
      if (call === null) continue;
      const alone = runPlain(backend, call);
      for (const name of RESULT_NAMES) expectSame(`${name} ${b}`, packed[b][name], alone[name]);
    }
  });

  // Few queries have a kernel of their own, chosen by their number: here all of a batch, padded
  // or not, have the same.
  const BATCHES: [string, Lengths][] = [
    [
      'few queries',
      [
        [1, 70],
        [4, 300],
        [2, 1],
        [3, 257],
      ],
    ],
    [
      'blocks of queries',
      [
        [17, 17],
        [65, 300],
        [32, 64],
        [100, 130],
        [48, 5],
      ],
    ],
  ];
  describe.each(BATCHES)('%s', (_, lengths) => {
    test.each(VARIANTS.filter(([, { kvLengths }]) => !kvLengths))('as padded: %s', (_, options) => {
      const batch = batchOf(lengths, options);
      const packed = runPacked(runner(backend, 2), batch);
      const padded = runPlain(backend, pad(batch));
      const most = [0, 1].map((i) => Math.max(...lengths.map((l) => l[i])));
      for (const [b, [queries, keys]] of lengths.entries()) {
        const rows = (name: keyof Results, planes: number, length: number, count: number) => {
          const width = padded[name].length / (lengths.length * planes * length);
          const parts = Array.from({ length: planes }, (_, plane) => {
            const from = (b * planes + plane) * length * width;
            return Array.from(padded[name].subarray(from, from + count * width));
          });
          return parts.flat();
        };
        for (const name of ['output', 'lse', 'gradQuery'] as const) {
          expectSame(`${name} ${b}`, packed[b][name], rows(name, heads, most[0], queries));
        }
        for (const name of ['gradKey', 'gradValue'] as const) {
          expectSame(`${name} ${b}`, packed[b][name], rows(name, kvHeads, most[1], keys));
        }
      }
    });
  });
});

/** The batch as one call of four axes: zeros behind each sequence, and key lengths. */
function pad({ calls, lengths, options }: Batch): Call {
  const padded = (name: (typeof NAMES)[number]): ReferenceTensor => {
    const tensors = calls.map((call) => call![name] as ReferenceTensor);
    const [, planes, , width] = tensors[0].dims;
    const most = Math.max(...tensors.map((t) => t.dims[2]));
    const data = new Float64Array(tensors.length * planes * most * width);
    for (const [b, t] of tensors.entries()) {
      const size = t.dims[2] * width;
      for (let plane = 0; plane < planes; plane++) {
        const rows = Array.from(t.data).slice(plane * size, (plane + 1) * size);
        data.set(rows, (b * planes + plane) * most * width);
      }
    }
    return { data, dims: [tensors.length, planes, most, width] };
  };
  const isBottomRight = options.causalOffset === 'bottom-right';
  return {
    query: padded('query'),
    key: padded('key'),
    value: padded('value'),
    gradOutput: padded('gradOutput'),
    options: {
      ...options,
      kvLengths: lengths.map(([, keys]) => keys),
      ...(isBottomRight && { causalOffset: lengths.map(([queries, keys]) => keys - queries) }),
    },
  };
}

describe.each(BACKENDS)('%s', (backend) => {
  test('asynchronous calls give the same, and stop', async () => {
    const batch = batchOf(LENGTHS, { ...DROPOUT, isCausal: true });
    const [query, key, value, options] = argumentsOf(batch, backend);
    const sync = attentionForwardSync(query, key, value, options);
    const result = await attentionForward(query, key, value, options);
    expectSame('output', result.output.data, sync.output.data);
    expectSame('lse', result.lse.data, sync.lse.data);
    const gradOutput = stored(batch.gradOutput);
    const gradients = await result.backward(gradOutput);
    expectSame('gradKey', gradients.gradKey.data, sync.backwardSync(gradOutput).gradKey.data);

    const controller = new AbortController();
    const stopped = scaledDotProductAttention(query, key, value, {
      ...options,
      signal: controller.signal,
    });
    controller.abort();
    await expect(stopped).rejects.toMatchObject({ code: 'ERR_SDPA_ABORTED' });
  });

  test('an output of the caller is overwritten, rows without keys too', () => {
    const batch = batchOf(LENGTHS, {});
    const [query, key, value, options] = argumentsOf(batch, backend);
    const fresh = scaledDotProductAttentionSync(query, key, value, options);
    const out = new Tensor('float32', new Float32Array(fresh.data.length).fill(7), fresh.dims);
    expect(scaledDotProductAttentionSync(query, key, value, { ...options, out })).toBe(out);
    expectSame('out', out.data, fresh.data);
  });
});

test.each(NATIVE_BACKENDS)('%s: one long sequence does not make the others long', (backend) => {
  const lengths: Lengths = [[1024, 1024], ...Array.from({ length: 31 }, () => [16, 16] as const)];
  const batch = batchOf(lengths, {});
  const padded = pad(batch);
  const plain = [padded.query, padded.key, padded.value].map((t) => stored(t));
  const options = { ...publicOptions(padded), backend } as AttentionOptions;
  const time = (work: () => unknown) => {
    work();
    const start = performance.now();
    work();
    return performance.now() - start;
  };
  const packedArguments = argumentsOf(batch, backend);
  const packedTime = time(() => scaledDotProductAttentionSync(...packedArguments));
  const paddedTime = time(() =>
    scaledDotProductAttentionSync(plain[0], plain[1], plain[2], {
      ...options,
      kvLengths: undefined,
    }),
  );
  expect(packedTime).toBeLessThan(paddedTime / 4); // by the number of products, 1 to 32
});
