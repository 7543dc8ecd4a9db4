// The operation in float64, with explicit [Lq, Lk] matrices and none of the package's code: what
// every backend is measured against. Beside each value stands how far float32 arithmetic may be
// from it.

export interface ReferenceTensor {
  readonly data: ArrayLike<number>;
  readonly dims: readonly number[];
}

export type Storage = 'float32' | 'float16' | 'bfloat16';
export const PLACEMENTS = ['weights', 'context', 'scores'] as const;
export type Placement = (typeof PLACEMENTS)[number];
export type BroadcastAxis = 'batch' | 'head' | 'query';
export const PRECISIONS = ['highest', 'high', 'medium'] as const;
export type Precision = (typeof PRECISIONS)[number];

/**
 * The options of the operation under their public names; tensors are [batch, heads, length, dim].
 */
export interface ReferenceOptions {
  /** A Uint8Array is boolean (1 takes part); anything else is a bias. */
  attnMask?: ReferenceTensor;
  isCausal?: boolean;
  causalOffset?: number | readonly number[] | 'bottom-right';
  windowSize?: readonly [number, number];
  kvLengths?: ArrayLike<number>;
  scale?: number;
  softcap?: number;
  dropoutP?: number;
  dropoutPlacement?: Placement;
  dropoutBroadcast?: readonly BroadcastAxis[];
  training?: boolean;
  seed?: bigint | number;
  offset?: bigint | number;
  keepMask?: ReferenceTensor;
  batchOffset?: number;
  headOffset?: number;
  queryOffset?: number;
  keyOffset?: number;
  /** Widens the budgets to what AMX may do there; the values are the same. */
  precision?: Precision;
}

/**
 * Values in float64, each with the largest error that a float32 evaluation may have. Infinity: a
 * step on the way is beyond the range of float32, and nothing is promised.
 */
export interface Bounded {
  readonly values: Float64Array;
  readonly error: Float64Array;
  /** Of gradients: 1 where a NaN or an infinity is among the terms. */
  readonly touched?: Uint8Array;
}

export interface ReferenceGradients {
  gradQuery: Bounded;
  gradKey: Bounded;
  gradValue: Bounded;
  gradAttnMask: Bounded | null;
}

export interface ReferenceResult {
  output: Bounded;
  lse: Bounded;
  scores: Bounded;
  weights: Bounded;
  droppedWeights: Bounded;
  /** Dropout decisions, 1 keeps; null without dropout. */
  keep: Uint8Array | null;
  backward(gradOutput: ArrayLike<number>): ReferenceGradients;
}

// ---- Random numbers (Philox4x32-10, Salmon et al., SC'11) ----

const WORD = 0xffffffffn;

export function philox(
  counter: readonly number[],
  key: readonly number[],
  rounds = 10,
): [number, number, number, number] {
  let [c0, c1, c2, c3] = counter.map(BigInt);
  let [k0, k1] = key.map(BigInt);
  for (let round = 0; round < rounds; round++) {
    const p0 = 0xd2511f53n * c0;
    const p1 = 0xcd9e8d57n * c2;
    [c0, c1, c2, c3] = [(p1 >> 32n) ^ c1 ^ k0, p1 & WORD, (p0 >> 32n) ^ c3 ^ k1, p0 & WORD];
    k0 = (k0 + 0x9e3779b9n) & WORD;
    k1 = (k1 + 0xbb67ae85n) & WORD;
  }
  return [Number(c0), Number(c1), Number(c2), Number(c3)];
}

export interface DropoutSpec {
  p: number;
  placement: Placement;
  seed: bigint | number;
  offset: bigint | number;
  broadcast?: readonly BroadcastAxis[];
  batchOffset?: number;
  headOffset?: number;
  queryOffset?: number;
  keyOffset?: number;
}

/** How many of 65536 decisions drop. */
export function dropThreshold(p: number): number {
  if (p === 0 || p === 1) return p * 65536;
  return Math.min(Math.max(Math.floor(p * 65536 + 0.5), 1), 65535);
}

