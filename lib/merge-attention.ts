// Attention over disjoint keys put together: parts computed apart (key shards, processes, machines)
// are joined by their lse into what all their keys together would have given.

import { checkWord, describe, type NoOptions, readOptions } from './arguments';
import { invalidType, invalidValue, shapeMismatch } from './errors';
import { readRow, writeRow } from './js-storage';
import { allocateFloat32, allocateFloats, BOOL, byteLength, checkBytes, FLOAT32 } from './memory';
import { type FloatArray, LAYOUTS, type Layout, sameShape } from './problem';
import {
  adoptTensor,
  checkLength,
  formatShape,
  readHostTensor,
  type Tensor,
  type TensorLike,
  type TensorView,
  TYPE_NAMES,
} from './tensor';

/**
 * Attention of some queries over some of the keys: the results of {@link attentionForward}, or
 * tensors that came from elsewhere.
 *
 * @example
 * ```js
 * import { mergeAttention } from 'node-sdpa';
 * import assert from 'node:assert';
 * const output = { data: Float32Array.of(1, 2), dims: [1, 1, 1, 2] };
 * const lse = { data: Float32Array.of(0), dims: [1, 1, 1] };
 * assert.deepStrictEqual([...mergeAttention([{ output, lse }]).output.data], [1, 2]);
 * ```
 */
export interface AttentionPart {
  /** [B, Hq, Lq, Dv], in layout `'bshd'` [B, Lq, Hq, Dv]; of a packed batch [totalQ, Hq, Dv] */
  readonly output: TensorLike;
  /** [B, Hq, Lq] float32 in either layout; of a packed batch [Hq, totalQ] */
  readonly lse: TensorLike;
}

/**
 * What {@link mergeAttention} returns: a part again, so that merging can go on.
 *
 * @example
 * ```js
 * import { mergeAttention } from 'node-sdpa';
 * import assert from 'node:assert';
 * const output = { data: Float32Array.of(1, 2), dims: [1, 1, 1, 2] };
 * const part = { output, lse: { data: Float32Array.of(0), dims: [1, 1, 1] } };
 * const half = mergeAttention([part, part]);
 * const whole = mergeAttention([half, half]);
 * assert.ok(Math.abs(whole.lse.data[0] - Math.log(4)) < 1e-6);
 * ```
 */
export interface MergedAttention {
  /** As the parts' outputs: their type and shape */
  readonly output: Tensor;
  /** As the parts' lse: the logarithm of the sum of all parts' exponentials */
  readonly lse: Tensor;
}

/**
 * Options of {@link mergeAttention}.
 *
 * @example
 * ```js
 * import { mergeAttention } from 'node-sdpa';
 * import assert from 'node:assert';
 * const output = { data: new Float32Array(6), dims: [1, 3, 2, 1] }; // 3 queries of 2 heads
 * const lse = { data: new Float32Array(6), dims: [1, 2, 3] };
 * const merged = mergeAttention([{ output, lse }], { layout: 'bshd' });
 * assert.deepStrictEqual(merged.output.dims, [1, 3, 2, 1]);
 * ```
 */
export interface MergeOptions {
  /** Order of the axes of the outputs with four. Default: `'bhsd'` */
  readonly layout?: Layout;
}

const NO_OPTIONS: NoOptions<MergeOptions> = { layout: undefined };
const BSHD = 1;

/** A part as read and checked. */
interface PartView {
  readonly output: TensorView;
  readonly lse: TensorView;
}

/**
 * Joins attention over disjoint sets of keys exactly: each part weighs `exp(lse - lse of all)`.
 * Flash-decoding (https://pytorch.org/blog/flash-decoding) by hand, or context parallelism: shards
 * of the keys, each with its `keyOffset`, may be computed in other processes or on other machines.
 *
 * Holds under dropout too, whose masks do not depend on how keys are split. A part adds nothing to
 * a row where its lse is -Infinity, whatever its output holds; a row without any key gives zeros
 * and -Infinity. Computed in float64 and rounded once to the outputs' type, on the calling thread.
 *
 * @param parts - one or more, of one shape and type
 * @param options - see {@link MergeOptions}
 * @returns the output and lse of all keys; new tensors
 * @throws TypeError `ERR_SDPA_INVALID_ARG_TYPE`: an argument of the wrong kind, an unknown option
 * @throws RangeError `ERR_SDPA_INVALID_ARG_VALUE`: no parts
 * @throws RangeError `ERR_SDPA_SHAPE_MISMATCH`: shapes that do not fit each other or their data
 * @throws Error `ERR_SDPA_DISPOSED`, `ERR_SDPA_OUT_OF_MEMORY`
 *
 * @example
 * ```js
 * import { attentionForwardSync, mergeAttention } from 'node-sdpa';
 * import assert from 'node:assert';
 * const query = { data: Float32Array.of(1, 0), dims: [1, 1, 1, 2] };
 * const first = { data: Float32Array.of(1, 2), dims: [1, 1, 1, 2] };
 * const second = { data: Float32Array.of(3, 4), dims: [1, 1, 1, 2] };
 * const both = { data: Float32Array.of(1, 2, 3, 4), dims: [1, 1, 2, 2] };
 * const merged = mergeAttention([
 *   attentionForwardSync(query, first, first),
 *   attentionForwardSync(query, second, second, { keyOffset: 1 }),
 * ]);
 * const whole = attentionForwardSync(query, both, both);
 * assert.ok(Math.abs(merged.output.data[0] - whole.output.data[0]) < 1e-6);
 * assert.ok(Math.abs(merged.lse.data[0] - whole.lse.data[0]) < 1e-6);
 * ```
 */
