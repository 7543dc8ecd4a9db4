// Attention forward in TypeScript: blocked online softmax, one pass over the keys for each block
// of queries; a second pass only where scores or weights are asked for.

import {
  atMostZero,
  exponential,
  type Matrix,
  multiplyAdd,
  multiplyAddWeighted,
  scratchMatrix,
} from './js-math';
import { StoredTensor } from './js-storage';
import { CONTEXT, KEY_BLOCK, QUERY_BLOCK, SCORES, ScoreTile, WEIGHTS } from './js-tile';
import type { FloatArray, ForwardOutputs, Inputs, Problem } from './problem-header';

/** One of the calls that a pass computes together: they differ in their offsets alone. */
export interface Sample {
  readonly problem: Problem;
  readonly output: FloatArray;
  /** Called when rows of the output are written */
  readonly onRows?: (batch: number, head: number, row: number, rows: number) => void;
}

/** The sums of weights times values of a block of queries. */
interface Context {
  readonly sums: Matrix; // [QUERY_BLOCK, valueDim]
  /** 1 where something is left to multiply values with; else the row is 0, whatever its sum. */
  readonly rowHasWeight: Uint8Array;
}

/**
 * One or more calls that share scores and softmax. Tasks are, outermost first: batch, head, block
 * of queries, pass, part of the keys.
 */
export class ForwardPass {
  readonly count: number;

  private readonly tile: ScoreTile;
  private readonly storedValue: StoredTensor;
  private readonly storedOutputs: readonly StoredTensor[];
  private readonly value: Matrix; // [KEY_BLOCK, valueDim]
  /** One for each sample where samples drop weights of their own; else one. */
  private readonly contexts: readonly Context[];
  /** Room for weights, then for a context, that a sample has dropped of those it shares. */
  private readonly dropped: Matrix | null;
  private readonly droppedContext: Matrix | null;
  private readonly rowMax = new Float64Array(QUERY_BLOCK);
  private readonly rowSum = new Float64Array(QUERY_BLOCK);
  private readonly rowLse = new Float64Array(QUERY_BLOCK);
  private readonly contextKeep: Uint8Array;

  private readonly passes: number;

  constructor(
    private readonly problem: Problem,
    inputs: Inputs,
    private readonly outputs: Omit<ForwardOutputs, 'output'>,
    private readonly samples: readonly Sample[],
  ) {
    const p = problem;
    this.tile = new ScoreTile(p, inputs, false);
    this.storedValue = StoredTensor.ofKeys(p, inputs.value, p.valueDim, inputs.keyBlocks);
    this.storedOutputs = samples.map((s) => StoredTensor.ofQueries(p, s.output, p.valueDim));
    this.value = scratchMatrix(KEY_BLOCK, p.valueDim);
    const hasSamples = samples.length > 1;
    const dropsWeights = this.tile.dropoutPlacement === WEIGHTS;
    this.contexts = (dropsWeights ? samples : samples.slice(0, 1)).map(() => ({
      sums: scratchMatrix(QUERY_BLOCK, p.valueDim),
      rowHasWeight: new Uint8Array(QUERY_BLOCK),
    }));
    this.dropped = hasSamples && dropsWeights ? scratchMatrix(QUERY_BLOCK, KEY_BLOCK) : null;
    this.droppedContext =
      hasSamples && !dropsWeights ? scratchMatrix(QUERY_BLOCK, p.valueDim) : null;
    this.contextKeep = new Uint8Array(p.valueDim);
    this.passes = outputs.scores || outputs.weights || outputs.droppedWeights ? 2 : 1;
    const { queryBlocks, keyParts } = this.tile;
    this.count = p.batch * p.queryHeads * queryBlocks * this.passes * keyParts;
  }

  run(task: number): void {
    const { keyParts } = this.tile;
    const part = task % keyParts;
    const pass = Math.floor(task / keyParts) % this.passes;
    const block = Math.floor(task / (keyParts * this.passes));
    if (pass === 0) {
      if (part === 0) this.beginRows(block);
      this.tile.eachScoreBlock(part, () => this.attend());
      if (part === keyParts - 1) this.finishRows();
    } else {
      if (part === 0) this.clearMatrices();
      this.tile.eachScoreBlock(part, () => this.writeMatrices());
    }
  }

