// What many seeds say about a dropout placement: its mean, its spread, and whether it is unbiased.

/** The normal quantile of a two-sided interval of 99.9 %. */
const QUANTILE_999 = 3.2905;

/** After how many seeds the distance of the mean output is noted: evenly on a logarithmic axis. */
const CHECKPOINTS = [1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700, 1000];

/**
 * Runs `attend` with the seeds 1 to `count` and compares with the undropped output.
 * All distances are relative to the length of the undropped output.
 * @param {(seed: number) => {output: Float32Array, weights: Float32Array}} attend
 * @param {Float32Array} undropped
 * @param {number} tokens
 * @param {number} count
 */
export function studySeeds(attend, undropped, tokens, count) {
  const sum = new Float64Array(undropped.length);
  const sumOfSquares = new Float64Array(undropped.length);
  const length = Math.sqrt(dot(undropped, undropped));
  const rows = new Summary();
  const shifts = new Summary();
  /** @type {{seeds: number, error: number}[]} */
  const course = [];

  for (let seed = 1; seed <= count; seed++) {
    const { output, weights } = attend(seed);
    for (let i = 0; i < output.length; i++) {
      const x = output[i] ?? 0;
      sum[i] += x;
      sumOfSquares[i] += x * x;
    }
    for (let at = 0; at < weights.length; at += tokens) rows.add(rowSum(weights, at, tokens));
    // How much longer the output has become along the undropped one: 0 on average if unbiased,
    // and independent between seeds, so that the central limit theorem holds.
    shifts.add(dot(output, undropped) / length ** 2 - 1);
    if (CHECKPOINTS.includes(seed)) {
      const error = Math.sqrt(squaredError(sum, seed, undropped)) / length;
      course.push({ seeds: seed, error });
    }
  }

  const variance = sumOfSquares.reduce((total, square, i) => {
    const mean = (sum[i] ?? 0) / count;
    return total + (square / count - mean * mean) * (count / (count - 1));
  }, 0);
  const margin = (QUANTILE_999 * shifts.deviation) / Math.sqrt(count);
  return {
    rows,
    course,
    meanError: Math.sqrt(squaredError(sum, count, undropped)) / length,
    chanceError: Math.sqrt(variance / count) / length,
    spread: Math.sqrt(variance) / length,
    shift: { mean: shifts.mean, margin, z: (shifts.mean / margin) * QUANTILE_999 },
    isUnbiased: Math.abs(shifts.mean) <= margin,
  };
}

/** Mean, standard deviation and range of numbers, without keeping them (Welford). */
export class Summary {
  count = 0;
  mean = 0;
  min = Number.POSITIVE_INFINITY;
  max = Number.NEGATIVE_INFINITY;
  #squares = 0;

  /** @param {number} x */
  add(x) {
    this.count++;
    const distance = x - this.mean;
    this.mean += distance / this.count;
    this.#squares += distance * (x - this.mean);
    this.min = Math.min(this.min, x);
    this.max = Math.max(this.max, x);
  }

  get deviation() {
    return this.count > 1 ? Math.sqrt(this.#squares / (this.count - 1)) : 0;
  }
}

/** @param {readonly number[]} numbers */
export function median(numbers) {
  const sorted = [...numbers].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  const upper = sorted[middle] ?? Number.NaN;
  return sorted.length % 2 ? upper : (upper + (sorted[middle - 1] ?? Number.NaN)) / 2;
}

/**
 * @param {Float32Array} a
 * @param {Float32Array} b
 */
function dot(a, b) {
  return a.reduce((sum, x, i) => sum + x * (b[i] ?? 0), 0);
}

/**
 * @param {Float32Array} weights
 * @param {number} at
 * @param {number} length
 */
function rowSum(weights, at, length) {
  let sum = 0;
  for (let j = at; j < at + length; j++) sum += weights[j] ?? 0;
  return sum;
}

/**
 * @param {Float64Array} sum
 * @param {number} count
 * @param {Float32Array} target
 */
function squaredError(sum, count, target) {
  return sum.reduce((total, x, i) => total + (x / count - (target[i] ?? 0)) ** 2, 0);
}