/** What a kept element is multiplied by. */
export function keepScaleOf(p: number): number {
  const threshold = dropThreshold(p);
  return threshold === 65536 ? 0 : Math.fround(65536 / (65536 - threshold));
}

export function dropoutKey(spec: DropoutSpec): [number, number] {
  const low = (x: bigint | number) => Number(BigInt(x) & WORD);
  const high = (x: bigint | number) => Number((BigInt(x) >> 32n) & WORD);
  const lattice = spec.placement === 'context' ? 1 : 0;
  const bits = broadcastBits(spec.broadcast);
  const counter = [low(spec.offset), high(spec.offset), lattice + 256 * bits, 0x4e545441];
  const [k0, k1] = philox(counter, [low(spec.seed), high(spec.seed)]);
  return [k0, k1];
}

function broadcastBits(axes: readonly BroadcastAxis[] = []): number {
  const bit = { batch: 1, head: 2, query: 4 };
  return axes.reduce((bits, axis) => bits | bit[axis], 0);
}

/**
 * Decisions for [batch, heads, queries, columns]: a column is a key, or a channel under `context`.
 */
export function keepDecisions(dims: readonly number[], spec: DropoutSpec): Uint8Array {
  const [batch, heads, queries, columns] = dims;
  const threshold = dropThreshold(spec.p);
  const key = dropoutKey(spec);
  const shared = new Set(spec.broadcast);
  const firstColumn = spec.placement === 'context' ? 0 : (spec.keyOffset ?? 0);
  const keep = new Uint8Array(batch * heads * queries * columns);
  let at = 0;
  for (let bi = 0; bi < batch; bi++)
    for (let hi = 0; hi < heads; hi++)
      for (let qi = 0; qi < queries; qi++) {
        const b = shared.has('batch') ? 0 : (spec.batchOffset ?? 0) + bi;
        const h = shared.has('head') ? 0 : (spec.headOffset ?? 0) + hi;
        const q = shared.has('query') ? 0 : (spec.queryOffset ?? 0) + qi;
        let group = -1;
        let words = [0, 0, 0, 0];
        for (let j = 0; j < columns; j++) {
          const c = firstColumn + j;
          if (Math.floor(c / 8) !== group) {
            group = Math.floor(c / 8);
            words = philox([group, q, h, b], key);
          }
          const i = c % 8;
          const word = words[i >> 1];
          keep[at++] = ((word >>> (16 * (i & 1))) & 0xffff) >= threshold ? 1 : 0;
        }
      }
  return keep;
}

// ---- Error budget ----
// Standard running error analysis (Higham, Accuracy and Stability, ch. 3): a sum of n products in
// any order, with or without fused multiply-add, is within (n + c) U of the exact one relative to
// the sum of magnitudes. SLACK covers products of errors; FLOOR covers results below float32's
// normal range, FLUSH an operand there, which AMX takes for 0 (also the low terms of a split one).

const U = 2 ** -24;
const SLACK = 1.1;
const FLOOR = 1e-30;
const FLUSH = 2 ** -124;
/**
 * Roundings of a sum of n products: n, and as many for an online softmax's rescaling of partial
 * sums; or 3 n on AMX, which adds six products of terms, two at a time.
 */
const sumRoundings = (n: number) => (3 * n + 16) * U;
const ARGUMENT = 4 * U;
/** Beyond this, sums of magnitudes, a product's operands or its start may overflow on the way. */
const LARGEST = 2 ** 126;
const isBeyond = (size: number) => size > LARGEST && size < Infinity;

/** Whether GPUs of compute capability 9.0 use kernels made for them. */
export const HOPPER = process.env.SDPA_CUDA_HOPPER === '1';

