// Keys and values that sequences have had so far, for decoding: caches, and the pools of blocks
// that they share.

import {
  checkInteger,
  checkWord,
  describe,
  type NoOptions,
  readOptions,
  wrongWord,
} from './arguments';
import { runForward, runForwardSync } from './attention';
import { BlockPool, type BlockShape, Hold, type SourceRows } from './block-pool';
import {
  disposedError,
  invalidType,
  invalidValue,
  sdpaError,
  shapeMismatch,
  unsupported,
  valueError,
} from './errors';
import { allocateInt32, FLOAT32 } from './memory';
import type { MergedAttention } from './merge-attention';
import {
  type AttentionOptions,
  type CachedKeys,
  type Call,
  type FloatArray,
  LARGEST_HEAD_DIM,
  LAYOUTS,
  type Layout,
  resolveCachedCall,
} from './problem';
import {
  checkLength,
  copyInt32Array,
  elementCount,
  formatShape,
  readHostTensor,
  type TensorLike,
  TensorView,
  TYPE_NAMES,
} from './tensor';

/** The types that keys and values may be stored in. */
/**
 * What keys and values are stored as; queries and outputs have types of their own.
 *
 * @example
 * ```js
 * import { KVCachePool } from 'node-sdpa';
 * import assert from 'node:assert';
 * const pool = new KVCachePool({ blocks: 4, kvHeads: 2, headDim: 16, type: 'bfloat16' });
 * assert.strictEqual(pool.type, 'bfloat16');
 * pool.dispose();
 * ```
 */
export type CacheType = 'float32' | 'float16' | 'bfloat16';

const CACHE_TYPES: readonly CacheType[] = ['float32', 'float16', 'bfloat16'];
const LARGEST_INT32 = 2 ** 31 - 1;
/** A tile of keys, which must not cross from one block into another. */
const BLOCK_UNIT = 64;

/**
 * Options of a {@link KVCachePool}.
 *
 * @example
 * ```js
 * import { KVCachePool } from 'node-sdpa';
 * import assert from 'node:assert';
 * const pool = new KVCachePool({ blocks: 8, kvHeads: 2, headDim: 16, type: 'bfloat16' });
 * assert.strictEqual(pool.blocks * pool.blockLength, 512); // positions, of all sequences together
 * ```
 */
export interface KVCachePoolOptions {
  /** How many blocks there are */
  readonly blocks: number;
  /** Positions in a block, a multiple of 64. Default: 64 */
  readonly blockLength?: number;
  /** Hkv, heads of keys and values */
  readonly kvHeads: number;
  /** D, 1 to 512 */
  readonly headDim: number;
  /** Dv, 1 to 512. Default: headDim */
  readonly valueDim?: number;
  /** What keys and values are stored as. Default: `'float32'` */
  readonly type?: CacheType;
  /** Where they are: only `'cpu'` in this version, whatever computes. Default: `'cpu'` */
  readonly device?: 'cpu' | 'cuda';
}

/**
 * Options of a {@link KVCache}: either what is stored, or the pool to store it in.
 *
 * @example
 * ```js
 * import { KVCache, KVCachePool } from 'node-sdpa';
 * import assert from 'node:assert';
 * const own = new KVCache({ batch: 2, kvHeads: 2, headDim: 16, maxLength: 100 });
 * const pool = new KVCachePool({ blocks: 4, kvHeads: 2, headDim: 16 });
 * const shared = new KVCache({ batch: 32, pool }); // 32 sequences that share 256 positions
 * assert.deepStrictEqual([own.batch, shared.batch], [2, 32]);
 * ```
 */
export interface KVCacheOptions {
  /** How many sequences there are room for. Default: 1 */
  readonly batch?: number;
  /** Positions that a sequence may have. Needed without a pool; default with one: all it holds */
  readonly maxLength?: number;
  /** Where blocks come from, together with its other users. Default: a pool of the cache's own */
  readonly pool?: KVCachePool;
  /** Needed without a pool, as `headDim`; the pool's, where there is one */
  readonly kvHeads?: number;
  /** D, 1 to 512 */
  readonly headDim?: number;
  /** Dv, 1 to 512. Default: headDim */
  readonly valueDim?: number;
  /** What keys and values are stored as. Default: `'float32'` */
  readonly type?: CacheType;
  /** Where they are: only `'cpu'` in this version, whatever computes. Default: `'cpu'` */
  readonly device?: 'cpu' | 'cuda';
}

