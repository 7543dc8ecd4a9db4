// How sure a model is of each token of a text: Monte-Carlo dropout (Gal & Ghahramani, "Dropout as a
// Bayesian Approximation", arXiv 1506.02142), in samples that may be computed anywhere and joined.
//
// With p_s(v) the softmax of sample s's logits and N samples, for each position of the text:
//
//   p(v)                  1/N sum_s p_s(v), the predictive distribution of the next token
//   mean                  p(t) of the token t that does come next
//   spread                sqrt(1/(N-1) sum_s (p_s(t) - p(t))^2)
//   entropy               H[p] = -sum_v p(v) ln p(v), in nats: all doubt
//   expectedEntropy       1/N sum_s H[p_s]: doubt that each sample has by itself, the text's own
//   mutualInformation     entropy - expectedEntropy: doubt on which samples disagree, the model's own
//                         (BALD; Houlsby et al., arXiv 1112.5745; Smith & Gal, arXiv 1803.08533)
import {
  backendInfo,
  type DropoutPlacement,
  scaledDotProductAttention,
  type Tensor,
} from 'node-sdpa';
import type { AttentionRequest } from '../gpt/attention';
import type { Gpt, ModelSizes } from '../gpt/model';
import { invalidField } from './errors';
import { decodeFloats, encodeFloats } from './floats';

/** What is asked, as JSON: the same job gives the same bits on every machine with one backend. */
export interface UncertaintyJob {
  /** Of the text, 1 to the model's length */
  readonly tokens: readonly number[];
  /** Where attention drops, in every layer */
  readonly placement: DropoutPlacement;
  /** Probability of a drop, 0 to 1 */
  readonly p: number;
  /** 0 to 2^64 - 1, in decimal */
  readonly seed: string;
  /** N, 2 to {@link MOST_SAMPLES} */
  readonly samples: number;
}

/** The samples [first, first + count) of a job, as JSON. */
export interface SampleShard {
  readonly first: number;
  readonly count: number;
  /** float32 [count, tokens, vocabulary], little-endian, in base64 */
  readonly logits: string;
  /** What computed attention: shards of one backend are bit-equal on every machine */
  readonly backend: string;
}

/** What the model says of the token that comes after some position of the text; see above. */
export interface Prediction {
  /** The token that does come next; null behind the last one, and so are mean and spread */
  readonly token: number | null;
  readonly mean: number | null;
  readonly spread: number | null;
  readonly entropy: number;
  readonly expectedEntropy: number;
  readonly mutualInformation: number;
  /** The likeliest tokens by p(v), the first one first */
  readonly likeliest: readonly { readonly token: number; readonly mean: number }[];
}

export interface Uncertainty {
  readonly samples: number;
  /** Names of the backends that computed; one, or the bits depend on who did what */
  readonly backends: readonly string[];
  /** predictions[i] is made from tokens 0 to i */
  readonly predictions: readonly Prediction[];
}

export const MOST_SAMPLES = 1024;
const LIKELIEST = 3;
/** Samples in one pass through the model: bounds its memory, and how soon it notices a signal. */
const GROUP = 8;
const PLACEMENTS: readonly DropoutPlacement[] = ['weights', 'context', 'scores'];

/** @throws RequestError where a field of a job does not fit the model */
export function checkJob(job: UncertaintyJob, sizes: ModelSizes): void {
  const { tokens, placement, p, seed, samples } = job;
  const isToken = (t: number) => Number.isInteger(t) && t >= 0 && t < sizes.vocabulary;
  if (tokens.length < 1 || tokens.length > sizes.length) {
    throw invalidField('tokens', `1 to ${sizes.length} of them`, tokens.length);
  }
  if (!tokens.every(isToken)) {
    const wrong = tokens.find((token) => !isToken(token));
    throw invalidField('tokens', `integers from 0 to ${sizes.vocabulary - 1}`, wrong);
  }
  if (!PLACEMENTS.includes(placement)) {
    throw invalidField('placement', PLACEMENTS.join(' or '), placement);
  }
  if (!(p >= 0 && p <= 1)) throw invalidField('p', 'a number from 0 to 1', p);
  if (!/^\d{1,20}$/.test(seed) || BigInt(seed) >= 1n << 64n) {
    throw invalidField('seed', 'a whole number below 2^64', seed);
  }
  if (!Number.isInteger(samples) || samples < 2 || samples > MOST_SAMPLES) {
    throw invalidField('samples', `a whole number from 2 to ${MOST_SAMPLES}`, samples);
  }
}

/**
 * Which of a seed's masks a layer of a sample drops by. It depends on nothing else, so that samples
 * are the same in any shard, and the first ones of a larger job are those of a smaller one.
 */
function offsetOf(layer: number, sample: number): bigint {
  return (BigInt(layer) << 32n) + BigInt(sample);
}

/**
 * Computes some samples of a job: all of a job's samples, in whatever pieces, make its result.
 * @param model - the same in all places
 * @param first - the first sample, from 0 on
 * @param count - how many
 * @param signal - stops the work: rejects with an AbortError
 */
