// The parts of a call, computed alone with their offsets, are the whole.
import { describe, test } from 'vitest';
import { randomTensor } from './cases';
import {
  BACKENDS,
  type Call,
  expectBounded,
  expected,
  expectSame,
  namedCall,
  type Outcome,
  run,
  runner,
} from './harness';
import { PLACEMENTS, type ReferenceOptions, type ReferenceTensor } from './reference';

const VARIANTS: [string, ReferenceOptions][] = [
  ['plain', {}],
  ['causal window', { isCausal: true, causalOffset: 9, windowSize: [20, -1] }],
  ...PLACEMENTS.map((dropoutPlacement): [string, ReferenceOptions] => [
    `dropout of ${dropoutPlacement}`,
    { dropoutP: 0.35, dropoutPlacement, seed: 21, offset: 4, isCausal: true, causalOffset: 20 },
  ]),
  [
    'shared dropout of weights, from an odd place',
    {
      ...{ dropoutP: 0.35, dropoutBroadcast: ['query'], seed: 21, offset: 4 },
      ...{ batchOffset: 3, headOffset: 5, queryOffset: 7, keyOffset: 11 },
    },
  ],
];

const [batch, heads, kvHeads, queries, keys, valueDim] = [3, 4, 2, 37, 53, 24];
const shape = [batch, heads, kvHeads, queries, keys, 16, valueDim] as const;

function whole(options: ReferenceOptions): Call {
  const attnMask = randomTensor(8, [batch, heads, queries, keys]);
  const all = { ...options, attnMask, kvLengths: [53, 29, 0] };
  return namedCall({ name: '', seed: 31, shape, options: all });
}

describe.each(BACKENDS)('%s, parts that are computed alone, bit for bit', (backend) => {
  test.each(VARIANTS)('each sequence of the batch: %s', (_, options) => {
    const call = whole(options);
    const all = run(runner(backend), call);
    for (let b = 0; b < batch; b++) {
      const part = run(runner(backend), shard(call, 0, b, b + 1));
      for (const name of ['output', 'lse', 'droppedWeights', 'gradQuery', 'gradKey'] as const) {
        const size = all[name]!.length / batch;
        expectSame(name, part[name]!, all[name]!.subarray(b * size, (b + 1) * size));
      }
    }
  });

  test.each(VARIANTS)('each group of heads: %s', (_, options) => {
    const call = whole(options);
    const all = run(runner(backend), call);
    const group = heads / kvHeads;
    for (let g = 0; g < kvHeads; g++) {
      const part = run(runner(backend), shard(call, 1, g * group, (g + 1) * group));
      for (const name of ['output', 'lse', 'droppedWeights', 'gradQuery'] as const) {
        const wanted = slice(all[name]!, [batch, heads, -1], 1, g * group, (g + 1) * group);
        expectSame(name, part[name]!, wanted);
      }
      const gradKey = slice(all.gradKey!, [batch, kvHeads, -1], 1, g, g + 1);
      expectSame('gradKey', part.gradKey!, gradKey);
    }
  });
});

describe.each(BACKENDS)('%s, parts that are merged', (backend) => {
  test.each(VARIANTS)('blocks of queries: %s', (_, options) => {
    const call = whole(options);
    const want = expected(call);
    const wantGradients = want.backward(call.gradOutput!.data);
    const gradValue = new Float64Array(wantGradients.gradValue.values.length);
    for (const [from, to] of [
      [0, 8],
      [8, 9],
      [9, queries],
    ]) {
      const part = run(runner(backend), shard(call, 2, from, to));
      for (const name of ['output', 'lse', 'scores', 'droppedWeights'] as const) {
        const rows = (data: Float64Array) => slice(data, [batch, heads, queries, -1], 2, from, to);
        const wanted = { values: rows(want[name].values), error: rows(want[name].error) };
        expectBounded(name, part[name], wanted);
      }
      part.gradValue!.forEach((x, at) => {
        gradValue[at] += x;
      });
    }
    // Three sums, each rounded once more than the whole: their budgets add up to less than two
    // wholes.
    const error = wantGradients.gradValue.error.map((x) => 2 * x);
    expectBounded('gradValue', gradValue, { ...wantGradients.gradValue, error });
  });

  test.each(VARIANTS)('blocks of keys, merged by lse: %s', (_, options) => {
    const call = whole(options);
    const want = expected(call);
    const parts = [
      [0, 1],
      [1, 16],
      [16, 43],
      [43, keys],
    ].map(([from, to]) => run(runner(backend), shard(call, 3, from, to)));
    const merged = mergeByLse(parts);
    // A part errs by no more than the whole; its lse enters twice more, as power and in the sum.
    const looser = (name: 'output' | 'lse') => want[name].error.map((x) => 3 * x);
    expectBounded('output', merged.output, { ...want.output, error: looser('output') });
    expectBounded('lse', merged.lse, { ...want.lse, error: looser('lse') });
  });
});

