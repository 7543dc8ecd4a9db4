// NaN and infinity go where they are seen and nowhere else; rows without keys are zeros.
import { describe, expect, test } from 'vitest';
import { namedTensors } from './cases';
import {
  BACKENDS,
  type Call,
  expectOutcome,
  expectSame,
  expectSameOutcome,
  type Outcome,
  representable,
  run,
  runner,
} from './harness';
import { HOPPER, type Placement, type ReferenceOptions, type ReferenceTensor } from './reference';

// 19 queries in 4 rows of heads, 37 keys, dims 16 and 24; two query heads share one of the keys.
const shape = [2, 2, 1, 19, 37, 16, 24] as const;
const base = namedTensors({ name: '', seed: 91, shape, options: {} });
const poisons = [Number.NaN, Infinity, -Infinity];

/**
 * A run in which nothing changed: bit for bit, or to rounding on AMX and with Hopper's kernels, where
 * others compute what a NaN might have touched.
 */
function expectUnchanged(call: Call, actual: Outcome, clean: Outcome) {
  const isComputedAgain = actual.backend === 'cpu:amx' || (HOPPER && actual.backend === 'cuda');
  if (isComputedAgain) return expectOutcome(call, actual);
  // The scores of dropped keys are shown as they are before dropout.
  const { dropoutPlacement } = call.options;
  const scores = dropoutPlacement === 'scores' ? clean.scores : actual.scores;
  expectSameOutcome({ ...actual, scores }, clean);
}

describe.each(BACKENDS)('%s, NaN and infinity where they are not seen', (backend) => {
  const hidden: [string, ReferenceOptions, number[]][] = [
    ['kvLengths', { kvLengths: [30, 30] }, [30, 33, 36]],
    ['causal', { isCausal: true }, [19, 25, 36]],
    ['window', { windowSize: [3, 2] }, [22, 36]],
    ['boolean mask', { attnMask: maskHiding([5, 36], 1, 0) }, [5, 36]],
    ['bias of -inf', { attnMask: maskHiding([0, 17], 0.5, -Infinity) }, [0, 17]],
    ['dropped scores', droppedKeys('scores', [7, 8]), [7, 8]],
  ];

  test.each(hidden)('change nothing: %s', (_, options, rows) => {
    const clean = run(runner(backend), representable({ ...base, options }));
    for (const poison of poisons) {
      const key = poisoned(base.key, rows, poison);
      const value = poisoned(base.value, rows, poison);
      const call = representable({ ...base, key, value, options });
      expectUnchanged(call, run(runner(backend), call), clean);
    }
  });

  test('nor does a value whose weight is dropped', () => {
    const options = droppedKeys('weights', [7, 8]);
    const clean = run(runner(backend), representable({ ...base, options }));
    for (const poison of poisons) {
      const value = poisoned(base.value, [7, 8], poison);
      const call = representable({ ...base, value, options });
      expectUnchanged(call, run(runner(backend), call), clean);
    }
  });
});