/**
 * What a product of two floats may be off by, relative, and exp with the rounding of its argument.
 *
 * AMX splits floats into bfloat16 terms. A cut-off term leaves less than 2^-7 of what it is of, and
 * a rounded one 2^-8. Three terms (hi, mid, lo) leave nothing, and the products that are left out
 * are 2 mid * lo < 2 * 2^-7 * 2^-15, and lo * lo; two leave out mid * mid < 2^-14 and twice what mid
 * is rounded by, 2^-7 * 2^-8; one is rounded itself, twice. Exponentials: 4 units in the last place;
 * with fewer terms the largest error over all floats is 2.9e-6 and 1.02e-4
 * (bench/results/precision.md). The kernels for Hopper round operands to 11 bits.
 */
const ARITHMETIC: Record<Precision, { product: number; exp: number }> = {
  highest: { product: 2 ** -21 + 2 ** -30, exp: 8 * U },
  high: { product: HOPPER ? 2 ** -10 : 2 ** -13, exp: 2 ** -18 },
  medium: { product: 2 ** -7 + 2 ** -16, exp: 2 ** -13 },
};
/** Keys after which an online softmax may rescale its sums, by an exp. */
const KEYS_A_RESCALE = 64;
/** tanh to 8 units of 2^-24, absolute: it may be formed from exp. */
const TANH = 8 * U;

const STORAGE = {
  float32: { unit: U, step: 2 ** -150, largest: LARGEST },
  float16: { unit: 2 ** -11, step: 2 ** -25, largest: 65504 },
  bfloat16: { unit: 2 ** -8, step: 2 ** -134, largest: LARGEST },
} as const;

/** The budget after a result is rounded once to its storage type. */
function stored(value: number, error: number, storage: Storage): number {
  const { unit, step, largest } = STORAGE[storage];
  const size = Math.abs(value) + SLACK * error;
  if (size > largest && Math.abs(value) < Infinity) return Infinity;
  return SLACK * error + unit * (Math.abs(value) + error) + step + FLOOR;
}

// ---- The operation ----

interface Shape {
  batch: number;
  queryHeads: number;
  kvHeads: number;
  queryLength: number;
  keyLength: number;
  headDim: number;
  valueDim: number;
}

/** One call with its matrices, [batch, queryHeads, queryLength, keyLength] each. */
interface State extends Shape {
  query: ArrayLike<number>;
  key: ArrayLike<number>;
  value: ArrayLike<number>;
  options: ReferenceOptions;
  storage: Storage;
  maskStorage: Storage;
  scale: number;
  placement: Placement | null;
  keepScale: number;
  keep: Uint8Array | null;
  arithmetic: { product: number; exp: number };
  /** Per row: 1 where something overflows float32 on the way, so that nothing is promised. */
  beyond: Uint8Array;
  scores: Bounded;
  /** Slope of the cap at each score: 1 without one. */
  slope: Bounded;
  weights: Bounded;
  dropped: Bounded;
  output: Bounded;
  lse: Bounded;
}

/** Attention over all of query, key and value; `storage` is the type of the results. */
export function reference(
  query: ReferenceTensor,
  key: ReferenceTensor,
  value: ReferenceTensor,
  options: ReferenceOptions = {},
  storage: Storage = 'float32',
  maskStorage: Storage = 'float32',
): ReferenceResult {
  const state = prepare(query, key, value, options, storage, maskStorage);
  for (let row = 0; row < state.batch * state.queryHeads * state.queryLength; row++) {
    scoreRow(state, row);
    softmaxRow(state, row);
    outputRow(state, row);
    if (state.beyond[row]) promiseNothing(state, row);
  }
  const { output, lse, scores, weights, dropped, keep } = state;
  const backward = (gradOutput: ArrayLike<number>) => gradients(state, gradOutput);
  return { output, lse, scores, weights, droppedWeights: dropped, keep, backward };
}

