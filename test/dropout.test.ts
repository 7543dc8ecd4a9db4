// Dropout: the bits that kernels use are the specified ones, forward and backward; edge rules;
// statistics.
import fc from 'fast-check';
import { beforeAll, describe, expect, test } from 'vitest';
import { dropoutMask } from '../lib/index';
import { type MaskSpec, maskSpecs, RUNS, SEED, settings } from './arbitrary';
import { randomTensor } from './cases';
import {
  BACKENDS,
  type Call,
  expectSame,
  expectSameOutcome,
  forward,
  namedCall,
  numbers,
  representable,
  run,
  runner,
  stored,
} from './harness';
import {
  keepDecisions,
  PLACEMENTS,
  type ReferenceOptions,
  type ReferenceTensor,
  reference,
} from './reference';

beforeAll(() => {
  console.log(`dropout: seed ${SEED}, ${RUNS} runs, backends ${BACKENDS.join(', ')}`);
});

describe('dropout masks, bit for bit', () => {
  test(`dropoutMask equals the specification, seed ${SEED}`, () => {
    const property = fc.property(maskSpecs, ({ dims, ...spec }) => {
      const mask = dropoutMask(dims, spec);
      expect(mask).toBeInstanceOf(Uint8Array);
      expectSame('mask', mask, keepDecisions(dims, spec));
    });
    fc.assert(property, settings(2 * RUNS));
  });

  describe.each(BACKENDS)(`%s, seed ${SEED}`, (backend) => {
    test('forward: droppedWeights and output show the mask of weights and scores', () => {
      const property = fc.property(maskSpecs, (spec) => {
        const placement = spec.placement === 'scores' ? 'scores' : 'weights';
        const [batch, heads, queries, keys] = spec.dims;
        const result = forward(backend, maskCall({ ...spec, placement }, keys), {
          outputs: ['droppedWeights'],
        });
        const mask = keepDecisions(spec.dims, { ...spec, placement });
        expectSame('droppedWeights', pattern(result.droppedWeights!.data), mask);
        expectSame('output', pattern(result.output.data), mask);
        expect(result.output.dims).toEqual([batch, heads, queries, keys]);
      });
      fc.assert(property, settings(RUNS));
    });

    test('forward: the output shows the mask of context', () => {
      const property = fc.property(maskSpecs, (spec) => {
        const placement = 'context';
        const [batch, heads, queries, channels] = spec.dims;
        const call: Call = {
          query: zeros([batch, heads, queries, 1]),
          key: zeros([batch, heads, 3, 1]),
          value: filled([batch, heads, 3, channels], () => 1),
          options: dropoutOptions({ ...spec, placement }),
        };
        const mask = keepDecisions(spec.dims, { ...spec, placement });
        expectSame('output', pattern(forward(backend, call).output.data), mask);
      });
      fc.assert(property, settings(RUNS));
    });

    test('backward: the gradient of value shows the mask of weights and scores', () => {
      const property = fc.property(maskSpecs, (spec) => {
        const placement = spec.placement === 'scores' ? 'scores' : 'weights';
        const [batch, heads, queries, keys] = spec.dims;
        const call = maskCall({ ...spec, placement }, queries);
        // With the identity as upstream gradient, gradValue is the transposed dropped weights.
        const identity = filled([batch, heads, queries, queries], (at) =>
          Math.floor(at / queries) % queries === at % queries ? 1 : 0,
        );
        const gradients = forward(backend, call).backwardSync(stored(identity));
        const mask = keepDecisions(spec.dims, { ...spec, placement });
        const transposed = Uint8Array.from(mask, (_, at) => {
          const head = Math.floor(at / (keys * queries));
          const key = Math.floor(at / queries) % keys;
          return mask[(head * queries + (at % queries)) * keys + key];
        });
        expectSame('gradValue', pattern(gradients.gradValue.data), transposed);
      });
      fc.assert(property, settings(Math.ceil(RUNS / 2)));
    });

    test('backward: the gradient of value shows the mask of context', () => {
      const property = fc.property(maskSpecs, (spec) => {
        const placement = 'context';
        const [batch, heads, , channels] = spec.dims;
        const call: Call = {
          query: zeros([batch, heads, 1, 1]),
          key: zeros([batch, heads, 1, 1]),
          value: filled([batch, heads, 1, channels], () => 1),
          options: dropoutOptions({ ...spec, placement }),
        };
        const upstream = filled([batch, heads, 1, channels], () => 1);
        const gradients = forward(backend, call).backwardSync(stored(upstream));
        const mask = keepDecisions([batch, heads, 1, channels], { ...spec, placement });
        expectSame('gradValue', pattern(gradients.gradValue.data), mask);
      });
      fc.assert(property, settings(Math.ceil(RUNS / 2)));
    });
  });
});