  private beginRows(block: number): void {
    const { queryHeads } = this.problem;
    const plane = Math.floor(block / this.tile.queryBlocks);
    const queryStart = (block % this.tile.queryBlocks) * QUERY_BLOCK;
    this.tile.placeRows(Math.floor(plane / queryHeads), plane % queryHeads, queryStart);
    this.rowMax.fill(-Infinity);
    this.rowSum.fill(0);
    for (const { sums, rowHasWeight } of this.contexts) {
      sums.data.fill(0);
      rowHasWeight.fill(0);
    }
  }

  /** Takes the tile's scores into the running softmax and its values into the contexts. */
  private attend(): void {
    const { tile, value } = this;
    if (tile.dropoutPlacement === SCORES) tile.dropScores();
    for (let row = tile.rowBegin; row < tile.rowEnd; row++) this.exponentiateRow(row);
    const { batch, kvHead, keyStart, keys } = tile;
    const finite = tile.isSingleRow || this.storedValue.read(batch, kvHead, keyStart, keys, value);
    const multiply = finite ? multiplyAdd : multiplyAddWeighted;
    const rows = tile.rowEnd - tile.rowBegin;
    for (let i = 0; i < this.contexts.length; i++) {
      const { sums } = this.contexts[i];
      const weights = tile.dropoutPlacement === WEIGHTS ? this.dropWeights(i) : tile.scores;
      if (tile.isSingleRow) {
        this.storedValue.addRows(batch, kvHead, keyStart, keys, weights.data, sums.data);
        continue;
      }
      sums.start = tile.rowBegin * sums.rowStep;
      multiply(sums, weights, value, rows, this.problem.valueDim, keys, weights.data);
    }
  }

  /** Turns a row of scores into exp(score - running maximum), rescaling what came before. */
  private exponentiateRow(row: number): void {
    const { scores, keys } = this.tile;
    const data = scores.data;
    const start = row * scores.rowStep;
    const before = this.rowMax[row];
    let max = before;
    for (let j = start; j < start + keys; j++) if (data[j] > max) max = data[j];
    if (max === Infinity) spoilScores(data, start, keys);
    if (max > before) {
      this.rescaleRow(row, max === Infinity ? Number.NaN : exponential(before - max));
      this.rowMax[row] = max;
    }
    const shift = max === -Infinity ? 0 : max; // no key yet: all weights 0, but NaN stays NaN
    let sum = 0;
    for (let j = start; j < start + keys; j++) {
      const weight = exponential(data[j] - shift);
      data[j] = weight;
      sum += weight;
    }
    this.rowSum[row] += sum;
    if (sum !== 0 && this.tile.dropoutPlacement !== WEIGHTS) this.contexts[0].rowHasWeight[row] = 1;
  }

  private rescaleRow(row: number, factor: number): void {
    this.rowSum[row] *= factor;
    for (const { sums, rowHasWeight } of this.contexts) {
      const { data, rowStep } = sums;
      const start = row * rowStep;
      if (factor === 0) {
        rowHasWeight[row] = 0;
        data.fill(0, start, start + rowStep); // also what came from infinite values
      } else {
        for (let d = start; d < start + rowStep; d++) data[d] *= factor;
      }
    }
  }

  /**
   * The tile's weights under the dropout of a sample. Row sums stay those of all keys; the kept
   * weights' scale follows at the end.
   */
  private dropWeights(sample: number): Matrix {
    const { tile, samples } = this;
    if (samples.length > 1) tile.chooseSample(samples[sample].problem);
    tile.decide();
    const weights = tile.scores.data;
    const dropped = this.dropped ?? tile.scores;
    dropped.start = tile.scores.start;
    for (let row = tile.rowBegin; row < tile.rowEnd; row++) {
      const start = row * tile.scores.rowStep;
      let left = 0;
      for (let j = start; j < start + tile.keys; j++) {
        const weight = tile.keep[j] === 0 ? 0 : weights[j];
        dropped.data[j] = weight;
        left += weight;
      }
      if (left !== 0) this.contexts[sample].rowHasWeight[row] = 1;
    }
    return dropped;
  }

