// What `precision` promises: how far results may be from float64, that only AMX trades it, that
// AMX at `highest` is no further from float64 than AVX-512's float32 arithmetic, and that neither
// gets further with the length.
import { describe, expect, test } from 'vitest';
import type { Precision } from '../lib/index';
import { namedTensors, randomTensor, swapAxes } from './cases';
import { BACKENDS, type Call, expected, forward, logical, representable, stored } from './harness';
import { onnxCall } from './onnx-case';
import { HOPPER, type ReferenceTensor } from './reference';
import { torchCall } from './torch-case';
import { generatedOnnxCases, publishedOnnxCases, torchCases, type VectorCase } from './vectors';

// 160 queries and 200 keys: several tiles and a rest, queries on both sides of a block.
const call: Call = representable({
  ...namedTensors({ name: '', seed: 17, shape: [1, 3, 3, 160, 200, 64, 64], options: {} }),
  options: {},
});
const want = expected(call);
const wanted = want.backward(call.gradOutput!.data);

/**
 * The largest relative L2 error, from the arithmetic: a float32 sum of some hundred terms gives
 * 1e-6; dropping terms below 2^-16 of a product 2^-16 (1.5e-5), below 2^-8 about 2^-8 (4e-3), and
 * a gradient multiplies rounded operands twice. The kernels for Hopper round operands at 2^-11.
 */
const bounds: Record<Precision, number> = {
  highest: 3e-6,
  high: HOPPER ? 1e-3 : 6e-5,
  medium: 1.6e-2,
};

/** Those that split float32 into fewer terms where less precision is asked for. */
const SPLITTING = ['cpu:amx', 'cuda'];

describe.each(BACKENDS)('%s', (backend) => {
  test.each(Object.entries(bounds) as [Precision, number][])('%s', (precision, bound) => {
    const result = forward(backend, call, { precision });
    const { gradQuery, gradKey, gradValue } = result.backwardSync({
      data: Float32Array.from(call.gradOutput!.data),
      dims: call.gradOutput!.dims,
    });
    const errors = {
      output: distance(logical(result.output), want.output.values),
      gradQuery: distance(logical(gradQuery), wanted.gradQuery.values),
      gradKey: distance(logical(gradKey), wanted.gradKey.values),
      gradValue: distance(logical(gradValue), wanted.gradValue.values),
    };
    for (const [name, error] of Object.entries(errors)) {
      expect(error, `${name}, relative L2`).toBeLessThan(bound);
    }
    if (SPLITTING.includes(backend)) return;
    const highest = forward(backend, call, {});
    expect(result.output.data).toEqual(highest.output.data);
  });
});

describe.each(BACKENDS.filter((name) => SPLITTING.includes(name)))('%s', (backend) => {
  test('lower precisions are really less exact', () => {
    const [highest, high, medium] = (['highest', 'high', 'medium'] as const).map((precision) =>
      distance(logical(forward(backend, call, { precision }).output), want.output.values),
    );
    expect(high).toBeGreaterThan(2 * highest);
    if (HOPPER) expect(medium).toBeGreaterThanOrEqual(high);
    else expect(medium).toBeGreaterThan(10 * high);
  });
});

// ---- AMX at `highest` against AVX-512 ----

const AMX = 'cpu:amx';
const FMA = 'cpu:avx512';

/** Half a unit in the last place of 1: the largest relative error of one float32 rounding. */
const ROUNDING = 2 ** -24;

if (!BACKENDS.includes(AMX)) {
  console.log('skipped: AMX at `highest` against AVX-512 (this machine has no AMX)');
} else {
  describe('AMX at `highest` is no further from float64 than AVX-512', () => {
    test.each([128, 512, 1024, 2048, 4096])('unit normals, length %i', (length) => {
      // At 4096, a quarter of the queries: float64 in JavaScript takes its time.
      const queries = Math.min(length, 1024);
      const problem = randomHead(length, queries, 64);
      const exact = attendInFloat64(problem);
      const amx = errors(AMX, problem, exact);
      const fma = errors(FMA, problem, exact);
      for (const name of Object.keys(exact)) {
        // One in a hundred is chance: the last bits of a few thousand elements.
        expect(amx[name], `${name}, relative L2`).toBeLessThanOrEqual(1.01 * fma[name]);
        // Short sums of short sums: a single one over 4096 keys is off by 1.2e-6.
        expect(fma[name], `${name}, relative L2`).toBeLessThan(name === 'output' ? 4e-7 : 6.5e-7);
      }
    });

    // Too small for more than luck to decide between equals: a few hundred elements, each a few
    // roundings from exact. One rounding of a score is what AMX may be behind there. A score's
    // absolute error is its weight's relative one, so that rounding counts by the size of scores;
    // AMX has them in units of log2(e), where powers of two, and coarser steps, come elsewhere.
    // (The gradient of a mask is not compared: vector kernels compute it on both backends.)
    const cases: [string, Call][] = [
      ...torchCases().map((c): [string, Call] => [c.name, torchCall(c)]),
      ...[...generatedOnnxCases(), ...(publishedOnnxCases() ?? [])]
        .filter((c) => c.inputs.Q.dtype === 'float32') // a float16 result is rounded to 2^-11
        .map((c): [string, Call] => [c.name, onnxAsCall(c)]),
    ];
    test.each(cases)('%s', (_, problem) => {
      const want = expected(problem);
      const gradients = problem.gradOutput && want.backward(problem.gradOutput.data);
      const exact = {
        output: want.output.values,
        ...(gradients && {
          gradQuery: gradients.gradQuery.values,
          gradKey: gradients.gradKey.values,
          gradValue: gradients.gradValue.values,
        }),
      };
      const amx = errors(AMX, problem, exact);
      const fma = errors(FMA, problem, exact);
      const noise = ROUNDING * Math.max(1, typicalSize(want.scores.values));
      for (const name of Object.keys(exact)) {
        expect(amx[name], `${name}, relative L2`).toBeLessThanOrEqual(fma[name] + noise);
      }
    });
  });
}