/**
 * Options of {@link KVCache.append}.
 *
 * @example
 * ```js
 * import { KVCache } from 'node-sdpa';
 * import assert from 'node:assert';
 * const cache = new KVCache({ batch: 3, kvHeads: 1, headDim: 2, maxLength: 8 });
 * const tensor = { data: new Float32Array(16), dims: [2, 1, 4, 2] };
 * cache.append(tensor, tensor, { sequences: [0, 2], lengths: [4, 1] }); // 1: of the 4 the first
 * assert.deepStrictEqual([...cache.lengths], [4, 0, 1]);
 * ```
 */
export interface AppendOptions {
  /** Which sequences, each once: entry i of key and value is for sequences[i]. Default: all */
  readonly sequences?: readonly number[];
  /** How many leading positions of each entry are appended, 0 to L. Default: L each */
  readonly lengths?: readonly number[] | Int32Array;
  /** Order of the axes of key and value. Default: `'bhsd'` */
  readonly layout?: Layout;
}

/**
 * Options of {@link KVCache.truncate}.
 *
 * @example
 * ```js
 * import { KVCache } from 'node-sdpa';
 * const cache = new KVCache({ batch: 2, kvHeads: 1, headDim: 2, maxLength: 8 });
 * cache.truncate(0, { sequences: [1] }); // makes room for another sequence
 * ```
 */
export interface TruncateOptions {
  /** Which sequences. Default: all */
  readonly sequences?: readonly number[];
}

/**
 * Options of {@link KVCache.attend}: those of {@link AttentionOptions} that make sense with a cache,
 * with other defaults where these say so.
 *
 * @example
 * ```js
 * import { KVCache } from 'node-sdpa';
 * import assert from 'node:assert';
 * const cache = new KVCache({ kvHeads: 1, headDim: 2, maxLength: 8 });
 * const tensor = { data: Float32Array.of(1, 2, 3, 4), dims: [1, 1, 2, 2] };
 * cache.append(tensor, tensor);
 * const query = { data: Float32Array.of(1, 2), dims: [1, 1, 1, 2] };
 * const { output } = cache.attendSync(query, { windowSize: [0, 0] }); // its own position alone
 * assert.deepStrictEqual([...output.data], [3, 4]);
 * ```
 */
export interface AttendOptions
  extends Pick<
    AttentionOptions,
    | 'windowSize'
    | 'scale'
    | 'softcap'
    | 'dropoutP'
    | 'dropoutPlacement'
    | 'dropoutBroadcast'
    | 'training'
    | 'seed'
    | 'offset'
    | 'generator'
    | 'batchOffset'
    | 'headOffset'
    | 'queryOffset'
    | 'keyOffset'
    | 'precision'
    | 'layout'
    | 'backend'
    | 'out'
    | 'signal'
  > {
  /** Which sequences: entry i of query is for sequences[i]; the same may come twice. Default: all */
  readonly sequences?: readonly number[];
  /** No query sees a later position. Default: true */
  readonly isCausal?: boolean;
  /**
   * Default: `'bottom-right'`, the queries are a sequence's last positions; its keys have been
   * appended already
   */
  readonly causalOffset?: AttentionOptions['causalOffset'];
}

const NO_SHAPE = {
  kvHeads: undefined,
  headDim: undefined,
  valueDim: undefined,
  type: undefined,
  device: undefined,
};
const SHAPE_NAMES = Object.keys(NO_SHAPE) as (keyof typeof NO_SHAPE)[];
const NO_POOL: NoOptions<KVCachePoolOptions> = {
  blocks: undefined,
  blockLength: undefined,
  ...NO_SHAPE,
};
const NO_CACHE: NoOptions<KVCacheOptions> = {
  batch: undefined,
  maxLength: undefined,
  pool: undefined,
  ...NO_SHAPE,
};
const NO_APPEND: NoOptions<AppendOptions> = {
  sequences: undefined,
  lengths: undefined,
  layout: undefined,
};
const NO_TRUNCATE: NoOptions<TruncateOptions> = { sequences: undefined };
const NO_ATTEND: NoOptions<AttendOptions> = {
  sequences: undefined,
  isCausal: undefined,
  causalOffset: undefined,
  windowSize: undefined,
  scale: undefined,
  softcap: undefined,
  dropoutP: undefined,
  dropoutPlacement: undefined,
  dropoutBroadcast: undefined,
  training: undefined,
  seed: undefined,
  offset: undefined,
  generator: undefined,
  batchOffset: undefined,
  headOffset: undefined,
  queryOffset: undefined,
  keyOffset: undefined,
  precision: undefined,
  layout: undefined,
  backend: undefined,
  out: undefined,
  signal: undefined,
};

