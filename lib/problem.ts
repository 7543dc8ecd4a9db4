// Every default, shape rule and user-facing error of an attention call: options and tensors in, a
// fully resolved Call out. Backends see its Problem and arrays, and never the user's objects.

import {
  checkBoolean,
  checkInteger,
  checkNumber,
  checkSignal,
  checkUint64,
  checkWord,
  checkWordList,
  describe,
  highWord,
  lowWord,
  type NoOptions,
  readOptions,
} from './arguments';
import { type Backend, selectForCall } from './backends';
import { deviceName, HOST } from './cuda';
import {
  invalidType,
  invalidValue,
  shapeMismatch,
  typeError,
  unsupported,
  valueError,
  wrongLocation,
} from './errors';
import { checkGenerator, draw, type Generator } from './generator';
import { allocateInt32, BOOL, FLOAT32, isOnDevice } from './memory';
import type { FloatArray, Problem, Sequences } from './problem-header';
import {
  checkLength,
  copyInt32Array,
  elementCount,
  formatShape,
  isTensor,
  readHostTensor,
  readTensor,
  type Tensor,
  type TensorLike,
  type TensorView,
  TYPE_NAMES,
} from './tensor';

export type {
  BackwardTensors,
  FloatArray,
  ForwardOutputs,
  Inputs,
  Problem,
  Sequences,
} from './problem-header';
export { encodeProblem, PROBLEM_FIELDS } from './problem-header';

/**
 * The order of axes: `'bhsd'` is [batch, heads, length, headDim] (PyTorch's), `'bshd'` is
 * [batch, length, heads, headDim] (flash-attention's).
 *
 * @example
 * ```js
 * import { scaledDotProductAttentionSync } from 'node-sdpa';
 * import assert from 'node:assert';
 * const tensor = { data: new Float32Array(24), dims: [1, 3, 2, 4] }; // 3 positions of 2 heads
 * const output = scaledDotProductAttentionSync(tensor, tensor, tensor, { layout: 'bshd' });
 * assert.deepStrictEqual(output.dims, [1, 3, 2, 4]);
 * ```
 */
export type Layout = 'bhsd' | 'bshd';

/**
 * What dropout acts on: the softmax weights, the context (weights x value, the output), or the
 * scores before the softmax (DropKey, arXiv 2208.02646).
 *
 * | placement | forward | property |
 * | --- | --- | --- |
 * | `'weights'` | `O = keepScale * sum_j keep_j P_j V_j` | unbiased; channels share the noise |
 * | `'context'` | `O_d = keepScale * keep_d * sum_j P_j V_jd` | unbiased; channels drop alone |
 * | `'scores'` | dropped scores become -inf, no rescale | rows sum to 1; biased |
 *
 * @example
 * ```js
 * import { attentionForwardSync } from 'node-sdpa';
 * import assert from 'node:assert';
 * const tensor = { data: new Float32Array(32).fill(1), dims: [1, 1, 8, 4] };
 * const { weights } = attentionForwardSync(tensor, tensor, tensor, {
 *   dropoutP: 0.5, dropoutPlacement: 'scores', training: true, seed: 1, outputs: ['weights'],
 * });
 * const sum = weights.data.subarray(0, 8).reduce((total, weight) => total + weight);
 * assert.ok(Math.abs(sum - 1) < 1e-6); // what is left of a row still sums to 1
 * ```
 */
export type DropoutPlacement = 'weights' | 'context' | 'scores';

/**
 * An axis along which one dropout decision is shared (as Tensor2Tensor and T5 do).
 *
 * @example
 * ```js
 * import { dropoutMask } from 'node-sdpa';
 * import assert from 'node:assert';
 * const mask = dropoutMask([1, 1, 2, 64], { p: 0.5, seed: 1, broadcast: ['query'] });
 * assert.deepStrictEqual(mask.subarray(0, 64), mask.subarray(64)); // the same for both queries
 * ```
 */
export type DropoutBroadcastAxis = 'batch' | 'head' | 'query';

/**
 * How exact the matrix products are, as `torch.set_float32_matmul_precision` has it: float32,
 * TF32-class or bfloat16-class. A backend may always be more exact than asked: only `cpu:amx`
 * makes a difference, by splitting float32 into three, two or one bfloat16 terms.
 *
 * Relative L2 errors against float64, measured over 500,000 rows of unit normals at head dim 64 and
 * lengths up to 4096, output and gradients: `'highest'` 6e-7 and 7e-7 on `cpu:amx`, 1.2e-6 and
 * 1.3e-6 on the others; `'high'` 2.4e-5 and 3.2e-5; `'medium'` 3.5e-3 and 4.3e-3
 * (bench/results/precision.md has more).
 *
 * @example
 * ```js
 * import { scaledDotProductAttentionSync } from 'node-sdpa';
 * import assert from 'node:assert';
 * const tensor = { data: Float32Array.of(1, 2), dims: [1, 1, 1, 2] };
 * const output = scaledDotProductAttentionSync(tensor, tensor, tensor, { precision: 'high' });
 * assert.deepStrictEqual([...output.data], [1, 2]);
 * ```
 */
export type Precision = 'highest' | 'high' | 'medium';

/**
 * What computes. `'auto'`: the best that runs here, with JavaScript as the last resort (or what
 * the variable SDPA_BACKEND names); a GPU where the tensors are on one, or where arrays in host memory
 * are worth the way there; `'cuda'`: the GPU that the tensors are on, or the first; `'cuda:1'` and so
 * on: a GPU by its number; `'cpu'`: the best native CPU backend (or the one that
 * SDPA_CPU_ISA names); the others are taken at their word, and are an error where unavailable.
 *
 * @example
 * ```js
 * import { attentionForwardSync } from 'node-sdpa';
 * import assert from 'node:assert';
 * const tensor = { data: Float32Array.of(1, 2), dims: [1, 1, 1, 2] };
 * const { backend } = attentionForwardSync(tensor, tensor, tensor, { backend: 'js' });
 * assert.strictEqual(backend, 'js');
 * ```
 */
export type BackendName =
  | 'auto'
  | 'cpu'
  | 'cuda'
  | `cuda:${number}`
  | 'js'
  | 'cpu:amx'
  | 'cpu:avx512'
  | 'cpu:avx2'
  | 'cpu:neon'
  | 'cpu:portable';