describe.each(BACKENDS)('%s, NaN and infinity where they are seen', (backend) => {
  test.each(['key', 'value', 'query'] as const)(
    'reach every row that sees them, and no other: %s',
    (name) => {
      for (const poison of poisons) {
        const rows = name === 'query' ? [4] : [11];
        const input = poisoned(base[name], rows, poison);
        const options = { isCausal: true, causalOffset: 0 };
        const call = representable({ ...base, [name]: input, options });
        const outcome = run(runner(backend), call);
        expectOutcome(call, outcome);
        for (let i = 0; i < 19; i++) {
          const sees = name === 'query' ? i === 4 : i >= 11;
          expect(Number.isFinite(outcome.output[i * 24]), `row ${i}`).toBe(!sees);
        }
      }
    },
  );

  test('an infinite score is an excluded key or a NaN row, by its sign', () => {
    // One channel of one key: its sign and the query's decide.
    const data = Float64Array.from(base.key.data);
    data[11 * 16 + 3] = Infinity;
    const call = representable({ ...base, key: { ...base.key, data }, options: {} });
    const outcome = run(runner(backend), call);
    expectOutcome(call, outcome);
    for (let i = 0; i < 19; i++) {
      const isExcluded = base.query.data[i * 16 + 3] < 0;
      expect(Number.isNaN(outcome.lse[i]), `row ${i}`).toBe(!isExcluded);
      if (isExcluded) expect(outcome.weights[i * 37 + 11]).toBe(0);
    }
  });

  test.each([Infinity, Number.NaN])('a bias of %d makes its rows NaN, and no others', (bias) => {
    const data = new Float64Array(19 * 37).map((_, at) => (at === 5 * 37 + 7 ? bias : 0.5));
    const options = { attnMask: { data, dims: [19, 37] } };
    const call = representable({ ...base, options });
    const outcome = run(runner(backend), call);
    expectOutcome(call, outcome);
    for (let row = 0; row < outcome.lse.length; row++) {
      expect(Number.isNaN(outcome.lse[row]), `row ${row}`).toBe(row % 19 === 5);
    }
  });

  test('a NaN gradient stays with the keys that its row sees', () => {
    const gradOutput = poisoned(base.gradOutput, [3], Number.NaN);
    const options = { isCausal: true };
    const clean = run(runner(backend), representable({ ...base, options }));
    const call = representable({ ...base, gradOutput, options });
    const outcome = run(runner(backend), call);
    const { gradValue, gradKey, gradQuery } = outcome;
    // Keys 0 to 3 are seen by row 3, in each of the two batches of one key/value head.
    for (let j = 0; j < 37; j++) {
      expect(Number.isNaN(gradValue![j * 24]), `gradValue ${j}`).toBe(j <= 3);
      expect(Number.isNaN(gradKey![j * 16]), `gradKey ${j}`).toBe(j <= 3);
    }
    const others = (data: Float64Array) => data.filter((_, at) => Math.floor(at / 16) % 19 !== 3);
    if (backend === 'cpu:amx') return expectOutcome(call, outcome);
    expectSame('gradQuery', others(gradQuery!), others(clean.gradQuery!));
  });
});

/** NaN or infinity in whole rows of a [batch, heads, length, dim] tensor. */
function poisoned(t: ReferenceTensor, rows: number[], poison: number): ReferenceTensor {
  const [, , length, width] = t.dims;
  const inRows = (at: number) => rows.includes(Math.floor(at / width) % length);
  return { ...t, data: Float64Array.from(t.data, (x, at) => (inRows(at) ? poison : x)) };
}

/** A mask over keys alone: `hide` at some, `show` at the others. */
function maskHiding(keys: number[], show: number, hide: number): ReferenceTensor {
  const values = Array.from({ length: 37 }, (_, j) => (keys.includes(j) ? hide : show));
  return { data: hide === 0 ? Uint8Array.from(values) : Float64Array.from(values), dims: [37] };
}

/** Explicit decisions that drop some keys of every row. */
function droppedKeys(dropoutPlacement: Placement, keys: number[]): ReferenceOptions {
  const data = Uint8Array.from({ length: 2 * 2 * 19 * 37 }, (_, at) =>
    keys.includes(at % 37) ? 0 : 1,
  );
  return { dropoutP: 0.25, dropoutPlacement, keepMask: { data, dims: [2, 2, 19, 37] } };
}

describe.each(BACKENDS)('%s, scores that grow along the keys', (backend) => {
  // Five tiles of 64 keys: what was summed under an earlier maximum has to be brought to the new one.
  const shape = [1, 2, 2, 65, 320, 32, 32] as const;
  const base = namedTensors({ name: '', seed: 93, shape, options: {} });

  test.each([
    [4, undefined],
    [40, undefined],
    [4, 'weights'],
    [4, 'scores'],
  ] as const)('tile by tile, %d times the first; dropout %s', (step, dropoutPlacement) => {
    const growth = (at: number) => 1 + step * Math.floor((Math.floor(at / 32) % 320) / 64);
    const data = base.key.data.map((x, at) => x * growth(at));
    const options = dropoutPlacement ? { dropoutP: 0.25, dropoutPlacement, seed: 5 } : {};
    const call = representable({ ...base, key: { ...base.key, data }, options });
    expectOutcome(call, run(runner(backend), call));
  });
});

