// Attention backward in TypeScript: weights are recomputed tile by tile from the row's lse, and
// gradients are summed in one fixed order.

import type { TaskList } from './js-backend';
import {
  atMostZero,
  exponential,
  type Matrix,
  multiplyAdd,
  multiplyAddWeighted,
  scratchMatrix,
  transposed,
} from './js-math';
import { backwardSequences } from './js-sequences';
import { StoredTensor, writeRow } from './js-storage';
import { CONTEXT, FLOAT_MASK, KEY_BLOCK, QUERY_BLOCK, SCORES, ScoreTile, WEIGHTS } from './js-tile';
import type { BackwardTensors, FloatArray, Inputs, Problem } from './problem';

/** The tasks of a backward call; see js-backend.ts. */
export function jsBackward(problem: Problem, inputs: Inputs, tensors: BackwardTensors): TaskList {
  const { sequences } = inputs;
  if (sequences) return backwardSequences(problem, inputs, sequences, tensors, jsBackward);
  const isScores = problem.dropoutPlacement === SCORES;
  if (problem.dropoutP === 1 && !(isScores && inputs.keepMask)) {
    return { count: 1, run: () => clearGradients(tensors) };
  }
  const tile = new GradientTile(problem, inputs, tensors);
  const pass = new GradientPass(tile, tensors);
  if (tensors.gradMask === null) return { count: pass.count, run: (task) => pass.run(task) };
  const maskPass = new MaskGradientPass(tile, tensors.gradMask);
  return {
    count: pass.count + maskPass.count,
    run: (task) => (task < pass.count ? pass.run(task) : maskPass.run(task - pass.count)),
  };
}

/** Everything is dropped, so nothing has a gradient. */
function clearGradients(tensors: BackwardTensors): void {
  tensors.gradQuery.fill(0);
  tensors.gradKey.fill(0);
  tensors.gradValue.fill(0);
  tensors.gradMask?.fill(0);
}

/** A tile of scores with its weights and the gradient of the scores. */
class GradientTile extends ScoreTile {
  /** Gradient of the block's context, context dropout undone: [QUERY_BLOCK, valueDim]. */
  readonly gradContext: Matrix;
  gradContextIsFinite = true;
  /** What multiplied the values: weights after their dropout, [QUERY_BLOCK, KEY_BLOCK]. */
  readonly droppedWeights: Matrix;
  /** Gradient of the scores as the softmax saw them, [QUERY_BLOCK, KEY_BLOCK]. */
  readonly gradScores: Matrix;

  private readonly storedValue: StoredTensor;
  private readonly storedOutput: StoredTensor;
  private readonly storedGradOutput: StoredTensor;
  private readonly lse: Float32Array;
  private readonly output: Matrix; // [QUERY_BLOCK, valueDim]
  private readonly valueTransposed: Matrix; // [valueDim, KEY_BLOCK]
  private readonly valueRows: Matrix; // the same memory, [KEY_BLOCK, valueDim]
  private readonly contextKeep: Uint8Array;
  /** Each row's sum of gradOutput * output: what the softmax's derivative takes off. */
  private readonly rowDelta = new Float64Array(QUERY_BLOCK);

  constructor(problem: Problem, inputs: Inputs, tensors: BackwardTensors) {
    super(problem, inputs, true);
    const p = problem;
    this.storedOutput = StoredTensor.ofQueries(p, tensors.output, p.valueDim);
    this.storedGradOutput = StoredTensor.ofQueries(p, tensors.gradOutput, p.valueDim);
    this.storedValue = StoredTensor.ofKeys(p, inputs.value, p.valueDim);
    this.lse = tensors.lse;
    this.gradContext = scratchMatrix(QUERY_BLOCK, p.valueDim);
    this.output = scratchMatrix(QUERY_BLOCK, p.valueDim);
    this.droppedWeights = scratchMatrix(QUERY_BLOCK, KEY_BLOCK);
    this.gradScores = scratchMatrix(QUERY_BLOCK, KEY_BLOCK);
    this.valueTransposed = scratchMatrix(p.valueDim, KEY_BLOCK + 4);
    this.valueRows = transposed(this.valueTransposed);
    this.contextKeep = new Uint8Array(p.valueDim);
  }