/**
 * What `attentionForward` can return besides the output: float32 tensors [B, Hq, Lq, Lk]
 * (`lse`: [B, Hq, Lq]) in either layout.
 *
 * - `'lse'`: the logarithm of the sum of the exponentials of a row's scores; always returned
 * - `'scores'`: before softmax and dropout, after scale, softcap, bias and exclusions (-inf)
 * - `'weights'`: the softmax; under `'scores'` dropout, that of the scores that are left
 * - `'droppedWeights'`: what multiplies value: after dropout and rescale under `'weights'`
 *   dropout, otherwise equal to the weights
 *
 * @example
 * ```js
 * import { attentionForwardSync } from 'node-sdpa';
 * import assert from 'node:assert';
 * const tensor = { data: Float32Array.of(1, 2, 3, 4), dims: [1, 1, 2, 2] };
 * const result = attentionForwardSync(tensor, tensor, tensor, {
 *   isCausal: true, outputs: ['scores', 'weights'],
 * });
 * assert.strictEqual(result.scores.data[1], -Infinity); // the first query does not see key 1
 * assert.deepStrictEqual([...result.weights.data.subarray(0, 2)], [1, 0]);
 * ```
 */
export type AttentionOutputName = 'lse' | 'scores' | 'weights' | 'droppedWeights';

/**
 * Where the sequences of a packed batch begin and end: B + 1 running totals each for queries and
 * keys, from 0 to the total, as flash-attention's `cu_seqlens`. A sequence may have no queries, and
 * no keys.
 *
 * @example
 * ```js
 * import { scaledDotProductAttentionSync } from 'node-sdpa';
 * import assert from 'node:assert';
 * const packed = { data: Float32Array.of(1, 2, 3, 4, 5), dims: [5, 1, 1] };
 * const starts = Int32Array.of(0, 2, 5); // one sequence of 2 tokens, one of 3
 * const output = scaledDotProductAttentionSync(packed, packed, packed, {
 *   cuSeqlens: { query: starts, key: starts }, isCausal: true,
 * });
 * assert.deepStrictEqual(output.dims, [5, 1, 1]);
 * assert.deepStrictEqual([output.data[0], output.data[2]], [1, 3]); // the first of each sequence
 * ```
 */
export interface CuSeqlens {
  /** `[B + 1]`: sequence b has the queries query[b] to query[b + 1] of the packed ones */
  readonly query: Int32Array;
  /** `[B + 1]`: the same for keys and values */
  readonly key: Int32Array;
}

/**
 * The options of an attention call; every one may be left out. PyTorch's names in camelCase.
 *
 * B, Hq, Hkv, Lq, Lk, D and Dv are batch, query heads, key/value heads, query and key length,
 * head dim and value dim. Query i sits at `Q = i + queryOffset + causalOffset`, key j at
 * `K = j + keyOffset`, and i sees j if and only if
 * (not causal or `K <= Q`) and (left < 0 or `K >= Q - left`) and (right < 0 or `K <= Q + right`)
 * and `j < kvLengths[b]` and the mask allows it. Excluded keys contribute nothing, whatever they
 * hold; a query without keys gives zeros.
 *
 * @example
 * ```js
 * import { scaledDotProductAttentionSync } from 'node-sdpa';
 * import assert from 'node:assert';
 * const query = { data: Float32Array.of(1, 0), dims: [1, 1, 1, 2] };
 * const key = { data: Float32Array.of(1, 0, 0, 1), dims: [1, 1, 2, 2] };
 * const options = { isCausal: true, causalOffset: 'bottom-right', scale: 2 };
 * const output = scaledDotProductAttentionSync(query, key, key, options);
 * const weight = 1 / (1 + Math.exp(-2)); // softmax of the scores 2 and 0
 * assert.ok(Math.abs(output.data[0] - weight) < 1e-6);
 * assert.throws(() => scaledDotProductAttentionSync(query, key, key, { isCasual: true }), {
 *   message: 'options: unknown option "isCasual"; did you mean "isCausal"?',
 * });
 * ```
 */