function prepare(
  query: ReferenceTensor,
  key: ReferenceTensor,
  value: ReferenceTensor,
  options: ReferenceOptions,
  storage: Storage,
  maskStorage: Storage,
): State {
  const [batch, queryHeads, queryLength, headDim] = query.dims;
  const [, kvHeads, keyLength] = key.dims;
  const valueDim = value.dims[3];
  const p = options.training === false ? 0 : (options.dropoutP ?? 0);
  const placement = p > 0 ? (options.dropoutPlacement ?? 'weights') : null;
  const rows = batch * queryHeads * queryLength;
  const columns = placement === 'context' ? valueDim : keyLength;
  const decide = () =>
    keepDecisions([batch, queryHeads, queryLength, columns], {
      ...options,
      p,
      placement: placement as Placement,
      seed: options.seed ?? 0,
      offset: options.offset ?? 0,
      broadcast: options.dropoutBroadcast,
    });
  const given = options.keepMask && Uint8Array.from(options.keepMask.data);
  const statedScale = p === 1 ? 0 : 1 / (1 - p);
  return {
    batch,
    queryHeads,
    kvHeads,
    queryLength,
    keyLength,
    headDim,
    valueDim,
    query: query.data,
    key: key.data,
    value: value.data,
    options,
    storage,
    maskStorage,
    placement,
    scale: options.scale ?? 1 / Math.sqrt(headDim),
    keepScale: given ? statedScale : keepScaleOf(p),
    keep: placement ? (given ?? decide()) : null,
    arithmetic: ARITHMETIC[options.precision ?? 'highest'],
    beyond: new Uint8Array(rows),
    scores: bounded(rows * keyLength),
    slope: bounded(rows * keyLength),
    weights: bounded(rows * keyLength),
    dropped: bounded(rows * keyLength),
    output: bounded(rows * valueDim),
    lse: bounded(rows),
  };
}

function bounded(length: number): Bounded {
  return { values: new Float64Array(length), error: new Float64Array(length) };
}

/** Batch, query head, query, and the head of key and value that the row reads. */
function locate(s: State, row: number) {
  const i = row % s.queryLength;
  const h = Math.floor(row / s.queryLength) % s.queryHeads;
  const b = Math.floor(row / (s.queryLength * s.queryHeads));
  const kvHead = Math.floor(h / (s.queryHeads / s.kvHeads));
  const kvRow = (b * s.kvHeads + kvHead) * s.keyLength;
  return { b, h, i, kvRow };
}

/** Every result of a row that overflows on the way. */
function promiseNothing(s: State, row: number): void {
  for (const { error } of [s.scores, s.weights, s.dropped]) {
    error.fill(Infinity, row * s.keyLength, (row + 1) * s.keyLength);
  }
  s.output.error.fill(Infinity, row * s.valueDim, (row + 1) * s.valueDim);
  s.lse.error[row] = Infinity;
}

/** Scale, cap, bias, exclusions: row `row` of the scores. */
function scoreRow(s: State, row: number): void {
  const { b, h, i, kvRow } = locate(s, row);
  const cap = s.options.softcap ?? 0;
  for (let j = 0; j < s.keyLength; j++) {
    const at = row * s.keyLength + j;
    const bias = maskAt(s, b, h, i, j);
    s.slope.values[at] = 1;
    if (!isVisible(s, b, i, j) || bias === -Infinity) {
      s.scores.values[at] = -Infinity;
      continue;
    }
    let dot = 0;
    let size = 0;
    let operands = 0;
    for (let d = 0; d < s.headDim; d++) {
      const query = s.scale * s.query[row * s.headDim + d];
      const key = s.key[(kvRow + j) * s.headDim + d];
      dot += query * key;
      size += Math.abs(query * key);
      operands += Math.abs(query) + Math.abs(key);
      if (isBeyond(Math.abs(query))) s.beyond[row] = 1;
    }
    if (isBeyond(size) || isBeyond(Math.abs(bias))) s.beyond[row] = 1;
    let score = dot;
    let error = (sumRoundings(s.headDim) + s.arithmetic.product) * size + FLUSH * operands;
    if (cap > 0) {
      const t = Math.tanh(score / cap);
      const rawError = Math.abs(score) === Infinity ? 0 : error; // tanh of it is exact
      const tanhError = Math.min(rawError / cap, 1 + Math.abs(t)) + TANH;
      s.slope.values[at] = 1 - t * t;
      s.slope.error[at] = 2 * Math.abs(t) * tanhError + tanhError ** 2 + 4 * U;
      score = cap * t;
      error = cap * tanhError;
    }
    s.scores.values[at] = score + bias;
    s.scores.error[at] = error + U * (Math.abs(score) + Math.abs(bias)) + FLOOR;
  }
}