/** Attention over disjoint keys put together: each part weighs as much as its sum of powers. */
function mergeByLse(parts: Outcome[]) {
  const rows = parts[0].lse.length;
  const merged = { output: new Float64Array(rows * valueDim), lse: new Float64Array(rows) };
  for (let row = 0; row < rows; row++) {
    const max = Math.max(...parts.map(({ lse }) => lse[row]));
    merged.lse[row] = -Infinity;
    if (max === -Infinity) continue;
    const powers = parts.map(({ lse }) => Math.exp(lse[row] - max));
    const sum = powers.reduce((a, x) => a + x, 0);
    merged.lse[row] = max + Math.log(sum);
    for (const [i, { output }] of parts.entries()) {
      for (let at = row * valueDim; at < (row + 1) * valueDim; at++) {
        merged.output[at] += (powers[i] / sum) * output[at];
      }
    }
  }
  return merged;
}

const OFFSET_NAMES = ['batchOffset', 'headOffset', 'queryOffset', 'keyOffset'] as const;

/** Part `from` to `to` of a call along batch, query heads, queries or keys (axis 0 to 3). */
function shard(call: Call, axis: number, from: number, to: number): Call {
  const { query, key, value, gradOutput, options } = call;
  const cut = (t: ReferenceTensor, along: number, a = from, b = to): ReferenceTensor => ({
    data: slice(t.data, t.dims, along, a, b),
    dims: t.dims.map((size, i) => (i === along ? b - a : size)),
  });
  const attnMask = options.attnMask && cut(options.attnMask, axis);
  const offsetName = OFFSET_NAMES[axis];
  const offset = { [offsetName]: (options[offsetName] ?? 0) + from };
  const moved = { ...options, ...offset, attnMask };
  if (axis === 3) {
    const lengths = Array.from(options.kvLengths!, (n) =>
      Math.min(Math.max(n - from, 0), to - from),
    );
    const inside = { key: cut(key, 2), value: cut(value, 2) };
    return { ...call, ...inside, options: { ...moved, kvLengths: lengths } };
  }
  const upstream = cut(gradOutput!, axis);
  if (axis === 2) return { ...call, query: cut(query, 2), gradOutput: upstream, options: moved };
  const group = axis === 1 ? query.dims[1] / key.dims[1] : 1;
  const kv = (t: ReferenceTensor) => cut(t, axis, from / group, to / group);
  const kvLengths = axis === 0 ? Array.from(options.kvLengths!).slice(from, to) : options.kvLengths;
  return {
    ...{ ...call, query: cut(query, axis), key: kv(key), value: kv(value), gradOutput: upstream },
    options: { ...moved, kvLengths },
  };
}

/** The elements `from` to `to` along one axis; a last size of -1 stands for all the rest. */
function slice(
  data: ArrayLike<number>,
  dims: readonly number[],
  axis: number,
  from: number,
  to: number,
) {
  const outer = dims.slice(0, axis).reduce((product, n) => product * n, 1);
  const inner = data.length / outer / dims[axis];
  const parts = new Float64Array(outer * (to - from) * inner);
  for (let o = 0; o < outer; o++)
    for (let i = 0; i < (to - from) * inner; i++)
      parts[o * (to - from) * inner + i] = data[(o * dims[axis] + from) * inner + i];
  return parts;
}
