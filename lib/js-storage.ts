// Rows of query, key, value and their like as the caller stores them (either layout, any type)
// to and from the JavaScript backend's float64 scratch.

import { bfloat16ToNumber, halfToNumber, numberToBfloat16, numberToHalf } from './float16';
import type { Matrix } from './js-math';
import type { FloatArray, Problem } from './problem';

const HALF = 1;
const BFLOAT16 = 2;
const LENGTH_BEFORE_HEADS = 1;

/**
 * A stored tensor: [batch, heads, length, width] or, layout 1, [batch, length, heads, width]; or, of
 * a cache, [blocks, heads, keyBlockLength, width] and the blocks [batch, n] of each batch entry.
 */
export class StoredTensor {
  private readonly batchStep: number;
  private readonly headStep: number;
  private readonly rowStep: number;
  /** Rows in a block, and blocks of a batch entry */
  private readonly blockLength: number;
  private readonly tableWidth: number;

  private constructor(
    problem: Problem,
    private readonly data: FloatArray,
    private readonly type: number,
    heads: number,
    length: number,
    private readonly width: number,
    private readonly blocks: Int32Array | null,
  ) {
    const headsInside = blocks === null && problem.layout === LENGTH_BEFORE_HEADS;
    this.blockLength = length;
    this.tableWidth = blocks === null ? 0 : blocks.length / problem.batch;
    this.batchStep = heads * length * width;
    this.headStep = headsInside ? width : length * width;
    this.rowStep = headsInside ? heads * width : width;
  }

  /** One with a row for each query: query, output and their gradients. */
  static ofQueries(problem: Problem, data: FloatArray, width: number): StoredTensor {
    const { type, queryHeads, queryLength } = problem;
    return new StoredTensor(problem, data, type, queryHeads, queryLength, width, null);
  }

  /** One with a row for each key: key, value and their gradients; in blocks if those are given. */
  static ofKeys(
    problem: Problem,
    data: FloatArray,
    width: number,
    blocks: Int32Array | null = null,
  ): StoredTensor {
    const { keyType, kvHeads, keyLength, keyBlockLength } = problem;
    const length = blocks === null ? keyLength : keyBlockLength;
    return new StoredTensor(problem, data, keyType, kvHeads, length, width, blocks);
  }

  /** Reads rows into scratch, as its rows; says whether every element is finite. */
  read(batch: number, head: number, row: number, rows: number, out: Matrix): boolean {
    let finite = true;
    for (let i = 0; i < rows; i++) {
      const from = this.rowStart(batch, head, row + i);
      const to = out.start + i * out.rowStep;
      if (!readRow(this.data, this.type, from, this.width, out.data, to, out.columnStep)) {
        finite = false;
      }
    }
    return finite;
  }

  /** Writes scratch rows, each element times `scale`. */
  write(batch: number, head: number, row: number, rows: number, from: Matrix, scale: number): void {
    for (let i = 0; i < rows; i++) {
      const to = this.rowStart(batch, head, row + i);
      const at = from.start + i * from.rowStep;
      writeRow(this.data, this.type, to, this.width, from.data, at, scale);
    }
  }

  /** Whether the two methods below can read this tensor. */
  get isFloat32(): boolean {
    return this.data instanceof Float32Array;
  }

  /** out[i] = vector . row i, in place: cheaper than `read` where only one vector needs it. */
  dotRows(
    batch: number,
    head: number,
    row: number,
    rows: number,
    vector: Float64Array,
    out: Float64Array,
  ): void {
    const data = this.data as Float32Array;
    const first = this.rowStart(batch, head, row);
    for (let i = 0; i < rows; i += 4) {
      // Past the last row, the last row again: its place in `out` is spare or overwritten.
      const at0 = first + i * this.rowStep;
      const at1 = first + Math.min(i + 1, rows - 1) * this.rowStep;
      const at2 = first + Math.min(i + 2, rows - 1) * this.rowStep;
      const at3 = first + Math.min(i + 3, rows - 1) * this.rowStep;
      let sum0 = 0;
      let sum1 = 0;
      let sum2 = 0;
      let sum3 = 0;
      for (let d = 0; d < this.width; d++) {
        const x = vector[d];
        sum0 += x * data[at0 + d];
        sum1 += x * data[at1 + d];
        sum2 += x * data[at2 + d];
        sum3 += x * data[at3 + d];
      }
      out[i] = sum0;
      out[i + 1] = sum1;
      out[i + 2] = sum2;
      out[i + 3] = sum3;
    }
  }