/** The bias of an element: 0 or -inf for a boolean mask. */
function maskAt(s: State, b: number, h: number, i: number, j: number): number {
  const mask = s.options.attnMask;
  if (!mask) return 0;
  const value = mask.data[maskIndex(s, b, h, i, j)];
  if (!(mask.data instanceof Uint8Array)) return value;
  return value ? 0 : -Infinity;
}

function maskIndex(s: State, b: number, h: number, i: number, j: number): number {
  const dims = (s.options.attnMask as ReferenceTensor).dims;
  const full = [b, h, i, j].slice(4 - dims.length);
  return dims.reduce((at, size, axis) => at * size + (size === 1 ? 0 : full[axis]), 0);
}

function isVisible(s: State, b: number, i: number, j: number): boolean {
  const { options } = s;
  const Q = i + (options.queryOffset ?? 0) + causalShift(s, b);
  const K = j + (options.keyOffset ?? 0);
  const [left, right] = options.windowSize ?? [-1, -1];
  const length = options.kvLengths ? options.kvLengths[b] : s.keyLength;
  if (options.isCausal && K > Q) return false;
  if (left >= 0 && K < Q - left) return false;
  if (right >= 0 && K > Q + right) return false;
  return j < length;
}

function causalShift(s: State, b: number): number {
  const shift = s.options.causalOffset ?? 0;
  if (shift === 'bottom-right') return s.keyLength - s.queryLength;
  return typeof shift === 'number' ? shift : shift[b];
}

function softmaxRow(s: State, row: number): void {
  const first = row * s.keyLength;
  const { exp } = s.arithmetic;
  const kept = (j: number) => s.placement !== 'scores' || s.keep?.[first + j] === 1;
  const used = Array.from({ length: s.keyLength }, (_, j) =>
    kept(j) ? s.scores.values[first + j] : -Infinity,
  );
  // Math.max is NaN as soon as one score is; +inf gives inf - inf = NaN below.
  const max = Math.max(...used);
  s.lse.values[row] = -Infinity;
  if (max === -Infinity) return;
  const powers = used.map((score) => Math.exp(score - max));
  const sum = powers.reduce((a, x) => a + x, 0);
  // Relative error of each power: its score's absolute error and the exp itself.
  const relative = used.map((score, j) =>
    score === -Infinity
      ? 0
      : s.scores.error[first + j] + ARGUMENT * (Math.abs(score) + Math.abs(max)) + exp,
  );
  const mean = powers.reduce((a, x, j) => a + (x / sum) * relative[j], 0);
  const lse = max + Math.log(sum);
  const lseError =
    mean +
    sumRoundings(s.keyLength) +
    (exp * s.keyLength) / KEYS_A_RESCALE +
    ARGUMENT * (Math.abs(max) + Math.abs(lse) + 1);
  s.lse.values[row] = Number.isNaN(sum) ? Number.NaN : lse;
  s.lse.error[row] = stored(lse, lseError, 'float32');
  for (let j = 0; j < s.keyLength; j++) {
    const at = first + j;
    // An excluded key has weight 0, without an error, also where another one makes the row NaN.
    if (used[j] === -Infinity) continue;
    const weight = powers[j] / sum;
    const multiplier = s.placement === 'weights' ? s.keepScale * (s.keep as Uint8Array)[at] : 1;
    const off = relative[j] + lseError;
    // A weight is never more than 1, however far off its score and lse are.
    const error =
      off < 1 ? weight * Math.expm1(off) * SLACK : Math.min(Math.exp(used[j] - lse + off), 1);
    s.weights.values[at] = weight;
    s.weights.error[at] = stored(weight, error, 'float32');
    s.dropped.values[at] = multiplier === 0 ? 0 : weight * multiplier;
    s.dropped.error[at] = multiplier === 0 ? 0 : multiplier * (error + FLOOR + 3 * U * weight);
  }
}

