// The operation: options to Problem, one backend call, result; forward and backward, at once or
// as a promise.

import { checkSignal, joinWords, type NoOptions, readOptions } from './arguments';
import { HOST, requireGpu } from './cuda';
import { reported, reportedAsync } from './diagnostics';
import {
  abortedError,
  disposedError,
  invalidType,
  type SdpaError,
  shapeMismatch,
  unsupported,
} from './errors';
import {
  allocateAt,
  allocateInt32,
  BOOL,
  byteLength,
  checkBytes,
  copyArray,
  FLOAT32,
} from './memory';
import {
  type AttentionOptions,
  type BackwardTensors,
  type Call,
  checkDevice,
  type FloatArray,
  type ForwardOutputs,
  type Inputs,
  type MomentsOptions,
  resolveCall,
  sameShape,
  scoresShape,
  WANTS_DROPPED_WEIGHTS,
  WANTS_MOMENTS,
  WANTS_SCORES,
  WANTS_WEIGHTS,
} from './problem';
import {
  adoptTensor,
  checkLength,
  elementCount,
  formatShape,
  readTensor,
  release,
  retain,
  type Tensor,
  type TensorLike,
  TensorView,
  TYPE_NAMES,
} from './tensor';

/**
 * The seed and offset that decided what was dropped; with `samples: N`, the offset of the first of
 * them: sample s has `offset + s`.
 *
 * @example
 * ```js
 * import { attentionForwardSync, dropoutMask } from 'node-sdpa';
 * import assert from 'node:assert';
 * const tensor = { data: new Float32Array(32).fill(1), dims: [1, 1, 8, 4] };
 * const result = attentionForwardSync(tensor, tensor, tensor, {
 *   dropoutP: 0.5, training: true, outputs: ['droppedWeights'],
 * });
 * const mask = dropoutMask([1, 1, 8, 8], { p: 0.5, ...result.rngState });
 * const kept = result.droppedWeights.data.map((weight) => Number(weight > 0));
 * assert.deepStrictEqual([...mask], [...kept]);
 * ```
 */
export interface RngState {
  /** 0 to 2^64 - 1 */
  readonly seed: bigint;
  /** 0 to 2^64 - 1 */
  readonly offset: bigint;
}

/**
 * The gradients of a scalar loss, each with the type and shape of what it belongs to.
 *
 * @example
 * ```js
 * import { attentionForwardSync } from 'node-sdpa';
 * import assert from 'node:assert';
 * const tensor = { data: Float32Array.of(1, 2), dims: [1, 1, 1, 2] };
 * const gradOutput = { data: Float32Array.of(5, 6), dims: [1, 1, 1, 2] };
 * const result = attentionForwardSync(tensor, tensor, tensor);
 * const { gradQuery, gradValue } = result.backwardSync(gradOutput);
 * assert.deepStrictEqual([...gradValue.data], [5, 6]); // the output is the only value
 * assert.deepStrictEqual([...gradQuery.data], [0, 0]); // and does not depend on the query
 * ```
 */
export interface Gradients {
  /** As query: `[B, Hq, Lq, D]` */
  readonly gradQuery: Tensor;
  /** As key: `[B, Hkv, Lk, D]`; summed over the query heads that share a key/value head */
  readonly gradKey: Tensor;
  /** As value: `[B, Hkv, Lk, Dv]` */
  readonly gradValue: Tensor;
  /** Where attnMask is a bias: summed over its broadcast axes, 0 where the bias is -inf */
  readonly gradAttnMask?: Tensor;
}

/**
 * Options of {@link AttentionResult.backward}.
 *
 * @example
 * ```js
 * import { attentionForwardSync } from 'node-sdpa';
 * import assert from 'node:assert';
 * const tensor = { data: Float32Array.of(1, 2), dims: [1, 1, 1, 2] };
 * const result = attentionForwardSync(tensor, tensor, tensor);
 * const stopped = result.backward(tensor, { signal: AbortSignal.abort() });
 * await assert.rejects(stopped, { name: 'AbortError', code: 'ERR_SDPA_ABORTED' });
 * ```
 */
export interface BackwardOptions {
  /** Stops `backward`: it rejects with an AbortError, `ERR_SDPA_ABORTED` */
  readonly signal?: AbortSignal;
}