export interface AttentionOptions {
  /**
   * Which keys take part (bool: Uint8Array, 1 takes part), or a bias added to the scores
   * (float32, or the query's type; -inf excludes a key). Its shape broadcasts from the right to
   * [B, Hq, Lq, Lk], in either layout. A bias has a gradient.
   */
  readonly attnMask?: TensorLike;
  /** No query sees a later key. Default: false */
  readonly isCausal?: boolean;
  /**
   * Moves the diagonal of the causal rule and of the window, by as many keys; one number, or one
   * for each batch entry. `'bottom-right'` is Lk - Lq: the last query sees the last key.
   * Default: 0, PyTorch's top-left
   */
  readonly causalOffset?: number | readonly number[] | 'bottom-right';
  /** How many keys before and behind the diagonal are seen; -1: all. Default: [-1, -1] */
  readonly windowSize?: readonly [left: number, right: number];
  /** `[B]`: how many leading keys of a batch entry there are, 0 to Lk. Default: Lk each */
  readonly kvLengths?: Int32Array;
  /** Multiplies query . key. Default: 1 / sqrt(D) */
  readonly scale?: number;
  /** c > 0 squeezes scores to -c..c by `c * tanh(s / c)`, before the bias. Default: 0, off */
  readonly softcap?: number;
  /** Lets Hkv be a divisor of Hq: query head h uses head floor(h / (Hq / Hkv)). Default: false */
  readonly enableGqa?: boolean;
  /** Probability of a drop, 0 to 1; takes effect in steps of 1/65536. Default: 0 */
  readonly dropoutP?: number;
  /** What is dropped. Default: `'weights'` */
  readonly dropoutPlacement?: DropoutPlacement;
  /** Axes along which a decision is shared. Default: none */
  readonly dropoutBroadcast?: readonly DropoutBroadcastAxis[];
  /** Must be stated where dropoutP > 0; false turns dropout off. No default */
  readonly training?: boolean;
  /** Start of the random numbers, 64 bits. Default: the generator's */
  readonly seed?: number | bigint;
  /** Which of a seed's masks, 64 bits: a new one for each step and layer. Default with a seed: 0 */
  readonly offset?: number | bigint;
  /** Gives seed and offset. Default: the default generator, see `manualSeed` */
  readonly generator?: Generator;
  /**
   * Explicit dropout decisions in place of random ones: bool, 1 keeps; [B, Hq, Lq, Lk], or
   * [B, Hq, Lq, Dv] for `'context'`, in either layout. What is kept is multiplied by 1 / (1 - p).
   */
  readonly keepMask?: TensorLike;
  /**
   * N dropout samples in one call (Monte-Carlo dropout, arXiv 1506.02142): the output gains a
   * leading axis of N, and sample s is, bit for bit, what the call with `offset + s` (modulo 2^64)
   * gives. A generator goes on N offsets. For `'weights'` and `'context'` dropout scores and softmax
   * are computed once; `'scores'` dropout costs as much as N calls. Without dropout all samples are
   * equal. Backward and the [Lq, Lk] outputs are for calls without samples. Default: none, and no
   * such axis
   *
   * @example
   * ```js
   * import { scaledDotProductAttentionSync } from 'node-sdpa';
   * import assert from 'node:assert';
   * const tensor = { data: Float32Array.of(1, 2, 3, 4, 5, 6, 7, 8), dims: [1, 1, 2, 4] };
   * const dropout = { dropoutP: 0.5, training: true, seed: 1 };
   * const run = (more) => scaledDotProductAttentionSync(tensor, tensor, tensor, more);
   * const output = run({ ...dropout, offset: 7, samples: 3 });
   * assert.deepStrictEqual(output.dims, [3, 1, 1, 2, 4]);
   * assert.deepStrictEqual(output.data.slice(16), run({ ...dropout, offset: 9 }).data);
   * ```
   */
  readonly samples?: number;
  /** Mean and variance in place of the samples' outputs: see {@link MomentsOptions} */
  readonly moments?: false;
  /** Position of this shard's first batch entry in the whole, for dropout. Default: 0 */
  readonly batchOffset?: number;
  /** Position of this shard's first query head in the whole, for dropout. Default: 0 */
  readonly headOffset?: number;
  /** Position of this shard's first query in the whole, for dropout and causal rule. Default: 0 */
  readonly queryOffset?: number;
  /** Position of this shard's first key in the whole, for dropout and causal rule. Default: 0 */
  readonly keyOffset?: number;
  /** How exact the matrix products are. Default: `'highest'` */
  readonly precision?: Precision;
  /** Order of the axes of query, key, value, output and gradients. Default: `'bhsd'` */
  readonly layout?: Layout;
  /**
   * Makes this a packed batch of sequences of different lengths: query [totalQ, Hq, D], key
   * [totalK, Hkv, D], value [totalK, Hkv, Dv], output [totalQ, Hq, Dv], lse [Hq, totalQ]. Positions
   * restart in each sequence, `'bottom-right'` is each one's own, and dropout takes the sequence's
   * number for its batch entry. A sequence has the very bits that it has alone. Not together with
   * attnMask, keepMask, samples, layout `'bhsd'`, or outputs other than lse. Default: none
   */
  readonly cuSeqlens?: CuSeqlens;
  /** What computes. Default: `'auto'` */
  readonly backend?: BackendName;
  /**
   * Takes the output in place of a new tensor: of the query's type and the output's shape, not
   * overlapping any input. It is untouched where the call fails, unless memory runs out half-way
   * through `samples`.
   */
  readonly out?: Tensor;
  /** Stops an asynchronous call: it rejects with an AbortError, `ERR_SDPA_ABORTED` */
  readonly signal?: AbortSignal;
  /** What `attentionForward` returns besides the output. Default: only lse */
  readonly outputs?: readonly AttentionOutputName[];
}

/**
 * The options of `attentionForward` where it gives the mean and the variance of N dropout samples
 * in place of N outputs. They need no memory for these, and every element is summed in float64.
 *
 * @example
 * ```js
 * import { attentionForwardSync } from 'node-sdpa';
 * import assert from 'node:assert';
 * const tensor = { data: Float32Array.of(1, 2, 3, 4, 5, 6, 7, 8), dims: [1, 1, 2, 4] };
 * const dropout = { dropoutP: 0.5, training: true, seed: 1, samples: 100 };
 * const { mean, variance } = attentionForwardSync(tensor, tensor, tensor, {
 *   ...dropout, moments: true,
 * });
 * const { data } = attentionForwardSync(tensor, tensor, tensor, dropout).output;
 * const first = Array.from({ length: 100 }, (_, s) => data[8 * s]);
 * const average = first.reduce((sum, x) => sum + x) / 100;
 * const spread = first.reduce((sum, x) => sum + (x - average) ** 2, 0) / 99;
 * assert.ok(Math.abs(mean.data[0] - average) < 1e-6 * average);
 * assert.ok(Math.abs(variance.data[0] - spread) < 1e-6 * spread);
 * ```
 */
export interface MomentsOptions extends Omit<AttentionOptions, 'moments' | 'out'> {
  /** At least 2: one sample has no variance */
  readonly samples: number;
  /** Returns mean and variance in place of the samples' outputs */
  readonly moments: true;
}

/** A call with every default resolved and every argument checked. */
export interface Call {
  readonly problem: Problem;
  readonly backend: Backend;
  /** What computes in its place where it fails: for a GPU that `'auto'` has chosen */
  readonly fallback: Backend | null;
  /** Where all tensors are: HOST, or the number of a GPU */
  readonly device: number;
  readonly query: TensorView;
  readonly key: TensorView;
  readonly value: TensorView;
  readonly mask: TensorView | null;
  readonly keepMask: TensorView | null;
  readonly causalOffsets: Int32Array | null;
  readonly kvLengths: Int32Array | null;
  readonly sequences: Sequences | null;
  readonly keyBlocks: Int32Array | null;
  /** Of one output, and of all where there are samples */
  readonly sampleDims: readonly number[];
  readonly outputDims: readonly number[];
  readonly lseDims: readonly number[];
  /** The caller's tensor for the output, and its elements */
  readonly out: Tensor | undefined;
  readonly outData: FloatArray | null;
  readonly signal: AbortSignal | undefined;
  /** Bits WANTS_SCORES, WANTS_WEIGHTS, WANTS_DROPPED_WEIGHTS, WANTS_MOMENTS */
  readonly outputs: number;
}

export const LAYOUTS: readonly Layout[] = ['bhsd', 'bshd'];
export const PLACEMENTS: readonly DropoutPlacement[] = ['weights', 'context', 'scores'];
export const BROADCAST_AXES: readonly DropoutBroadcastAxis[] = ['batch', 'head', 'query'];
const PRECISIONS: readonly Precision[] = ['highest', 'high', 'medium'];
const OUTPUT_NAMES: readonly AttentionOutputName[] = ['lse', 'scores', 'weights', 'droppedWeights'];
export const WANTS_SCORES = 2;
export const WANTS_WEIGHTS = 4;
export const WANTS_DROPPED_WEIGHTS = 8;
export const WANTS_MOMENTS = 16;