export async function computeSamples(
  model: Gpt,
  job: UncertaintyJob,
  first: number,
  count: number,
  signal?: AbortSignal,
): Promise<SampleShard> {
  checkJob(job, model.sizes);
  if (!(first >= 0 && count >= 1 && first + count <= job.samples)) {
    throw new RangeError(`no samples ${first} to ${first + count} in ${job.samples}`);
  }
  const size = job.tokens.length * model.sizes.vocabulary;
  const logits = new Float32Array(count * size);
  for (let done = 0; done < count; done += GROUP) {
    const group = Math.min(GROUP, count - done);
    logits.set(await forwardSamples(model, job, first + done, group, signal), done * size);
  }
  return { first, count, logits: encodeFloats(logits), backend: `${backendInfo().selected}` };
}

/** One pass: the text as often as there are samples, each with dropout of its own. */
async function forwardSamples(
  model: Gpt,
  { tokens, placement, p, seed }: UncertaintyJob,
  first: number,
  count: number,
  signal: AbortSignal | undefined,
) {
  const { heads, width } = model.sizes;
  const length = tokens.length;
  const dims = [1, length, heads, width / heads];
  const options = {
    layout: 'bshd',
    isCausal: true,
    dropoutP: p,
    dropoutPlacement: placement,
    training: true,
    seed: BigInt(seed),
    signal,
  } as const;
  const attend = (request: AttentionRequest, i: number, samples?: number): Promise<Tensor> => {
    const [query, key, value] = [request.query, request.key, request.value].map((rows) => ({
      data: rows.subarray(i * length * width, (i + 1) * length * width) as Float32Array,
      dims,
    }));
    const offset = offsetOf(request.layer, first + i);
    return scaledDotProductAttention(query, key, value, { ...options, offset, samples });
  };
  const rows = Array.from({ length: count * length }, (_, row) => row % length);
  return model.forwardRows(
    Int32Array.from(rows, (position) => tokens[position]),
    Int32Array.from(rows),
    async (request) => {
      // Before the first dropout all samples ask the same: scores and softmax are computed once.
      if (request.layer === 0) return (await attend(request, 0, count)).data as Float32Array;
      const all = await Promise.all(Array.from({ length: count }, (_, i) => attend(request, i)));
      const output = new Float32Array(request.query.length);
      all.forEach(({ data }, i) => {
        output.set(data as Float32Array, i * length * width);
      });
      return output;
    },
  );
}

/**
 * The result of a job from all its samples. It is the same to the bit for any split into shards, in
 * any order: sums run over the samples in their order, in float64.
 * @param vocabulary - how many tokens the model knows
 * @throws RangeError where a sample is missing, is there twice, or is of another job
 */
export function joinShards(
  job: UncertaintyJob,
  vocabulary: number,
  shards: readonly SampleShard[],
): Uncertainty {
  const { tokens, samples } = job;
  const size = tokens.length * vocabulary;
  const logits: Float32Array[] = []; // of each sample: [tokens, vocabulary]
  for (const shard of [...shards].sort((a, b) => a.first - b.first)) {
    if (shard.first !== logits.length) {
      throw new RangeError(`expected a shard from sample ${logits.length} on, got ${shard.first}`);
    }
    const all = decodeFloats(shard.logits);
    if (all.length !== shard.count * size) {
      throw new RangeError(`shard ${shard.first}: ${all.length} logits, not ${shard.count * size}`);
    }
    for (let i = 0; i < shard.count; i++) logits.push(all.subarray(i * size, (i + 1) * size));
  }
  if (logits.length !== samples) {
    throw new RangeError(`expected ${samples} samples, got ${logits.length}`);
  }
  const predictions = tokens.map((_, i) => {
    const rows = logits.map((sample) => sample.subarray(i * vocabulary, (i + 1) * vocabulary));
    return predict(rows.map(softmax), tokens[i + 1] ?? null);
  });
  return { samples, backends: [...new Set(shards.map(({ backend }) => backend))], predictions };
}

/** @param distributions - of each sample, p_s [vocabulary] */
function predict(distributions: readonly Float64Array[], token: number | null): Prediction {
  const n = distributions.length;
  const average = new Float64Array(distributions[0].length);
  for (const p of distributions) for (let v = 0; v < p.length; v++) average[v] += p[v] / n;
  const entropy = entropyOf(average);
  const expectedEntropy = distributions.reduce((sum, p) => sum + entropyOf(p) / n, 0);
  const ranked = [...average.keys()].sort((a, b) => average[b] - average[a] || a - b);
  return {
    token,
    mean: token === null ? null : average[token],
    spread: token === null ? null : spreadOf(distributions.map((p) => p[token])),
    entropy,
    expectedEntropy,
    mutualInformation: Math.max(0, entropy - expectedEntropy), // below 0 by rounding alone
    likeliest: ranked.slice(0, LIKELIEST).map((token) => ({ token, mean: average[token] })),
  };
}

function spreadOf(values: readonly number[]): number {
  const mean = values.reduce((sum, x) => sum + x) / values.length;
  const squares = values.reduce((sum, x) => sum + (x - mean) ** 2, 0);
  return Math.sqrt(squares / (values.length - 1));
}

/** The probabilities of logits. */
export function softmax(logits: Float32Array): Float64Array {
  const largest = logits.reduce((most, x) => Math.max(most, x), Number.NEGATIVE_INFINITY);
  const powers = new Float64Array(logits).map((x) => Math.exp(x - largest));
  const sum = powers.reduce((total, x) => total + x);
  return powers.map((x) => x / sum);
}

/** Of a distribution, in nats. */
export function entropyOf(p: Float64Array): number {
  return p.reduce((sum, x) => (x > 0 ? sum - x * Math.log(x) : sum), 0);
}
