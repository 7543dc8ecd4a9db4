// The arithmetic that the JavaScript backend spends its time in: one matrix product and one
// exponential. Scratch matrices are float64: that is what V8 computes with, and its conversions
// from float32 would cost as much as the products.

/** A scratch matrix, or its transpose: element (i, j) is data[start + i*rowStep + j*columnStep]. */
export interface Matrix {
  readonly data: Float64Array;
  start: number;
  readonly rowStep: number;
  readonly columnStep: number;
}

/** Columns that the product computes side by side; rows of scratch are padded to this. */
const COLUMN_UNIT = 4;

/** Bounds of an operand: the largest head dim, and a block of keys or queries with padding. */
const LONGEST_ROW = 512;
const LONGEST_COLUMN = 68;

/** The smallest padded row length for `columns` elements. */
function padded(columns: number): number {
  return Math.ceil(columns / COLUMN_UNIT) * COLUMN_UNIT;
}

/** A zeroed scratch matrix whose rows are padded for `multiplyAdd`. */
export function scratchMatrix(rows: number, columns: number): Matrix {
  const rowStep = padded(columns);
  return { data: new Float64Array(rows * rowStep), start: 0, rowStep, columnStep: 1 };
}

/** The same memory with rows and columns exchanged. */
export function transposed(matrix: Matrix): Matrix {
  const { data, start, rowStep, columnStep } = matrix;
  return { data, start, rowStep: columnStep, columnStep: rowStep };
}

/** Rows that the product computes side by side. */
const ROW_UNIT = 2;

/**
 * The operands of the product at hand, copied here: arrays that V8 knows as constants need almost
 * none of its checks at each access, which doubles the speed of the innermost loop.
 */
const leftRows = new Float64Array(ROW_UNIT * LONGEST_ROW); // pairs of rows, element by element
const rightRows = new Float64Array(LONGEST_ROW * LONGEST_COLUMN);

/**
 * out [m, n] += left [m, k] right [k, n]. Columns from n up to the next multiple of four are
 * written too, with nonsense: rows of `out` and `right` have room for them and stand in order
 * in memory.
 */
export function multiplyAdd(
  out: Matrix,
  left: Matrix,
  right: Matrix,
  m: number,
  n: number,
  k: number,
): void {
  rightRows.set(right.data);
  for (let i = 0; i < m; i += ROW_UNIT) {
    const rows = Math.min(ROW_UNIT, m - i);
    copyLeftRows(left, i, rows, k);
    const to = out.start + i * out.rowStep;
    for (let j = 0; j < n; j += COLUMN_UNIT) {
      multiplyAddTile(out, to + j, rows, right.start + j, right.rowStep, k);
    }
  }
}

function copyLeftRows(left: Matrix, i: number, rows: number, k: number): void {
  const { data, rowStep, columnStep } = left;
  let from0 = left.start + i * rowStep;
  let from1 = rows > 1 ? from0 + rowStep : from0;
  for (let p = 0; p < ROW_UNIT * k; p += ROW_UNIT) {
    leftRows[p] = data[from0];
    leftRows[p + 1] = data[from1];
    from0 += columnStep;
    from1 += columnStep;
  }
}

/** Two rows by four columns of the product: eight sums, which stay in registers. */
function multiplyAddTile(
  out: Matrix,
  to: number,
  rows: number,
  rightStart: number,
  rightStep: number,
  k: number,
): void {
  let c00 = 0;
  let c01 = 0;
  let c02 = 0;
  let c03 = 0;
  let c10 = 0;
  let c11 = 0;
  let c12 = 0;
  let c13 = 0;
  let at = rightStart | 0; // "| 0" spares the checks for integer overflow
  for (let p = 0; p < ROW_UNIT * k; p = (p + ROW_UNIT) | 0) {
    const b0 = rightRows[at];
    const b1 = rightRows[at + 1];
    const b2 = rightRows[at + 2];
    const b3 = rightRows[at + 3];
    const a0 = leftRows[p];
    c00 += a0 * b0;
    c01 += a0 * b1;
    c02 += a0 * b2;
    c03 += a0 * b3;
    const a1 = leftRows[p + 1];
    c10 += a1 * b0;
    c11 += a1 * b1;
    c12 += a1 * b2;
    c13 += a1 * b3;
    at = (at + rightStep) | 0;
  }
  addFour(out.data, to, c00, c01, c02, c03);
  if (rows > 1) addFour(out.data, to + out.rowStep, c10, c11, c12, c13);
}

function addFour(
  target: Float64Array,
  at: number,
  x0: number,
  x1: number,
  x2: number,
  x3: number,
): void {
  target[at] += x0;
  target[at + 1] += x1;
  target[at + 2] += x2;
  target[at + 3] += x3;
}

/**
 * multiplyAdd for a `right` that holds NaN or infinity: where the weight that stands at the same
 * place as an element of `left` is exactly 0, that element contributes nothing, not 0 * NaN.
 */
export function multiplyAddWeighted(
  out: Matrix,
  left: Matrix,
  right: Matrix,
  m: number,
  n: number,
  k: number,
  weights: Float64Array,
): void {
  for (let i = 0; i < m; i++) {
    const outAt = out.start + i * out.rowStep;
    for (let p = 0; p < k; p++) {
      const leftAt = left.start + i * left.rowStep + p * left.columnStep;
      if (weights[leftAt] === 0) continue;
      const x = left.data[leftAt];
      const rightAt = right.start + p * right.rowStep;
      for (let j = 0; j < n; j++) out.data[outAt + j] += x * right.data[rightAt + j];
    }
  }
}

/** Below this a weight is 0: float32 could not hold it. */
const UNDERFLOW = -104;
/** Above this the result is out of float32's range, and of the table's. */
const OVERFLOW = 89;
/** e^x = 2^(step / 64) e^rest: the tables hold 2^(i / 64) and 2^(i - LOWEST_POWER). */
const STEPS_PER_POWER = 64;
const LOWEST_POWER = 152;
const STEPS = STEPS_PER_POWER / Math.LN2;
const STEP = Math.LN2 / STEPS_PER_POWER;
const LOWEST_STEP = LOWEST_POWER * STEPS_PER_POWER;
const fractions = Float64Array.from({ length: STEPS_PER_POWER }, (_, i) => 2 ** (i / 64));
const powers = Float64Array.from({ length: 282 }, (_, i) => 2 ** (i - LOWEST_POWER));

/**
 * A score less its row's lse. Only rounding takes it above 0, but that of scores of 1e9 by far: no
 * weight may come out as more than 1. NaN stays.
 */
export function atMostZero(x: number): number {
  return x > 0 ? 0 : x;
}

/** e^x to 4e-11, relative; exactly 0 where float32 would underflow. Several times Math.exp. */
export function exponential(x: number): number {
  if (x < UNDERFLOW) return 0;
  if (x > OVERFLOW) return Math.exp(x);
  const step = (x * STEPS + (LOWEST_STEP + 0.5)) | 0; // NaN gives 0, and a NaN rest
  const rest = x - (step - LOWEST_STEP) * STEP;
  const tail = 1 + rest * (1 + rest * (0.5 + rest * (1 / 6)));
  return fractions[step & (STEPS_PER_POWER - 1)] * powers[step >> 6] * tail;
}