const BSHD = 1;
const CONTEXT = 1;
const SCORES = 2;
const MASK_NONE = 0;
const MASK_BOOL = 1;
const LARGEST_INT32 = 2 ** 31 - 1;
const SMALLEST_INT32 = -(2 ** 31);
const LARGEST_FLOAT32 = (2 - 2 ** -23) * 2 ** 127;
export const LARGEST_HEAD_DIM = 512;

/** The options as they came: read once, not yet checked. */
type Given = { readonly [Name in keyof AttentionOptions]-?: unknown };

/** A Problem while it is being resolved. */
export type Draft = { -readonly [Field in keyof Problem]: Problem[Field] };

const NO_OPTIONS: NoOptions<AttentionOptions> = {
  attnMask: undefined,
  isCausal: undefined,
  causalOffset: undefined,
  windowSize: undefined,
  kvLengths: undefined,
  scale: undefined,
  softcap: undefined,
  enableGqa: undefined,
  dropoutP: undefined,
  dropoutPlacement: undefined,
  dropoutBroadcast: undefined,
  training: undefined,
  seed: undefined,
  offset: undefined,
  generator: undefined,
  keepMask: undefined,
  samples: undefined,
  moments: undefined,
  batchOffset: undefined,
  headOffset: undefined,
  queryOffset: undefined,
  keyOffset: undefined,
  precision: undefined,
  layout: undefined,
  cuSeqlens: undefined,
  backend: undefined,
  out: undefined,
  signal: undefined,
  outputs: undefined,
};

/**
 * Checks the arguments of an attention call and resolves every default. Lengths come after all
 * code of the caller's (getters, proxies) has run, and the draw from a generator comes last.
 *
 * @param allowsOutputs - whether the caller of this function can return more than the output
 */
export function resolveCall(
  queryLike: unknown,
  keyLike: unknown,
  valueLike: unknown,
  options: unknown,
  allowsOutputs: boolean,
): Call {
  const given = options === undefined ? NO_OPTIONS : readOptions<Given>(options, NO_OPTIONS);
  const query = readTensor('query', queryLike);
  const key = readTensor('key', keyLike);
  const value = readTensor('value', valueLike);
  const mask = given.attnMask === undefined ? null : readTensor('attnMask', given.attnMask);
  const keepMask = given.keepMask === undefined ? null : readTensor('keepMask', given.keepMask);
  const inputs = [query, key, value, mask, keepMask];

  const problem = newProblem();
  problem.layout = checkWord('layout', given.layout, LAYOUTS);
  problem.precision = checkWord('precision', given.precision, PRECISIONS);
  const device = commonDevice(inputs);
  resolveTypes(problem, query, key, value);
  const enableGqa = checkBoolean('enableGqa', given.enableGqa, false);
  const isPacked = given.cuSeqlens !== undefined;
  if (isPacked) resolvePackedShapes(problem, query, key, value, enableGqa);
  else resolveShapes(problem, query, key, value, enableGqa);
  const sequences = isPacked ? resolveSequences(problem, given, query.dims[0], key.dims[0]) : null;
  if (mask !== null) resolveMask(problem, mask);
  resolveScores(problem, given);
  const causalOffsets = resolveVisibility(problem, given, sequences);
  const kvLengths = resolveKvLengths(problem, given.kvLengths, sequences);
  resolveShard(problem, given);
  const isDropping = resolveDropout(problem, given, keepMask);
  const outputs =
    resolveOutputs(problem, given.outputs, allowsOutputs) |
    resolveSamples(problem, given, allowsOutputs);
  if (isPacked && outputs > 1) {
    throw unsupported('outputs', 'none but "lse" together with cuSeqlens', describe(given.outputs));
  }
  const signal = checkSignal('signal', given.signal);
  const chosen = selectForCall(given.backend, problem, device, true);

  checkLength('query', query);
  checkLength('key', key);
  checkLength('value', value);
  if (mask !== null) checkLength('attnMask', mask);
  if (keepMask !== null) checkLength('keepMask', keepMask);
  const sampleDims = sampleShape(problem, sequences);
  const outputDims = outputShape(problem, sampleDims);
  const { out } = given;
  const outData = out === undefined ? null : readOut(out, problem, outputDims, inputs);
  resolveSeed(problem, given, isDropping && keepMask === null);
  return {
    problem: Object.freeze(problem),
    ...chosen,
    device,
    query,
    key,
    value,
    mask,
    keepMask: isDropping ? keepMask : null,
    causalOffsets,
    kvLengths,
    sequences,
    keyBlocks: null,
    sampleDims,
    outputDims,
    lseDims: lseShape(problem, sequences),
    out: out as Tensor | undefined,
    outData,
    signal,
    outputs,
  };
}

/** The keys and values that a cache gives to a call. */
export interface CachedKeys {
  /** [blocks, Hkv, blockLength, D] and [blocks, Hkv, blockLength, Dv] */
  readonly key: TensorView;
  readonly value: TensorView;
  /** [B, n]: the blocks of each batch entry */
  readonly blocks: Int32Array;
  /** [B] */
  readonly lengths: Int32Array;
}

/**
 * As {@link resolveCall}, for queries at the end of what a cache holds: causal by default, with the
 * diagonal of `'bottom-right'`, each sequence by its own length. `gather` says what is in the cache.
 */
export function resolveCachedCall(
  queryLike: unknown,
  options: AttentionOptions,
  gather: () => CachedKeys,
): Call {
  const { isCausal = true, causalOffset = 'bottom-right' } = options;
  const given: Given = { ...NO_OPTIONS, ...options, isCausal, causalOffset };
  const query = readHostTensor('query', queryLike);
  const problem = newProblem();
  problem.layout = checkWord('layout', given.layout, LAYOUTS);
  problem.precision = checkWord('precision', given.precision, PRECISIONS);
  const { key, value, blocks, lengths } = gather();
  resolveCachedShapes(problem, query, key, value, lengths);
  resolveScores(problem, given);
  const causalOffsets = resolveVisibility(problem, given, null);
  resolveShard(problem, given);
  const isDropping = resolveDropout(problem, given, null);
  const signal = checkSignal('signal', given.signal);
  const chosen = selectForCall(given.backend, problem, HOST, false);
  checkLength('query', query);
  const sampleDims = sampleShape(problem, null);
  const outputDims = outputShape(problem, sampleDims);
  const { out } = given;
  const outData = out === undefined ? null : readOut(out, problem, outputDims, [query]);
  resolveSeed(problem, given, isDropping);
  const ends =
    given.causalOffset === 'bottom-right'
      ? lengths.map((length) => length - problem.queryLength)
      : causalOffsets;
  return {
    problem: Object.freeze(problem),
    ...chosen,
    device: HOST,
    query,
    key,
    value,
    mask: null,
    keepMask: null,
    causalOffsets: ends,
    kvLengths: lengths,
    sequences: null,
    keyBlocks: blocks,
    sampleDims,
    outputDims,
    lseDims: lseShape(problem, null),
    out: out as Tensor | undefined,
    outData,
    signal,
    outputs: 0,
  };
}