/**
 * What {@link attentionForward} returns: the output, and all that its gradient needs.
 *
 * Until the last `backward`, leave unchanged the output and those inputs that were given as
 * {@link Tensor}s; all other inputs were copied.
 *
 * @example
 * ```js
 * import { attentionForward } from 'node-sdpa';
 * import assert from 'node:assert';
 * const tensor = { data: Float32Array.of(1, 2, 3, 4), dims: [1, 1, 2, 2] };
 * const { output, lse, backward } = await attentionForward(tensor, tensor, tensor);
 * assert.deepStrictEqual(lse.dims, [1, 1, 2]);
 * const { gradKey } = await backward(output);
 * assert.deepStrictEqual(gradKey.dims, [1, 1, 2, 2]);
 * ```
 */
export interface AttentionResult {
  /**
   * [B, Hq, Lq, Dv], in layout `'bshd'` [B, Lq, Hq, Dv], of a packed batch [totalQ, Hq, Dv]; the
   * query's type. With `samples: N` there is an axis of N before these
   */
  readonly output: Tensor;
  /**
   * [B, Hq, Lq] float32: log-sum-exp of each row's scores; -inf for a row without keys. Of a packed
   * batch [Hq, totalQ], as flash-attention has it. Samples share it, except under `'scores'` dropout:
   * [N, B, Hq, Lq] then
   */
  readonly lse: Tensor;
  /** What decided on dropout; null where no random number was drawn */
  readonly rngState: RngState | null;
  /** Name of the backend that computed, such as `'cpu:avx2'` */
  readonly backend: string;
  /** [B, Hq, Lq, Lk] float32, where `outputs` names it */
  readonly scores?: Tensor;
  /** [B, Hq, Lq, Lk] float32, where `outputs` names it */
  readonly weights?: Tensor;
  /** [B, Hq, Lq, Lk] float32, where `outputs` names it */
  readonly droppedWeights?: Tensor;
  /**
   * The gradients for a gradient of the output, which has the output's shape and type. Drops
   * what the forward call dropped. Rejects with `ERR_SDPA_SHAPE_MISMATCH` or
   * `ERR_SDPA_INVALID_ARG_TYPE` for another gradOutput, `ERR_SDPA_DISPOSED` after `dispose()`,
   * `ERR_SDPA_UNSUPPORTED` where the forward call had samples.
   */
  backward(gradOutput: TensorLike, options?: BackwardOptions): Promise<Gradients>;
  /** As `backward`, on the calling thread; throws where that rejects */
  backwardSync(gradOutput: TensorLike, options?: BackwardOptions): Gradients;
  /** Lets go of what is kept for `backward`. The tensors above stay usable, each until its own */
  dispose(): void;
  /** Calls `dispose()` at the end of a `using` block */
  [Symbol.dispose](): void;
}

/**
 * What {@link attentionForward} returns for {@link MomentsOptions}: the first two moments of N
 * dropout samples, each the output of a call, in place of these outputs.
 *
 * @example
 * ```js
 * import { attentionForward } from 'node-sdpa';
 * import assert from 'node:assert';
 * const tensor = { data: Float32Array.of(1, 2, 3, 4), dims: [1, 1, 2, 2] };
 * const { mean, variance } = await attentionForward(tensor, tensor, tensor, {
 *   dropoutP: 0.5, dropoutPlacement: 'context', training: true, samples: 64, moments: true,
 * });
 * assert.deepStrictEqual(mean.dims, [1, 1, 2, 2]);
 * assert.ok(variance.data.every((x) => x > 0));
 * ```
 */
export interface AttentionMoments {
  /** As one output, float32 whatever the query's type */
  readonly mean: Tensor;
  /**
   * As one output, float32: unbiased (divided by N - 1, `torch.var`'s default). NaN where a sample
   * is not finite
   */
  readonly variance: Tensor;
  /** As in {@link AttentionResult} */
  readonly lse: Tensor;
  /** As in {@link AttentionResult} */
  readonly rngState: RngState | null;
  /** Name of the backend that computed, such as `'cpu:avx2'` */
  readonly backend: string;
}

