// One tile of scores, a block of queries by a block of keys, for the JavaScript backend: which
// keys a row sees, scale, softcap, bias and exclusions, and the dropout decisions.

import { fillKeepRow, type ResolvedDropout, resolveDropout } from './js-dropout';
import { type Matrix, multiplyAdd, scratchMatrix, transposed } from './js-math';
import { readRow, StoredTensor } from './js-storage';
import type { Inputs, Problem } from './problem';

/** Queries and keys of a tile: small enough for the first two caches, large enough to amortize. */
export const QUERY_BLOCK = 64;
export const KEY_BLOCK = 64;

/** `dropoutPlacement` of a Problem, or none. */
const NOTHING = -1;
export const WEIGHTS = 0;
export const CONTEXT = 1;
export const SCORES = 2;

const BOOL_MASK = 1;
/** A `maskType` from here on is this much more than the `type` of the same elements. */
export const FLOAT_MASK = 2;

/** About as much arithmetic as fits between two turns of the event loop. */
const MULTIPLIES_PER_TASK = 2 ** 22;

/** A block of queries against a block of keys, moved over the whole call. */
export class ScoreTile {
  /** Scaled queries of the block, [QUERY_BLOCK, headDim]. */
  readonly query: Matrix;
  /** Whether they are all finite. */
  queryIsFinite = true;
  /** [QUERY_BLOCK, KEY_BLOCK]: scores, and what the passes turn them into. */
  readonly scores: Matrix;
  /** Derivative of the softcap at each score; only where asked for and capped. */
  readonly capSlope: Float64Array | null;
  /** Decisions at each score, 1 keeps; written by `decide`. */
  readonly keep: Uint8Array;

  batch = 0;
  head = 0;
  kvHead = 0;
  /** The block's queries: queryStart to queryStart + rows. */
  queryStart = 0;
  rows = 0;
  /** Keys outside these bounds are seen by no row of the block. */
  firstKey = 0;
  endKey = 0;
  /** Keys of the batch entry that are stored. */
  private keyLength = 0;
  /** The tile's keys: keyStart to keyStart + keys. */
  keyStart = 0;
  keys = 0;
  /** The rows that see any of the tile's keys; only theirs are computed. */
  rowBegin = 0;
  rowEnd = 0;

  /** Blocks of queries in a head, and parts of the keys that a task handles at once. */
  readonly queryBlocks: number;
  readonly keyParts: number;
  private readonly partLength: number;

  readonly dropoutPlacement: number;
  readonly keepScale: number;
  private dropout: ResolvedDropout;

  private readonly storedQuery: StoredTensor;
  private readonly storedKey: StoredTensor;
  private readonly keyTransposed: Matrix; // [headDim, KEY_BLOCK]
  private readonly keyRows: Matrix; // the same memory, [KEY_BLOCK, headDim]
  private readonly bias = new Float64Array(KEY_BLOCK);
  private readonly rowFirstKey = new Float64Array(QUERY_BLOCK);
  private readonly rowEndKey = new Float64Array(QUERY_BLOCK);

  constructor(
    readonly problem: Problem,
    readonly inputs: Inputs,
    wantsSlope: boolean,
  ) {
    const p = problem;
    this.storedQuery = StoredTensor.ofQueries(p, inputs.query, p.headDim);
    this.storedKey = StoredTensor.ofKeys(p, inputs.key, p.headDim, inputs.keyBlocks);
    this.query = scratchMatrix(QUERY_BLOCK, p.headDim);
    this.keyTransposed = scratchMatrix(p.headDim, KEY_BLOCK + 4); // rows apart in the cache
    this.keyRows = transposed(this.keyTransposed);
    this.scores = scratchMatrix(QUERY_BLOCK, KEY_BLOCK);
    this.capSlope = wantsSlope && p.softcap > 0 ? new Float64Array(this.scores.data.length) : null;
    this.keep = new Uint8Array(this.scores.data.length);
    this.queryBlocks = Math.ceil(p.queryLength / QUERY_BLOCK);
    const blockMultiplies = QUERY_BLOCK * KEY_BLOCK * (p.headDim + p.valueDim);
    this.partLength = KEY_BLOCK * Math.ceil(MULTIPLIES_PER_TASK / blockMultiplies);
    this.keyParts = Math.ceil(p.keyLength / this.partLength);
    this.dropoutPlacement = p.dropoutP > 0 ? p.dropoutPlacement : NOTHING;
    this.dropout = resolveDropout(p);
    this.keepScale = inputs.keepMask ? explicitScale(p.dropoutP) : this.dropout.keepScale;
  }