export function mergeAttention(
  parts: readonly AttentionPart[],
  options?: MergeOptions,
): MergedAttention {
  const layout = readLayout(options);
  const views = readParts(parts);
  const [{ output, lse }] = views;
  const [major, minor] = rowAxes(output.dims, layout, lse.dims);
  views.forEach((part, i) => {
    checkLength(`parts[${i}].output`, part.output);
    checkLength(`parts[${i}].lse`, part.lse);
  });
  checkBytes(byteLength(output.type, output.data.length) + byteLength(FLOAT32, lse.data.length));
  const merged = allocateFloats(output.type, output.data.length);
  const mergedLse = allocateFloat32(lse.data.length);
  mergeRows(views, major, minor, merged, mergedLse);
  return {
    output: adoptTensor(output.type, merged, [...output.dims]),
    lse: adoptTensor(FLOAT32, mergedLse, [...lse.dims]),
  };
}

function readLayout(options: unknown): number {
  if (options === undefined) return 0;
  return checkWord('layout', readOptions<MergeOptions>(options, NO_OPTIONS).layout, LAYOUTS);
}

function readParts(parts: unknown): PartView[] {
  if (!Array.isArray(parts)) {
    throw invalidType('parts', 'an array of {output, lse}', describe(parts));
  }
  if (parts.length === 0) throw invalidValue('parts', 'at least one {output, lse}', '[]');
  const views = Array.from(parts, readPart);
  for (let i = 1; i < views.length; i++) {
    checkSame(`parts[${i}].output`, views[i].output, views[0].output);
    checkSame(`parts[${i}].lse`, views[i].lse, views[0].lse);
  }
  return views;
}

function readPart(part: unknown, i: number): PartView {
  if (typeof part !== 'object' || part === null) {
    throw invalidType(`parts[${i}]`, 'an object {output, lse}', describe(part));
  }
  const output = readHostTensor(`parts[${i}].output`, (part as AttentionPart).output);
  const lse = readHostTensor(`parts[${i}].lse`, (part as AttentionPart).lse);
  if (output.type === BOOL) {
    throw invalidType(`parts[${i}].output`, 'float32, float16 or bfloat16 elements', 'bool');
  }
  if (lse.type !== FLOAT32) {
    throw invalidType(`parts[${i}].lse`, 'float32 elements', TYPE_NAMES[lse.type]);
  }
  return { output, lse };
}

function checkSame(argument: string, view: TensorView, first: TensorView): void {
  if (view.type !== first.type) {
    const expected = `${TYPE_NAMES[first.type]} elements, as in the first part`;
    throw invalidType(argument, expected, TYPE_NAMES[view.type]);
  }
  if (!sameShape(view.dims, first.dims)) {
    const expected = `${formatShape(first.dims)}, as in the first part`;
    throw shapeMismatch(argument, expected, formatShape(view.dims));
  }
}

/**
 * How the rows of outputs and lse lie to each other: row (group, i, j) of an output, with j < minor,
 * belongs to element (group, j, i) of lse, with i < major. 1 and 1 where the orders are the same.
 */
function rowAxes(
  output: readonly number[],
  layout: number,
  lse: readonly number[],
): [major: number, minor: number] {
  if (output.length !== 3 && output.length !== 4) {
    throw shapeMismatch('parts[0].output', '4 axes, or 3 of a packed batch', formatShape(output));
  }
  const [major, minor] = output.slice(-3, -1);
  const isHeadsFirst = output.length === 4 && layout !== BSHD;
  const leading = output.slice(0, -3);
  const expected = isHeadsFirst ? [...leading, major, minor] : [...leading, minor, major];
  if (!sameShape(lse, expected)) {
    const words = `${formatShape(expected)} to match output ${formatShape(output)}`;
    throw shapeMismatch('parts[0].lse', words, formatShape(lse));
  }
  return isHeadsFirst ? [1, 1] : [major, minor];
}

function mergeRows(
  parts: readonly PartView[],
  major: number,
  minor: number,
  merged: FloatArray,
  mergedLse: Float32Array,
): void {
  const [{ output }] = parts;
  const width = output.dims[output.dims.length - 1];
  const lses = parts.map((part) => part.lse.data as Float32Array);
  const row = new Float64Array(width);
  const sum = new Float64Array(width);
  for (let r = 0; r < mergedLse.length; r++) {
    const inGroup = r % (major * minor);
    const at = r - inGroup + (inGroup % minor) * major + Math.floor(inGroup / minor);
    const total = logSumExp(lses, at);
    mergedLse[at] = total;
    sum.fill(0);
    for (let i = 0; i < parts.length; i++) {
      if (lses[i][at] === -Infinity) continue;
      const weight = Math.exp(lses[i][at] - total);
      if (weight === 0) continue; // as everywhere: it adds nothing, not even NaN
      readRow(parts[i].output.data, output.type, r * width, width, row, 0, 1);
      for (let d = 0; d < width; d++) sum[d] += weight * row[d];
    }
    writeRow(merged, output.type, r * width, width, sum, 0, 1);
  }
}

/** log of the sum of exp over the parts; -Infinity where all are. */
function logSumExp(lses: readonly Float32Array[], at: number): number {
  let top = -Infinity;
  for (const lse of lses) top = Math.max(top, lse[at]); // NaN if any is
  if (top === -Infinity) return top;
  let sum = 0;
  for (const lse of lses) sum += Math.exp(lse[at] - top);
  return top + Math.log(sum);
}
