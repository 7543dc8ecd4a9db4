// Random problems on every backend: against the float64 reference, against differences of the
// forward pass, and against itself with other numbers of threads.
import fc from 'fast-check';
import { beforeAll, describe, expect, test } from 'vitest';
import { calls, RUNS, SEED, settings } from './arbitrary';
import { NAMED_CASES, type NamedCase, randomTensor } from './cases';
import {
  BACKENDS,
  type Call,
  expected,
  expectOutcome,
  expectSameOutcome,
  NATIVE_BACKENDS,
  namedCall,
  representable,
  run,
  runner,
  withinReach,
} from './harness';
import { PLACEMENTS, type ReferenceOptions } from './reference';

beforeAll(() => {
  console.log(`properties: seed ${SEED}, ${RUNS} runs, backends ${BACKENDS.join(', ')}`);
});

describe.each(BACKENDS)(`%s against the reference, seed ${SEED}`, (backend) => {
  test('random problems, forward and backward', () => {
    const property = fc.property(calls, fc.constantFrom(1, 2, 5), (any, threads) => {
      const call = withinReach(backend, any);
      expectOutcome(call, run(runner(backend, threads), call));
    });
    fc.assert(property, settings());
  });

  // The error budgets hold for the worst data. On unit normals float32 accumulation gives up to
  // 1e-6 (relative L2), three-term bfloat16 products give 6e-6: 3e-6 tells them apart.
  test.each(NAMED_CASES)(
    '$name: each element in its budget, all with the error of float32',
    (named) => {
      const call = withinReach(backend, namedCall(named));
      const outcome = run(runner(backend), call);
      const want = expected(call);
      expectOutcome(call, outcome, want);
      expectClose('output', outcome.output, want.output.values);
      if (!call.gradOutput) return;
      const gradients = want.backward(call.gradOutput.data);
      for (const name of ['gradQuery', 'gradKey', 'gradValue'] as const) {
        expectClose(name, outcome[name]!, gradients[name].values);
      }
    },
  );
});

function expectClose(name: string, actual: ArrayLike<number>, wanted: Float64Array): void {
  const norm = Math.sqrt(wanted.reduce((sum, x) => sum + x * x, 0));
  const distance = Math.sqrt(wanted.reduce((sum, x, i) => sum + (actual[i] - x) ** 2, 0));
  // A single key has gradients of 0: 1e-6 is the rounding of the terms that cancel there.
  expect(distance, name).toBeLessThan(3e-6 * norm + 1e-6);
}

describe.each(BACKENDS)('%s, gradients against differences of its own forward', (backend) => {
  const variants: [string, ReferenceOptions][] = [
    ['no dropout', { isCausal: true, causalOffset: 3, softcap: 4 }],
    ...PLACEMENTS.map((dropoutPlacement): [string, ReferenceOptions] => [
      dropoutPlacement,
      { dropoutP: 0.3, dropoutPlacement, seed: 3, offset: 9, isCausal: true, causalOffset: 3 },
    ]),
  ];

  test.each(variants)('%s', (_, options) => {
    const base: NamedCase = { name: '', seed: 77, shape: [2, 4, 2, 9, 17, 16, 24], options };
    const call = namedCall(base);
    const result = run(runner(backend), call);
    const upstream = call.gradOutput!.data;
    for (const [input, name] of [
      ['query', 'gradQuery'],
      ['key', 'gradKey'],
      ['value', 'gradValue'],
    ] as const) {
      const direction = randomTensor(5, call[input].dims).data;
      const moved = (step: number): Call => {
        const data = Float64Array.from(call[input].data, (x, i) => x + step * direction[i]);
        return representable({ ...call, [input]: { ...call[input], data } });
      };
      const step = 2 ** -6;
      const [above, below] = [moved(step), moved(-step)];
      const loss = (output: ArrayLike<number>) =>
        Array.from(output).reduce((sum, x, i) => sum + x * upstream[i], 0);
      const [wantAbove, wantBelow] = [expected(above), expected(below)];
      const own =
        loss(run(runner(backend), above).output) - loss(run(runner(backend), below).output);
      const exact = loss(wantAbove.output.values) - loss(wantBelow.output.values);
      const analytic = dot(result[name]!, direction);
      const gradient = expected(call).backward(upstream)[name];
      const truth = dot(gradient.values, direction);
      // A float32 forward errs by its budget at each end, and the gradient by its own; the rest of
      // the gap between a difference and a derivative the float64 reference measures.
      const budget = [wantAbove, wantBelow].reduce(
        (sum, want) => sum + dot(want.output.error, Float64Array.from(upstream, Math.abs)),
        0,
      );
      const truncation = Math.abs(exact / (2 * step) - truth);
      const own32 = dot(gradient.error, direction.map(Math.abs));
      const bound = budget / (2 * step) + truncation + own32;
      expect(Math.abs(own / (2 * step) - analytic), name).toBeLessThan(bound);
    }
  });
});