/** What reaches into a pool's private field; the class assigns it. Null: disposed. */
let blocksOf: (pool: KVCachePool) => BlockPool | null;
let isPool: (value: unknown) => value is KVCachePool;

/**
 * A fixed number of blocks of keys and values that caches share, as vLLM's block tables do
 * (PagedAttention, arXiv 2309.06180). A sequence takes a block when it grows into it and gives it
 * back when it is cut; forked sequences share theirs. Memory is taken up as it is first written.
 *
 * @example
 * ```js
 * import { KVCache, KVCachePool } from 'node-sdpa';
 * import assert from 'node:assert';
 * const pool = new KVCachePool({ blocks: 2, kvHeads: 1, headDim: 4 });
 * const cache = new KVCache({ batch: 3, pool });
 * const token = { data: new Float32Array(4), dims: [1, 1, 1, 4] };
 * cache.append(token, token, { sequences: [0] });
 * cache.append(token, token, { sequences: [1] });
 * assert.strictEqual(pool.freeBlocks, 0);
 * assert.throws(() => cache.append(token, token, { sequences: [2] }), {
 *   code: 'ERR_SDPA_OUT_OF_MEMORY', // and the sequences 0 and 1 go on
 * });
 * ```
 */
export class KVCachePool {
  #blocks: BlockPool | null;
  readonly #shape: BlockShape;
  readonly #count: number;

  static {
    blocksOf = (pool) => pool.#blocks;
    isPool = (value): value is KVCachePool =>
      typeof value === 'object' && value !== null && #blocks in value;
  }

