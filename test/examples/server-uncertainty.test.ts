// The statistics of dropout samples that examples/server gives: against float64 throughout, with an
// independent attention and its masks, and bit-equal for every split into shards.
import { describe, expect, test } from 'vitest';
import type { Attention } from '../../examples/gpt/attention';
import type { Floats } from '../../examples/gpt/matmul';
import { Gpt } from '../../examples/gpt/model';
import { randomStreams, standardNormal } from '../../examples/gpt/random';
import {
  checkJob,
  computeSamples,
  joinShards,
  type SampleShard,
  type UncertaintyJob,
} from '../../examples/server/uncertainty';
import { swapAxes } from '../cases';
import { PLACEMENTS, reference } from '../reference';

const SIZES = { layers: 2, heads: 2, width: 16, length: 12, vocabulary: 7 };

function createModel(precision?: Floats): Gpt {
  const [numbers] = randomStreams(21, 1);
  const model = new Gpt(SIZES, precision);
  for (const { value } of model.parameters) {
    for (let i = 0; i < value.length; i++) value[i] = Math.fround(0.4 * standardNormal(numbers));
  }
  return model;
}

const model = createModel();
const JOB: UncertaintyJob = {
  tokens: [3, 0, 6, 6, 1, 0, 2, 5],
  placement: 'weights',
  p: 0.3,
  seed: `${2n ** 64n - 1n}`,
  samples: 11,
};

/** The probabilities of a sample in float64 [tokens][vocabulary], by none of the package's code. */
function referenceSample(job: UncertaintyJob, sample: number): number[][] {
  const attention: Attention = (query, key, value, { batch, length, heads, headDim }, layer) => {
    const dims = [batch, length, heads, headDim];
    const [q, k, v] = [query, key, value].map((data) => swapAxes({ data, dims }));
    const { output } = reference(q, k, v, {
      isCausal: true,
      training: true,
      dropoutP: job.p,
      dropoutPlacement: job.placement,
      seed: BigInt(job.seed),
      offset: BigInt(layer) * 2n ** 32n + BigInt(sample),
    });
    const back = swapAxes({ data: output.values, dims: [batch, heads, length, headDim] });
    return { output: back.data as Float64Array };
  };
  const logits = createModel(new Float64Array()).forward(Int32Array.from(job.tokens), 1, attention);
  return job.tokens.map((_, i) => {
    const row = [...logits.slice(i * SIZES.vocabulary, (i + 1) * SIZES.vocabulary)];
    const sum = row.reduce((total, x) => total + Math.exp(x), 0);
    return row.map((x) => Math.exp(x) / sum);
  });
}

const mean = (values: number[]) => values.reduce((sum, x) => sum + x) / values.length;
const entropy = (p: number[]) => -p.reduce((sum, x) => sum + x * Math.log(x), 0);

describe.each(PLACEMENTS)('dropout of %s', (placement) => {
  const job = { ...JOB, placement };

  test('every number against float64', async () => {
    const result = joinShards(job, SIZES.vocabulary, [await computeSamples(model, job, 0, 11)]);
    const samples = Array.from({ length: 11 }, (_, s) => referenceSample(job, s));
    expect(result.predictions).toHaveLength(8);
    result.predictions.forEach((prediction, i) => {
      const rows = samples.map((sample) => sample[i]);
      const average = rows[0].map((_, v) => mean(rows.map((row) => row[v])));
      const near = (value: number | null, wanted: number) =>
        expect(Math.abs(value! - wanted)).toBeLessThan(2e-6);
      near(prediction.entropy, entropy(average));
      near(prediction.expectedEntropy, mean(rows.map(entropy)));
      near(prediction.mutualInformation, entropy(average) - mean(rows.map(entropy)));
      expect(prediction.mutualInformation).toBeGreaterThan(0);
      const likeliest = average.indexOf(Math.max(...average));
      expect(prediction.likeliest[0].token).toBe(likeliest);
      near(prediction.likeliest[0].mean, average[likeliest]);
      if (i === 7) {
        expect(prediction).toMatchObject({ token: null, mean: null, spread: null });
        return;
      }
      const token = job.tokens[i + 1];
      const values = rows.map((row) => row[token]);
      expect(prediction.token).toBe(token);
      near(prediction.mean, mean(values));
      near(
        prediction.spread,
        Math.sqrt((mean(values.map((x) => x * x)) - mean(values) ** 2) * (11 / 10)),
      );
    });
  });

  test.each([[[11]], [[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]], [[9, 2]], [[2, 8, 1]]])(
    'shards of %j samples, come in any order and by JSON, give the same bits',
    async (counts) => {
      const whole = joinShards(job, SIZES.vocabulary, [await computeSamples(model, job, 0, 11)]);
      const shards: SampleShard[] = [];
      let first = 0;
      for (const count of counts) {
        shards.unshift(await computeSamples(model, job, first, count));
        first += count;
      }
      const sent = JSON.parse(JSON.stringify({ job, shards }));
      expect(joinShards(sent.job, SIZES.vocabulary, sent.shards)).toEqual(whole);
    },
  );
});