/**
 * Attention: `softmax(scale * query key^T + mask) value`, with dropout where it is asked for.
 * Computed by threads of the package's own; the event loop is never blocked.
 *
 * Every input that is not a {@link Tensor} is copied before the call returns, so the caller may do
 * with it as it likes; a Tensor is read without a copy. Float32, float16 and bfloat16 are computed
 * with float32 accumulation. Memory grows with the lengths, never with their product.
 *
 * The operation is that of "Attention Is All You Need" (arXiv 1706.03762), under the names of
 * PyTorch's `scaled_dot_product_attention`, by the blocked online softmax of FlashAttention-2
 * (arXiv 2307.08691).
 *
 * @param query - [B, Hq, Lq, D]; in layout `'bshd'` [B, Lq, Hq, D]; D up to 512. With `cuSeqlens`
 *   [totalQ, Hq, D], and so the others
 * @param key - [B, Hkv, Lk, D]; in layout `'bshd'` [B, Lk, Hkv, D]; the query's type
 * @param value - [B, Hkv, Lk, Dv]; in layout `'bshd'` [B, Lk, Hkv, Dv]; the query's type, Dv up
 *   to 512
 * @param options - see {@link AttentionOptions}
 * @returns the output, [B, Hq, Lq, Dv] or in layout `'bshd'` [B, Lq, Hq, Dv], of the query's type:
 *   a new tensor, or `options.out`. Rejects with
 *   TypeError `ERR_SDPA_INVALID_ARG_TYPE`: an argument of the wrong kind, an unknown option, or
 *   dropoutP > 0 without training;
 *   RangeError `ERR_SDPA_INVALID_ARG_VALUE`, `ERR_SDPA_SHAPE_MISMATCH`, `ERR_SDPA_UNSUPPORTED`:
 *   values, shapes and sizes that are not allowed;
 *   Error `ERR_SDPA_BACKEND_UNAVAILABLE`, `ERR_SDPA_ABORTED`, `ERR_SDPA_DISPOSED`,
 *   `ERR_SDPA_QUEUE_FULL`, `ERR_SDPA_OUT_OF_MEMORY`. `options.out` is untouched then.
 *
 * @example
 * ```js
 * import { scaledDotProductAttention } from 'node-sdpa';
 * import assert from 'node:assert';
 * const query = { data: Float32Array.of(1, 0), dims: [1, 1, 1, 2] };
 * const key = { data: Float32Array.of(9, 0, 0, 9), dims: [1, 1, 2, 2] };
 * const value = { data: Float32Array.of(1, 2, 3, 4), dims: [1, 1, 2, 2] };
 * const output = await scaledDotProductAttention(query, key, value, { scale: 10 });
 * assert.deepStrictEqual([...output.data], [1, 2]); // the first key has all the weight
 * ```
 */
export async function scaledDotProductAttention(
  query: TensorLike,
  key: TensorLike,
  value: TensorLike,
  options?: AttentionOptions,
): Promise<Tensor> {
  const call = resolveCall(query, key, value, options, false);
  return outputTensor(call, (await forward(withStableInputs(call), false)).outputs);
}

/** Output and lse of a resolved call, beside the event loop. */
export async function runForward(call: Call): Promise<{ output: Tensor; lse: Tensor }> {
  return outputAndLse(call, (await forward(withStableInputs(call), true)).outputs);
}

/** As {@link runForward}, on the calling thread. */
export function runForwardSync(call: Call): { output: Tensor; lse: Tensor } {
  return outputAndLse(call, forwardSync(call, true).outputs);
}

function outputAndLse(call: Call, outputs: ForwardOutputs) {
  const lse = adoptTensor(FLOAT32, outputs.lse as Float32Array, [...call.lseDims]);
  return { output: outputTensor(call, outputs), lse };
}

/**
 * As {@link scaledDotProductAttention}, on the calling thread (and helpers where that pays): the
 * event loop waits. For small problems, scripts and workers. `signal` is looked at only at the
 * start.
 *
 * @param query - [B, Hq, Lq, D]; in layout `'bshd'` [B, Lq, Hq, D]; D up to 512. With `cuSeqlens`
 *   [totalQ, Hq, D], and so the others
 * @param key - [B, Hkv, Lk, D]; in layout `'bshd'` [B, Lk, Hkv, D]; the query's type
 * @param value - [B, Hkv, Lk, Dv]; in layout `'bshd'` [B, Lk, Hkv, Dv]; the query's type, Dv up
 *   to 512
 * @param options - see {@link AttentionOptions}
 * @returns the output, [B, Hq, Lq, Dv] or in layout `'bshd'` [B, Lq, Hq, Dv], of the query's type:
 *   a new tensor, or `options.out`
 * @throws what {@link scaledDotProductAttention} rejects with
 *
 * @example
 * ```js
 * import { scaledDotProductAttentionSync, Tensor } from 'node-sdpa';
 * import assert from 'node:assert';
 * const tensor = { data: Float32Array.of(1, 2, 3, 4), dims: [1, 1, 2, 2] };
 * const out = new Tensor('float32', new Float32Array(4), [1, 1, 2, 2]);
 * const output = scaledDotProductAttentionSync(tensor, tensor, tensor, { isCausal: true, out });
 * assert.strictEqual(output, out);
 * assert.deepStrictEqual([...out.data.subarray(0, 2)], [1, 2]); // the first query sees key 0 only
 * ```
 */