  override placeRows(batch: number, head: number, queryStart: number): void {
    super.placeRows(batch, head, queryStart);
    const { rows, gradContext, output } = this;
    gradContext.start = 0;
    this.gradContextIsFinite = this.storedGradOutput.read(
      batch,
      head,
      queryStart,
      rows,
      gradContext,
    );
    this.storedOutput.read(batch, head, queryStart, rows, output);
    for (let row = 0; row < rows; row++) {
      const start = row * output.rowStep;
      let delta = 0;
      for (let d = start; d < start + this.problem.valueDim; d++) {
        // What is 0 because all of it was dropped takes no NaN from gradOutput.
        if (output.data[d] !== 0) delta += gradContext.data[d] * output.data[d];
      }
      this.rowDelta[row] = delta;
      if (this.dropoutPlacement === CONTEXT) this.dropContextRow(row, start);
    }
  }

  private dropContextRow(row: number, start: number): void {
    const { contextKeep, gradContext } = this;
    const { valueDim } = this.problem;
    this.decideRow(row, 0, valueDim, valueDim, contextKeep, 0);
    for (let d = 0; d < valueDim; d++) {
      if (contextKeep[d] === 0) gradContext.data[start + d] = 0;
      else gradContext.data[start + d] *= this.keepScale;
    }
  }

  /** eachScoreBlock with weights and gradients computed too. */
  eachGradientBlock(part: number, visit: () => void): void {
    this.eachScoreBlock(part, () => {
      this.computeWeights();
      this.computeGradScores();
      visit();
    });
  }

  /** Scores become weights, and weights after dropout stand beside them. */
  private computeWeights(): void {
    const { problem: p, scores, droppedWeights, keys, keep, keepScale, lse } = this;
    const isWeights = this.dropoutPlacement === WEIGHTS;
    if (this.dropoutPlacement === SCORES) this.dropScores();
    if (isWeights) this.decide();
    const firstRow = (this.batch * p.queryHeads + this.head) * p.queryLength + this.queryStart;
    for (let row = this.rowBegin; row < this.rowEnd; row++) {
      const rowLse = lse[firstRow + row];
      const start = row * scores.rowStep;
      for (let j = start; j < start + keys; j++) {
        const score = scores.data[j];
        const weight = score === -Infinity ? 0 : exponential(atMostZero(score - rowLse));
        scores.data[j] = weight;
        const isDropped = isWeights && keep[j] === 0;
        droppedWeights.data[j] = isDropped ? 0 : isWeights ? weight * keepScale : weight;
      }
    }
  }

  /** dS = P (dP - delta), where dP = keepScale keep (gradContext . value); 0 where P is. */
  private computeGradScores(): void {
    const { gradContext, gradScores, scores, droppedWeights, rowBegin, rowEnd, keys } = this;
    this.storedValue.read(this.batch, this.kvHead, this.keyStart, keys, this.valueRows);
    gradContext.start = rowBegin * gradContext.rowStep;
    gradScores.start = rowBegin * gradScores.rowStep;
    gradScores.data.fill(0, gradScores.start, rowEnd * gradScores.rowStep);
    const { valueDim } = this.problem;
    multiplyAdd(gradScores, gradContext, this.valueTransposed, rowEnd - rowBegin, keys, valueDim);
    for (let row = rowBegin; row < rowEnd; row++) {
      const delta = this.rowDelta[row];
      const start = row * gradScores.rowStep;
      for (let j = start; j < start + keys; j++) {
        const weight = scores.data[j];
        const used = droppedWeights.data[j];
        const gain = used === 0 ? 0 : used * gradScores.data[j];
        gradScores.data[j] = weight === 0 ? 0 : gain - weight * delta;
      }
    }
  }
}

/**
 * Gradients of query, key and value. Tasks are, outermost first: batch, key/value head, query head
 * of its group, block of queries, part of the keys.
 */
class GradientPass {
  readonly count: number;

  private readonly group: number;
  private readonly storedKey: StoredTensor;
  private readonly gradQuery: StoredTensor;
  private readonly gradKey: StoredTensor;
  private readonly gradValue: StoredTensor;
  private readonly key: Matrix; // [KEY_BLOCK, headDim]
  private readonly querySum: Matrix; // [QUERY_BLOCK, headDim]
  private readonly keySum: Matrix; // [keyLength, headDim], for one key/value head
  private readonly valueSum: Matrix; // [keyLength, valueDim]
  private readonly droppedWeightsTransposed: Matrix;
  private readonly gradScoresTransposed: Matrix;