/** Sizes from the query's shape and what the cache has. */
function resolveCachedShapes(
  problem: Draft,
  query: TensorView,
  key: TensorView,
  value: TensorView,
  lengths: Int32Array,
): void {
  checkRank(problem, 'query', query);
  if (query.type === BOOL || (query.type !== FLOAT32 && query.type !== key.type)) {
    const own = key.type === FLOAT32 ? '' : ` or ${TYPE_NAMES[key.type]}`;
    throw invalidType('query', `float32${own} elements`, TYPE_NAMES[query.type]);
  }
  const [, kvHeads, blockLength, headDim] = key.dims;
  const [batch, first, second, width] = query.dims;
  const [heads, length] = problem.layout === BSHD ? [second, first] : [first, second];
  if (batch !== lengths.length || width !== headDim || heads % kvHeads !== 0) {
    const shape = problem.layout === BSHD ? ['Lq', 'Hq'] : ['Hq', 'Lq'];
    const expected = formatShape([lengths.length, ...shape, headDim]);
    const words = `${expected}, Hq a multiple of the cache's ${kvHeads} heads`;
    throw shapeMismatch('query', words, formatShape(query.dims));
  }
  problem.type = query.type;
  problem.keyType = key.type;
  problem.keyBlockLength = blockLength;
  problem.batch = batch;
  problem.queryHeads = heads;
  problem.kvHeads = kvHeads;
  problem.queryLength = length;
  problem.keyLength = lengths.reduce((most, n) => Math.max(most, n), 1);
  problem.headDim = headDim;
  problem.valueDim = value.dims[3];
}

/** A Problem of size 0 with every option at its default. */
export function newProblem(): Draft {
  return {
    batch: 0,
    queryHeads: 0,
    kvHeads: 0,
    queryLength: 0,
    keyLength: 0,
    headDim: 0,
    valueDim: 0,
    layout: 0,
    type: FLOAT32,
    keyType: FLOAT32,
    keyBlockLength: 0,
    maskType: MASK_NONE,
    maskBatch: 1,
    maskHeads: 1,
    maskQueries: 1,
    maskKeys: 1,
    isCausal: 0,
    causalOffset: 0,
    windowLeft: -1,
    windowRight: -1,
    scale: 0,
    softcap: 0,
    dropoutP: 0,
    dropoutPlacement: 0,
    dropoutBroadcast: 0,
    seedLo: 0,
    seedHi: 0,
    offsetLo: 0,
    offsetHi: 0,
    batchOffset: 0,
    headOffset: 0,
    queryOffset: 0,
    keyOffset: 0,
    precision: 0,
    samples: 0,
  };
}

/** All tensors of a call are at one place. */
function commonDevice(inputs: readonly (TensorView | null)[]): number {
  const { device } = inputs[0] as TensorView;
  inputs.forEach((input, i) => {
    if (input !== null) checkDevice(INPUT_NAMES[i], input, device);
  });
  return device;
}

/** Requires a tensor to be where the query is. */
export function checkDevice(argument: string, view: TensorView, device: number): void {
  if (view.device === device) return;
  const expected = `a tensor on ${deviceName(device)}, as query (to() moves one)`;
  throw wrongLocation(argument, expected, `one on ${deviceName(view.device)}`);
}

/** query, key and value share one floating-point type. */
function resolveTypes(problem: Draft, query: TensorView, key: TensorView, value: TensorView): void {
  if (query.type === BOOL) {
    throw invalidType('query', 'float32, float16 or bfloat16 elements', 'bool');
  }
  if (key.type !== query.type) throw wrongType('key', query, key);
  if (value.type !== query.type) throw wrongType('value', query, value);
  problem.type = query.type;
  problem.keyType = key.type;
}

function wrongType(argument: string, query: TensorView, other: TensorView): Error {
  const expected = `${TYPE_NAMES[query.type]} elements, as in query`;
  return invalidType(argument, expected, TYPE_NAMES[other.type]);
}

/** Sizes from the shapes, which must fit each other and their data. */
function resolveShapes(
  problem: Draft,
  query: TensorView,
  key: TensorView,
  value: TensorView,
  enableGqa: boolean,
): void {
  checkRank(problem, 'query', query);
  checkRank(problem, 'key', key);
  checkRank(problem, 'value', value);
  const heads = problem.layout === BSHD ? 2 : 1;
  const length = problem.layout === BSHD ? 1 : 2;
  const q = query.dims;
  const k = key.dims;
  const v = value.dims;
  if (k[0] !== q[0] || k[3] !== q[3] || (k[heads] !== q[heads] && !enableGqa)) {
    throw keyMismatch(problem, q, k, enableGqa);
  }
  checkGroups(q[heads], k[heads]);
  if (v[0] !== k[0] || v[1] !== k[1] || v[2] !== k[2]) throw valueMismatch(k, v);
  if (q[3] > LARGEST_HEAD_DIM) throw tooWide('query', 'headDim', q);
  if (v[3] > LARGEST_HEAD_DIM) throw tooWide('value', 'valueDim', v);
  problem.batch = q[0];
  problem.queryHeads = q[heads];
  problem.kvHeads = k[heads];
  problem.queryLength = q[length];
  problem.keyLength = k[length];
  problem.headDim = q[3];
  problem.valueDim = v[3];
}