describe.each(BACKENDS)('%s, rows without keys', (backend) => {
  const shape = [2, 2, 2, 9, 17, 8, 12] as const;
  const base = namedTensors({ name: '', seed: 92, shape, options: {} });
  const dead: [string, ReferenceOptions][] = [
    ['kvLengths of 0', { kvLengths: [0, 0] }],
    ['a negative causal offset', { isCausal: true, causalOffset: -9 }],
    ['a window beyond the keys', { windowSize: [0, 0], causalOffset: 40 }],
    ['a boolean mask', { attnMask: { data: new Uint8Array(17), dims: [17] } }],
    ['a bias', { attnMask: { data: new Float64Array(17).fill(-Infinity), dims: [17] } }],
    ['dropped scores', { dropoutP: 1, dropoutPlacement: 'scores' }],
  ];

  test.each(dead)('give zeros, lse = -inf and zero gradients: %s', (_, options) => {
    const outcome = run(runner(backend), representable({ ...base, options }));
    expect(outcome.lse.every((x) => x === -Infinity)).toBe(true);
    for (const name of [
      'output',
      'weights',
      'droppedWeights',
      'gradQuery',
      'gradKey',
      'gradValue',
    ] as const) {
      expect(
        outcome[name]!.every((x) => x === 0),
        name,
      ).toBe(true);
    }
    if (outcome.gradAttnMask) expect(outcome.gradAttnMask.every((x) => x === 0)).toBe(true);
  });
});

describe.each(BACKENDS)('%s, scores of a size whose rounding is large', (backend) => {
  // Padding by a finite bias leaves rows whose scores are all about -1e9: a score and its row's lse
  // are then rounded by more than the scores differ, but weights are still at most 1.
  test.each([-1e9, 1e9, -1e30])('a bias of about %d', (size) => {
    const shape = [1, 1, 1, 49, 3, 16, 16] as const;
    const base = namedTensors({ name: '', seed: 94, shape, options: {} });
    const biases = base.query.data.slice(0, 49).map((x) => size * (1 + x / 8));
    const call = representable({ ...base, options: { attnMask: { data: biases, dims: [49, 1] } } });
    const outcome = run(runner(backend), call);
    expectOutcome(call, outcome);
    expect(Math.max(...outcome.weights)).toBeLessThanOrEqual(1);
    for (const name of ['gradQuery', 'gradKey', 'gradValue', 'gradAttnMask'] as const) {
      expect(outcome[name]!.every(Number.isFinite), name).toBe(true);
    }
    const upstream = Array.from(call.gradOutput!.data).reduce((sum, x) => sum + Math.abs(x), 0);
    expect(Math.max(...outcome.gradValue!.map(Math.abs))).toBeLessThanOrEqual(upstream);
  });
});

describe.each(BACKENDS)('%s, an infinite score of a row that drops all its weights', (backend) => {
  test.each([Infinity, -Infinity])('%d is seen in lse', (poison) => {
    const shape = [1, 1, 1, 49, 3, 16, 16] as const;
    const base = namedTensors({ name: '', seed: 99, shape, options: {} });
    const options = { dropoutP: 1, dropoutPlacement: 'weights' as const };
    const call = representable({ ...base, key: poisoned(base.key, [0, 1, 2], poison), options });
    expectOutcome(call, run(runner(backend), call));
  });
});

