// Samples of dropout: bit for bit so many calls, on every backend; their mean and variance against
// float64 and against the formulas of Bernoulli masks.
import fc from 'fast-check';
import { beforeAll, describe, expect, test } from 'vitest';
import {
  type AttentionMoments,
  type AttentionOptions,
  attentionForward,
  attentionForwardSync,
  Generator,
  type MomentsOptions,
  scaledDotProductAttention,
  scaledDotProductAttentionSync,
  Tensor,
} from '../lib/index';
import { calls, RUNS, SEED, settings } from './arbitrary';
import { randomTensor } from './cases';
import {
  BACKENDS,
  type Call,
  expectSame,
  forward,
  namedCall,
  numbers,
  publicOptions,
  representable,
  stored,
  withThreads,
} from './harness';
import { PLACEMENTS, type ReferenceOptions, reference } from './reference';

beforeAll(() => {
  console.log(`samples: seed ${SEED}, ${RUNS} runs, backends ${BACKENDS.join(', ')}`);
});

/** Sample `s` alone: the call with `offset + s`, modulo 2^64. */
function single(backend: string, call: Call, s: number) {
  const { seed, offset = 0 } = call.options;
  const moved = BigInt.asUintN(64, BigInt(offset) + BigInt(s));
  return forward(backend, call, seed === undefined ? {} : { offset: moved });
}

/** All samples, one call each, as numbers in their stored order. */
function oneByOne(backend: string, call: Call, samples: number) {
  return Array.from({ length: samples }, (_, s) => {
    const { output, lse } = single(backend, call, s);
    return { dims: output.dims, output: numbers(output), lse: numbers(lse) };
  });
}

function moments(backend: string, call: Call, samples: number): AttentionMoments {
  const { layout = 'bhsd', type = 'float32' } = call;
  const [query, key, value] = [call.query, call.key, call.value].map((t) =>
    stored(t, type, layout),
  );
  const options = { ...publicOptions(call), samples, moments: true, backend } as MomentsOptions;
  const result = attentionForwardSync(query, key, value, options);
  expect(result.backend).toBe(backend);
  return result;
}

function expectSamples(backend: string, call: Call, samples: number): void {
  const wanted = oneByOne(backend, call, samples);
  const { output, lse, rngState } = forward(backend, call, { samples });
  expect(output.dims).toEqual([samples, ...wanted[0].dims]);
  const all = numbers(output);
  const size = all.length / samples;
  const rows = wanted[0].lse.length;
  const ownLse = call.options.dropoutPlacement === 'scores';
  expect(lse.data.length).toBe(ownLse ? samples * rows : rows);
  for (const [s, want] of wanted.entries()) {
    expectSame(`sample ${s}`, all.subarray(s * size, (s + 1) * size), want.output);
    const from = ownLse ? s * rows : 0;
    expectSame(`lse ${s}`, numbers(lse).subarray(from, from + rows), want.lse);
  }
  expect(rngState).toEqual(single(backend, call, 0).rngState);
}

/**
 * Mean and variance in float64 by their definition. What is returned is that, rounded to float32;
 * the running sums add some roundings of float64 for each sample.
 */
function expectMoments(backend: string, call: Call, samples: number): void {
  const outputs = oneByOne(backend, call, samples);
  const { mean, variance } = moments(backend, call, samples);
  expect([mean.type, variance.type]).toEqual(['float32', 'float32']);
  expect([mean.dims, variance.dims]).toEqual([outputs[0].dims, outputs[0].dims]);
  for (let i = 0; i < mean.data.length; i++) {
    const values = outputs.map(({ output }) => output[i]);
    const average = values.reduce((sum, x) => sum + x, 0) / samples;
    const spread = values.reduce((sum, x) => sum + (x - average) ** 2, 0) / (samples - 1);
    const size = Math.max(...values.map(Math.abs));
    expectWithin(`mean[${i}]`, mean.data[i], average, 2 ** -50 * samples * size);
    const scatter = 2 ** -50 * samples * (spread + 2 ** -50 * samples * size * size);
    expectWithin(`variance[${i}]`, variance.data[i], spread, scatter);
  }
}

/** Equal within `error` and one rounding to float32. */
function expectWithin(label: string, actual: number, wanted: number, error: number): void {
  if (Object.is(actual, wanted) || (Number.isNaN(actual) && Number.isNaN(wanted))) return;
  const rounding = 2 ** -24 * Math.abs(wanted) + 2 ** -150;
  if (Math.abs(actual - wanted) <= error + rounding) return;
  expect.fail(`${label} = ${actual}, not ${wanted}`);
}

