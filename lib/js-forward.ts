// Attention forward in TypeScript: blocked online softmax, one pass over the keys for each block
// of queries; a second pass only where scores or weights are asked for.

import type { TaskList } from './js-backend';
import {
  exponential,
  type Matrix,
  multiplyAdd,
  multiplyAddWeighted,
  scratchMatrix,
} from './js-math';
import { forwardSequences } from './js-sequences';
import { StoredTensor } from './js-storage';
import { CONTEXT, KEY_BLOCK, QUERY_BLOCK, SCORES, ScoreTile, WEIGHTS } from './js-tile';
import type { ForwardOutputs, Inputs, Problem } from './problem';

/** The tasks of a forward call; see js-backend.ts. */
export function jsForward(problem: Problem, inputs: Inputs, outputs: ForwardOutputs): TaskList {
  const { sequences } = inputs;
  if (sequences) return forwardSequences(problem, inputs, sequences, outputs, jsForward);
  const pass = new ForwardPass(problem, inputs, outputs);
  return { count: pass.count, run: (task) => pass.run(task) };
}

/** Tasks are, outermost first: batch, head, block of queries, pass, part of the keys. */
class ForwardPass {
  readonly count: number;

  private readonly tile: ScoreTile;
  private readonly storedValue: StoredTensor;
  private readonly storedOutput: StoredTensor;
  private readonly value: Matrix; // [KEY_BLOCK, valueDim]
  private readonly context: Matrix; // [QUERY_BLOCK, valueDim]: sums of weights times values
  private readonly rowMax = new Float64Array(QUERY_BLOCK);
  private readonly rowSum = new Float64Array(QUERY_BLOCK);
  /** 1 where something is left to multiply values with; else the row is 0, whatever its sum. */
  private readonly rowHasWeight = new Uint8Array(QUERY_BLOCK);
  private readonly rowLse = new Float64Array(QUERY_BLOCK);
  private readonly contextKeep: Uint8Array;

  private readonly passes: number;

  constructor(
    private readonly problem: Problem,
    inputs: Inputs,
    private readonly outputs: ForwardOutputs,
  ) {
    const p = problem;
    this.tile = new ScoreTile(p, inputs, false);
    this.storedValue = StoredTensor.ofKeys(p, inputs.value, p.valueDim, inputs.keyBlocks);
    this.storedOutput = StoredTensor.ofQueries(p, outputs.output, p.valueDim);
    this.value = scratchMatrix(KEY_BLOCK, p.valueDim);
    this.context = scratchMatrix(QUERY_BLOCK, p.valueDim);
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
    this.rowHasWeight.fill(0);
    this.context.data.fill(0);
  }

  /** Takes the tile's scores into the running softmax and its values into the context. */
  private attend(): void {
    const { tile, value, context } = this;
    if (tile.dropoutPlacement === SCORES) tile.dropScores();
    for (let row = tile.rowBegin; row < tile.rowEnd; row++) this.exponentiateRow(row);
    if (tile.dropoutPlacement === WEIGHTS) this.dropWeights();
    const { batch, kvHead, keyStart, keys } = tile;
    if (tile.isSingleRow) {
      this.storedValue.addRows(batch, kvHead, keyStart, keys, tile.scores.data, context.data);
      return;
    }
    const finite = this.storedValue.read(batch, kvHead, keyStart, keys, value);
    const multiply = finite ? multiplyAdd : multiplyAddWeighted;
    const rows = tile.rowEnd - tile.rowBegin;
    const { valueDim } = this.problem;
    context.start = tile.rowBegin * context.rowStep;
    multiply(context, tile.scores, value, rows, valueDim, keys, tile.scores.data);
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
    if (sum !== 0 && this.tile.dropoutPlacement !== WEIGHTS) this.rowHasWeight[row] = 1;
  }

  private rescaleRow(row: number, factor: number): void {
    const { data, rowStep } = this.context;
    this.rowSum[row] *= factor;
    const start = row * rowStep;
    if (factor === 0) {
      this.rowHasWeight[row] = 0;
      data.fill(0, start, start + rowStep); // also what came from infinite values
    } else {
      for (let d = start; d < start + rowStep; d++) data[d] *= factor;
    }
  }

  /** Row sums stay those of all keys; the kept weights' scale follows at the end. */
  private dropWeights(): void {
    const { tile } = this;
    tile.decide();
    const weights = tile.scores.data;
    for (let row = tile.rowBegin; row < tile.rowEnd; row++) {
      const start = row * tile.scores.rowStep;
      let left = 0;
      for (let j = start; j < start + tile.keys; j++) {
        if (tile.keep[j] === 0) weights[j] = 0;
        else left += weights[j];
      }
      if (left !== 0) this.rowHasWeight[row] = 1;
    }
  }

  /** Divides by the row sums, applies what dropout is left to apply, and stores. */
  private finishRows(): void {
    const { tile, problem, context } = this;
    const { batch, head, queryStart, rows } = tile;
    const scale = tile.dropoutPlacement === WEIGHTS ? tile.keepScale : 1;
    for (let row = 0; row < rows; row++) {
      const sum = this.rowSum[row];
      const start = row * context.rowStep;
      if (this.rowHasWeight[row] === 0 || scale === 0) {
        context.data.fill(0, start, start + context.rowStep);
      } else {
        const factor = scale / sum;
        for (let d = start; d < start + problem.valueDim; d++) context.data[d] *= factor;
      }
      if (tile.dropoutPlacement === CONTEXT) this.dropContextRow(row);
      this.rowLse[row] = this.rowMax[row] + Math.log(sum);
    }
    context.start = 0;
    this.storedOutput.write(batch, head, queryStart, rows, context, 1);
    const lse = this.outputs.lse;
    if (lse === null) return;
    const from = (batch * problem.queryHeads + head) * problem.queryLength + queryStart;
    for (let row = 0; row < rows; row++) lse[from + row] = this.rowLse[row];
  }

  private dropContextRow(row: number): void {
    const { tile, contextKeep, context } = this;
    const { valueDim } = this.problem;
    tile.decideRow(row, 0, valueDim, valueDim, contextKeep, 0);
    const start = row * context.rowStep;
    for (let d = 0; d < valueDim; d++) {
      const kept = contextKeep[d] !== 0 && tile.keepScale !== 0;
      context.data[start + d] = kept ? context.data[start + d] * tile.keepScale : 0;
    }
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
        const weight = score === -Infinity ? 0 : exponential(score - rowLse[row]);
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