/** Equal scores, and values that show each key in a channel of its own. */
function maskCall(spec: MaskSpec, channels: number): Call {
  const [batch, heads, queries, keys] = spec.dims;
  return {
    query: zeros([batch, heads, queries, 1]),
    key: zeros([batch, heads, keys, 1]),
    value: filled([batch, heads, keys, channels], (at) =>
      Math.floor(at / channels) % keys === at % channels ? 1 : 0,
    ),
    options: dropoutOptions(spec),
  };
}

function dropoutOptions({ dims: _, p, placement, broadcast, ...rest }: MaskSpec): ReferenceOptions {
  return { ...rest, dropoutP: p, dropoutPlacement: placement, dropoutBroadcast: broadcast };
}

function zeros(dims: number[]): ReferenceTensor {
  return filled(dims, () => 0);
}

function filled(dims: number[], value: (at: number) => number): ReferenceTensor {
  const size = dims.reduce((product, n) => product * n, 1);
  return { data: Float64Array.from({ length: size }, (_, at) => value(at)), dims };
}

function pattern(data: ArrayLike<number>): Uint8Array {
  return Uint8Array.from(data, (x) => (x === 0 ? 0 : 1));
}

describe.each(BACKENDS)('%s, edge rules of dropout', (backend) => {
  const base = namedCall({ name: '', seed: 55, shape: [2, 4, 2, 17, 33, 24, 40], options: {} });

  test.each(PLACEMENTS)('p = 0 and training: false are bit for bit without dropout: %s', (at) => {
    const plain = run(runner(backend), base);
    const options = { dropoutPlacement: at, seed: 5, offset: 6 };
    const zero = run(runner(backend), { ...base, options: { ...options, dropoutP: 0 } });
    expectSameOutcome(zero, plain);
    const inactive = { ...options, dropoutP: 0.5, training: false };
    expectSameOutcome(run(runner(backend), { ...base, options: inactive }), plain);
  });

  test.each(PLACEMENTS)('p = 1 gives zeros and zero gradients: %s', (dropoutPlacement) => {
    const options = { dropoutP: 1, dropoutPlacement, seed: 5, offset: 6 };
    const attnMask = randomTensor(9, [17, 33]);
    const call = representable({ ...base, options: { ...options, attnMask } });
    const outcome = run(runner(backend), call);
    for (const name of ['output', 'gradQuery', 'gradKey', 'gradValue', 'gradAttnMask'] as const) {
      expect(outcome[name]!.every((x) => x === 0)).toBe(true);
    }
    const dead = dropoutPlacement === 'scores';
    expect(outcome.lse.every((x) => (dead ? x === -Infinity : Number.isFinite(x)))).toBe(true);
  });
});

describe('statistics of dropout', () => {
  test.each([0.1, 0.5, 1 / 65536, 0.999])('the drop rate is the effective one: p = %d', (p) => {
    const dims = [2, 4, 64, 1024] as const;
    const mask = dropoutMask(dims, { p, placement: 'weights', seed: 1, offset: 0 });
    const count = mask.length;
    const rate = Math.round(p * 65536) / 65536;
    const dropped = count - mask.reduce((sum, x) => sum + x, 0);
    const sigma = Math.sqrt(count * rate * (1 - rate));
    expect(Math.abs(dropped - count * rate)).toBeLessThan(5 * sigma);
  });
});

describe.each(BACKENDS)('%s, statistics of dropout', (backend) => {
  test.each([
    ['weights', true],
    ['context', true],
    ['scores', false],
  ] as const)(
    'the mean over seeds is the output without dropout: %s, %s',
    (placement, unbiased) => {
      // Peaked rows, where dropping scores is biased the most.
      const shape = [1, 1, 1, 8, 16, 8, 8] as const;
      const options: ReferenceOptions = { scale: 1.5 };
      const call = namedCall({ name: '', seed: 61, shape, options });
      const plain = reference(call.query, call.key, call.value, options).output.values;
      const draws = 1000;
      const sum = new Float64Array(plain.length);
      const squares = new Float64Array(plain.length);
      for (let seed = 0; seed < draws; seed++) {
        const dropout = { dropoutP: 0.5, dropoutPlacement: placement, seed, offset: 0 };
        const { output } = forward(backend, { ...call, options: { ...options, ...dropout } });
        numbers(output).forEach((x, i) => {
          sum[i] += x;
          squares[i] += x * x;
        });
      }
      // The largest of 64 standard scores: beyond 5 is a chance of 4e-5, and the seeds are fixed.
      const scores = plain.map((x, i) => {
        const mean = sum[i] / draws;
        const deviation = Math.sqrt(Math.max(squares[i] / draws - mean * mean, 1e-30) / draws);
        return Math.abs(mean - x) / deviation;
      });
      if (unbiased) expect(Math.max(...scores)).toBeLessThan(5);
      else expect(Math.max(...scores)).toBeGreaterThan(5);
    },
  );
});