export function scaledDotProductAttentionSync(
  query: TensorLike,
  key: TensorLike,
  value: TensorLike,
  options?: AttentionOptions,
): Tensor {
  const call = resolveCall(query, key, value, options, false);
  return outputTensor(call, forwardSync(call, false).outputs);
}

/**
 * As below, with the moments of dropout samples in place of their outputs: see
 * {@link MomentsOptions}.
 *
 * @example
 * ```js
 * import { attentionForward } from 'node-sdpa';
 * import assert from 'node:assert';
 * const tensor = { data: Float32Array.of(1, 2, 3, 4), dims: [1, 1, 2, 2] };
 * const { mean, variance } = await attentionForward(tensor, tensor, tensor, {
 *   dropoutP: 0.5, training: true, seed: 1, samples: 50, moments: true,
 * });
 * assert.deepStrictEqual([mean.dims, variance.dims], [tensor.dims, tensor.dims]);
 * ```
 */
export function attentionForward(
  query: TensorLike,
  key: TensorLike,
  value: TensorLike,
  options: MomentsOptions,
): Promise<AttentionMoments>;
/**
 * Attention with all that training needs: the output, lse, the state of the random numbers, on
 * request scores and weights, and `backward`. Otherwise as {@link scaledDotProductAttention}.
 *
 * The backward pass recomputes the weights from lse (FlashAttention-2, arXiv 2307.08691); its
 * memory too grows with the lengths, never with their product.
 *
 * @param query - [B, Hq, Lq, D]; in layout `'bshd'` [B, Lq, Hq, D]; D up to 512. With `cuSeqlens`
 *   [totalQ, Hq, D], and so the others
 * @param key - [B, Hkv, Lk, D]; in layout `'bshd'` [B, Lk, Hkv, D]; the query's type
 * @param value - [B, Hkv, Lk, Dv]; in layout `'bshd'` [B, Lk, Hkv, Dv]; the query's type, Dv up
 *   to 512
 * @param options - see {@link AttentionOptions}; `outputs` asks for [B, Hq, Lq, Lk] tensors
 * @returns see {@link AttentionResult}. Rejects as {@link scaledDotProductAttention}
 *
 * @example
 * ```js
 * import { attentionForward } from 'node-sdpa';
 * import assert from 'node:assert';
 * const tensor = { data: Float32Array.of(1, 2, 3, 4), dims: [1, 1, 2, 2] };
 * const result = await attentionForward(tensor, tensor, tensor, {
 *   dropoutP: 0.5, dropoutPlacement: 'context', training: true, seed: 3,
 * });
 * assert.deepStrictEqual(result.rngState, { seed: 3n, offset: 0n });
 * const { gradQuery } = await result.backward(result.output);
 * assert.deepStrictEqual(gradQuery.dims, [1, 1, 2, 2]);
 * ```
 */
export function attentionForward(
  query: TensorLike,
  key: TensorLike,
  value: TensorLike,
  options?: AttentionOptions,
): Promise<AttentionResult>;
export async function attentionForward(
  query: TensorLike,
  key: TensorLike,
  value: TensorLike,
  options?: AttentionOptions | MomentsOptions,
): Promise<AttentionResult | AttentionMoments> {
  const borrowed = resolveCall(query, key, value, options, true);
  if (borrowed.outputs & WANTS_MOMENTS) {
    return createMoments(await forward(withStableInputs(borrowed), true));
  }
  const call = withRetainedInputs(withStableInputs(borrowed));
  try {
    return createResult(await forward(call, true));
  } catch (error) {
    mapInputs(call, released);
    throw error;
  }
}