/** Sizes but for the lengths from the shapes of a packed batch, [total, heads, dim] each. */
function resolvePackedShapes(
  problem: Draft,
  query: TensorView,
  key: TensorView,
  value: TensorView,
  enableGqa: boolean,
): void {
  for (const [argument, { dims }] of Object.entries({ query, key, value })) {
    if (dims.length !== 3) {
      throw shapeMismatch(argument, '3 axes, [total, heads, dim]', formatShape(dims));
    }
  }
  const q = query.dims;
  const k = key.dims;
  const v = value.dims;
  if (k[2] !== q[2] || (k[1] !== q[1] && !enableGqa)) {
    const expected = formatShape(['totalK', enableGqa ? 'Hkv' : q[1], q[2]]);
    const hint = k[2] === q[2] ? '; heads may differ only with enableGqa: true' : '';
    const words = `${expected} to match query ${formatShape(q)}`;
    throw shapeMismatch('key', words, formatShape(k) + hint);
  }
  checkGroups(q[1], k[1]);
  if (v[0] !== k[0] || v[1] !== k[1]) {
    const expected = `${formatShape([k[0], k[1], 'Dv'])} to match key ${formatShape(k)}`;
    throw shapeMismatch('value', expected, formatShape(v));
  }
  if (q[2] > LARGEST_HEAD_DIM) throw tooWide('query', 'headDim', q);
  if (v[2] > LARGEST_HEAD_DIM) throw tooWide('value', 'valueDim', v);
  problem.queryHeads = q[1];
  problem.kvHeads = k[1];
  problem.headDim = q[2];
  problem.valueDim = v[2];
}

/** The sequences of a packed batch; their number and largest lengths become the problem's. */
function resolveSequences(problem: Draft, given: Given, totalQ: number, totalK: number): Sequences {
  const { cuSeqlens } = given;
  const { query, key } = readOptions<CuSeqlens>(cuSeqlens, NO_STARTS, 'cuSeqlens');
  const queryStarts = readStarts('cuSeqlens.query', query, totalQ);
  const keyStarts = readStarts('cuSeqlens.key', key, totalK);
  if (keyStarts.length !== queryStarts.length) {
    const expected = `${queryStarts.length} running totals, as in cuSeqlens.query`;
    throw shapeMismatch('cuSeqlens.key', expected, String(keyStarts.length));
  }
  for (const name of ['attnMask', 'keepMask', 'samples'] as const) {
    if (given[name] !== undefined) throw unsupported(name, 'none together with cuSeqlens', 'one');
  }
  if (given.layout === 'bhsd') {
    throw valueError('layout: expected none or "bshd" together with cuSeqlens, got "bhsd"');
  }
  problem.layout = BSHD;
  problem.batch = queryStarts.length - 1;
  problem.queryLength = longest(queryStarts);
  problem.keyLength = longest(keyStarts);
  return { queryStarts, keyStarts };
}

const NO_STARTS = { query: undefined, key: undefined };

/** Checks a copy: the original may be shared with another thread. */
function readStarts(argument: string, value: unknown, total: number): Int32Array {
  const starts = copyInt32Array(value);
  if (starts === null) throw invalidType(argument, 'an Int32Array', describe(value));
  if (starts.length < 2) {
    throw shapeMismatch(argument, 'B + 1 running totals', String(starts.length));
  }
  if (starts[0] !== 0) throw invalidValue(`${argument}[0]`, '0', String(starts[0]));
  for (let b = 1; b < starts.length; b++) {
    if (starts[b] < starts[b - 1]) {
      const expected = `${starts[b - 1]} or more, as totals do not fall`;
      throw invalidValue(`${argument}[${b}]`, expected, String(starts[b]));
    }
  }
  const last = starts.length - 1;
  if (starts[last] !== total) {
    throw shapeMismatch(`${argument}[${last}]`, `the total, ${total}`, String(starts[last]));
  }
  return starts;
}

function lengthOf(starts: Int32Array, b: number): number {
  return starts[b + 1] - starts[b];
}

function longest(starts: Int32Array): number {
  let most = 0;
  for (let b = 0; b < starts.length - 1; b++) most = Math.max(most, lengthOf(starts, b));
  return most;
}

function checkGroups(queryHeads: number, kvHeads: number): void {
  if (queryHeads % kvHeads === 0) return;
  const expected = `a head count that divides query's ${queryHeads}`;
  throw shapeMismatch('key', expected, String(kvHeads));
}

function checkRank(problem: Problem, argument: string, view: TensorView): void {
  if (view.dims.length !== 4) {
    const axes =
      problem.layout === BSHD ? '[batch, length, heads, dim]' : '[batch, heads, length, dim]';
    throw shapeMismatch(argument, `4 axes, ${axes}`, formatShape(view.dims));
  }
}

function keyMismatch(
  problem: Problem,
  q: readonly number[],
  k: readonly number[],
  enableGqa: boolean,
): Error {
  const heads = problem.layout === BSHD ? q[2] : q[1];
  const kvHeads = enableGqa ? 'Hkv' : heads;
  const shape = problem.layout === BSHD ? [q[0], 'Lk', kvHeads, q[3]] : [q[0], kvHeads, 'Lk', q[3]];
  const expected = `${formatShape(shape)} to match query ${formatShape(q)}`;
  const onlyHeadsDiffer = k[0] === q[0] && k[3] === q[3];
  const hint = onlyHeadsDiffer ? '; heads may differ only with enableGqa: true' : '';
  return shapeMismatch('key', expected, formatShape(k) + hint);
}

function valueMismatch(k: readonly number[], v: readonly number[]): Error {
  const expected = `${formatShape([k[0], k[1], k[2], 'Dv'])} to match key ${formatShape(k)}`;
  return shapeMismatch('value', expected, formatShape(v));
}

function tooWide(argument: string, name: string, dims: readonly number[]): Error {
  return unsupported(argument, `a ${name} up to ${LARGEST_HEAD_DIM}`, formatShape(dims));
}

/** Mask sizes: broadcast from the right to [B, Hq, Lq, Lk]. */
function resolveMask(problem: Draft, mask: TensorView): void {
  if (mask.type !== BOOL && mask.type !== FLOAT32 && mask.type !== problem.type) {
    const own = problem.type === FLOAT32 ? '' : ` or ${TYPE_NAMES[problem.type]}`;
    throw invalidType('attnMask', `bool, float32${own} elements`, TYPE_NAMES[mask.type]);
  }
  problem.maskType = mask.type === BOOL ? MASK_BOOL : mask.type + 2;
  const full = scoresShape(problem);
  const { dims } = mask;
  const missing = 4 - dims.length;
  for (let axis = 0; axis < dims.length; axis++) {
    if (missing < 0 || (dims[axis] !== 1 && dims[axis] !== full[missing + axis])) {
      throw shapeMismatch(
        'attnMask',
        `a shape that broadcasts to ${formatShape(full)}`,
        formatShape(dims),
      );
    }
  }
  if (missing < 1) problem.maskBatch = dims[-missing];
  if (missing < 2) problem.maskHeads = dims[1 - missing];
  if (missing < 3) problem.maskQueries = dims[2 - missing];
  if (missing < 4) problem.maskKeys = dims[3 - missing];
}