function outputRow(s: State, row: number): void {
  const { kvRow } = locate(s, row);
  for (let d = 0; d < s.valueDim; d++) {
    const at = row * s.valueDim + d;
    let sum = 0;
    let error = 0;
    let size = 0;
    const roundings = sumRoundings(s.keyLength) + s.arithmetic.product;
    for (let j = 0; j < s.keyLength; j++) {
      const weight = s.dropped.values[row * s.keyLength + j];
      if (s.dropped.error[row * s.keyLength + j] === 0) continue;
      const value = s.value[(kvRow + j) * s.valueDim + d];
      // Whether float32 has a 0 there decides what an infinity comes to.
      if (weight < FLOOR && !Number.isFinite(value)) s.beyond[row] = 1;
      sum += weight * value;
      error += Math.abs(value) * s.dropped.error[row * s.keyLength + j];
      error += Math.abs(value) * weight * roundings + FLUSH;
      size += Math.abs(value);
    }
    const multiplier = channelMultiplier(s, at);
    // Of a row that is not a number and has lost all its keys, it is left open which one decides.
    if (size === 0 && Number.isNaN(s.lse.values[row])) s.beyond[row] = 1;
    if (isBeyond(size * Math.max(1, s.keepScale))) s.beyond[row] = 1;
    s.output.values[at] = multiplier === 0 ? 0 : sum * multiplier;
    s.output.error[at] = stored(
      sum * multiplier,
      (error + 2 * U * Math.abs(sum)) * multiplier,
      s.storage,
    );
  }
}

/** What dropout multiplies a channel of the context by. */
function channelMultiplier(s: State, at: number): number {
  return s.placement === 'context' ? s.keepScale * (s.keep as Uint8Array)[at] : 1;
}

// ---- Gradients: the chain rule through the explicit matrices ----

/** A sum of products with its budget: `n` roundings of the whole, plus the error of each term. */
class Accumulator {
  readonly sum: Float64Array;
  readonly size: Float64Array;
  readonly error: Float64Array;
  /** What operands below the normal range may have lost. */
  readonly flushed: Float64Array;
  readonly beyond: Uint8Array;
  readonly touched: Uint8Array;

  constructor(length: number) {
    this.sum = new Float64Array(length);
    this.size = new Float64Array(length);
    this.error = new Float64Array(length);
    this.flushed = new Float64Array(length);
    this.beyond = new Uint8Array(length);
    this.touched = new Uint8Array(length);
  }

  add(at: number, factor: number, factorError: number, value: number): void {
    this.sum[at] = this.sum[at] + factor * value;
    this.size[at] = this.size[at] + Math.abs(factor * value);
    this.error[at] = this.error[at] + factorError * Math.abs(value);
    this.flushed[at] = this.flushed[at] + FLUSH * (1 + Math.abs(factor) + Math.abs(value));
    if (isBeyond(Math.abs(value))) this.beyond[at] = 1;
  }

  finish(terms: number, product: number, factor: number, storage: Storage): Bounded {
    const values = this.sum.map((x) => factor * x);
    const error = values.map((x, at) => {
      // Before the sum or after it: it is open where a kernel multiplies by the factor.
      const largest = Math.max(1, Math.abs(factor));
      const size = (this.size[at] + this.error[at]) * largest;
      if (this.beyond[at] || isBeyond(size)) return Infinity;
      const raw = this.error[at] + (sumRoundings(terms) + product) * this.size[at];
      return stored(x, Math.abs(factor) * raw + largest * this.flushed[at], storage);
    });
    return { values, error, touched: this.touched };
  }
}

