// The dropout decisions of a call, without the call: the very bits that the kernels use.

import { checkUint64, checkWord, checkWordList, type NoOptions, readOptions } from './arguments';
import { selectBackend } from './backends';
import { sdpaError, shapeMismatch, unsupported } from './errors';
import { checkBytes } from './memory';
import {
  type BackendName,
  BROADCAST_AXES,
  checkPosition,
  checkProbability,
  type Draft,
  type DropoutBroadcastAxis,
  type DropoutPlacement,
  LARGEST_HEAD_DIM,
  newProblem,
  PLACEMENTS,
  setSeed,
} from './problem';
import { elementCount, formatShape, readDims } from './tensor';

/**
 * Options of {@link dropoutMask}; those of an attention call without their prefix.
 *
 * @example
 * ```js
 * import { dropoutMask } from 'node-sdpa';
 * import assert from 'node:assert';
 * const whole = dropoutMask([1, 1, 1, 16], { p: 0.5, seed: 1 });
 * const half = dropoutMask([1, 1, 1, 8], { p: 0.5, seed: 1, keyOffset: 8 });
 * assert.deepStrictEqual(half, whole.slice(8));
 * ```
 */
export interface DropoutMaskOptions {
  /** Probability of a drop, 0 to 1 */
  readonly p: number;
  /** Default: `'weights'`; `'scores'` has the same decisions, `'context'` others */
  readonly placement?: DropoutPlacement;
  /** Chooses the decisions, together with `offset`: 0 to 2^64 - 1 */
  readonly seed: number | bigint;
  /** Default: 0 */
  readonly offset?: number | bigint;
  /** Axes along which a decision is shared. Default: none */
  readonly broadcast?: readonly DropoutBroadcastAxis[];
  /** Position of the first batch entry in the whole. Default: 0 */
  readonly batchOffset?: number;
  /** Position of the first head in the whole. Default: 0 */
  readonly headOffset?: number;
  /** Position of the first query in the whole. Default: 0 */
  readonly queryOffset?: number;
  /** Position of the first key in the whole. Default: 0 */
  readonly keyOffset?: number;
  /** What computes; all give the same. Default: `'auto'` */
  readonly backend?: BackendName;
}

const NO_OPTIONS: NoOptions<DropoutMaskOptions> = {
  p: undefined,
  placement: undefined,
  seed: undefined,
  offset: undefined,
  broadcast: undefined,
  batchOffset: undefined,
  headOffset: undefined,
  queryOffset: undefined,
  keyOffset: undefined,
  backend: undefined,
};

const CONTEXT = 1;

/**
 * The dropout decisions that an attention call with the same options makes: 1 keeps, 0 drops.
 *
 * The decisions are those of Philox4x32-10 (Salmon et al., SC'11) at the coordinates (batch,
 * head, query, key or channel), so that every part of a mask can be had on its own.
 *
 * @param dims - [batch, query heads, query length, key length]; for placement `'context'`
 *   [batch, query heads, query length, value dim], with a value dim up to 512
 * @param options - `p` and `seed` are needed
 * @returns one byte for each element of `dims`, row-major
 * @throws TypeError `ERR_SDPA_INVALID_ARG_TYPE`: an argument of the wrong kind; unknown option
 * @throws RangeError `ERR_SDPA_INVALID_ARG_VALUE`: a value out of range
 * @throws RangeError `ERR_SDPA_SHAPE_MISMATCH`: dims that are not four
 * @throws Error `ERR_SDPA_BACKEND_UNAVAILABLE`: the named backend cannot run here
 *
 * @example
 * ```js
 * import { dropoutMask } from 'node-sdpa';
 * import assert from 'node:assert';
 * const seed = 0x123456789abcdef0n;
 * const mask = dropoutMask([2, 3, 1, 8], { p: 0.1, seed, offset: 7n });
 * assert.deepStrictEqual([...mask.slice(-8)], [1, 1, 1, 1, 1, 0, 1, 1]); // b = 1, h = 2
 * ```
 */
export function dropoutMask(
  dims: readonly number[],
  options: DropoutMaskOptions,
): Uint8Array<ArrayBuffer> {
  const given = readOptions<DropoutMaskOptions>(options, NO_OPTIONS);
  const { p, placement, seed, offset = 0, broadcast } = given;
  const { batchOffset = 0, headOffset = 0, queryOffset = 0, keyOffset = 0, backend } = given;
  const problem = newProblem();
  problem.dropoutPlacement = checkWord('placement', placement, PLACEMENTS);
  problem.dropoutBroadcast = checkWordList('broadcast', broadcast, BROADCAST_AXES);
  problem.dropoutP = checkProbability('p', p);
  setSeed(problem, checkUint64('seed', seed), checkUint64('offset', offset));
  const length = resolveDims(problem, dims);
  problem.batchOffset = checkPosition('batchOffset', batchOffset, problem.batch);
  problem.headOffset = checkPosition('headOffset', headOffset, problem.queryHeads);
  problem.queryOffset = checkPosition('queryOffset', queryOffset, problem.queryLength);
  problem.keyOffset = checkPosition('keyOffset', keyOffset, problem.keyLength);
  const mask = allocateMask(length);
  selectBackend(backend).dropoutMask(problem, mask);
  return mask;
}

/** Writes the sizes; those that a mask does not depend on become 1. Returns the element count. */
function resolveDims(problem: Draft, value: unknown): number {
  const dims = readDims(value, 'dims');
  if (dims.length !== 4) throw shapeMismatch('dims', '4 sizes', formatShape(dims));
  const isContext = problem.dropoutPlacement === CONTEXT;
  if (isContext && dims[3] > LARGEST_HEAD_DIM) {
    throw unsupported('dims', `a value dim up to ${LARGEST_HEAD_DIM}`, formatShape(dims));
  }
  problem.batch = dims[0];
  problem.queryHeads = dims[1];
  problem.kvHeads = dims[1];
  problem.queryLength = dims[2];
  problem.keyLength = isContext ? 1 : dims[3];
  problem.headDim = 1;
  problem.valueDim = isContext ? dims[3] : 1;
  return elementCount('dims', dims);
}

function allocateMask(length: number): Uint8Array<ArrayBuffer> {
  checkBytes(length);
  try {
    return new Uint8Array(length);
  } catch (cause) {
    throw sdpaError('ERR_SDPA_OUT_OF_MEMORY', `No memory for a mask of ${length} bytes`, cause);
  }
}