/**
 * As below, with the moments of dropout samples in place of their outputs: see
 * {@link MomentsOptions}.
 *
 * @example
 * ```js
 * import { attentionForwardSync } from 'node-sdpa';
 * import assert from 'node:assert';
 * const tensor = { data: Float32Array.of(1, 2, 3, 4), dims: [1, 1, 2, 2] };
 * const { mean, variance } = attentionForwardSync(tensor, tensor, tensor, {
 *   dropoutP: 0.5, training: true, seed: 1, samples: 50, moments: true,
 * });
 * assert.deepStrictEqual([mean.dims, variance.dims], [tensor.dims, tensor.dims]);
 * ```
 */
export function attentionForwardSync(
  query: TensorLike,
  key: TensorLike,
  value: TensorLike,
  options: MomentsOptions,
): AttentionMoments;
/**
 * As {@link attentionForward}, on the calling thread; throws where that rejects.
 *
 * @param query - [B, Hq, Lq, D]; in layout `'bshd'` [B, Lq, Hq, D]; D up to 512. With `cuSeqlens`
 *   [totalQ, Hq, D], and so the others
 * @param key - [B, Hkv, Lk, D]; in layout `'bshd'` [B, Lk, Hkv, D]; the query's type
 * @param value - [B, Hkv, Lk, Dv]; in layout `'bshd'` [B, Lk, Hkv, Dv]; the query's type, Dv up
 *   to 512
 * @param options - see {@link AttentionOptions}; `outputs` asks for [B, Hq, Lq, Lk] tensors
 * @returns see {@link AttentionResult}
 * @throws what {@link scaledDotProductAttention} rejects with
 *
 * @example
 * ```js
 * import { attentionForwardSync } from 'node-sdpa';
 * import assert from 'node:assert';
 * const query = { data: Float32Array.of(0, 0), dims: [1, 1, 1, 2] };
 * const key = { data: Float32Array.of(1, 2, 3, 4), dims: [1, 1, 2, 2] };
 * const { weights, lse } = attentionForwardSync(query, key, key, { outputs: ['weights'] });
 * assert.deepStrictEqual([...weights.data], [0.5, 0.5]); // all scores are 0
 * assert.ok(Math.abs(lse.data[0] - Math.log(2)) < 1e-6);
 * ```
 */
export function attentionForwardSync(
  query: TensorLike,
  key: TensorLike,
  value: TensorLike,
  options?: AttentionOptions,
): AttentionResult;
export function attentionForwardSync(
  query: TensorLike,
  key: TensorLike,
  value: TensorLike,
  options?: AttentionOptions | MomentsOptions,
): AttentionResult | AttentionMoments {
  const borrowed = resolveCall(query, key, value, options, true);
  if (borrowed.outputs & WANTS_MOMENTS) return createMoments(forwardSync(borrowed, true));
  const call = withRetainedInputs(withStableInputs(borrowed)); // backward reads them again
  try {
    return createResult(forwardSync(call, true));
  } catch (error) {
    mapInputs(call, released);
    throw error;
  }
}

/** The arrays of a call, as they are: for calls that return before anyone can change them. */
function inputsOf(call: Call): Inputs {
  return {
    query: call.query.data as FloatArray,
    key: call.key.data as FloatArray,
    value: call.value.data as FloatArray,
    mask: call.mask === null ? null : call.mask.data,
    keepMask: call.keepMask === null ? null : (call.keepMask.data as Uint8Array),
    causalOffsets: call.causalOffsets,
    kvLengths: call.kvLengths,
    sequences: call.sequences,
    keyBlocks: call.keyBlocks,
  };
}

/** The same call on memory that the caller cannot take away: tensors not ours are copied. */
function withStableInputs(call: Call): Call {
  return mapInputs(call, stable);
}

/** The same call on tensors that may be disposed of before its `backward`. */
function withRetainedInputs(call: Call): Call {
  return mapInputs(call, retain);
}

function mapInputs(call: Call, change: (view: TensorView) => TensorView): Call {
  return {
    ...call,
    query: change(call.query),
    key: change(call.key),
    value: change(call.value),
    mask: call.mask === null ? null : change(call.mask),
    keepMask: call.keepMask === null ? null : change(call.keepMask),
  };
}

function stable(view: TensorView): TensorView {
  if (view.isOwned) return view;
  return new TensorView(view.type, copyArray(view.type, view.data), view.dims, true);
}

type Make = <A extends FloatArray>(type: number, dims: readonly number[]) => A;

/**
 * Makes the arrays of a call where its tensors are: all of them, or none.
 *
 * @param besides - bytes that the call needs together with them
 */