describe.each(BACKENDS)('%s, queries below the normal range', (backend) => {
  test('are not lost before a scale that makes much of them', () => {
    const shape = [1, 1, 1, 20, 70, 16, 16] as const;
    const base = namedTensors({ name: '', seed: 93, shape, options: {} });
    const query = { ...base.query, data: Array.from(base.query.data, (x) => x * 2 ** -130) };
    const call = representable({ ...base, query, options: { scale: 2 ** 127 } });
    const outcome = run(runner(backend), call);
    expectOutcome(call, outcome);
    expect(outcome.scores.every((x) => x !== 0)).toBe(true);
  });

  // Their scores are infinite, not 0 times infinity.
  test('against infinite keys: an infinite score stays one', () => {
    const shape = [1, 1, 1, 20, 3, 16, 16] as const;
    const base = namedTensors({ name: '', seed: 97, shape, options: {} });
    const query = { ...base.query, data: Array.from(base.query.data, (x) => Math.abs(x) * 2e-42) };
    const key = poisoned(base.key, [0, 2], -Infinity);
    const call = representable({ ...base, query, key, options: {} });
    const outcome = run(runner(backend), call);
    expectOutcome(call, outcome);
    for (let row = 0; row < 20; row++) {
      expect(Array.from(outcome.weights.slice(3 * row, 3 * row + 3))).toEqual([0, 1, 0]);
    }
  });
});

describe.each(BACKENDS)('%s, a NaN score that is dropped', (backend) => {
  // As is the largest score: what is kept has the weight 0, before it is divided by a sum of NaN.
  test.each([1, 20])('leaves its row NaN: %i rows', (rows) => {
    const shape = [1, 1, 1, rows, 4, 16, 16] as const;
    const base = namedTensors({ name: '', seed: 98, shape, options: {} });
    const keep = Uint8Array.from({ length: 4 * rows }, (_, i) => +(i % 4 === 0 || i % 4 === 3));
    const options: ReferenceOptions = {
      attnMask: { data: [-1e30, 0, 0, -1e30], dims: [4] },
      dropoutP: 0.5,
      dropoutPlacement: 'weights',
      keepMask: { data: keep, dims: [1, 1, rows, 4] },
    };
    const key = poisoned(base.key, [1], Number.NaN);
    const call = representable({ ...base, key, options });
    const outcome = run(runner(backend), call);
    expectOutcome(call, outcome);
    expect(outcome.output.every(Number.isNaN)).toBe(true);
  });
});

describe.each(BACKENDS)('%s, the least float as a bias', (backend) => {
  // As masks for padding have it: it hides a key beside others, and where it is all that a row has,
  // the row is the average of its values.
  test('hides keys, or counts them all alike', () => {
    const shape = [1, 2, 2, 70, 80, 16, 16] as const;
    const base = namedTensors({ name: '', seed: 96, shape, options: {} });
    const least = -(2 ** 128 - 2 ** 104);
    const biases = Array.from({ length: 70 * 80 }, (_, i) => {
      const [row, key] = [Math.floor(i / 80), i % 80];
      return row % 7 === 3 || key >= 50 ? least : 0;
    });
    const call = representable({
      ...base,
      options: { attnMask: { data: biases, dims: [70, 80] } },
    });
    const outcome = run(runner(backend), call);
    expectOutcome(call, outcome);
    for (let d = 0; d < 16; d++) {
      const values = Array.from({ length: 80 }, (_, key) => call.value.data[16 * key + d]);
      const average = values.reduce((sum, x) => sum + x) / 80;
      expect(outcome.output[3 * 16 + d]).toBeCloseTo(average, 6);
    }
  });
});

describe.each(BACKENDS)('%s, float16 numbers below its normal range', (backend) => {
  // Rows of whole vectors, and rows with a rest; enough queries for AMX, which flushes what is
  // below float32's range.
  test.each([3, 16, 24])('are not lost: rows of %i', (width) => {
    const shape = [1, 1, 1, 20, 20, width, width] as const;
    const base = namedTensors({ name: '', seed: 95, shape, options: {} });
    const small = (t: ReferenceTensor) => ({ ...t, data: Array.from(t.data, (x) => x * 2 ** -18) });
    for (const name of ['query', 'key', 'value', 'gradOutput'] as const) {
      const options = { scale: name === 'query' || name === 'key' ? 2 ** 17 : 1 };
      const call = representable({ ...base, [name]: small(base[name]), options, type: 'float16' });
      expectOutcome(call, run(runner(backend), call));
    }
  });
});
