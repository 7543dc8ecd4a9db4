// Key/value caches: against float64, bit for bit against attention on the same keys in one piece,
// and against a model that keeps every sequence apart while sequences grow, are cut and forked.
import { describe, expect, test } from 'vitest';
import {
  type AttendOptions,
  type AttentionOptions,
  attentionForwardSync,
  KVCache,
  KVCachePool,
  scaledDotProductAttentionSync,
  Tensor,
} from '../lib/index';
import { randomNormals, randomTensor, swapAxes, uniform } from './cases';
import { roundToHalf } from './half';
import {
  BACKENDS,
  expectBounded,
  expectSame,
  numbers,
  publicOptions,
  stored,
  withThreads,
} from './harness';
import {
  PLACEMENTS,
  type ReferenceOptions,
  type ReferenceTensor,
  reference,
  type Storage,
} from './reference';

const [heads, kvHeads, headDim, valueDim] = [6, 2, 24, 16];

/** Keys and values of one sequence, [1, kvHeads, length, dim], as the storage type has them. */
interface Sequence {
  readonly key: ReferenceTensor;
  readonly value: ReferenceTensor;
}

function sequenceOf(seed: number, length: number, type: Storage = 'float32'): Sequence {
  const round = type === 'float32' ? Math.fround : (x: number) => roundToHalf(type, x);
  const rounded = (seed: number, dim: number) => {
    const { data, dims } = randomTensor(seed, [1, kvHeads, length, dim]);
    return { data: data.map(round), dims };
  };
  return { key: rounded(seed, headDim), value: rounded(seed + 1, valueDim) };
}

function queryOf(seed: number, length: number, type: Storage): ReferenceTensor {
  const round = type === 'float32' ? Math.fround : (x: number) => roundToHalf(type, x);
  const { data, dims } = randomTensor(seed, [1, heads, length, headDim]);
  return { data: data.map(round), dims };
}

/** Positions `from` to `to` of [1, heads, length, dim]. */
function cut({ data, dims }: ReferenceTensor, from: number, to: number): ReferenceTensor {
  const [, planes, length, width] = dims;
  const rows = Array.from({ length: planes }, (_, plane) =>
    Array.from(data).slice((plane * length + from) * width, (plane * length + to) * width),
  );
  return { data: rows.flat(), dims: [1, planes, to - from, width] };
}

/** One after the other along the batch. */
function stack(tensors: readonly ReferenceTensor[]): ReferenceTensor {
  const data = tensors.flatMap((t) => Array.from(t.data));
  return { data, dims: [tensors.length, ...tensors[0].dims.slice(1)] };
}

/** A cache with sequences of these lengths, in pieces of different size. */
function cacheOf(sequences: readonly Sequence[], type: Storage): KVCache {
  const pool = new KVCachePool({ blocks: 64, kvHeads, headDim, valueDim, type });
  const cache = new KVCache({ batch: sequences.length, pool });
  // Taking turns, so that the blocks of a sequence are anywhere in the pool.
  for (let from = 0; sequences.some(({ key }) => from < key.dims[2]); from += 50) {
    for (const [i, { key, value }] of sequences.entries()) {
      const to = Math.min(from + 50, key.dims[2]);
      if (from >= to) continue;
      const rows = (t: ReferenceTensor) => stored(cut(t, from, to), type);
      cache.append(rows(key), rows(value), { sequences: [i] });
    }
  }
  return cache;
}

const LENGTHS = [200, 1, 64, 0, 333, 65, 130];
const DROPOUT = { dropoutP: 0.3, seed: 3, offset: 8, training: true };

const VARIANTS: [string, ReferenceOptions][] = [
  ['as by default', {}],
  ['not causal, capped', { isCausal: false, softcap: 3 }],
  ['a window', { windowSize: [40, 0], scale: 0.4 }],
  ['each its own diagonal', { causalOffset: LENGTHS.map((length) => length - 20) }],
  ...PLACEMENTS.map((dropoutPlacement): [string, ReferenceOptions] => [
    `dropout of ${dropoutPlacement}`,
    { ...DROPOUT, dropoutPlacement },
  ]),
];

