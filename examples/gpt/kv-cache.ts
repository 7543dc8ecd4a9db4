// Keys and values of the tokens so far, so that writing a character costs one row of attention.
import { scaledDotProductAttentionSync } from 'node-sdpa';
import type { Attention } from './attention';

/** What decoding needs of a cache of one layer; tensors are [1, length, heads, headDim]. */
export interface KeyValueCache {
  /** How many tokens it holds */
  readonly length: number;
  append(key: Float32Array, value: Float32Array): void;
  /** Attention of the last tokens, whose queries these are, to all tokens up to each */
  attend(query: Float32Array): Float32Array;
}

/** A cache in plain arrays, which double as they fill. */
export class ArrayCache implements KeyValueCache {
  length = 0;
  #keys = new Float32Array(0);
  #values = new Float32Array(0);

  constructor(
    readonly heads: number,
    readonly headDim: number,
  ) {}

  append(key: Float32Array, value: Float32Array): void {
    const used = this.length * this.heads * this.headDim;
    this.#keys = extend(this.#keys, used, key);
    this.#values = extend(this.#values, used, value);
    this.length += key.length / (this.heads * this.headDim);
  }

  attend(query: Float32Array): Float32Array {
    const row = this.heads * this.headDim;
    const tensor = (data: Float32Array, length: number) => ({
      data: data.subarray(0, length * row),
      dims: [1, length, this.heads, this.headDim],
    });
    const output = scaledDotProductAttentionSync(
      tensor(query, query.length / row),
      tensor(this.#keys, this.length),
      tensor(this.#values, this.length),
      { layout: 'bshd', isCausal: true, causalOffset: 'bottom-right' },
    );
    return output.data as Float32Array;
  }
}

/** Attention of the model over a cache for each layer. */
export function cachedAttention(caches: readonly KeyValueCache[]): Attention {
  return (query, key, value, _shape, layer) => {
    caches[layer].append(key as Float32Array, value as Float32Array);
    return { output: caches[layer].attend(query as Float32Array) };
  };
}

/** `array`, of which `used` numbers are in use, with `more` after them. */
function extend(array: Float32Array<ArrayBuffer>, used: number, more: Float32Array) {
  let result = array;
  if (used + more.length > array.length) {
    result = new Float32Array(Math.max(2 * array.length, used + more.length));
    result.set(array.subarray(0, used));
  }
  result.set(more, used);
  return result;
}