/** Few samples of large problems, many of small ones. */
function samplesFor(call: Call, choice: number): number {
  const [batch, heads, queries, dim] = call.query.dims;
  const cost = batch * heads * queries * call.key.dims[2] * (dim + call.value.dims[3]);
  return cost < 1e4 ? choice : 2 + (choice % 3);
}

describe.each(BACKENDS)(`%s, samples are so many calls, seed ${SEED}`, (backend) => {
  test('random problems, bit for bit', () => {
    const property = fc.property(calls, fc.integer({ min: 1, max: 20 }), (call, choice) => {
      expectSamples(backend, call, samplesFor(call, choice));
    });
    fc.assert(property, settings());
  });

  test('random problems: mean and variance', () => {
    const property = fc.property(calls, fc.integer({ min: 2, max: 20 }), (call, choice) => {
      expectMoments(backend, call, samplesFor(call, choice));
    });
    fc.assert(property, settings(Math.ceil(RUNS / 2)));
  });
});

const SHAPES: [string, readonly [number, number, number, number, number, number, number]][] = [
  ['wide', [1, 2, 1, 70, 150, 64, 64]],
  ['wider, another value dim', [1, 2, 1, 49, 200, 40, 130]],
  ['decode', [2, 4, 2, 1, 300, 32, 32]],
];

describe.each(BACKENDS)('%s, more samples than are computed at once', (backend) => {
  // 2 groups or more on every backend: the contexts of 75 blocks of 32 x 64 floats are 600 KiB.
  const samples = backend === 'js' ? 37 : 75;
  const variants: [string, ReferenceOptions][] = PLACEMENTS.flatMap((dropoutPlacement) => {
    const dropout = { dropoutP: 0.3, dropoutPlacement, seed: 5, offset: 2n ** 64n - 3n };
    return [
      [dropoutPlacement, { ...dropout, isCausal: true, causalOffset: 30 }],
      [`${dropoutPlacement}, from an odd key`, { ...dropout, keyOffset: 3, softcap: 3 }],
      [`${dropoutPlacement}, large scores`, { ...dropout, scale: 8 }],
    ];
  });

  test.each(
    SHAPES.flatMap(([name, shape]) => variants.map((v) => [name, v[0], shape, v[1]] as const)),
  )('%s: %s', (_, __, shape, options) => {
    const call = namedCall({ name: '', seed: 201, shape, options });
    for (const threads of backend === 'js' ? [1] : [1, 3]) {
      withThreads(threads, () => expectSamples(backend, call, samples));
    }
    expectMoments(backend, call, samples);
  });
});

describe.each(BACKENDS)('%s, what samples share', (backend) => {
  const dropout = { dropoutP: 0.4, training: true, backend } as AttentionOptions;
  const tensor = (seed: number) => stored(randomTensor(seed, [2, 3, 40, 24]));
  const [query, key, value] = [tensor(1), tensor(2), tensor(3)];

  test('a generator goes on as many offsets as there are samples, also past 2^32', () => {
    const generator = new Generator({ seed: 3, offset: 2n ** 32n - 2n });
    const result = attentionForwardSync(query, key, value, { ...dropout, generator, samples: 5 });
    expect(result.rngState).toEqual({ seed: 3n, offset: 2n ** 32n - 2n });
    expect(generator.getState().offset).toBe(2n ** 32n + 3n);
    const next = scaledDotProductAttentionSync(query, key, value, { ...dropout, generator });
    const more = { seed: 3, offset: 2n ** 32n - 2n, samples: 6 };
    const six = scaledDotProductAttentionSync(query, key, value, { ...dropout, ...more });
    expectSame('the call after', next.data, six.data.slice(-next.data.length));
  });

  test('without dropout all samples are the output, and their variance is 0', () => {
    const options = { ...dropout, training: false, samples: 3 };
    const plain = scaledDotProductAttentionSync(query, key, value, { backend: dropout.backend });
    const { data } = scaledDotProductAttentionSync(query, key, value, options);
    const size = plain.data.length;
    for (let s = 0; s < 3; s++) {
      expectSame(`${s}`, data.slice(s * size, (s + 1) * size), plain.data);
    }
    const both = attentionForwardSync(query, key, value, { ...options, moments: true });
    expectSame('mean', both.mean.data, plain.data);
    expect(both.variance.data.every((x) => x === 0)).toBe(true);
    expect(both.rngState).toBe(null);
  });

  test.each(PLACEMENTS)('a value that is not finite: %s', (dropoutPlacement) => {
    const call = namedCall({
      name: '',
      seed: 9,
      shape: [1, 2, 1, 40, 70, 32, 32],
      options: { dropoutP: 0.4, dropoutPlacement, seed: 3, isCausal: true, causalOffset: 8 },
    });
    const data = Float64Array.from(call.value.data);
    data[20 * 32 + 5] = Number.NaN;
    data[33 * 32 + 6] = Infinity;
    expectSamples(backend, representable({ ...call, value: { ...call.value, data } }), 5);
  });

  test('asynchronous calls, `out` and an abort', async () => {
    const options = { ...dropout, seed: 8, samples: 4 };
    const wanted = scaledDotProductAttentionSync(query, key, value, options);
    const out = new Tensor('float32', new Float32Array(wanted.data.length), wanted.dims);
    const { signal } = new AbortController();
    expect(await scaledDotProductAttention(query, key, value, { ...options, out, signal })).toBe(
      out,
    );
    expectSame('out', out.data, wanted.data);
    const both = await attentionForward(query, key, value, { ...options, moments: true });
    const sync = attentionForwardSync(query, key, value, { ...options, moments: true });
    expectSame('mean', both.mean.data, sync.mean.data);
    expectSame('variance', both.variance.data, sync.variance.data);

    const long = stored(randomTensor(4, [1, 4, 512, 64]));
    const controller = new AbortController();
    const many = { ...dropout, samples: 20000, moments: true, signal: controller.signal } as const;
    const start = performance.now();
    const stopped = attentionForward(long, long, long, many);
    setTimeout(() => controller.abort(), 20);
    await expect(stopped).rejects.toMatchObject({ code: 'ERR_SDPA_ABORTED' });
    expect(performance.now() - start).toBeLessThan(5000);
  });
});