  constructor(
    private readonly tile: GradientTile,
    tensors: BackwardTensors,
  ) {
    const p = tile.problem;
    this.storedKey = StoredTensor.ofKeys(p, tile.inputs.key, p.headDim);
    this.gradQuery = StoredTensor.ofQueries(p, tensors.gradQuery, p.headDim);
    this.gradKey = StoredTensor.ofKeys(p, tensors.gradKey, p.headDim);
    this.gradValue = StoredTensor.ofKeys(p, tensors.gradValue, p.valueDim);
    this.key = scratchMatrix(KEY_BLOCK, p.headDim);
    this.querySum = scratchMatrix(QUERY_BLOCK, p.headDim);
    this.keySum = scratchMatrix(p.keyLength, p.headDim);
    this.valueSum = scratchMatrix(p.keyLength, p.valueDim);
    this.droppedWeightsTransposed = transposed(tile.droppedWeights);
    this.gradScoresTransposed = transposed(tile.gradScores);
    this.group = p.queryHeads / p.kvHeads;
    this.count = p.batch * p.queryHeads * tile.queryBlocks * tile.keyParts;
  }

  run(task: number): void {
    const { tile, group } = this;
    const { kvHeads, keyLength, scale } = tile.problem;
    const part = task % tile.keyParts;
    const block = Math.floor(task / tile.keyParts) % tile.queryBlocks;
    const plane = Math.floor(task / (tile.keyParts * tile.queryBlocks));
    const head = plane % (kvHeads * group);
    const batch = Math.floor(plane / (kvHeads * group));
    if (part === 0) {
      if (block === 0 && head % group === 0) {
        this.keySum.data.fill(0);
        this.valueSum.data.fill(0);
      }
      tile.placeRows(batch, head, block * QUERY_BLOCK);
      this.querySum.data.fill(0);
    }
    tile.eachGradientBlock(part, () => this.accumulate());
    const isLastPart = part === tile.keyParts - 1;
    if (isLastPart) {
      this.querySum.start = 0;
      this.gradQuery.write(batch, head, tile.queryStart, tile.rows, this.querySum, scale);
    }
    if (isLastPart && block === tile.queryBlocks - 1 && head % group === group - 1) {
      this.keySum.start = 0;
      this.valueSum.start = 0;
      this.gradKey.write(batch, tile.kvHead, 0, keyLength, this.keySum, 1);
      this.gradValue.write(batch, tile.kvHead, 0, keyLength, this.valueSum, 1);
    }
  }

  /** Adds the tile's share to all three gradients. */
  private accumulate(): void {
    const { tile, key, querySum, keySum, valueSum } = this;
    const { query, gradContext, gradScores, rowBegin, keyStart, keys } = tile;
    const { headDim, valueDim } = tile.problem;
    const rows = tile.rowEnd - rowBegin;
    const weightsT = this.droppedWeightsTransposed;
    const gradScoresT = this.gradScoresTransposed;
    weightsT.start = rowBegin * weightsT.columnStep;
    gradScoresT.start = rowBegin * gradScoresT.columnStep;
    querySum.start = rowBegin * querySum.rowStep;
    keySum.start = keyStart * keySum.rowStep;
    valueSum.start = keyStart * valueSum.rowStep;

    const addValue = tile.gradContextIsFinite ? multiplyAdd : multiplyAddWeighted;
    addValue(valueSum, weightsT, gradContext, keys, valueDim, rows, tile.droppedWeights.data);
    if (tile.capSlope) this.applyCapSlope(tile.capSlope);
    const keyIsFinite = this.storedKey.read(tile.batch, tile.kvHead, keyStart, keys, key);
    const addQuery = keyIsFinite ? multiplyAdd : multiplyAddWeighted;
    addQuery(querySum, gradScores, key, rows, headDim, keys, tile.scores.data);
    const addKey = tile.queryIsFinite ? multiplyAdd : multiplyAddWeighted;
    // The query is scaled already.
    addKey(keySum, gradScoresT, query, keys, headDim, rows, tile.scores.data);
  }