  /** out += sum of factors[i] * row i; a factor of 0 contributes nothing, not even NaN. */
  addRows(
    batch: number,
    head: number,
    row: number,
    rows: number,
    factors: Float64Array,
    out: Float64Array,
  ): void {
    const data = this.data as Float32Array;
    const first = this.rowStart(batch, head, row);
    const { width, rowStep } = this;
    for (let i = 0; i < rows; i += 4) {
      const at = first + i * rowStep;
      const x0 = factors[i];
      const x1 = factors[i + 1];
      const x2 = factors[i + 2];
      const x3 = factors[i + 3];
      if (i + 4 <= rows && x0 * x1 * x2 * x3 !== 0) {
        for (let d = 0; d < width; d++) {
          const from = at + d;
          out[d] +=
            x0 * data[from] +
            x1 * data[from + rowStep] +
            x2 * data[from + 2 * rowStep] +
            x3 * data[from + 3 * rowStep];
        }
      } else {
        for (let r = i; r < Math.min(i + 4, rows); r++) {
          const x = factors[r];
          if (x === 0) continue;
          const from = first + r * rowStep;
          for (let d = 0; d < width; d++) out[d] += x * data[from + d];
        }
      }
    }
  }

  /** Where a row begins, in elements. */
  rowStart(batch: number, head: number, row: number): number {
    if (this.blocks !== null) {
      const block = this.blocks[batch * this.tableWidth + Math.floor(row / this.blockLength)];
      const inBlock = row % this.blockLength;
      return block * this.batchStep + head * this.headStep + inBlock * this.rowStep;
    }
    return batch * this.batchStep + head * this.headStep + row * this.rowStep;
  }
}

/**
 * Reads `count` stored elements in order to every `step`-th place of `out`; says whether all are
 * finite.
 */
export function readRow(
  data: Uint8Array | FloatArray,
  type: number,
  from: number,
  count: number,
  out: Float64Array,
  to: number,
  step: number,
): boolean {
  if (type === HALF) {
    return readHalfRow(data as Uint16Array, from, count, out, to, step);
  }
  if (type === BFLOAT16) {
    return readBfloat16Row(data as Uint16Array, from, count, out, to, step);
  }
  return readFloatRow(data as Float32Array, from, count, out, to, step);
}

// One function for each type, so that V8 compiles each for the one kind of array it meets.

function readFloatRow(
  data: Float32Array,
  from: number,
  count: number,
  out: Float64Array,
  to: number,
  step: number,
): boolean {
  let check = 0; // turns NaN where an element is not finite
  for (let i = 0; i < count; i++) {
    const x = data[from + i];
    out[to + i * step] = x;
    check += x * 0;
  }
  return check === 0;
}

function readHalfRow(
  data: Uint16Array,
  from: number,
  count: number,
  out: Float64Array,
  to: number,
  step: number,
): boolean {
  let check = 0; // turns NaN where an element is not finite
  for (let i = 0; i < count; i++) {
    const x = halfToNumber(data[from + i]);
    out[to + i * step] = x;
    check += x * 0;
  }
  return check === 0;
}

function readBfloat16Row(
  data: Uint16Array,
  from: number,
  count: number,
  out: Float64Array,
  to: number,
  step: number,
): boolean {
  let check = 0; // turns NaN where an element is not finite
  for (let i = 0; i < count; i++) {
    const x = bfloat16ToNumber(data[from + i]);
    out[to + i * step] = x;
    check += x * 0;
  }
  return check === 0;
}

/** Writes `count` numbers in order, each times `scale`, rounded once to the stored type. */
export function writeRow(
  data: FloatArray,
  type: number,
  to: number,
  count: number,
  source: Float64Array,
  from: number,
  scale: number,
): void {
  if (type === HALF) {
    for (let i = 0; i < count; i++) data[to + i] = numberToHalf(source[from + i] * scale);
  } else if (type === BFLOAT16) {
    for (let i = 0; i < count; i++) data[to + i] = numberToBfloat16(source[from + i] * scale);
  } else {
    for (let i = 0; i < count; i++) data[to + i] = source[from + i] * scale;
  }
}