  /**
   * @param options - see {@link KVCachePoolOptions}
   * @throws TypeError `ERR_SDPA_INVALID_ARG_TYPE`, RangeError `ERR_SDPA_INVALID_ARG_VALUE`,
   *   `ERR_SDPA_UNSUPPORTED`: options of the wrong kind, or out of range
   * @throws Error `ERR_SDPA_OUT_OF_MEMORY`; `ERR_SDPA_BACKEND_UNAVAILABLE` for another device
   */
  constructor(options: KVCachePoolOptions) {
    const given = readOptions<KVCachePoolOptions>(options, NO_POOL);
    const { blocks, blockLength = BLOCK_UNIT } = given;
    const length = checkInteger('blockLength', blockLength, 1, LARGEST_INT32);
    if (length % BLOCK_UNIT !== 0) {
      throw invalidValue('blockLength', `a multiple of ${BLOCK_UNIT}`, String(length));
    }
    this.#count = checkInteger('blocks', blocks, 1, LARGEST_INT32);
    this.#shape = readShape(given, length);
    const { kvHeads, headDim, valueDim } = this.#shape;
    elementCount('blocks', [this.#count, length, kvHeads, Math.max(headDim, valueDim)]);
    this.#blocks = new BlockPool(this.#shape, this.#count);
  }

  /** How many blocks there are. */
  get blocks(): number {
    return this.#count;
  }

  /** How many of them nobody holds; 0 after `dispose()`. */
  get freeBlocks(): number {
    return this.#blocks?.freeCount ?? 0;
  }

  /** Positions in a block. */
  get blockLength(): number {
    return this.#shape.blockLength;
  }

  /** What keys and values are stored as. */
  get type(): CacheType {
    return CACHE_TYPES[this.#shape.type];
  }

  /**
   * Lets go of the memory, and with it of what all caches of the pool hold: using one then throws
   * `ERR_SDPA_DISPOSED`. Calls that run are not disturbed. Disposing twice is allowed.
   */
  dispose(): void {
    this.#blocks = null;
  }

  /** Calls `dispose()` at the end of a `using` block. */
  [Symbol.dispose](): void {
    this.dispose();
  }
}

/** Reads what a pool, or a cache with one of its own, stores. */
function readShape(
  options: Pick<KVCacheOptions, (typeof SHAPE_NAMES)[number]>,
  blockLength: number,
): BlockShape {
  const { kvHeads, headDim, type, device } = options;
  const { valueDim = headDim } = options;
  if (device === 'cuda') {
    const message = 'device: caches are in host memory in this version, got "cuda"';
    throw sdpaError('ERR_SDPA_BACKEND_UNAVAILABLE', message);
  }
  if (device !== undefined && device !== 'cpu') throw wrongWord('device', device, ['cpu', 'cuda']);
  return {
    kvHeads: checkInteger('kvHeads', kvHeads, 1, LARGEST_INT32),
    headDim: checkDim('headDim', headDim),
    valueDim: checkDim('valueDim', valueDim),
    type: checkWord('type', type, CACHE_TYPES),
    blockLength,
  };
}

function checkDim(argument: string, value: unknown): number {
  const dim = checkInteger(argument, value, 1, LARGEST_INT32);
  if (dim > LARGEST_HEAD_DIM) throw unsupported(argument, `up to ${LARGEST_HEAD_DIM}`, String(dim));
  return dim;
}

/** One sequence: its blocks, and how many positions they hold. */
interface Sequence {
  readonly blocks: number[];
  length: number;
}

/** What a cache holds of a pool, apart from the cache: it is given back if that is forgotten. */
interface Holding {
  readonly pool: KVCachePool;
  readonly sequences: readonly Sequence[];
}

const forgotten = new FinalizationRegistry(giveBack);

function giveBack({ pool, sequences }: Holding): void {
  const blocks = blocksOf(pool);
  for (const sequence of sequences) {
    if (blocks !== null) for (const block of sequence.blocks) blocks.release(block);
    sequence.blocks.length = 0;
    sequence.length = 0;
  }
}

/**
 * The keys and values of `batch` sequences, each with a length of its own, for decoding: `append`
 * what is new, then `attend` with the queries of the same positions. Sequences are numbered from 0
 * to batch - 1; every method takes all of them, or those that `sequences` names.
 *
 * Storage is in blocks ({@link KVCachePool}), of the cache's own or shared with others. `fork` lets
 * a sequence begin as another, without a copy; where they part, only one block is copied.
 * Everything is at once and on the calling thread but `attend`, which works on what the cache holds
 * when it is called: sequences may grow, be cut and given to others while it runs.
 *
 * A sequence's results are the same bit for bit alone and in a batch, and on any storage that holds
 * its keys without rounding they are those of `attentionForward` on the same keys.
 *
 * @example
 * ```js
 * import { KVCache, scaledDotProductAttentionSync } from 'node-sdpa';
 * import assert from 'node:assert';
 * const data = Float32Array.from({ length: 12 }, (_, i) => Math.sin(i));
 * const tokens = { data, dims: [1, 1, 3, 4] }; // 3 of them
 * const whole = scaledDotProductAttentionSync(tokens, tokens, tokens, { isCausal: true });
 *
 * const cache = new KVCache({ batch: 1, kvHeads: 1, headDim: 4, maxLength: 1024 });
 * for (let i = 0; i < 3; i++) {
 *   const token = { data: tokens.data.subarray(4 * i, 4 * i + 4), dims: [1, 1, 1, 4] };
 *   cache.append(token, token);
 *   const { output } = await cache.attend(token);
 *   assert.ok(Math.abs(output.data[0] - whole.data[4 * i]) < 1e-6);
 * }
 * assert.strictEqual(cache.length, 3);
 * ```
 */
export class KVCache {
  #holding: Holding | null;
  readonly #shape: BlockShape;
  readonly #maxLength: number;
  readonly #ownsPool: boolean;

  /**
   * @param options - see {@link KVCacheOptions}
   * @throws TypeError `ERR_SDPA_INVALID_ARG_TYPE`, RangeError `ERR_SDPA_INVALID_ARG_VALUE`,
   *   `ERR_SDPA_UNSUPPORTED`: options of the wrong kind, out of range, or given beside a pool
   * @throws Error `ERR_SDPA_OUT_OF_MEMORY`, `ERR_SDPA_DISPOSED`; `ERR_SDPA_BACKEND_UNAVAILABLE` for
   *   another device
   */
  constructor(options: KVCacheOptions) {
    const {
      batch = 1,
      maxLength,
      pool: given,
      ...shape
    } = readOptions<KVCacheOptions>(options, NO_CACHE);
    const count = checkInteger('batch', batch, 1, LARGEST_INT32);
    this.#ownsPool = given === undefined;
    const pool = given === undefined ? ownPool(count, maxLength, shape) : checkPool(given, shape);
    const blocks = blocksOf(pool);
    if (blocks === null) throw disposedError('KVCachePool');
    this.#shape = blocks.shape;
    const most = Math.min(LARGEST_INT32, blocks.count * blocks.shape.blockLength);
    this.#maxLength =
      maxLength === undefined ? most : checkInteger('maxLength', maxLength, 1, LARGEST_INT32);
    const sequences = Array.from({ length: count }, () => ({ blocks: [], length: 0 }));
    this.#holding = { pool, sequences };
    forgotten.register(this, this.#holding, this);
  }

  /** How many sequences there are room for. */
  get batch(): number {
    return this.#held().sequences.length;
  }

  /** Positions of the longest sequence. */
  get length(): number {
    return this.#held().sequences.reduce((most, { length }) => Math.max(most, length), 0);
  }

  /** Positions of each sequence, [batch]: a copy. */
  get lengths(): Int32Array {
    return Int32Array.from(this.#held().sequences, ({ length }) => length);
  }

  /**
   * Stores the keys and values of new positions behind those that sequences have. Elements of
   * another floating-point type than the cache's are rounded to it once.
   *
   * @param key - [n, Hkv, L, D] for n sequences, in layout `'bshd'` [n, L, Hkv, D]; float32, or the
   *   cache's type
   * @param value - [n, Hkv, L, Dv], in layout `'bshd'` [n, L, Hkv, Dv]; the key's type
   * @param options - see {@link AppendOptions}
   * @throws TypeError `ERR_SDPA_INVALID_ARG_TYPE`, RangeError `ERR_SDPA_INVALID_ARG_VALUE`,
   *   `ERR_SDPA_SHAPE_MISMATCH`: arguments that do not fit, or a length beyond maxLength
   * @throws Error `ERR_SDPA_OUT_OF_MEMORY`: there are too few free blocks; `ERR_SDPA_DISPOSED`.
   *   Nothing is stored then, and all sequences stay as they are
   *
   * @example
   * ```js
   * import { KVCache } from 'node-sdpa';
   * import assert from 'node:assert';
   * const cache = new KVCache({ kvHeads: 2, headDim: 4, maxLength: 8, type: 'float16' });
   * const key = { data: new Float32Array(24), dims: [1, 2, 3, 4] };
   * cache.append(key, key);
   * assert.strictEqual(cache.length, 3);
   * ```
   */
  append(key: TensorLike, value: TensorLike, options: AppendOptions = {}): void {
    const given = readOptions<AppendOptions>(options, NO_APPEND);
    const { sequences: chosen, lengths: givenLengths } = given;
    const headsInside = checkWord('layout', given.layout, LAYOUTS) === 1;
    const keys = readHostTensor('key', key);
    const values = readHostTensor('value', value);
    const numbers = readSequences(chosen, this.batch, false);
    const length = this.#checkRows(keys, values, numbers.length, headsInside);
    const lengths = readLengths(givenLengths, numbers.length, length);
    checkLength('key', keys);
    checkLength('value', values);
    const { sequences } = this.#held();
    const growing = numbers.map((number) => sequences[number]);
    this.#checkRoom(numbers, growing, lengths);
    const pool = this.#pool();
    growing.forEach((sequence, entry) => {
      const source = {
        key: keys.data as FloatArray,
        value: values.data as FloatArray,
        ...{ type: keys.type, entry, length, headsInside },
      };
      this.#grow(pool, sequence, source, lengths[entry]);
    });
  }

  /** Requires keys and values of one shape, and returns their length. */
  #checkRows(keys: TensorView, values: TensorView, entries: number, headsInside: boolean): number {
    const { kvHeads, headDim, valueDim, type } = this.#shape;
    if (keys.type !== type && keys.type !== FLOAT32) {
      const own = type === FLOAT32 ? '' : ` or ${TYPE_NAMES[type]}`;
      throw invalidType('key', `float32${own} elements`, TYPE_NAMES[keys.type]);
    }
    if (values.type !== keys.type) {
      const expected = `${TYPE_NAMES[keys.type]} elements, as in key`;
      throw invalidType('value', expected, TYPE_NAMES[values.type]);
    }
    const shapeOf = (length: number | string, width: number) =>
      headsInside ? [entries, length, kvHeads, width] : [entries, kvHeads, length, width];
    const fits = ({ dims }: TensorView, shape: readonly (number | string)[]) =>
      dims.length === 4 && shape.every((size, i) => typeof size === 'string' || size === dims[i]);
    if (!fits(keys, shapeOf('L', headDim))) {
      throw shapeMismatch('key', formatShape(shapeOf('L', headDim)), formatShape(keys.dims));
    }
    const length = keys.dims[headsInside ? 1 : 2];
    if (!fits(values, shapeOf(length, valueDim))) {
      const expected = `${formatShape(shapeOf(length, valueDim))} to match key`;
      throw shapeMismatch('value', expected, formatShape(values.dims));
    }
    return length;
  }

  /** Throws if the sequences cannot all grow. */
  #checkRoom(numbers: readonly number[], growing: readonly Sequence[], lengths: Int32Array): void {
    const { blockLength } = this.#shape;
    const pool = this.#pool();
    const left = new Map<number, number>(); // holders of blocks that forks grow into
    let needed = 0;
    growing.forEach(({ length, blocks }, i) => {
      const end = length + lengths[i];
      if (end > this.#maxLength) {
        const room = `at most ${this.#maxLength - length} more positions for sequence ${numbers[i]}`;
        const words = `${room}, as it has ${length} and maxLength is ${this.#maxLength}`;
        throw invalidValue('append', words, String(lengths[i]));
      }
      needed += Math.ceil(end / blockLength) - blocks.length;
      const at = length % blockLength;
      if (lengths[i] === 0 || at === 0) return;
      const last = blocks[blocks.length - 1];
      const isTaken = left.has(last); // another of these sequences has grown into it or left it
      const holders = left.get(last) ?? pool.holdersOf(last);
      const stays = holders === 1 || (!isTaken && pool.filledOf(last) === at);
      if (!stays) needed++;
      left.set(last, stays ? holders : holders - 1);
    });
    if (needed <= pool.freeCount) return;
    throw sdpaError(
      'ERR_SDPA_OUT_OF_MEMORY',
      `No room in the cache: ${needed} blocks are needed, and ${pool.freeCount} of ${pool.count} ` +
        'are free. Truncate or dispose other sequences, or make the pool larger',
    );
  }

  /** Stores the first `count` rows of the source behind the sequence's; there is room. */
  #grow(pool: BlockPool, sequence: Sequence, source: SourceRows, count: number): void {
    const { blocks } = sequence;
    const { blockLength } = this.#shape;
    for (let done = 0; done < count; ) {
      const at = sequence.length % blockLength;
      const last = blocks.length - 1;
      if (at === 0) blocks.push(pool.take());
      else if (pool.holdersOf(blocks[last]) > 1 && pool.filledOf(blocks[last]) !== at) {
        blocks[last] = pool.moveToCopy(blocks[last], at);
      }
      const rows = Math.min(blockLength - at, count - done);
      pool.write(blocks[blocks.length - 1], at, source, done, rows);
      sequence.length += rows;
      done += rows;
    }
  }

  /**
   * Keeps the first positions of sequences and gives back the blocks of the others. A sequence that
   * is no longer stays as it is.
   *
   * @param length - how many positions to keep; 0 makes room for another sequence
   * @param options - see {@link TruncateOptions}
   * @throws TypeError `ERR_SDPA_INVALID_ARG_TYPE`, RangeError `ERR_SDPA_INVALID_ARG_VALUE`
   * @throws Error `ERR_SDPA_DISPOSED`
   *
   * @example
   * ```js
   * import { KVCache } from 'node-sdpa';
   * import assert from 'node:assert';
   * const cache = new KVCache({ kvHeads: 1, headDim: 1, maxLength: 8 });
   * const tensor = { data: new Float32Array(5), dims: [1, 1, 5, 1] };
   * cache.append(tensor, tensor);
   * cache.truncate(3); // takes back what a draft model got wrong
   * assert.strictEqual(cache.length, 3);
   * ```
   */
  truncate(length: number, options: TruncateOptions = {}): void {
    const { sequences: chosen } = readOptions<TruncateOptions>(options, NO_TRUNCATE);
    const most = checkInteger('length', length, 0, LARGEST_INT32);
    const numbers = readSequences(chosen, this.batch, true);
    const { sequences } = this.#held();
    const pool = this.#pool();
    for (const number of numbers) {
      const sequence = sequences[number];
      if (sequence.length <= most) continue;
      sequence.length = most;
      const kept = Math.ceil(most / this.#shape.blockLength);
      for (const block of sequence.blocks.splice(kept)) pool.release(block);
    }
  }

  /**
   * Lets sequence `to` begin anew with all that sequence `from` has. Nothing is copied: they share
   * their blocks, until one of them grows into a block that the other has grown into already.
   *
   * @param from - number of a sequence
   * @param to - number of another; what it had is given back
   * @throws TypeError `ERR_SDPA_INVALID_ARG_TYPE`, RangeError `ERR_SDPA_INVALID_ARG_VALUE`
   * @throws Error `ERR_SDPA_DISPOSED`
   *
   * @example
   * ```js
   * import { KVCache } from 'node-sdpa';
   * import assert from 'node:assert';
   * const cache = new KVCache({ batch: 2, kvHeads: 1, headDim: 1, maxLength: 8 });
   * const prompt = { data: new Float32Array(5), dims: [1, 1, 5, 1] };
   * cache.append(prompt, prompt, { sequences: [0] });
   * cache.fork(0, 1);
   * assert.deepStrictEqual([...cache.lengths], [5, 5]);
   * ```
   */
  fork(from: number, to: number): void {
    const { sequences } = this.#held();
    const pool = this.#pool();
    const source = sequences[checkInteger('from', from, 0, sequences.length - 1)];
    const target = sequences[checkInteger('to', to, 0, sequences.length - 1)];
    if (source === target) throw valueError(`to: expected another sequence than from, got ${to}`);
    for (const block of source.blocks) pool.retain(block);
    for (const block of target.blocks) pool.release(block);
    target.blocks.splice(0, target.blocks.length, ...source.blocks);
    target.length = source.length;
  }

  /**
   * Attention of queries over what the cache holds of their sequences, beside the event loop. The
   * queries are a sequence's last positions (`'bottom-right'`), and causal: first `append` their
   * keys and values.
   *
   * Works on the lengths and blocks of the moment of the call; what happens to the cache meanwhile
   * does not change the result, and a block that it reads is not written to until it ends.
   *
   * @param query - [n, Hq, Lq, D] for n sequences, in layout `'bshd'` [n, Lq, Hq, D], Hq a multiple
   *   of Hkv; float32, or the cache's type
   * @param options - see {@link AttendOptions}
   * @returns output [n, Hq, Lq, Dv], in layout `'bshd'` [n, Lq, Hq, Dv], of the query's type; and
   *   lse [n, Hq, Lq], for {@link mergeAttention}. Rejects as `scaledDotProductAttention`, and with
   *   `ERR_SDPA_DISPOSED`
   *
   * @example
   * ```js
   * import { KVCache } from 'node-sdpa';
   * import assert from 'node:assert';
   * const cache = new KVCache({ batch: 2, kvHeads: 1, headDim: 2, maxLength: 8 });
   * const tensor = { data: Float32Array.of(1, 2, 3, 4), dims: [2, 1, 1, 2] };
   * cache.append(tensor, tensor);
   * const { output, lse } = await cache.attend(tensor);
   * assert.deepStrictEqual([...output.data], [1, 2, 3, 4]);
   * assert.deepStrictEqual(lse.dims, [2, 1, 1]);
   * ```
   */
  async attend(query: TensorLike, options: AttendOptions = {}): Promise<MergedAttention> {
    const hold = new Hold(this.#pool());
    try {
      return await runForward(this.#resolve(query, options, hold));
    } finally {
      // An aborted call may still be reading, but what it makes of it is seen by no one.
      hold.end();
    }
  }

  /**
   * As `attend`, on the calling thread; throws where that rejects.
   *
   * @param query - [n, Hq, Lq, D] for n sequences, in layout `'bshd'` [n, Lq, Hq, D]
   * @param options - see {@link AttendOptions}
   * @returns output and lse, as of `attend`
   *
   * @example
   * ```js
   * import { KVCache, mergeAttention } from 'node-sdpa';
   * import assert from 'node:assert';
   * const token = { data: Float32Array.of(1, 2), dims: [1, 1, 1, 2] };
   * const caches = [1, 2].map(() => new KVCache({ kvHeads: 1, headDim: 2, maxLength: 8 }));
   * for (const cache of caches) cache.append(token, token);
   * const merged = mergeAttention(caches.map((cache) => cache.attendSync(token)));
   * assert.deepStrictEqual([...merged.output.data], [1, 2]);
   * ```
   */
  attendSync(query: TensorLike, options: AttendOptions = {}): MergedAttention {
    const hold = new Hold(this.#pool());
    try {
      return runForwardSync(this.#resolve(query, options, hold));
    } finally {
      hold.end();
    }
  }

  /** A call on the cache as it is now; `hold` gets the blocks that it reads. */
  #resolve(query: unknown, options: AttendOptions, hold: Hold): Call {
    const given = readOptions<AttendOptions>(options, NO_ATTEND);
    return resolveCachedCall(query, given, () => {
      const numbers = readSequences(given.sequences, this.batch, true);
      const { sequences } = this.#held();
      return this.#gather(
        numbers.map((number) => sequences[number]),
        hold,
      );
    });
  }

  #gather(sequences: readonly Sequence[], hold: Hold): CachedKeys {
    const { kvHeads, blockLength, headDim, valueDim, type } = this.#shape;
    const { key, value, count } = this.#pool();
    const width = sequences.reduce((most, { blocks }) => Math.max(most, blocks.length), 1);
    const blocks = allocateInt32(sequences.length * width);
    sequences.forEach((sequence, i) => {
      blocks.set(sequence.blocks, i * width);
      for (const block of sequence.blocks) hold.add(block);
    });
    const lengths = allocateInt32(sequences.length);
    lengths.set(sequences.map(({ length }) => length));
    return {
      key: new TensorView(type, key, [count, kvHeads, blockLength, headDim], true),
      value: new TensorView(type, value, [count, kvHeads, blockLength, valueDim], true),
      blocks,
      lengths,
    };
  }

  /**
   * Gives all blocks back, and the memory where no other cache shares it. Every later use throws
   * `ERR_SDPA_DISPOSED`; calls that run are not disturbed. Disposing twice is allowed.
   *
   * @example
   * ```js
   * import { KVCache } from 'node-sdpa';
   * import assert from 'node:assert';
   * const cache = new KVCache({ kvHeads: 1, headDim: 2, maxLength: 8 });
   * cache.dispose();
   * assert.throws(() => cache.length, { code: 'ERR_SDPA_DISPOSED' });
   * ```
   */
  dispose(): void {
    if (this.#holding === null) return;
    const { pool } = this.#holding;
    giveBack(this.#holding);
    if (this.#ownsPool) pool.dispose();
    this.#holding = null;
    forgotten.unregister(this);
  }

  /** Calls `dispose()` at the end of a `using` block. */
  [Symbol.dispose](): void {
    this.dispose();
  }

  #held(): Holding {
    if (this.#holding === null) throw disposedError('KVCache');
    return this.#holding;
  }

  #pool(): BlockPool {
    const blocks = blocksOf(this.#held().pool);
    if (blocks === null) throw disposedError('KVCachePool');
    return blocks;
  }
}

type ShapeOptions = Pick<KVCacheOptions, (typeof SHAPE_NAMES)[number]>;

/** A pool as large as all sequences together can get. */
function ownPool(batch: number, maxLength: unknown, shape: ShapeOptions): KVCachePool {
  const length = checkInteger('maxLength', maxLength, 1, LARGEST_INT32);
  const blocks = batch * Math.ceil(length / BLOCK_UNIT);
  if (blocks > LARGEST_INT32) {
    throw invalidValue('maxLength', 'at most 2^31 - 1 blocks of 64 for all sequences', `${blocks}`);
  }
  return new KVCachePool({ ...(shape as KVCachePoolOptions), blocks });
}

function checkPool(pool: unknown, shape: ShapeOptions): KVCachePool {
  if (!isPool(pool)) throw invalidType('pool', 'a KVCachePool', describe(pool));
  for (const name of SHAPE_NAMES) {
    if (shape[name] !== undefined) throw valueError(`${name}: expected none beside a pool's own`);
  }
  return pool;
}

/** Numbers of sequences: all, or those listed, each once unless `mayRepeat`. */
function readSequences(value: unknown, batch: number, mayRepeat: boolean): number[] {
  if (value === undefined) return Array.from({ length: batch }, (_, i) => i);
  if (!Array.isArray(value)) {
    throw invalidType('sequences', 'an array of numbers of sequences', describe(value));
  }
  if (value.length === 0) throw invalidValue('sequences', 'at least one sequence', '[]');
  const numbers = Array.from(value, (number: unknown, i) =>
    checkInteger(`sequences[${i}]`, number, 0, batch - 1),
  );
  if (!mayRepeat && new Set(numbers).size < numbers.length) {
    throw invalidValue('sequences', 'each sequence once', describe(value));
  }
  return numbers;
}

/** How many positions of each entry are new: all, or those listed. */
function readLengths(value: unknown, entries: number, length: number): Int32Array {
  if (value === undefined) return new Int32Array(entries).fill(length);
  const given: readonly unknown[] | Int32Array | null = Array.isArray(value)
    ? [...value]
    : copyInt32Array(value);
  if (given === null) throw invalidType('lengths', 'an array or Int32Array', describe(value));
  if (given.length !== entries) {
    throw shapeMismatch('lengths', `one for each of ${entries} sequences`, String(given.length));
  }
  return Int32Array.from(given as ArrayLike<unknown>, (n, i) =>
    checkInteger(`lengths[${i}]`, n, 0, length),
  );
}