  /** From the gradient of the capped scores to that of the bare ones. */
  private applyCapSlope(slope: Float64Array): void {
    const { gradScores, rowBegin, rowEnd, keys } = this.tile;
    for (let row = rowBegin; row < rowEnd; row++) {
      const start = row * gradScores.rowStep;
      for (let j = start; j < start + keys; j++) {
        if (gradScores.data[j] !== 0) gradScores.data[j] *= slope[j];
      }
    }
  }
}

/**
 * Gradient of the bias, summed over the axes along which it was broadcast. A region is a block of
 * the mask's rows in one of its planes; tasks are, outermost first: region (batch, head, rows),
 * what is summed into it (batch, head, block of queries), part of the keys.
 */
class MaskGradientPass {
  readonly count: number;

  private readonly sum: Matrix; // [rows of a region, maskKeys]
  private readonly blocksSummed: number;
  private readonly headsSummed: number;
  private readonly batchesSummed: number;

  constructor(
    private readonly tile: GradientTile,
    private readonly gradMask: FloatArray,
  ) {
    const p = tile.problem;
    const hasRows = p.maskQueries > 1;
    this.sum = scratchMatrix(hasRows ? QUERY_BLOCK : 1, p.maskKeys);
    this.blocksSummed = hasRows ? 1 : tile.queryBlocks;
    this.headsSummed = p.queryHeads / p.maskHeads;
    this.batchesSummed = p.batch / p.maskBatch;
    this.count = p.batch * p.queryHeads * tile.queryBlocks * tile.keyParts;
  }

  run(task: number): void {
    const { tile, blocksSummed, headsSummed, batchesSummed } = this;
    const p = tile.problem;
    const tasksPerRegion = batchesSummed * headsSummed * blocksSummed * tile.keyParts;
    const step = task % tasksPerRegion;
    const region = Math.floor(task / tasksPerRegion);
    const [part, sumBlock, sumHead, sumBatch] = digits(step, [
      tile.keyParts,
      blocksSummed,
      headsSummed,
      batchesSummed,
    ]);
    const [regionBlock, regionHead, regionBatch] = digits(region, [
      tile.queryBlocks / blocksSummed,
      p.maskHeads,
      p.maskBatch,
    ]);
    if (step === 0) this.sum.data.fill(0);
    if (part === 0) {
      // Along each axis either the regions or their summands advance.
      const queryStart = (regionBlock + sumBlock) * QUERY_BLOCK;
      tile.placeRows(regionBatch + sumBatch, regionHead + sumHead, queryStart);
    }
    tile.eachGradientBlock(part, () => this.accumulate());
    if (step === tasksPerRegion - 1) {
      const firstRow = (regionBatch * p.maskHeads + regionHead) * p.maskQueries;
      this.store(firstRow + regionBlock * QUERY_BLOCK);
    }
  }

  private accumulate(): void {
    const { gradScores, rowBegin, rowEnd, keyStart, keys } = this.tile;
    const { maskQueries, maskKeys } = this.tile.problem;
    const sums = this.sum.data;
    for (let row = rowBegin; row < rowEnd; row++) {
      const from = row * gradScores.rowStep;
      const to = (maskQueries > 1 ? row : 0) * this.sum.rowStep;
      if (maskKeys > 1) {
        for (let j = 0; j < keys; j++) sums[to + keyStart + j] += gradScores.data[from + j];
      } else {
        for (let j = 0; j < keys; j++) sums[to] += gradScores.data[from + j];
      }
    }
  }

  /** Writes the region whose first row is the mask's `firstRow`. */
  private store(firstRow: number): void {
    const { maskType, maskQueries, maskKeys } = this.tile.problem;
    const rows = maskQueries > 1 ? this.tile.rows : 1;
    for (let row = 0; row < rows; row++) {
      const to = (firstRow + row) * maskKeys;
      const from = row * this.sum.rowStep;
      writeRow(this.gradMask, maskType - FLOAT_MASK, to, maskKeys, this.sum.data, from, 1);
    }
  }
}

/** A number in mixed radix, lowest digit first. */
function digits(value: number, sizes: readonly number[]): number[] {
  return sizes.map((size) => {
    const digit = value % size;
    value = Math.floor(value / size);
    return digit;
  });
}