/** What a sequence's own call of the reference has in place of the cache's defaults. */
function ownOptions(options: ReferenceOptions, i: number): ReferenceOptions {
  const { isCausal = true, causalOffset = 'bottom-right' } = options;
  const own = Array.isArray(causalOffset) ? causalOffset[i] : causalOffset;
  return { ...options, isCausal, causalOffset: own, batchOffset: i };
}

const STORAGES: [Storage, Storage][] = [
  ['float32', 'float32'],
  ['float16', 'float16'],
  ['bfloat16', 'bfloat16'],
  ['float32', 'bfloat16'],
  ['float32', 'float16'],
];

describe.each(STORAGES)('%s queries, %s storage, against float64', (queryType, type) => {
  const sequences = LENGTHS.map((length, i) => sequenceOf(100 + 2 * i, length, type));
  const cache = cacheOf(sequences, type);

  describe.each([1, 4, 40])('%i queries', (queryLength) => {
    const queries = LENGTHS.map((_, i) => queryOf(200 + i, queryLength, queryType));
    const query = stored(stack(queries), queryType);

    describe.each(VARIANTS)('%s', (_, options) => {
      const wanted = sequences.map(({ key, value }, i) =>
        LENGTHS[i] === 0
          ? null
          : reference(queries[i], key, value, ownOptions(options, i), queryType),
      );

      test.each(BACKENDS)('%s', (backend) => {
        const { output, lse } = cache.attendSync(query, { ...options, backend } as AttendOptions);
        expect([output.type, ...output.dims]).toEqual([
          ...[queryType, LENGTHS.length, heads],
          ...[queryLength, valueDim],
        ]);
        expect(lse.dims).toEqual([LENGTHS.length, heads, queryLength]);
        const rows = heads * queryLength;
        for (const [i, want] of wanted.entries()) {
          const got = numbers(output).subarray(i * rows * valueDim, (i + 1) * rows * valueDim);
          const gotLse = numbers(lse).subarray(i * rows, (i + 1) * rows);
          if (want === null) {
            expectSame(`output ${i}`, got, new Float64Array(rows * valueDim));
            expectSame(`lse ${i}`, gotLse, new Float64Array(rows).fill(-Infinity));
          } else {
            expectBounded(`output ${i}`, got, want.output);
            expectBounded(`lse ${i}`, gotLse, want.lse);
          }
        }
      });
    });
  });
});

