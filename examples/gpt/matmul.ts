// The matrix product of all layers but attention: plain TypeScript, kept in registers by blocks.

/** Numbers of a model: float32 to train, float64 to check its gradients by the same code. */
export type Floats = Float32Array | Float64Array;

/** New zeros of the same precision as `like`. */
export function zeros(like: Floats, length: number): Floats {
  return like instanceof Float64Array ? new Float64Array(length) : new Float32Array(length);
}

/**
 * Adds a [n, k] times b [k, m] to out [n, m].
 *
 * Every sum runs over k in order and in float64, whatever the sizes are, so a row of the result
 * is the same bit for bit with any other rows beside it.
 */
export function addProduct(
  out: Floats,
  a: Floats,
  b: Floats,
  n: number,
  k: number,
  m: number,
): void {
  const blockRows = n - (n % 4);
  const blockColumns = m - (m % 2);
  for (let i = 0; i < blockRows; i += 4) {
    for (let j = 0; j < blockColumns; j += 2) addBlock(out, a, b, i, j, k, m);
    for (let row = i; row < i + 4 && blockColumns < m; row++) addDot(out, a, b, row, m - 1, k, m);
  }
  for (let i = blockRows; i < n; i++) {
    const quads = m - (m % 4);
    for (let j = 0; j < quads; j += 4) addRow(out, a, b, i, j, k, m);
    for (let j = quads; j < m; j++) addDot(out, a, b, i, j, k, m);
  }
}

/** Four rows by two columns: eight sums stay in registers, and each number loaded serves some. */
function addBlock(
  out: Floats,
  a: Floats,
  b: Floats,
  row: number,
  column: number,
  k: number,
  m: number,
): void {
  let [s00, s01, s10, s11, s20, s21, s30, s31] = [0, 0, 0, 0, 0, 0, 0, 0];
  const a0 = row * k;
  const a1 = a0 + k;
  const a2 = a1 + k;
  const a3 = a2 + k;
  for (let p = 0, at = column; p < k; p++, at += m) {
    const b0 = b[at];
    const b1 = b[at + 1];
    const x0 = a[a0 + p];
    s00 += x0 * b0;
    s01 += x0 * b1;
    const x1 = a[a1 + p];
    s10 += x1 * b0;
    s11 += x1 * b1;
    const x2 = a[a2 + p];
    s20 += x2 * b0;
    s21 += x2 * b1;
    const x3 = a[a3 + p];
    s30 += x3 * b0;
    s31 += x3 * b1;
  }
  let at = row * m + column;
  out[at] += s00;
  out[at + 1] += s01;
  at += m;
  out[at] += s10;
  out[at + 1] += s11;
  at += m;
  out[at] += s20;
  out[at + 1] += s21;
  at += m;
  out[at] += s30;
  out[at + 1] += s31;
}

/** One row by four columns: what is left over of the rows, and all of a single one. */
function addRow(
  out: Floats,
  a: Floats,
  b: Floats,
  row: number,
  column: number,
  k: number,
  m: number,
): void {
  let [s0, s1, s2, s3] = [0, 0, 0, 0];
  for (let p = 0, i = row * k, at = column; p < k; p++, i++, at += m) {
    const x = a[i];
    s0 += x * b[at];
    s1 += x * b[at + 1];
    s2 += x * b[at + 2];
    s3 += x * b[at + 3];
  }
  const at = row * m + column;
  out[at] += s0;
  out[at + 1] += s1;
  out[at + 2] += s2;
  out[at + 3] += s3;
}

/** One element: what is left over of the columns. */
function addDot(
  out: Floats,
  a: Floats,
  b: Floats,
  row: number,
  column: number,
  k: number,
  m: number,
): void {
  let sum = 0;
  for (let p = 0; p < k; p++) sum += a[row * k + p] * b[p * m + column];
  out[row * m + column] += sum;
}

/** x [rows, columns] as [columns, rows]. */
export function transpose(x: Floats, rows: number, columns: number): Floats {
  const out = zeros(x, x.length);
  for (let i = 0; i < rows; i++) {
    for (let j = 0; j < columns; j++) out[j * rows + i] = x[i * columns + j];
  }
  return out;
}