function allocateAll<T>(call: Call, besides: number, build: (make: Make) => T): T {
  let bytes = besides;
  build(<A>(type: number, dims: readonly number[]) => {
    bytes += byteLength(type, elementCount('output', dims));
    return NOT_YET as A;
  });
  checkBytes(bytes);
  const made: FloatArray[] = [];
  try {
    return build(<A extends FloatArray>(type: number, dims: readonly number[]) => {
      const data = allocateAt<A>(call.device, type, elementCount('output', dims));
      made.push(data);
      return data;
    });
  } catch (error) {
    discard(call, made);
    throw error;
  }
}

const NOT_YET = new Float32Array(0) as FloatArray;

/** Memory for what a forward call writes; the output goes to `output` where that is given. */
function allocateOutputs(call: Call, output: FloatArray | null, withLse: boolean): ForwardOutputs {
  const { problem, outputs, outputDims } = call;
  const wantsMoments = (outputs & WANTS_MOMENTS) !== 0;
  const sums = wantsMoments ? 16 * elementCount('output', call.sampleDims) : 0; // in float64
  const square = scoresShape(problem);
  return allocateAll(call, sums, (make) => {
    const floats = (isWanted: boolean, dims: readonly number[]) =>
      isWanted ? make<Float32Array>(FLOAT32, dims) : null;
    return {
      output: wantsMoments ? null : (output ?? make(problem.type, outputDims)),
      lse: floats(withLse, call.lseDims),
      scores: floats((outputs & WANTS_SCORES) !== 0, square),
      weights: floats((outputs & WANTS_WEIGHTS) !== 0, square),
      droppedWeights: floats((outputs & WANTS_DROPPED_WEIGHTS) !== 0, square),
      mean: floats(wantsMoments, call.sampleDims),
      variance: floats(wantsMoments, call.sampleDims),
    };
  });
}

/** What a forward call gave, and the call as it was computed: on its fallback where it had to be. */
interface Computed {
  readonly call: Call;
  readonly outputs: ForwardOutputs;
}

/** Whether a call that 'auto' has brought to a GPU has to be computed elsewhere. */
function mayFallBack({ fallback }: Call, error: unknown): boolean {
  return fallback !== null && (error as SdpaError).code !== 'ERR_SDPA_ABORTED';
}

function onFallback(call: Call): Call {
  return { ...call, backend: call.fallback ?? call.backend, fallback: null };
}

/**
 * Whether the caller's `out` has to wait for the end: what is stopped, or gets no memory for a later
 * part of several, or is on a GPU that fails, leaves its output half written.
 */
function isAside({ outData, signal, sequences, keyBlocks, backend }: Call): boolean {
  if (outData === null) return false;
  if (signal !== undefined || backend.name.startsWith('cuda')) return true;
  return sequences !== null || keyBlocks !== null;
}

/** Gives arrays that nobody will see back to a GPU; host memory is collected. */
function discard(call: Call, arrays: Iterable<FloatArray | null>): void {
  if (call.device === HOST) return;
  for (const data of arrays) {
    if (data !== null) release(new TensorView(FLOAT32, data, [], true));
  }
}

/** Runs a forward call beside the event loop. Inputs must be stable. */
async function forward(call: Call, withLse: boolean): Promise<Computed> {
  const { problem, backend, signal, outData } = call;
  const target = isAside(call) ? null : outData;
  const outputs = allocateOutputs(call, target, withLse);
  const inputs = inputsOf(call);
  try {
    await reportedAsync('forward', call, () =>
      stoppable(signal, (cancel) => backend.forward(problem, inputs, outputs, cancel)),
    );
    if (outData !== target) await copyOutput(call, outputs.output as FloatArray);
  } catch (error) {
    discard(call, written(outputs, target));
    if (mayFallBack(call, error)) return forward(onFallback(call), withLse);
    throw error;
  }
  return finish(call, outputs, target);
}

function forwardSync(call: Call, withLse: boolean): Computed {
  const { problem, backend, outData, device } = call;
  const target = isAside(call) ? null : outData;
  const outputs = allocateOutputs(call, target, withLse);
  try {
    reported('forward', call, () => backend.forwardSync(problem, inputsOf(call), outputs));
    if (outData !== target) {
      if (device === HOST) outData?.set(outputs.output as FloatArray);
      else requireGpu(device).copySync(outputs.output, outData);
    }
  } catch (error) {
    discard(call, written(outputs, target));
    if (mayFallBack(call, error)) return forwardSync(onFallback(call), withLse);
    throw error;
  }
  return finish(call, outputs, target);
}