type Results = Record<string, ArrayLike<number>>;

/** The relative L2 error of each result in `exact`. */
function errors(backend: string, problem: Call, exact: Results): Record<string, number> {
  const result = forward(backend, problem, { precision: 'highest' });
  const found: Results = { output: logical(result.output, problem.layout) };
  if (problem.gradOutput) {
    const gradOutput = stored(problem.gradOutput, problem.type, problem.layout);
    const { gradQuery, gradKey, gradValue } = result.backwardSync(gradOutput);
    for (const [name, tensor] of Object.entries({ gradQuery, gradKey, gradValue })) {
      found[name] = logical(tensor, problem.layout);
    }
  }
  expect(Object.keys(found)).toEqual(Object.keys(exact));
  return Object.fromEntries(
    Object.entries(exact).map(([name, values]) => [name, distance(found[name], values)]),
  );
}

/** An ONNX case in [batch, heads, length, dim]. */
function onnxAsCall(c: VectorCase): Call {
  const { query, key, value, layout, type, options } = onnxCall(c);
  const toBhsd = (t: ReferenceTensor) => (layout === 'bshd' ? swapAxes(t) : t);
  return {
    ...{ query: toBhsd(query), key: toBhsd(key), value: toBhsd(value), layout, type, options },
    maskType: c.inputs.attn_mask?.dtype === 'float16' ? 'float16' : 'float32',
  };
}

/** One head of unit normals. */
function randomHead(keys: number, queries: number, width: number): Call {
  return representable({
    query: randomTensor(keys, [1, 1, queries, width]),
    key: randomTensor(keys + 1, [1, 1, keys, width]),
    value: randomTensor(keys + 2, [1, 1, keys, width]),
    gradOutput: randomTensor(keys + 3, [1, 1, queries, width]),
    options: {},
  });
}

/**
 * One head without options, row by row: the reference's error budgets and matrices of [query, key]
 * would not fit.
 */
function attendInFloat64({ query, key, value, gradOutput }: Call) {
  const [, , queries, width] = query.dims;
  const keys = key.dims[2];
  const scale = 1 / Math.sqrt(width);
  const row = (t: ReferenceTensor, i: number) =>
    (t.data as Float64Array).subarray(i * width, (i + 1) * width);
  const dot = (a: Float64Array, b: Float64Array) => {
    let sum = 0;
    for (let d = 0; d < width; d++) sum += a[d] * b[d];
    return sum;
  };
  const add = (to: Float64Array, factor: number, from: Float64Array) => {
    for (let d = 0; d < width; d++) to[d] += factor * from[d];
  };
  const zeros = (t: ReferenceTensor) => ({ dims: t.dims, data: new Float64Array(t.data.length) });
  const [output, gradQuery, gradKey, gradValue] = [query, query, key, value].map(zeros);
  const weights = new Float64Array(keys);
  const gains = new Float64Array(keys);
  for (let i = 0; i < queries; i++) {
    const q = row(query, i);
    const upstream = row(gradOutput!, i);
    for (let j = 0; j < keys; j++) weights[j] = scale * dot(q, row(key, j));
    const max = weights.reduce((a, b) => Math.max(a, b));
    for (let j = 0; j < keys; j++) weights[j] = Math.exp(weights[j] - max);
    const sum = weights.reduce((a, b) => a + b);
    let mean = 0;
    for (let j = 0; j < keys; j++) {
      weights[j] /= sum;
      gains[j] = dot(upstream, row(value, j));
      mean += weights[j] * gains[j];
      add(row(output, i), weights[j], row(value, j));
      add(row(gradValue, j), weights[j], upstream);
    }
    for (let j = 0; j < keys; j++) {
      const gradScore = scale * weights[j] * (gains[j] - mean);
      add(row(gradQuery, i), gradScore, row(key, j));
      add(row(gradKey, j), gradScore, q);
    }
  }
  return {
    output: output.data,
    gradQuery: gradQuery.data,
    gradKey: gradKey.data,
    gradValue: gradValue.data,
  };
}

/** The root mean square of what is finite. */
function typicalSize(values: Float64Array): number {
  const finite = values.filter(Number.isFinite);
  return Math.sqrt(finite.reduce((sum, x) => sum + x * x, 0) / Math.max(1, finite.length));
}

/** Relative L2. NaN and infinities must be where they are expected. */
function distance(actual: ArrayLike<number>, exact: ArrayLike<number>): number {
  let error = 0;
  let norm = 0;
  for (let i = 0; i < exact.length; i++) {
    if (Object.is(actual[i], exact[i])) {
      if (Number.isFinite(exact[i])) norm += exact[i] ** 2;
      continue;
    }
    error += (actual[i] - exact[i]) ** 2;
    norm += exact[i] ** 2;
  }
  return error === 0 ? 0 : Math.sqrt(error / norm);
}