  /** Goes to a block of queries: loads them and finds which keys they see. */
  placeRows(batch: number, head: number, queryStart: number): void {
    const p = this.problem;
    this.batch = batch;
    this.head = head;
    this.kvHead = Math.floor(head / (p.queryHeads / p.kvHeads));
    this.queryStart = queryStart;
    this.rows = Math.min(QUERY_BLOCK, p.queryLength - queryStart);
    this.query.start = 0;
    this.queryIsFinite = this.storedQuery.read(batch, head, queryStart, this.rows, this.query);
    const query = this.query.data;
    for (let i = 0; i < this.rows * this.query.rowStep; i++) query[i] *= p.scale;

    const offsets = this.inputs.causalOffsets;
    const offset = offsets ? offsets[batch] : p.causalOffset;
    const length = this.inputs.kvLengths ? this.inputs.kvLengths[batch] : p.keyLength;
    // A cache has no rows at all from there on.
    this.keyLength = this.inputs.keyBlocks === null ? p.keyLength : length;
    for (let i = 0; i < this.rows; i++) {
      // The key in line with the row, counted from this call's first key.
      const diagonal = queryStart + i + p.queryOffset + offset - p.keyOffset;
      let end = length;
      if (p.isCausal) end = Math.min(end, diagonal + 1);
      if (p.windowRight >= 0) end = Math.min(end, diagonal + p.windowRight + 1);
      this.rowFirstKey[i] = p.windowLeft < 0 ? 0 : Math.max(0, diagonal - p.windowLeft);
      this.rowEndKey[i] = Math.max(0, end);
    }
    // Both bounds only grow from row to row.
    this.firstKey = this.rowFirstKey[0];
    this.endKey = this.rowEndKey[this.rows - 1];
  }

  /** Calls `visit` with scores computed for each key block of a part that any row sees. */
  eachScoreBlock(part: number, visit: () => void): void {
    const first = Math.max(part * this.partLength, this.firstKey - (this.firstKey % KEY_BLOCK));
    const end = Math.min((part + 1) * this.partLength, this.endKey);
    for (let keyStart = first; keyStart < end; keyStart += KEY_BLOCK) {
      if (this.computeScores(keyStart)) visit();
    }
  }

  /**
   * Computes the scores of the block's rows with the keys from `keyStart` on (a multiple of
   * KEY_BLOCK), -inf where a row does not see a key. False if no row sees any of them.
   */
  private computeScores(keyStart: number): boolean {
    const p = this.problem;
    this.keyStart = keyStart;
    this.keys = Math.min(KEY_BLOCK, this.keyLength - keyStart);
    this.rowBegin = 0;
    while (this.rowBegin < this.rows && this.rowEndKey[this.rowBegin] <= keyStart) this.rowBegin++;
    this.rowEnd = this.rows;
    while (this.rowEnd > this.rowBegin && this.rowFirstKey[this.rowEnd - 1] >= keyStart + this.keys)
      this.rowEnd--;
    if (this.rowBegin === this.rowEnd) return false;

    this.multiplyQueryByKeys();
    if (p.softcap > 0) this.applySoftcap();
    if (this.inputs.mask) this.applyMask(this.inputs.mask);
    this.excludeUnseen();
    return true;
  }

  /** Goes to another sample: a call that differs from this one in its offset alone. */
  chooseSample(sample: Problem): void {
    this.dropout = resolveDropout(sample);
  }

  /** Draws or reads the decisions of the tile's elements. */
  decide(): void {
    const { problem, keep, keyStart, keys } = this;
    const step = this.scores.rowStep;
    for (let row = this.rowBegin; row < this.rowEnd; row++) {
      this.decideRow(row, keyStart, keys, problem.keyLength, keep, row * step);
    }
  }

  /** Decisions of one row of the block, for columns (keys or channels) of a row of `width`. */
  decideRow(
    row: number,
    first: number,
    count: number,
    width: number,
    out: Uint8Array,
    outStart: number,
  ): void {
    const { problem: p, batch, head } = this;
    const query = this.queryStart + row;
    const given = this.inputs.keepMask;
    if (given === null) {
      fillKeepRow(p, this.dropout, batch, head, query, first, count, out, outStart);
      return;
    }
    const from = ((batch * p.queryHeads + head) * p.queryLength + query) * width + first;
    for (let j = 0; j < count; j++) out[outStart + j] = given[from + j];
  }