async function copyOutput({ device, outData }: Call, output: FloatArray): Promise<void> {
  if (device === HOST) outData?.set(output);
  else await requireGpu(device).copyAsync(output, outData);
}

/** What was allocated for the outputs of a call. */
function written(outputs: ForwardOutputs, target: FloatArray | null): (FloatArray | null)[] {
  return Object.values(outputs).filter((data) => data !== target);
}

/** The results of a call whose output is where the caller wants it. */
function finish(call: Call, outputs: ForwardOutputs, target: FloatArray | null): Computed {
  if (call.outData === target) return { call, outputs };
  discard(call, [outputs.output]);
  return { call, outputs: { ...outputs, output: call.outData } };
}

/** The output as a tensor: the caller's where there is one. */
function outputTensor(call: Call, { output }: ForwardOutputs): Tensor {
  return call.out ?? adoptTensor(call.problem.type, output as FloatArray, call.outputDims);
}

/** Runs work that a signal can stop; the promise does not wait until the work has noticed. */
async function stoppable(
  signal: AbortSignal | undefined,
  run: (cancel: Int32Array | null) => Promise<void>,
): Promise<void> {
  if (signal === undefined) return run(null);
  const cancel = allocateInt32(1);
  let stop = () => {};
  const stopped = new Promise<void>((resolve) => {
    stop = () => {
      Atomics.store(cancel, 0, 1);
      resolve();
    };
  });
  // A signal need not be Node's own: what its methods throw belongs to this call's promise.
  signal.addEventListener('abort', stop, { once: true });
  try {
    await Promise.race([run(cancel), stopped]);
  } catch (error) {
    if (cancel[0] === 0) throw error;
  } finally {
    signal.removeEventListener('abort', stop);
  }
  if (cancel[0] !== 0) throw abortedError(signal);
}

/** What `backward` needs of a forward call. */
interface Saved {
  readonly call: Call;
  readonly output: TensorView;
  readonly lse: TensorView;
}

function createResult({ call, outputs }: Computed): AttentionResult {
  const { problem, backend } = call;
  const shape = scoresShape(problem);
  const square = (data: Float32Array | null) =>
    data === null ? undefined : adoptTensor(FLOAT32, data, [...shape]);
  const output = outputs.output as FloatArray;
  const lse = outputs.lse as Float32Array;
  // The tensors of the result may be disposed of before its backward.
  let saved: Saved | null = {
    call,
    output: retain(new TensorView(problem.type, output, call.outputDims, true)),
    lse: retain(new TensorView(FLOAT32, lse, call.lseDims, true)),
  };
  const stillSaved = () => {
    if (saved === null) throw disposedError('AttentionResult');
    if (problem.samples > 0) throw noBackward(problem.samples);
    return saved;
  };
  const dispose = () => {
    if (saved === null) return;
    mapInputs(saved.call, released);
    release(saved.output);
    release(saved.lse);
    saved = null;
  };
  return {
    output: outputTensor(call, outputs),
    lse: adoptTensor(FLOAT32, lse, [...call.lseDims]),
    rngState: rngStateOf(call),
    backend: backend.name,
    scores: square(outputs.scores),
    weights: square(outputs.weights),
    droppedWeights: square(outputs.droppedWeights),
    backward: async (gradOutput, options) => backward(stillSaved(), gradOutput, options),
    backwardSync: (gradOutput, options) => backwardSync(stillSaved(), gradOutput, options),
    dispose,
    [Symbol.dispose]: dispose,
  };
}

function released(view: TensorView): TensorView {
  release(view);
  return view;
}

function noBackward(samples: number): Error {
  const expected =
    'none for a forward call with samples: for the gradient of a sample, call attentionForward ' +
    'with its offset and without samples,';
  return unsupported('backward', expected, `samples: ${samples}`);
}

function createMoments({ call, outputs }: Computed): AttentionMoments {
  const { backend } = call;
  const tensor = (data: Float32Array | null, dims: readonly number[]) =>
    adoptTensor(FLOAT32, data as Float32Array, [...dims]);
  return {
    mean: tensor(outputs.mean, call.sampleDims),
    variance: tensor(outputs.variance, call.sampleDims),
    lse: tensor(outputs.lse, call.lseDims),
    rngState: rngStateOf(call),
    backend: backend.name,
  };
}