interface GradientSums {
  query: Accumulator;
  key: Accumulator;
  value: Accumulator;
  mask: Accumulator | null;
}

function gradients(s: State, gradOutput: ArrayLike<number>): ReferenceGradients {
  const mask = s.options.attnMask;
  const biasLength = mask && !(mask.data instanceof Uint8Array) ? mask.data.length : 0;
  const sums: GradientSums = {
    query: new Accumulator(s.query.length),
    key: new Accumulator(s.key.length),
    value: new Accumulator(s.value.length),
    mask: biasLength ? new Accumulator(biasLength) : null,
  };
  const rows = s.batch * s.queryHeads * s.queryLength;
  const isOdd = [s.query, s.key, s.value, gradOutput].some((data) =>
    Array.prototype.some.call(data, (x) => !Number.isFinite(x)),
  );
  for (let row = 0; row < rows; row++) {
    if (isOdd && isTouched(s, row, gradOutput)) markRow(s, row, sums, 'touched');
    if (s.beyond[row]) markRow(s, row, sums, 'beyond');
    else if (s.lse.values[row] !== -Infinity) gradientRow(s, row, gradOutput, sums);
  }
  const { product } = s.arithmetic;
  const readers = (s.queryHeads / s.kvHeads) * s.queryLength;
  const summed = biasLength ? (rows * s.keyLength) / biasLength : 1;
  return {
    gradQuery: sums.query.finish(s.keyLength, product, s.scale, s.storage),
    gradKey: sums.key.finish(readers, product, s.scale, s.storage),
    gradValue: sums.value.finish(readers, product, 1, s.storage),
    gradAttnMask: sums.mask?.finish(summed, product, 1, s.maskStorage) ?? null,
  };
}

/** Marks the gradients that a row takes part in: its own, and those of all keys that it sees. */
function markRow(s: State, row: number, sums: GradientSums, mark: 'beyond' | 'touched'): void {
  const { b, h, i, kvRow } = locate(s, row);
  sums.query[mark].fill(1, row * s.headDim, (row + 1) * s.headDim);
  for (let j = 0; j < s.keyLength; j++) {
    if (!isVisible(s, b, i, j) || maskAt(s, b, h, i, j) === -Infinity) continue;
    sums.key[mark].fill(1, (kvRow + j) * s.headDim, (kvRow + j + 1) * s.headDim);
    sums.value[mark].fill(1, (kvRow + j) * s.valueDim, (kvRow + j + 1) * s.valueDim);
    if (sums.mask) sums.mask[mark][maskIndex(s, b, h, i, j)] = 1;
  }
}

/** Whether a row meets a NaN or an infinity: its own, or one of a key or value that it sees. */
function isTouched(s: State, row: number, gradOutput: ArrayLike<number>): boolean {
  const { b, h, i, kvRow } = locate(s, row);
  const isOdd = (data: ArrayLike<number>, at: number, width: number) => {
    for (let d = at * width; d < (at + 1) * width; d++) if (!Number.isFinite(data[d])) return true;
    return false;
  };
  if (isOdd(s.query, row, s.headDim) || isOdd(gradOutput, row, s.valueDim)) return true;
  for (let j = 0; j < s.keyLength; j++) {
    if (!isVisible(s, b, i, j) || maskAt(s, b, h, i, j) === -Infinity) continue;
    if (isOdd(s.key, kvRow + j, s.headDim) || isOdd(s.value, kvRow + j, s.valueDim)) return true;
  }
  return false;
}