  /** Dropout of scores: what is dropped is as good as unseen. */
  dropScores(): void {
    this.decide();
    const { keep, keys } = this;
    const scores = this.scores.data;
    for (let row = this.rowBegin; row < this.rowEnd; row++) {
      const start = row * this.scores.rowStep;
      for (let j = start; j < start + keys; j++) if (keep[j] === 0) scores[j] = -Infinity;
    }
  }

  /** Whether keys and values are better used in place: scratch copies serve one row only once. */
  get isSingleRow(): boolean {
    return this.rows === 1 && this.storedKey.isFloat32;
  }

  private multiplyQueryByKeys(): void {
    const { query, scores, batch, kvHead, keyStart, keys, rowBegin, rowEnd } = this;
    if (this.isSingleRow) {
      this.storedKey.dotRows(batch, kvHead, keyStart, keys, query.data, scores.data);
      return;
    }
    this.storedKey.read(batch, kvHead, keyStart, keys, this.keyRows);
    query.start = rowBegin * query.rowStep;
    scores.start = rowBegin * scores.rowStep;
    scores.data.fill(0, scores.start, rowEnd * scores.rowStep);
    const { headDim } = this.problem;
    multiplyAdd(scores, query, this.keyTransposed, rowEnd - rowBegin, keys, headDim);
  }

  private applySoftcap(): void {
    const { softcap } = this.problem;
    const slope = this.capSlope;
    const scores = this.scores.data;
    for (let row = this.rowBegin; row < this.rowEnd; row++) {
      const start = row * this.scores.rowStep;
      for (let j = start; j < start + this.keys; j++) {
        const bent = Math.tanh(scores[j] / softcap);
        scores[j] = softcap * bent;
        if (slope) slope[j] = 1 - bent * bent;
      }
    }
  }

  /** Adds the bias; a bias of -inf excludes, whatever the score. */
  private applyMask(mask: NonNullable<Inputs['mask']>): void {
    const { problem: p, bias, keys } = this;
    const scores = this.scores.data;
    const batch = p.maskBatch > 1 ? this.batch : 0;
    const head = p.maskHeads > 1 ? this.head : 0;
    for (let row = this.rowBegin; row < this.rowEnd; row++) {
      if (p.maskQueries > 1 || row === this.rowBegin) {
        const query = p.maskQueries > 1 ? this.queryStart + row : 0;
        const from = ((batch * p.maskHeads + head) * p.maskQueries + query) * p.maskKeys;
        this.readBias(mask, from);
      }
      const start = row * this.scores.rowStep;
      for (let j = 0; j < keys; j++) {
        const added = bias[j];
        scores[start + j] = added === -Infinity ? -Infinity : scores[start + j] + added;
      }
    }
  }

  /** The mask's row at `from` as a bias for the tile's keys: 0 or -inf where it is boolean. */
  private readBias(mask: NonNullable<Inputs['mask']>, from: number): void {
    const { maskType, maskKeys } = this.problem;
    const { bias, keys } = this;
    const start = maskKeys > 1 ? from + this.keyStart : from;
    const count = maskKeys > 1 ? keys : 1;
    if (maskType === BOOL_MASK) {
      for (let j = 0; j < count; j++) bias[j] = mask[start + j] === 0 ? -Infinity : 0;
    } else {
      readRow(mask, maskType - FLOAT_MASK, start, count, bias, 0, 1);
    }
    if (maskKeys === 1) bias.fill(bias[0], 0, keys);
  }

  private excludeUnseen(): void {
    const { rowFirstKey, rowEndKey, keyStart, keys } = this;
    const scores = this.scores.data;
    for (let row = this.rowBegin; row < this.rowEnd; row++) {
      const start = row * this.scores.rowStep;
      const first = Math.min(keys, Math.max(0, rowFirstKey[row] - keyStart));
      const end = Math.min(keys, Math.max(0, rowEndKey[row] - keyStart));
      if (first > 0) scores.fill(-Infinity, start, start + first);
      if (end < keys) scores.fill(-Infinity, start + end, start + keys);
    }
  }
}

/** Decisions that were given, not drawn, have the probability exactly as stated. */
function explicitScale(p: number): number {
  return p === 1 ? 0 : 1 / (1 - p);
}
