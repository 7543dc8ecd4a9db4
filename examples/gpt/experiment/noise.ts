// Measures on the package the noise that each dropout placement puts into one row of attention, and
// sets the exact theory beside it.
import { renameSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { attentionForwardSync, type DropoutPlacement } from 'node-sdpa';
import { type Random, randomStreams, standardNormal } from '../random';
import { PLACEMENTS, PROBABILITIES } from './plan';
import { describeMachine, type Machine, NOISE_FILE } from './results';
import {
  approximateScoresMoments,
  approximateScoresWeights,
  channelCorrelation,
  contextMoments,
  contextOf,
  type Moments,
  type RowOfAttention,
  relativeBias,
  relativeNoise,
  scoresMoments,
  weightsMoments,
} from './theory';

const KEYS = 12; // so few that all 4096 sets of kept keys can be summed up
const CHANNELS = 16;
/** How many times as far apart scores are as standard normal ones: 0 is a flat row. */
const SHARPNESS = [0, 0.5, 1, 1.5, 2, 3, 4, 6];
/** How much of the values' variance is common to all keys. */
const COMMON_SHARES = [0, 0.5];
/** Draws of a case: rows of identical queries, each with its own dropout. */
const HEADS = 16;
const QUERIES = 4096;
const SEED = 1851; // the year of Moby-Dick

/** One quantity by theory and as measured. */
interface Compared {
  readonly theory: number;
  readonly measured: number;
}

export interface NoiseCase {
  readonly placement: DropoutPlacement;
  /** The probability as it takes effect, a multiple of 1/65536 */
  readonly p: number;
  readonly commonShare: number;
  /** The heaviest key's undropped weight */
  readonly topWeight: number;
  readonly noise: Compared;
  readonly bias: Compared;
  readonly correlation: Compared;
  /** Mean of the heaviest key's weight under dropout */
  readonly meanTopWeight: Compared;
  /** First-order theory, for scores only */
  readonly approximation?: { noise: number; meanTopWeight: number };
  /** Distances of measured means and variances of all channels from theory, in standard errors */
  readonly z: readonly number[];
}

export interface NoiseFile {
  readonly machine: Machine;
  readonly keys: number;
  readonly channels: number;
  readonly draws: number;
  readonly cases: readonly NoiseCase[];
}

/** Measures all cases and writes them to the folder. */
export function measureNoise(folder: string): void {
  const content: NoiseFile = {
    machine: describeMachine(),
    keys: KEYS,
    channels: CHANNELS,
    draws: HEADS * QUERIES,
    cases: measureCases(SHARPNESS, PROBABILITIES),
  };
  const round = (_key: string, value: unknown) =>
    typeof value === 'number' ? Number(value.toPrecision(6)) : value;
  const file = path.join(folder, NOISE_FILE);
  writeFileSync(`${file}.tmp`, `${JSON.stringify(content, round)}\n`);
  renameSync(`${file}.tmp`, file);
}

/** Every placement at each probability on rows of each sharpness. */
export function measureCases(
  sharpness: readonly number[],
  probabilities: readonly number[],
): NoiseCase[] {
  const [random] = randomStreams(SEED, 1);
  const scores = Float64Array.from({ length: KEYS }, () => standardNormal(random));
  const tables = COMMON_SHARES.map((share) => ({ share, values: drawValues(random, share) }));
  let offset = 0;
  return tables.flatMap(({ share, values }) =>
    sharpness.flatMap((times) => {
      const row = rowOf(scores, times, values);
      return probabilities.flatMap((p) =>
        PLACEMENTS.map((placement) => {
          const drawn = draw(row, placement, p, offset++);
          return compare(row, placement, p, share, drawn);
        }),
      );
    }),
  );
}

/** Normal values [keys, channels]; a share of their variance is the same for all keys. */
function drawValues(random: Random, share: number): Float64Array {
  const common = Float64Array.from({ length: CHANNELS }, () => standardNormal(random));
  return Float64Array.from({ length: KEYS * CHANNELS }, (_, at) => {
    const own = standardNormal(random);
    // The package gets float32, and so does the theory.
    return Math.fround(Math.sqrt(share) * common[at % CHANNELS] + Math.sqrt(1 - share) * own);
  });
}

interface ScoredRow extends RowOfAttention {
  readonly scores: Float64Array;
}

function rowOf(normal: Float64Array, sharpness: number, values: Float64Array): ScoredRow {
  const scores = normal.map((x) => Math.fround(sharpness * x));
  const powers = scores.map((score) => Math.exp(score));
  const sum = powers.reduce((total, power) => total + power);
  return { scores, weights: powers.map((power) => power / sum), values, channels: CHANNELS };
}

/** Calls the package; the query is 1 and the keys are the scores themselves. */
function draw(row: ScoredRow, placement: DropoutPlacement, p: number, offset: number) {
  const repeat = (numbers: Float64Array) =>
    Float32Array.from({ length: HEADS * numbers.length }, (_, at) => numbers[at % numbers.length]);
  const query = new Float32Array(HEADS * QUERIES).fill(1);
  const result = attentionForwardSync(
    { data: query, dims: [1, HEADS, QUERIES, 1] },
    { data: repeat(row.scores), dims: [1, HEADS, KEYS, 1] },
    { data: repeat(row.values), dims: [1, HEADS, KEYS, CHANNELS] },
    {
      scale: 1,
      dropoutP: p,
      dropoutPlacement: placement,
      training: true,
      seed: SEED,
      offset,
      outputs: ['droppedWeights'],
    },
  );
  return {
    outputs: result.output.data as Float32Array,
    weights: result.droppedWeights?.data as Float32Array,
  };
}

function compare(
  row: ScoredRow,
  placement: DropoutPlacement,
  p: number,
  commonShare: number,
  { outputs, weights }: ReturnType<typeof draw>,
): NoiseCase {
  const effectiveP = Math.floor(p * 65536 + 0.5) / 65536;
  const context = contextOf(row);
  const topWeight = Math.max(...row.weights);
  const top = row.weights.indexOf(topWeight);
  const exact = scoresMoments(row, effectiveP);
  const theory = {
    weights: weightsMoments(row, effectiveP),
    context: contextMoments(row, effectiveP),
    scores: exact,
  }[placement];
  const measured = momentsOf(outputs);
  const both = (summary: (moments: Moments) => number): Compared => ({
    theory: summary(theory),
    measured: summary(measured),
  });
  let sumOfTop = 0;
  for (let at = top; at < weights.length; at += KEYS) sumOfTop += weights[at];
  const approximate = approximateScoresMoments(row, effectiveP);
  return {
    placement,
    p: effectiveP,
    commonShare,
    topWeight,
    noise: both((moments) => relativeNoise(moments, context)),
    bias: both((moments) => relativeBias(moments, context)),
    correlation: both(channelCorrelation),
    meanTopWeight: {
      theory: placement === 'scores' ? exact.meanWeights[top] : topWeight,
      measured: sumOfTop / (weights.length / KEYS),
    },
    ...(placement === 'scores' && {
      approximation: {
        noise: relativeNoise(approximate, context),
        meanTopWeight: approximateScoresWeights(row.weights, effectiveP)[top],
      },
    }),
    z: standardDistances(measured, theory),
  };
}

interface MeasuredMoments extends Moments {
  /** Fourth central moment of each channel */
  readonly fourth: Float64Array;
  readonly draws: number;
}

/** Moments of outputs [draws, channels]. */
function momentsOf(outputs: Float32Array): MeasuredMoments {
  const draws = outputs.length / CHANNELS;
  const mean = new Float64Array(CHANNELS);
  outputs.forEach((x, at) => {
    mean[at % CHANNELS] += x / draws;
  });
  const covariance = new Float64Array(CHANNELS ** 2);
  const fourth = new Float64Array(CHANNELS);
  const centered = new Float64Array(CHANNELS);
  for (let row = 0; row < outputs.length; row += CHANNELS) {
    for (let d = 0; d < CHANNELS; d++) {
      centered[d] = outputs[row + d] - mean[d];
      fourth[d] += centered[d] ** 2 * (centered[d] ** 2 / draws);
      for (let e = 0; e <= d; e++) {
        const share = (centered[d] * centered[e]) / (draws - 1);
        covariance[d * CHANNELS + e] += share;
        if (e < d) covariance[e * CHANNELS + d] += share;
      }
    }
  }
  return { mean, covariance, fourth, draws };
}

/**
 * Each channel's mean and variance against theory, in standard errors of the measurement. Dropout
 * of context at p = 0.5 gives 0 or 2 o: there is no error of the variance to measure by.
 */
function standardDistances(measured: MeasuredMoments, theory: Moments): number[] {
  return Array.from({ length: CHANNELS }, (_, d) => {
    const at = d * CHANNELS + d;
    const variance = measured.covariance[at];
    const meanError = Math.sqrt(variance / measured.draws);
    const varianceError = Math.sqrt((measured.fourth[d] - variance ** 2) / measured.draws);
    const meanDistance = (measured.mean[d] - theory.mean[d]) / meanError;
    if (!(varianceError > 1e-3 * variance)) return [meanDistance]; // rounding may make it NaN
    return [meanDistance, (variance - theory.covariance[at]) / varianceError];
  }).flat();
}