/** [B, Hq, Lq, Lk]: of masks, scores and weights, in either layout. */
export function scoresShape(problem: Problem): number[] {
  return [problem.batch, problem.queryHeads, problem.queryLength, problem.keyLength];
}

/** Shape of one output in the call's layout: also of the moments of samples. */
function sampleShape(p: Problem, sequences: Sequences | null): number[] {
  if (sequences) return [sequences.queryStarts[p.batch], p.queryHeads, p.valueDim];
  return p.layout === BSHD
    ? [p.batch, p.queryLength, p.queryHeads, p.valueDim]
    : [p.batch, p.queryHeads, p.queryLength, p.valueDim];
}

/** Shape of the whole output: samples have an axis of their own. */
function outputShape({ samples }: Problem, sampleDims: readonly number[]): readonly number[] {
  return samples > 0 ? [samples, ...sampleDims] : sampleDims;
}

/** Shape of lse, the same in either layout; samples have an axis where each drops its own scores. */
function lseShape(p: Problem, sequences: Sequences | null): number[] {
  if (sequences) return [p.queryHeads, sequences.queryStarts[p.batch]];
  const one = [p.batch, p.queryHeads, p.queryLength];
  return p.samples > 0 && p.dropoutPlacement === SCORES ? [p.samples, ...one] : one;
}

/** Scale and softcap: rounded to float32 here, so that every backend has the same number. */
function resolveScores(problem: Draft, given: Given): void {
  const { scale, softcap } = given;
  problem.scale = Math.fround(
    scale === undefined
      ? 1 / Math.sqrt(problem.headDim)
      : checkNumber('scale', scale, -LARGEST_FLOAT32, LARGEST_FLOAT32, 'a finite float32 number'),
  );
  if (softcap === undefined || softcap === 0) return;
  const expected = '0 (off) or a positive finite float32 number';
  problem.softcap = Math.fround(checkNumber('softcap', softcap, 0, LARGEST_FLOAT32, expected));
  if (problem.softcap === 0) throw invalidValue('softcap', expected, describe(softcap));
}

/** Causal rule and window. Returns the offsets where each batch entry has its own. */
function resolveVisibility(
  problem: Draft,
  given: Given,
  sequences: Sequences | null,
): Int32Array | null {
  const { isCausal, causalOffset, windowSize } = given;
  problem.isCausal = checkBoolean('isCausal', isCausal, false) ? 1 : 0;
  if (windowSize !== undefined) resolveWindow(problem, windowSize);
  if (causalOffset === undefined) return null;
  if (Array.isArray(causalOffset)) return readCausalOffsets(problem, causalOffset);
  if (sequences !== null && causalOffset === 'bottom-right') {
    const { queryStarts, keyStarts } = sequences;
    const offsets = allocateInt32(problem.batch);
    return offsets.map((_, b) => lengthOf(keyStarts, b) - lengthOf(queryStarts, b));
  }
  problem.causalOffset =
    causalOffset === 'bottom-right'
      ? problem.keyLength - problem.queryLength
      : checkCausalOffset('causalOffset', causalOffset);
  return null;
}

function checkCausalOffset(argument: string, value: unknown): number {
  if (typeof value === 'number') {
    return checkInteger(argument, value, SMALLEST_INT32, LARGEST_INT32);
  }
  const expected = 'an integer, an array of one for each batch entry, or "bottom-right"';
  if (typeof value === 'string') throw invalidValue(argument, expected, describe(value));
  throw invalidType(argument, expected, describe(value));
}

function readCausalOffsets(problem: Problem, values: readonly unknown[]): Int32Array {
  if (values.length !== problem.batch) {
    const expected = `one offset for each of ${problem.batch} batch entries`;
    throw shapeMismatch('causalOffset', expected, String(values.length));
  }
  const offsets = allocateInt32(problem.batch);
  for (let b = 0; b < offsets.length; b++) {
    offsets[b] = checkInteger(`causalOffset[${b}]`, values[b], SMALLEST_INT32, LARGEST_INT32);
  }
  return offsets;
}

function resolveWindow(problem: Draft, windowSize: unknown): void {
  if (!Array.isArray(windowSize)) {
    throw invalidType('windowSize', 'an array [left, right]', describe(windowSize));
  }
  if (windowSize.length !== 2) {
    throw invalidValue('windowSize', '[left, right]', describe(windowSize));
  }
  problem.windowLeft = checkReach('windowSize[0]', windowSize[0]);
  problem.windowRight = checkReach('windowSize[1]', windowSize[1]);
}

/** How many keys are seen to one side; -1 is unlimited. */
function checkReach(argument: string, value: unknown): number {
  return checkInteger(argument, value, -1, LARGEST_INT32);
}

/** Checks a copy: the original may be shared with another thread. */
function resolveKvLengths(
  problem: Problem,
  value: unknown,
  sequences: Sequences | null,
): Int32Array | null {
  if (value === undefined) return null;
  const lengths = copyInt32Array(value);
  if (lengths === null) throw invalidType('kvLengths', 'an Int32Array', describe(value));
  if (lengths.length !== problem.batch) {
    const expected = `one length for each of ${problem.batch} batch entries`;
    throw shapeMismatch('kvLengths', expected, String(lengths.length));
  }
  for (let b = 0; b < lengths.length; b++) {
    const most = sequences === null ? problem.keyLength : lengthOf(sequences.keyStarts, b);
    if (lengths[b] < 0 || lengths[b] > most) {
      const expected = `a length from 0 to ${most}`;
      throw invalidValue(`kvLengths[${b}]`, expected, String(lengths[b]));
    }
  }
  return lengths;
}

/** Position of this call's part in the whole. */
function resolveShard(problem: Draft, given: Given): void {
  const { batchOffset, headOffset, queryOffset, keyOffset } = given;
  if (batchOffset !== undefined) {
    problem.batchOffset = checkPosition('batchOffset', batchOffset, problem.batch);
  }
  if (headOffset !== undefined) {
    problem.headOffset = checkPosition('headOffset', headOffset, problem.queryHeads);
  }
  if (queryOffset !== undefined) {
    problem.queryOffset = checkPosition('queryOffset', queryOffset, problem.queryLength);
  }
  if (keyOffset !== undefined) {
    problem.keyOffset = checkPosition('keyOffset', keyOffset, problem.keyLength);
  }
}

/** Coordinates of dropout decisions are unsigned 32-bit numbers. */
export function checkPosition(argument: string, value: unknown, size: number): number {
  return checkInteger(argument, value, 0, 2 ** 32 - size);
}

