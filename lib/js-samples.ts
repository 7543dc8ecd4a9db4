// Samples of dropout for the JavaScript backend: sample s is, bit for bit, the ordinary call with
// offset + s. The twin of native/cpu/attention_samples.inl.

import type { TaskList } from './js-backend';
import { ForwardPass, type Sample } from './js-forward';
import { readRow, StoredTensor } from './js-storage';
import { SCORES } from './js-tile';
import { allocateFloat64, allocateFloats } from './memory';
import type { FloatArray, ForwardOutputs, Inputs, Problem } from './problem-header';

/** Samples that are computed together: their contexts take a second-level cache. */
const SAMPLES_AT_ONCE = 16;

/** One pass over the whole call for each group of samples, one after the other. */
export class SampledCall implements TaskList {
  readonly count: number;

  private readonly groupSize: number;
  private readonly isRandom: boolean;
  private readonly passTasks: number;
  private readonly outputSize: number;
  private readonly moments: Moments | null;
  private pass: ForwardPass;

  constructor(
    private readonly problem: Problem,
    private readonly inputs: Inputs,
    private readonly outputs: ForwardOutputs,
  ) {
    const p = problem;
    this.outputSize = p.batch * p.queryHeads * p.queryLength * p.valueDim;
    this.isRandom = p.dropoutP > 0 && inputs.keepMask === null;
    // Under dropout of scores samples share nothing, and without dropout everything.
    const sharesScores = this.isRandom && p.dropoutPlacement !== SCORES;
    this.groupSize = sharesScores ? Math.min(SAMPLES_AT_ONCE, p.samples) : 1;
    this.moments = outputs.mean === null ? null : new Moments(p, this.outputSize);
    this.pass = this.passOf(0);
    this.passTasks = this.pass.count;
    const passes = this.isRandom ? Math.ceil(p.samples / this.groupSize) : 1;
    this.count = passes * this.passTasks + 1;
  }

  run(task: number): void {
    if (task === this.count - 1) {
      this.finish();
      return;
    }
    const number = task % this.passTasks;
    if (number === 0 && task > 0) this.pass = this.passOf(task / this.passTasks);
    this.pass.run(number);
  }

  /** The pass of a group of samples. */
  private passOf(group: number): ForwardPass {
    const first = group * this.groupSize;
    const count = Math.min(this.groupSize, this.problem.samples - first);
    const samples = Array.from({ length: count }, (_, i) => this.sample(first + i));
    const outputs = { ...this.outputs, lse: this.lseOf(first) };
    return new ForwardPass(samples[0].problem, this.inputs, outputs, samples);
  }

  private sample(number: number): Sample {
    const problem = problemOfSample(this.problem, number);
    const { moments, outputSize } = this;
    if (moments === null) {
      const from = number * outputSize;
      const output = (this.outputs.output as FloatArray).subarray(from, from + outputSize);
      return { problem, output };
    }
    const onRows = (batch: number, head: number, row: number, rows: number) => {
      // Without dropout the one pass stands for all samples.
      const last = this.isRandom ? number : this.problem.samples - 1;
      for (let s = number; s <= last; s++) moments.add(s, batch, head, row, rows);
    };
    return { problem, output: moments.output, onRows };
  }

  private lseOf(sample: number): Float32Array | null {
    const { problem: p, outputs, outputSize } = this;
    if (outputs.lse === null) return null;
    const rows = outputSize / p.valueDim;
    if (p.dropoutPlacement === SCORES)
      return outputs.lse.subarray(sample * rows, (sample + 1) * rows);
    return sample === 0 ? outputs.lse : null;
  }

  private finish(): void {
    const { problem: p, outputs, outputSize, moments } = this;
    if (moments !== null) {
      moments.finish(outputs.mean as Float32Array, outputs.variance as Float32Array);
    }
    if (this.isRandom) return;
    const output = outputs.output as FloatArray | null;
    for (let s = 1; s < p.samples; s++) {
      output?.copyWithin(s * outputSize, 0, outputSize);
      const lse = this.lseOf(s);
      if (lse !== null) lse.set((this.lseOf(0) as Float32Array).subarray(0, lse.length));
    }
  }
}

/** The call that gives a sample. */
function problemOfSample(problem: Problem, sample: number): Problem {
  const low = problem.offsetLo + sample;
  const carry = low > 0xffff_ffff ? 1 : 0;
  const offsetHi = (problem.offsetHi + carry) >>> 0;
  return { ...problem, samples: 0, offsetLo: low >>> 0, offsetHi };
}

/**
 * Mean and variance of outputs that come one after the other (Youngs and Cramer, Technometrics 13,
 * 1971).
 */
class Moments {
  /** Where a sample's rows are written before they are added */
  readonly output: FloatArray;
  private readonly sums: Float64Array;
  private readonly squares: Float64Array; // of distances from the mean
  private readonly stored: StoredTensor;
  private readonly row: Float64Array;

  constructor(
    private readonly problem: Problem,
    size: number,
  ) {
    this.output = allocateFloats(problem.type, size);
    this.sums = allocateFloat64(size);
    this.squares = allocateFloat64(size);
    this.stored = StoredTensor.ofQueries(problem, this.output, problem.valueDim);
    this.row = new Float64Array(problem.valueDim);
  }

  /** Adds rows of `output` as those of a sample; samples come in order. */
  add(sample: number, batch: number, head: number, first: number, rows: number): void {
    const { problem, output, sums, squares, row } = this;
    const n = sample + 1;
    const share = sample > 0 ? 1 / (n * (n - 1)) : 0;
    for (let i = first; i < first + rows; i++) {
      const from = this.stored.rowStart(batch, head, i);
      readRow(output, problem.type, from, problem.valueDim, row, 0, 1);
      for (let d = 0; d < problem.valueDim; d++) {
        const sum = sums[from + d] + row[d];
        const distance = n * row[d] - sum;
        sums[from + d] = sum;
        squares[from + d] += distance * distance * share;
      }
    }
  }

  finish(mean: Float32Array, variance: Float32Array): void {
    const n = this.problem.samples;
    for (let i = 0; i < mean.length; i++) {
      mean[i] = this.sums[i] / n;
      variance[i] = this.squares[i] / (n - 1);
    }
  }
}