/**
 * The exact moments for independent Bernoulli decisions that keep with probability 1 - p and are
 * scaled by 1 / (1 - p): the mean is the output without dropout; the variance is p / (1 - p) times
 * the sum over the keys of (weight * value)^2, or times the square of the context. The fourth
 * central moment, for the error of a sample variance, adds up the cumulants of the terms.
 */
function closedForm(call: Call, placement: 'weights' | 'context', p: number) {
  const { output, weights } = reference(call.query, call.key, call.value);
  const [, , queries, keys] = [...call.query.dims.slice(0, 3), call.key.dims[2]];
  const dim = call.value.dims[3];
  return Array.from(output.values, (mean, at) => {
    const d = at % dim;
    const row = Math.floor(at / dim);
    const head = Math.floor(row / queries);
    const terms =
      placement === 'context'
        ? [mean]
        : Array.from(
            { length: keys },
            (_, j) => weights.values[row * keys + j] * call.value.data[(head * keys + j) * dim + d],
          );
    const odds = p / (1 - p);
    const variance = odds * terms.reduce((sum, x) => sum + x ** 2, 0);
    const fourthCumulant = (odds ** 3 - 4 * odds ** 2 + odds) * sumOf(terms, 4);
    return { mean, variance, fourth: fourthCumulant + 3 * variance ** 2 };
  });
}

function sumOf(terms: readonly number[], power: number): number {
  return terms.reduce((sum, x) => sum + x ** power, 0);
}

describe.each(BACKENDS)('%s, samples against the closed form of one layer', (backend) => {
  test.each(['weights', 'context'] as const)('%s', (dropoutPlacement) => {
    const p = 0.25; // a multiple of 2^-16, so the effective probability
    const options = { dropoutP: p, dropoutPlacement, seed: 17, offset: 0 };
    const call = namedCall({ name: '', seed: 62, shape: [1, 2, 2, 20, 40, 16, 16], options });
    const samples = 4000;
    const { mean, variance } = moments(backend, call, samples);
    const scores = closedForm(call, dropoutPlacement, p).map((exact, i) => {
      const meanError = Math.sqrt(exact.variance / samples);
      const varianceError = Math.sqrt(
        (exact.fourth - ((samples - 3) / (samples - 1)) * exact.variance ** 2) / samples,
      );
      return [
        (mean.data[i] - exact.mean) / meanError,
        (variance.data[i] - exact.variance) / varianceError,
      ];
    });
    for (const [which, name] of ['mean', 'variance'].entries()) {
      const standard = scores.map((pair) => pair[which]);
      // 640 standard scores: one beyond 5 has a chance of 4e-4, and their mean square is 1 with a
      // standard error that the scores' dependence along a row leaves below 0.25.
      expect(Math.max(...standard.map(Math.abs)), name).toBeLessThan(5);
      const meanSquare = sumOf(standard, 2) / standard.length;
      expect(Math.abs(meanSquare - 1), `${name}: mean square ${meanSquare}`).toBeLessThan(1);
    }
  });
});