/** All of dropout but its seed. Returns whether anything is dropped. */
function resolveDropout(problem: Draft, given: Given, keepMask: TensorView | null): boolean {
  const { dropoutP, dropoutPlacement, dropoutBroadcast, training } = given;
  problem.dropoutPlacement = checkWord('dropoutPlacement', dropoutPlacement, PLACEMENTS);
  problem.dropoutBroadcast = checkWordList('dropoutBroadcast', dropoutBroadcast, BROADCAST_AXES);
  const p = dropoutP === undefined ? 0 : checkProbability('dropoutP', dropoutP);
  const isTraining = checkBoolean('training', training, false);
  if (p > 0 && training === undefined) throw trainingNotStated(p);
  if (keepMask !== null) checkKeepMask(problem, given, keepMask, p);
  if (!isTraining || p === 0) return false;
  problem.dropoutP = p;
  return true;
}

/** A probability: a number from 0 to 1. */
export function checkProbability(argument: string, value: unknown): number {
  return checkNumber(argument, value, 0, 1, 'a probability from 0 to 1');
}

function trainingNotStated(p: number): Error {
  return typeError(
    `training: expected true or false because dropoutP is ${p}, got undefined. Dropout belongs ` +
      'to training, and a call cannot know whether it trains: pass training: model.training',
  );
}

/** Explicit decisions: they take the place of the random ones, so they exclude their options. */
function checkKeepMask(problem: Problem, given: Given, keepMask: TensorView, p: number): void {
  for (const name of ['seed', 'offset', 'generator', 'dropoutBroadcast'] as const) {
    if (given[name] !== undefined) {
      throw valueError(`${name}: expected none together with keepMask, which replaces it`);
    }
  }
  if (p === 0) throw valueError('keepMask: expected dropoutP > 0 with it, got 0');
  if (keepMask.type !== BOOL) {
    throw invalidType('keepMask', 'bool elements (a Uint8Array)', TYPE_NAMES[keepMask.type]);
  }
  const expected = scoresShape(problem);
  if (problem.dropoutPlacement === CONTEXT) expected[3] = problem.valueDim;
  if (!sameShape(keepMask.dims, expected)) {
    throw shapeMismatch('keepMask', formatShape(expected), formatShape(keepMask.dims));
  }
}

/** Whether two shapes are equal. */
export function sameShape(a: readonly number[], b: readonly number[]): boolean {
  if (a.length !== b.length) return false;
  for (let i = 0; i < a.length; i++) if (a[i] !== b[i]) return false;
  return true;
}

/** Seed and offset: explicit, or drawn, and only where they decide something. */
function resolveSeed(problem: Draft, given: Given, isRandom: boolean): void {
  const { seed, offset } = given;
  const generator = checkGenerator('generator', given.generator);
  if (generator !== undefined && (seed !== undefined || offset !== undefined)) {
    const name = seed === undefined ? 'offset' : 'seed';
    throw valueError(`${name}: expected none together with a generator, which gives both`);
  }
  if (seed === undefined) {
    if (offset !== undefined) throw valueError('offset: expected a seed with it, got none');
    if (isRandom) draw(generator, problem, Math.max(problem.samples, 1));
    return;
  }
  const start = checkUint64('seed', seed);
  const step = offset === undefined ? 0 : checkUint64('offset', offset);
  if (isRandom) setSeed(problem, start, step);
}

/** Writes seed and offset as 32-bit halves. */
export function setSeed(problem: Draft, seed: number | bigint, offset: number | bigint): void {
  problem.seedLo = lowWord(seed);
  problem.seedHi = highWord(seed);
  problem.offsetLo = lowWord(offset);
  problem.offsetHi = highWord(offset);
}

/** Which further results are wanted, as bits; their size must be a number. */
function resolveOutputs(problem: Problem, outputs: unknown, isAllowed: boolean): number {
  if (outputs === undefined) return 0;
  if (!isAllowed) {
    throw typeError('outputs: expected none, as only attentionForward returns them');
  }
  const bits = checkWordList('outputs', outputs, OUTPUT_NAMES);
  if (bits > 1) elementCount('outputs', scoresShape(problem));
  return bits;
}

/** How many samples there are, and whether their moments are wanted in place of outputs, as a bit. */
function resolveSamples(problem: Draft, given: Given, allowsMoments: boolean): number {
  const { samples, outputs } = given;
  const moments = checkBoolean('moments', given.moments, false);
  if (samples === undefined) {
    if (moments) throw typeError('samples: expected how many, because moments is true, got none');
    return 0;
  }
  problem.samples = checkInteger('samples', samples, 1, LARGEST_INT32);
  if (checkWordList('outputs', outputs, OUTPUT_NAMES) > 1) {
    throw unsupported('outputs', 'only "lse" together with samples', describe(outputs));
  }
  if (!moments) return 0;
  if (!allowsMoments) {
    throw typeError('moments: expected none, as only attentionForward returns them');
  }
  if (samples === 1) throw invalidValue('samples', 'at least 2 where moments is true', '1');
  if (given.out !== undefined) {
    throw valueError('out: expected none together with moments, which give no output');
  }
  return WANTS_MOMENTS;
}

/** The caller's tensor for the output: like the output, and apart from all inputs. */
function readOut(
  value: unknown,
  problem: Problem,
  outputDims: readonly number[],
  inputs: readonly (TensorView | null)[],
): FloatArray {
  if (!isTensor(value)) throw invalidType('out', 'a Tensor', describe(value));
  const out = readTensor('out', value);
  if (out.type !== problem.type) {
    throw invalidType('out', `type ${TYPE_NAMES[problem.type]}, as query`, TYPE_NAMES[out.type]);
  }
  if (!sameShape(out.dims, outputDims)) {
    throw shapeMismatch('out', formatShape(outputDims), formatShape(out.dims));
  }
  checkLength('out', out);
  checkDevice('out', out, (inputs[0] as TensorView).device);
  for (let i = 0; i < inputs.length; i++) {
    const input = inputs[i];
    if (input !== null && overlaps(out.data, input.data)) {
      throw valueError(`out: expected memory apart from ${INPUT_NAMES[i]}, got an overlap`);
    }
  }
  return out.data as FloatArray;
}

const INPUT_NAMES = ['query', 'key', 'value', 'attnMask', 'keepMask'];

function overlaps(a: TensorView['data'], b: TensorView['data']): boolean {
  if (isOnDevice(a)) return a === b;
  return (
    a.buffer === b.buffer &&
    a.byteOffset < b.byteOffset + b.byteLength &&
    b.byteOffset < a.byteOffset + a.byteLength
  );
}