  /** Divides by the row sums, applies what dropout is left to apply, and stores. */
  private finishRows(): void {
    const { tile, problem, contexts, samples } = this;
    const { batch, head, queryStart, rows } = tile;
    for (const context of contexts) this.normalise(context);
    for (let i = 0; i < samples.length; i++) {
      const context = tile.dropoutPlacement === CONTEXT ? this.dropContext(i) : contexts[i].sums;
      context.start = 0;
      this.storedOutputs[i].write(batch, head, queryStart, rows, context, 1);
      samples[i].onRows?.(batch, head, queryStart, rows);
    }
    const lse = this.outputs.lse;
    if (lse === null) return;
    const from = (batch * problem.queryHeads + head) * problem.queryLength + queryStart;
    for (let row = 0; row < rows; row++) lse[from + row] = this.rowLse[row];
  }

  private normalise({ sums, rowHasWeight }: Context): void {
    const { tile, problem } = this;
    const { data, rowStep } = sums;
    const scale = tile.dropoutPlacement === WEIGHTS ? tile.keepScale : 1;
    for (let row = 0; row < tile.rows; row++) {
      const sum = this.rowSum[row];
      const start = row * rowStep;
      // A NaN among a row's scores makes all its weights NaN, also where none but 0 seems left.
      if ((rowHasWeight[row] === 0 && !Number.isNaN(sum)) || scale === 0) {
        data.fill(0, start, start + rowStep);
      } else {
        const factor = scale / sum;
        for (let d = start; d < start + problem.valueDim; d++) data[d] *= factor;
      }
      this.rowLse[row] = this.rowMax[row] + Math.log(sum);
    }
  }

  /** The context under the dropout of a sample. */
  private dropContext(sample: number): Matrix {
    const { tile, contextKeep, samples } = this;
    const { valueDim } = this.problem;
    const { sums } = this.contexts[0];
    const dropped = this.droppedContext ?? sums;
    if (samples.length > 1) tile.chooseSample(samples[sample].problem);
    for (let row = 0; row < tile.rows; row++) {
      tile.decideRow(row, 0, valueDim, valueDim, contextKeep, 0);
      const start = row * sums.rowStep;
      for (let d = 0; d < valueDim; d++) {
        const kept = contextKeep[d] !== 0 && tile.keepScale !== 0;
        dropped.data[start + d] = kept ? sums.data[start + d] * tile.keepScale : 0;
      }
    }
    return dropped;
  }

  /** Where a row's [keyLength] part of scores and weights begins. */
  private matrixStart(row: number): number {
    const { queryHeads, queryLength, keyLength } = this.problem;
    const { batch, head, queryStart } = this.tile;
    return ((batch * queryHeads + head) * queryLength + queryStart + row) * keyLength;
  }

  /** What the second pass leaves standing where no row of a tile sees a key. */
  private clearMatrices(): void {
    const from = this.matrixStart(0);
    const to = this.matrixStart(this.tile.rows);
    this.outputs.scores?.fill(-Infinity, from, to);
    this.outputs.weights?.fill(0, from, to);
    this.outputs.droppedWeights?.fill(0, from, to);
  }

  /** Second pass: the same scores again, and weights with the row's lse now known. */
  private writeMatrices(): void {
    const { tile, rowLse } = this;
    const { scores, weights, droppedWeights } = this.outputs;
    const source = tile.scores.data;
    if (scores) {
      for (let row = tile.rowBegin; row < tile.rowEnd; row++) {
        const from = row * tile.scores.rowStep;
        const to = this.matrixStart(row) + tile.keyStart;
        for (let j = 0; j < tile.keys; j++) scores[to + j] = source[from + j];
      }
    }
    if (tile.dropoutPlacement === SCORES) tile.dropScores();
    const isWeights = tile.dropoutPlacement === WEIGHTS;
    if (isWeights) tile.decide();
    for (let row = tile.rowBegin; row < tile.rowEnd; row++) {
      const from = row * tile.scores.rowStep;
      const to = this.matrixStart(row) + tile.keyStart;
      for (let j = 0; j < tile.keys; j++) {
        const score = source[from + j];
        const weight = score === -Infinity ? 0 : exponential(atMostZero(score - rowLse[row]));
        const scale = isWeights ? tile.keep[from + j] * tile.keepScale : 1;
        if (weights) weights[to + j] = weight;
        if (droppedWeights) droppedWeights[to + j] = scale === 0 ? 0 : weight * scale;
      }
    }
  }
}

/** A visible score of +inf makes the weights of all that its row sees NaN. */
function spoilScores(scores: Float64Array, start: number, keys: number): void {
  for (let j = start; j < start + keys; j++) {
    if (scores[j] !== -Infinity) scores[j] = Number.NaN;
  }
}