function dot(a: ArrayLike<number>, b: ArrayLike<number>): number {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
}

describe.each(NATIVE_BACKENDS)(`%s, threads, seed ${SEED}`, (backend) => {
  test('results do not depend on the number of threads: random problems', () => {
    const property = fc.property(calls, (call) => {
      const one = run(runner(backend, 1), call);
      for (const threads of [2, 5]) expectSameOutcome(run(runner(backend, threads), call), one);
    });
    fc.assert(property, settings(Math.ceil(RUNS / 2)));
  });

  // Large enough that other threads are woken, with several tasks for each of them.
  const large: [string, ReferenceOptions][] = [
    ['plain', {}],
    ['causal', { isCausal: true, causalOffset: 'bottom-right' }],
    ['bias of each head', { attnMask: randomTensor(6, [4, 1, 700]) }],
    ['bias of each query', { attnMask: randomTensor(6, [2, 1, 200, 1]) }],
    ['lengths and cap', { kvLengths: [700, 130], softcap: 2 }],
    ...PLACEMENTS.map((dropoutPlacement): [string, ReferenceOptions] => [
      `dropout of ${dropoutPlacement}`,
      { dropoutP: 0.2, dropoutPlacement, seed: 3, offset: 4 },
    ]),
  ];

  test.each(large)('results do not depend on the number of threads: %s', (_, options) => {
    const shape = [2, 4, 2, 200, 700, 40, 24] as const;
    const call = namedCall({ name: '', seed: 120, shape, options });
    const one = run(runner(backend, 1), call);
    for (const threads of [2, 3, 5, 16]) {
      expectSameOutcome(run(runner(backend, threads), call), one);
    }
  });
});

describe.each(BACKENDS)('%s, far from the origin', (backend) => {
  const edge = 2 ** 32;
  const shards: [string, ReferenceOptions][] = [
    ['the last queries and keys', { queryOffset: edge - 17, keyOffset: edge - 33 }],
    ['keys far behind', { queryOffset: edge - 17, keyOffset: 3 }],
    ['keys far ahead', { queryOffset: 5, keyOffset: edge - 33 }],
    ['a shift back', { queryOffset: 2 ** 31, keyOffset: 8, causalOffset: -(2 ** 31) + 20 }],
    ['a shift ahead', { queryOffset: 2, keyOffset: 2 ** 31, causalOffset: 2 ** 31 - 1 }],
    ['a window of all', { queryOffset: 9, keyOffset: 1, windowSize: [2 ** 31 - 1, 2 ** 31 - 1] }],
  ];

  test.each(shards)('%s', (_, options) => {
    const shape = [1, 2, 2, 17, 33, 16, 16] as const;
    const masked = {
      dropoutP: 0.5,
      seed: 1,
      offset: 2,
      batchOffset: edge - 1,
      headOffset: edge - 2,
    };
    for (const rest of [{ isCausal: true }, { windowSize: [9, 4] as const }, { isCausal: false }]) {
      const call = namedCall({
        name: '',
        seed: 33,
        shape,
        options: { ...rest, ...masked, ...options },
      });
      expectOutcome(call, run(runner(backend), call));
    }
  });
});