test('fewer samples are the first of more', async () => {
  const [few, many] = await Promise.all([
    computeSamples(model, { ...JOB, samples: 3 }, 0, 3),
    computeSamples(model, { ...JOB, samples: 700 }, 0, 3),
  ]);
  expect(many).toEqual(few);
  const other = await computeSamples(model, { ...JOB, seed: '1' }, 0, 3);
  expect(other.logits).not.toBe(few.logits);
});

test('without dropout no sample differs', async () => {
  const job = { ...JOB, p: 0 };
  const { predictions } = joinShards(job, 7, [await computeSamples(model, job, 0, 11)]);
  for (const { spread, mutualInformation } of predictions) {
    expect(spread ?? 0).toBeLessThan(1e-15);
    expect(mutualInformation).toBeLessThan(1e-14);
  }
});

test('a signal stops the work', async () => {
  const stopped = new AbortController();
  const work = computeSamples(model, { ...JOB, samples: 1000 }, 0, 1000, stopped.signal);
  stopped.abort();
  await expect(work).rejects.toMatchObject({ name: 'AbortError' });
});

test('shards that are missing, twice, or of another job are refused', async () => {
  const [a, b] = await Promise.all([
    computeSamples(model, JOB, 0, 6),
    computeSamples(model, JOB, 6, 5),
  ]);
  const join = (...shards: SampleShard[]) => joinShards(JOB, SIZES.vocabulary, shards);
  expect(() => join(a)).toThrow('expected 11 samples, got 6');
  expect(() => join(b)).toThrow('expected a shard from sample 0 on, got 6');
  expect(() => join(a, b, b)).toThrow('expected a shard from sample 11 on, got 6');
  expect(() => join(a, { ...b, logits: a.logits })).toThrow('shard 6: 336 logits, not 280');
  await expect(computeSamples(model, JOB, 6, 6)).rejects.toThrow('no samples 6 to 12 in 11');
});

test.each<[Partial<UncertaintyJob>, string]>([
  [{ tokens: [] }, 'tokens: expected 1 to 12 of them, got 0'],
  [{ tokens: new Array(13).fill(0) }, 'tokens: expected 1 to 12 of them, got 13'],
  [{ tokens: [0, 7] }, 'tokens: expected integers from 0 to 6, got 7'],
  [{ tokens: [0.5] }, 'tokens: expected integers from 0 to 6, got 0.5'],
  [
    { placement: 'query' as never },
    'placement: expected weights or context or scores, got "query"',
  ],
  [{ p: -0.1 }, 'p: expected a number from 0 to 1, got -0.1'],
  [{ p: Number.NaN }, 'p: expected a number from 0 to 1, got null'],
  [
    { seed: `${2n ** 64n}` },
    'seed: expected a whole number below 2^64, got "18446744073709551616"',
  ],
  [{ seed: '-1' }, 'seed: expected a whole number below 2^64, got "-1"'],
  [{ samples: 1 }, 'samples: expected a whole number from 2 to 1024, got 1'],
  [{ samples: 2.5 }, 'samples: expected a whole number from 2 to 1024, got 2.5'],
])('the job %j is refused', (wrong, message) => {
  expect(() => checkJob({ ...JOB, ...wrong }, SIZES)).toThrow(
    expect.objectContaining({ message, status: 400, code: 'INVALID_FIELD' }),
  );
});
