// The noise that dropout puts into one row of attention, in float64 and without the package: exact
// means and covariances, and the approximations for dropout of scores.
//
// With weights w_j, values v_j, context o = sum_j w_j v_j, and p the probability of a drop:
//   weights   E = o,  Cov(d, e) = p/(1-p) sum_j w_j^2 v_jd v_je
//   context   E = o,  Var(d) = p/(1-p) o_d^2, channels independent
//   scores    sums over all 2^L sets of kept keys; to first order in the noise of the row's sum
//             E[w'_j] = w_j - p/(1-p) w_j (w_j - sum_i w_i^2)
//             Cov(d, e) = p/(1-p) sum_j w_j^2 (v_jd - o_d)(v_je - o_e)

export interface RowOfAttention {
  /** w [keys] */
  readonly weights: Float64Array;
  /** v [keys, channels] */
  readonly values: Float64Array;
  readonly channels: number;
}

/** Mean [channels] and covariance [channels, channels] of the context. */
export interface Moments {
  readonly mean: Float64Array;
  readonly covariance: Float64Array;
}

export function contextOf({ weights, values, channels }: RowOfAttention): Float64Array {
  const context = new Float64Array(channels);
  weights.forEach((w, j) => {
    for (let d = 0; d < channels; d++) context[d] += w * values[j * channels + d];
  });
  return context;
}

export function weightsMoments(row: RowOfAttention, p: number): Moments {
  return { mean: contextOf(row), covariance: spread(row, p, new Float64Array(row.channels)) };
}

export function contextMoments(row: RowOfAttention, p: number): Moments {
  const mean = contextOf(row);
  const covariance = new Float64Array(row.channels ** 2);
  mean.forEach((x, d) => {
    covariance[d * row.channels + d] = (p / (1 - p)) * x * x;
  });
  return { mean, covariance };
}

/** First-order moments under dropout of scores, for large rows without a heavy key. */
export function approximateScoresMoments(row: RowOfAttention, p: number): Moments {
  const mean = contextOf({ ...row, weights: approximateScoresWeights(row.weights, p) });
  return { mean, covariance: spread(row, p, contextOf(row)) };
}

export function approximateScoresWeights(weights: Float64Array, p: number): Float64Array {
  const sumOfSquares = weights.reduce((sum, w) => sum + w * w, 0);
  return weights.map((w) => w - (p / (1 - p)) * w * (w - sumOfSquares));
}

/** p/(1-p) sum_j w_j^2 (v_j - center)(v_j - center)^T */
function spread({ weights, values, channels }: RowOfAttention, p: number, center: Float64Array) {
  const covariance = new Float64Array(channels ** 2);
  weights.forEach((w, j) => {
    for (let d = 0; d < channels; d++) {
      for (let e = 0; e < channels; e++) {
        const product =
          (values[j * channels + d] - center[d]) * (values[j * channels + e] - center[e]);
        covariance[d * channels + e] += (p / (1 - p)) * w * w * product;
      }
    }
  });
  return covariance;
}

/**
 * The exact moments under dropout of scores, and the mean of each weight, by all sets of kept keys.
 * Where no key is kept, the output is 0.
 */
export function scoresMoments(row: RowOfAttention, p: number) {
  const { weights, channels } = row;
  const keys = weights.length;
  const mean = new Float64Array(channels);
  const squares = new Float64Array(channels ** 2);
  const meanWeights = new Float64Array(keys);
  for (let set = 1; set < 2 ** keys; set++) {
    const kept = weights.map((w, j) => ((set >> j) & 1 ? w : 0));
    const sum = kept.reduce((total, w) => total + w);
    const count = kept.reduce((total, w) => total + (w > 0 ? 1 : 0), 0);
    const probability = (1 - p) ** count * p ** (keys - count);
    const normalised = kept.map((w) => w / sum);
    const context = contextOf({ ...row, weights: normalised });
    normalised.forEach((w, j) => {
      meanWeights[j] += probability * w;
    });
    for (let d = 0; d < channels; d++) {
      mean[d] += probability * context[d];
      for (let e = 0; e < channels; e++) {
        squares[d * channels + e] += probability * context[d] * context[e];
      }
    }
  }
  const covariance = squares.map((square, at) => {
    return square - mean[Math.floor(at / channels)] * mean[at % channels];
  });
  return { mean, covariance, meanWeights };
}

/** Standard deviation of the context under dropout, all channels together, relative to |o|. */
export function relativeNoise({ covariance }: Moments, context: Float64Array): number {
  const channels = context.length;
  let variance = 0;
  for (let d = 0; d < channels; d++) variance += covariance[d * channels + d];
  return Math.sqrt(variance) / lengthOf(context);
}

/** How far the mean is from the undropped context, relative to its length. */
export function relativeBias({ mean }: Moments, context: Float64Array): number {
  return lengthOf(mean.map((x, d) => x - context[d])) / lengthOf(context);
}

/** The mean size of the correlation between two channels; 0 where there is no noise. */
export function channelCorrelation({ covariance }: Moments): number {
  const channels = Math.sqrt(covariance.length);
  let sum = 0;
  for (let d = 0; d < channels; d++) {
    for (let e = 0; e < d; e++) {
      const size = Math.sqrt(covariance[d * channels + d] * covariance[e * channels + e]);
      sum += size === 0 ? 0 : Math.abs(covariance[d * channels + e]) / size;
    }
  }
  return sum / ((channels * (channels - 1)) / 2);
}

function lengthOf(vector: Float64Array): number {
  return Math.sqrt(vector.reduce((sum, x) => sum + x * x, 0));
}