function rngStateOf({ problem, keepMask }: Call): RngState | null {
  if (problem.dropoutP === 0 || keepMask !== null) return null;
  return {
    seed: joinWords(problem.seedLo, problem.seedHi),
    offset: joinWords(problem.offsetLo, problem.offsetHi),
  };
}

async function backward(
  saved: Saved,
  gradOutputLike: unknown,
  options: unknown,
): Promise<Gradients> {
  const { call } = saved;
  const signal = readBackwardSignal(options);
  const gradOutput = stable(readGradOutput(call, gradOutputLike));
  const tensors = allocateGradients(saved, gradOutput);
  try {
    await runBackward(call, signal, tensors);
  } catch (error) {
    discard(call, gradientsOf(tensors));
    if (!mayFallBack(call, error)) throw error;
    await runBackward(onFallback(call), signal, tensors);
  }
  return toGradients(call, tensors);
}

function backwardSync(saved: Saved, gradOutputLike: unknown, options: unknown): Gradients {
  const { call } = saved;
  readBackwardSignal(options);
  const tensors = allocateGradients(saved, readGradOutput(call, gradOutputLike));
  try {
    runBackwardSync(call, tensors);
  } catch (error) {
    discard(call, gradientsOf(tensors));
    if (!mayFallBack(call, error)) throw error;
    runBackwardSync(onFallback(call), tensors);
  }
  return toGradients(call, tensors);
}

function runBackward(
  call: Call,
  signal: AbortSignal | undefined,
  tensors: BackwardTensors,
): Promise<void> {
  const { problem, backend } = call;
  const inputs = inputsOf(call);
  return reportedAsync('backward', call, () =>
    stoppable(signal, (cancel) => backend.backward(problem, inputs, tensors, cancel)),
  );
}

function runBackwardSync(call: Call, tensors: BackwardTensors): void {
  const { problem, backend } = call;
  reported('backward', call, () => backend.backwardSync(problem, inputsOf(call), tensors));
}

const NO_BACKWARD_OPTIONS: NoOptions<BackwardOptions> = { signal: undefined };

function readBackwardSignal(options: unknown): AbortSignal | undefined {
  if (options === undefined) return undefined;
  return checkSignal('signal', readOptions<BackwardOptions>(options, NO_BACKWARD_OPTIONS).signal);
}

/** The gradient of the output: of the output's type and shape. */
function readGradOutput(call: Call, value: unknown): TensorView {
  const gradOutput = readTensor('gradOutput', value);
  const { type } = call.problem;
  if (gradOutput.type !== type) {
    const expected = `${TYPE_NAMES[type]} elements, as in output`;
    throw invalidType('gradOutput', expected, TYPE_NAMES[gradOutput.type]);
  }
  if (!sameShape(gradOutput.dims, call.outputDims)) {
    const expected = `${formatShape(call.outputDims)}, the shape of output`;
    throw shapeMismatch('gradOutput', expected, formatShape(gradOutput.dims));
  }
  checkLength('gradOutput', gradOutput);
  checkDevice('gradOutput', gradOutput, call.device);
  return gradOutput;
}

function allocateGradients(saved: Saved, gradOutput: TensorView): BackwardTensors {
  const { query, key, value, mask } = saved.call;
  const hasBias = mask !== null && mask.type !== BOOL;
  return allocateAll(saved.call, 0, (make) => ({
    output: saved.output.data as FloatArray,
    lse: saved.lse.data as Float32Array,
    gradOutput: gradOutput.data as FloatArray,
    gradQuery: make(query.type, query.dims),
    gradKey: make(key.type, key.dims),
    gradValue: make(value.type, value.dims),
    gradMask: hasBias ? make(mask.type, mask.dims) : null,
  }));
}

function gradientsOf(tensors: BackwardTensors): (FloatArray | null)[] {
  return [tensors.gradQuery, tensors.gradKey, tensors.gradValue, tensors.gradMask];
}

function toGradients({ query, key, value, mask }: Call, tensors: BackwardTensors): Gradients {
  const gradients = {
    gradQuery: adoptTensor(query.type, tensors.gradQuery, query.dims),
    gradKey: adoptTensor(key.type, tensors.gradKey, key.dims),
    gradValue: adoptTensor(value.type, tensors.gradValue, value.dims),
  };
  if (mask === null || tensors.gradMask === null) return gradients;
  return { ...gradients, gradAttnMask: adoptTensor(mask.type, tensors.gradMask, mask.dims) };
}
