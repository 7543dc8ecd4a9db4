// What `precision` promises: how far results may be from float64, and that only AMX trades it.
import { describe, expect, test } from 'vitest';
import type { Precision } from '../lib/index';
import { namedTensors } from './cases';
import { BACKENDS, type Call, expected, forward, logical, representable } from './harness';

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
 * a gradient multiplies rounded operands twice.
 */
const bounds: Record<Precision, number> = { highest: 3e-6, high: 6e-5, medium: 1.6e-2 };

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
    if (backend === 'cpu:amx') return;
    const highest = forward(backend, call, {});
    expect(result.output.data).toEqual(highest.output.data);
  });
});

describe.each(BACKENDS.filter((name) => name === 'cpu:amx'))('%s', (backend) => {
  test('lower precisions are really less exact', () => {
    const [highest, high, medium] = (['highest', 'high', 'medium'] as const).map((precision) =>
      distance(logical(forward(backend, call, { precision }).output), want.output.values),
    );
    expect(high).toBeGreaterThan(2 * highest);
    expect(medium).toBeGreaterThan(10 * high);
  });
});

function distance(actual: ArrayLike<number>, exact: ArrayLike<number>): number {
  let error = 0;
  let norm = 0;
  for (let i = 0; i < exact.length; i++) {
    error += (actual[i] - exact[i]) ** 2;
    norm += exact[i] ** 2;
  }
  return Math.sqrt(error / norm);
}