function gradientRow(
  s: State,
  row: number,
  gradOutput: ArrayLike<number>,
  sums: GradientSums,
): void {
  const { b, h, i, kvRow } = locate(s, row);
  const { grad, gradError, size } = weightGradients(s, row, gradOutput, sums);
  // Delta = sum of P * dP: the softmax's normalisation. Kernels form it as dO . O, whose error is
  // below.
  let delta = 0;
  let deltaError = 0;
  let deltaSize = 0;
  let isOverflown = false; // the output, which kernels form Delta from
  for (let j = 0; j < s.keyLength; j++) {
    const weight = s.weights.values[row * s.keyLength + j];
    if (weight !== 0) delta += weight * grad[j];
  }
  for (let d = 0; d < s.valueDim; d++) {
    const at = row * s.valueDim + d;
    const roundings = sumRoundings(s.valueDim) * Math.abs(s.output.values[at]);
    deltaError += Math.abs(gradOutput[at]) * (s.output.error[at] + roundings);
    deltaError += FLUSH * (1 + Math.abs(gradOutput[at]) + Math.abs(s.output.values[at]));
    deltaSize += Math.abs(gradOutput[at]) * (Math.abs(s.output.values[at]) + s.output.error[at]);
    isOverflown ||= s.output.error[at] === Infinity;
  }
  if (isOverflown || isBeyond(deltaSize) || size.some(isBeyond)) {
    markRow(s, row, sums, 'beyond');
    return;
  }
  for (let j = 0; j < s.keyLength; j++) {
    const at = row * s.keyLength + j;
    const weight = s.weights.values[at];
    if (s.weights.error[at] === 0) continue;
    const dP = grad[j] as number;
    const difference = dP - delta;
    const differenceError = gradError[j] + deltaError + ARGUMENT * (Math.abs(dP) + Math.abs(delta));
    const dScore = weight * difference;
    const dScoreError =
      s.weights.error[at] * (Math.abs(difference) + differenceError) +
      weight * differenceError * SLACK +
      FLUSH;
    if (sums.mask) sums.mask.add(maskIndex(s, b, h, i, j), dScore, dScoreError, 1);
    const slope = s.slope.values[at];
    const dRaw = dScore * slope;
    const dRawError = dScoreError * slope + (Math.abs(dScore) + dScoreError) * s.slope.error[at];
    for (let d = 0; d < s.headDim; d++) {
      const queryAt = row * s.headDim + d;
      const keyAt = (kvRow + j) * s.headDim + d;
      sums.query.add(queryAt, dRaw, dRawError, s.key[keyAt]);
      sums.key.add(keyAt, dRaw, dRawError, s.query[queryAt]);
    }
  }
}

/** dP of one row, and the row's share of the gradient of value. */
function weightGradients(s: State, row: number, gradOutput: ArrayLike<number>, sums: GradientSums) {
  const { kvRow } = locate(s, row);
  const grad = new Array<number>(s.keyLength).fill(0);
  const gradError = new Array<number>(s.keyLength).fill(0);
  const sizes = new Array<number>(s.keyLength).fill(0);
  for (let j = 0; j < s.keyLength; j++) {
    const at = row * s.keyLength + j;
    const dropped = s.dropped.values[at];
    if (s.dropped.error[at] === 0) continue;
    const multiplier = s.placement === 'weights' ? s.keepScale : 1;
    let size = 0;
    let operands = 0;
    for (let d = 0; d < s.valueDim; d++) {
      const channel = channelMultiplier(s, row * s.valueDim + d);
      if (channel === 0) continue;
      const upstream = channel * gradOutput[row * s.valueDim + d];
      const valueAt = (kvRow + j) * s.valueDim + d;
      const product = multiplier * upstream * s.value[valueAt];
      grad[j] = grad[j] + product;
      size += Math.abs(product);
      operands += Math.abs(upstream) + Math.abs(s.value[valueAt]) + 1;
      sums.value.add(valueAt, dropped, s.dropped.error[at], upstream);
    }
    gradError[j] =
      (sumRoundings(s.valueDim) + s.arithmetic.product) * size + FLUSH * multiplier * operands;
    sizes[j] = size;
  }
  return { grad, gradError, size: sizes };
}