describe.each(BACKENDS)('%s, bit for bit', (backend) => {
  const named = { backend } as { backend: AttentionOptions['backend'] };
  const sequences = LENGTHS.map((length, i) => sequenceOf(300 + 2 * i, length));
  const cache = cacheOf(sequences, 'float32');

  describe.each([1, 3, 40])('%i queries', (queryLength) => {
    const queries = LENGTHS.map((_, i) => queryOf(400 + i, queryLength, 'float32'));
    const query = stored(stack(queries));

    test.each(VARIANTS)('alone, in a batch, and in one piece: %s', (_, options) => {
      const all = withThreads(2, () =>
        cache.attendSync(query, { ...options, ...named } as AttendOptions),
      );
      const rows = heads * queryLength;
      for (const [i, { key, value }] of sequences.entries()) {
        const own = ownOptions(options, i);
        const alone = cache.attendSync(stored(queries[i]), {
          ...(own as AttendOptions),
          ...named,
          causalOffset: own.causalOffset as number | 'bottom-right',
          sequences: [i],
        });
        const output = all.output.data.slice(i * rows * valueDim, (i + 1) * rows * valueDim);
        const lse = all.lse.data.slice(i * rows, (i + 1) * rows);
        expectSame(`output ${i}`, alone.output.data, output);
        expectSame(`lse ${i}`, alone.lse.data, lse);
        if (LENGTHS[i] === 0) continue;
        const call = { query: queries[i], key, value, options: own };
        const whole = attentionForwardSync(stored(queries[i]), stored(key), stored(value), {
          ...publicOptions(call),
          ...named,
        });
        expectSame(`output ${i} in one piece`, output, whole.output.data);
        expectSame(`lse ${i} in one piece`, lse, whole.lse.data);
      }
    });
  });

  test('layout bshd', () => {
    const query = stack([queryOf(1, 5, 'float32'), queryOf(2, 5, 'float32')]);
    const { key, value } = sequenceOf(3, 70);
    const turned = new KVCache({ batch: 2, kvHeads, headDim, valueDim, maxLength: 70 });
    const plain = new KVCache({ batch: 2, kvHeads, headDim, valueDim, maxLength: 70 });
    const both = (t: ReferenceTensor) => stack([t, t]);
    plain.append(stored(both(key)), stored(both(value)));
    turned.append(stored(swapAxes(both(key))), stored(swapAxes(both(value))), { layout: 'bshd' });
    const want = plain.attendSync(stored(query), named);
    const got = turned.attendSync(stored(swapAxes(query)), { ...named, layout: 'bshd' });
    expect(got.output.dims).toEqual([2, 5, heads, valueDim]);
    const data = swapAxes({ data: numbers(got.output), dims: got.output.dims }).data;
    expectSame('output', data, numbers(want.output));
    expectSame('lse', got.lse.data, want.lse.data);
  });

  test('float32 keys are rounded to the storage type once', () => {
    const { key, value } = sequenceOf(5, 90);
    const rounded = (t: ReferenceTensor) => stored(t, 'bfloat16');
    const query = stored(queryOf(6, 2, 'float32'));
    const shape = { kvHeads, headDim, valueDim, maxLength: 90, type: 'bfloat16' } as const;
    const [given, own] = [new KVCache(shape), new KVCache(shape)];
    given.append(stored(key), stored(value));
    own.append(rounded(key), rounded(value));
    const [a, b] = [given.attendSync(query, named), own.attendSync(query, named)];
    expectSame('output', a.output.data, b.output.data);
  });

  test('token by token, the whole causal call', () => {
    const length = 150;
    const { key, value } = sequenceOf(7, length);
    const query = queryOf(8, length, 'float32');
    const want = reference(query, key, value, { isCausal: true });
    const token = new KVCache({ kvHeads, headDim, valueDim, maxLength: length });
    for (let i = 0; i < length; i++) {
      token.append(stored(cut(key, i, i + 1)), stored(cut(value, i, i + 1)));
      const { output } = token.attendSync(stored(cut(query, i, i + 1)), named);
      const row = (all: Float64Array) =>
        Float64Array.from(cut({ data: all, dims: [1, heads, length, valueDim] }, i, i + 1).data);
      const wanted = { values: row(want.output.values), error: row(want.output.error) };
      expectBounded(`output ${i}`, numbers(output), wanted);
    }
  });

  test('what happens to the cache while a call runs does not change it', async () => {
    const long = sequenceOf(9, 1000);
    const pool = new KVCachePool({ blocks: 100, kvHeads, headDim, valueDim });
    const busy = new KVCache({ batch: 3, pool });
    const given = [stored(long.key), stored(long.value)] as const;
    busy.append(...given, { sequences: [0] });
    busy.fork(0, 1);
    const query = stored(queryOf(10, 64, 'float32'));
    const options = { ...named, sequences: [0] };
    const want = busy.attendSync(query, options);
    const running = Array.from({ length: 8 }, () => busy.attend(query, options));
    const noise = {
      data: new Float32Array(given[0].data.length).fill(Number.NaN),
      dims: given[0].dims,
    };
    const noiseValue = {
      data: new Float32Array(given[1].data.length).fill(Number.NaN),
      dims: given[1].dims,
    };
    busy.append(noise, noiseValue, { sequences: [0] });
    busy.truncate(10, { sequences: [0] });
    busy.append(noise, noiseValue, { sequences: [0] }); // over rows that the calls read
    busy.truncate(0);
    busy.append(noise, noiseValue, { sequences: [2] }); // into what was given back
    const dying = busy.attend(query, { ...named, sequences: [1, 2].slice(0, 1) });
    busy.dispose();
    for (const call of running) {
      const got = await call;
      expectSame('output', got.output.data, want.output.data);
      expectSame('lse', got.lse.data, want.lse.data);
    }
    expectSame(
      'of an empty sequence',
      (await dying).lse.data,
      new Float32Array(heads * 64).fill(-Infinity),
    );
    expect(pool.freeBlocks).toBe(100);
  });
});

/** A model of a cache: each sequence's keys and values in arrays of their own, [length][kvHeads]. */
class Model {
  readonly sequences: { key: Float32Array[]; value: Float32Array[] }[];

  constructor(batch: number) {
    this.sequences = Array.from({ length: batch }, () => ({ key: [], value: [] }));
  }

  /** [1, kvHeads, length, dim] of one sequence. */
  tensors(i: number) {
    const { key, value } = this.sequences[i];
    const whole = (rows: Float32Array[], width: number) => ({
      data: Float32Array.from(
        Array.from({ length: kvHeads }, (_, head) =>
          rows.flatMap((row) => Array.from(row.subarray(head * width, (head + 1) * width))),
        ).flat(),
      ),
      dims: [1, kvHeads, rows.length, width],
    });
    return [whole(key, headDim), whole(value, valueDim)] as const;
  }
}

describe.each(['cpu', 'js'] as const)('%s, against a model', (backend) => {
  test.each([1, 2, 3, 4, 5, 6, 7, 8])('sequences grow, are cut and forked, seed %i', (seed) => {
    const next = uniform(seed);
    const below = (n: number) => Math.floor(next() * n);
    const batch = 5;
    const pool = new KVCachePool({ blocks: 14, blockLength: 64, kvHeads, headDim, valueDim });
    const cache = new KVCache({ batch, pool });
    const model = new Model(batch);
    let refusals = 0;
    for (let step = 0; step < 120; step++) {
      const action = below(6);
      if (action <= 2) {
        const chosen = Array.from({ length: batch }, (_, i) => i).filter(() => below(3) > 0);
        if (chosen.length === 0) continue;
        const length = 1 + below(90);
        const lengths = chosen.map(() => below(length + 1));
        const rows = (width: number) => ({
          data: Float32Array.from(
            randomNormals(seed * 1000 + step + width, chosen.length * kvHeads * length * width),
          ),
          dims: [chosen.length, kvHeads, length, width],
        });
        const [key, value] = [rows(headDim), rows(valueDim)];
        const before = cache.lengths;
        const free = pool.freeBlocks;
        try {
          cache.append(key, value, { sequences: chosen, lengths });
        } catch (error) {
          expect(error).toMatchObject({ code: 'ERR_SDPA_OUT_OF_MEMORY' });
          expect(cache.lengths).toEqual(before);
          expect(pool.freeBlocks).toBe(free);
          refusals++;
          cache.truncate(below(40), { sequences: [below(batch)] });
          syncLengths(cache, model);
          continue;
        }
        for (const [entry, i] of chosen.entries()) {
          for (let position = 0; position < lengths[entry]; position++) {
            const row = (t: { data: Float32Array }, width: number) =>
              Float32Array.from(
                Array.from({ length: kvHeads }, (_, head) => {
                  const at = ((entry * kvHeads + head) * length + position) * width;
                  return Array.from(t.data.subarray(at, at + width));
                }).flat(),
              );
            model.sequences[i].key.push(row(key, headDim));
            model.sequences[i].value.push(row(value, valueDim));
          }
        }
      } else if (action === 3) {
        cache.truncate(below(200), { sequences: [below(batch)] });
        syncLengths(cache, model);
      } else if (action === 4) {
        const from = below(batch);
        const to = (from + 1 + below(batch - 1)) % batch;
        cache.fork(from, to);
        const { key, value } = model.sequences[from];
        model.sequences[to] = { key: [...key], value: [...value] };
      } else {
        expectModel(cache, model, backend, seed + step);
      }
      expect([...cache.lengths]).toEqual(model.sequences.map(({ key }) => key.length));
    }
    expectModel(cache, model, backend, seed);
    cache.truncate(0);
    expect(pool.freeBlocks).toBe(14);
    expect(refusals).toBeGreaterThan(0);
  });
});

/** Cuts the model as the cache was cut. */
function syncLengths(cache: KVCache, model: Model) {
  cache.lengths.forEach((length, i) => {
    const sequence = model.sequences[i];
    expect(length).toBeLessThanOrEqual(sequence.key.length);
    sequence.key.length = length;
    sequence.value.length = length;
  });
}

function expectModel(cache: KVCache, model: Model, backend: 'cpu' | 'js', seed: number) {
  const batch = model.sequences.length;
  const query = stored(randomTensor(seed, [batch, heads, 2, headDim]));
  const got = cache.attendSync(query, { backend });
  const size = heads * 2 * headDim;
  for (let i = 0; i < batch; i++) {
    const [key, value] = model.tensors(i);
    if (key.dims[2] === 0) continue;
    const own = {
      data: query.data.slice(i * size, (i + 1) * size) as Float32Array,
      dims: [1, heads, 2, headDim],
    };
    const want = scaledDotProductAttentionSync(own, key, value, {
      ...{ isCausal: true, causalOffset: 'bottom-right', enableGqa: true, backend },
    });
    const output = got.output.data.slice(i * heads * 2 * valueDim, (i + 1) * heads * 2 * valueDim);
    expectSame(`sequence ${i}`, output, want.data);
  }
}

describe('blocks', () => {
  const rows = (length: number, n = 1) => ({
    data: new Float32Array(n * length),
    dims: [n, 1, length, 1],
  });
  const tiny = { kvHeads: 1, headDim: 1 };

  test('forks share all but what they grow into', () => {
    const pool = new KVCachePool({ ...tiny, blocks: 10 });
    const cache = new KVCache({ batch: 4, pool });
    cache.append(rows(200), rows(200), { sequences: [0] }); // 4 blocks, 8 rows in the last
    for (const to of [1, 2, 3]) cache.fork(0, to);
    expect(pool.freeBlocks).toBe(6);
    cache.append(rows(1), rows(1), { sequences: [2] }); // the first to grow needs no copy
    expect(pool.freeBlocks).toBe(6);
    cache.append(rows(1, 2), rows(1, 2), { sequences: [0, 1] });
    expect(pool.freeBlocks).toBe(4);
    cache.append(rows(1), rows(1), { sequences: [3] }); // the last holder of the old one but 2
    expect(pool.freeBlocks).toBe(3);
    cache.truncate(0, { sequences: [0, 1, 3] });
    expect(pool.freeBlocks).toBe(6);
    cache.dispose();
    expect(pool.freeBlocks).toBe(10);
  });

  test('the last of two forks that part in one call needs no copy', () => {
    const pool = new KVCachePool({ ...tiny, blocks: 2 });
    const cache = new KVCache({ batch: 2, pool });
    cache.append(rows(10), rows(10), { sequences: [0] });
    cache.fork(0, 1);
    cache.truncate(5);
    cache.append(rows(1, 2), rows(1, 2)); // one copies, and leaves the block to the other
    expect(pool.freeBlocks).toBe(0);
    expect([...cache.lengths]).toEqual([6, 6]);
  });

  test('caches of one pool: one that is full leaves the others alone', () => {
    const pool = new KVCachePool({ ...tiny, blocks: 3 });
    const [one, other] = [new KVCache({ pool }), new KVCache({ pool })];
    one.append(rows(64), rows(64));
    other.append(rows(64), rows(64));
    const full = expect.objectContaining({ code: 'ERR_SDPA_OUT_OF_MEMORY' });
    expect(() => one.append(rows(65), rows(65))).toThrow(full);
    expect([one.length, pool.freeBlocks]).toEqual([64, 1]);
    other.append(rows(1), rows(1));
    expect(other.attendSync(rows(1)).output.dims).toEqual([1, 1, 1, 1]);
    one.dispose();
    other.append(rows(127), rows(127));
    expect(other.length).toBe(192);
  });
});

test('an output of the caller', () => {
  const cache = new KVCache({ kvHeads, headDim, valueDim, maxLength: 100 });
  const { key, value } = sequenceOf(11, 100);
  cache.append(stored(key), stored(value));
  const query = stored(queryOf(12, 3, 'float32'));
  const out = new Tensor('float32', new Float32Array(heads * 3 * valueDim), [
    1,
    heads,
    3,
    valueDim,
  ]);
  const { output } = cache.attendSync(query, { out });
  expect(output).toBe(out);
  expectSame('output', out.data, cache.attendSync(query).output.data);
});
