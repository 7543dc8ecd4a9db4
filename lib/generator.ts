// Where the randomness of dropout comes from: a seed, and an offset that grows with every call.

import { randomBytes } from 'node:crypto';
import {
  checkPlainObject,
  checkUint64,
  describe,
  highWord,
  joinWords,
  lowWord,
  type NoOptions,
  readOptions,
} from './arguments';
import { invalidType } from './errors';
import { philox4x32 } from './js-dropout';

/**
 * How a {@link Generator} starts; each a safe non-negative integer or a bigint below 2^64.
 *
 * @example
 * ```js
 * import { Generator } from 'node-sdpa';
 * import assert from 'node:assert';
 * const generator = new Generator({ seed: 2n ** 63n, offset: 5 });
 * assert.deepStrictEqual(generator.getState(), { seed: 2n ** 63n, offset: 5n });
 * ```
 */
export interface GeneratorOptions {
  /** Default: 64 bits from node:crypto */
  readonly seed?: number | bigint;
  /** Default: 0 */
  readonly offset?: number | bigint;
}

/**
 * All that a {@link Generator} consists of: the seed, and the offset that its next call takes.
 *
 * @example
 * ```js
 * import { Generator } from 'node-sdpa';
 * import assert from 'node:assert';
 * const saved = new Generator({ seed: 1 }).getState();
 * assert.deepStrictEqual(saved, { seed: 1n, offset: 0n });
 * ```
 */
export interface GeneratorState {
  /** 0 to 2^64 - 1 */
  readonly seed: bigint;
  /** The next to be drawn: 0 to 2^64 - 1 */
  readonly offset: bigint;
}

/** A seed and an offset as 32-bit halves, without the cost of bigints. */
export interface DrawnState {
  seedLo: number;
  seedHi: number;
  offsetLo: number;
  offsetHi: number;
}

const NO_OPTIONS: NoOptions<GeneratorOptions> = { seed: undefined, offset: undefined };

/** Tells the counters that fork a generator from all that decide on dropout: "FORK". */
const FORK_DERIVATION = 0x464f524b;

// What reaches into a Generator's private fields; the class assigns it.
let drawFrom: (generator: Generator, target: DrawnState, count: number) => void;
let isGeneratorObject: (value: object) => boolean;

/**
 * A source of dropout masks. Every call with dropout takes the seed and the next offset, so that
 * no two calls share a mask, and the same start gives the same masks again, on every backend.
 *
 * The role is that of PyTorch's `torch.Generator`; the numbers are Philox4x32-10's (Salmon et
 * al., "Parallel random numbers: as easy as 1, 2, 3", SC'11).
 *
 * @example
 * ```js
 * import { Generator, scaledDotProductAttentionSync } from 'node-sdpa';
 * import assert from 'node:assert';
 * const ones = { data: new Float32Array(64).fill(1), dims: [1, 1, 1, 64] };
 * const options = { dropoutP: 0.5, dropoutPlacement: 'context', training: true };
 * const run = (generator) =>
 *   scaledDotProductAttentionSync(ones, ones, ones, { ...options, generator }).data;
 * const generator = new Generator({ seed: 42 });
 * const [first, second] = [run(generator), run(generator)];
 * assert.notDeepStrictEqual(first, second);
 * assert.deepStrictEqual(run(new Generator({ seed: 42 })), first);
 * ```
 */
export class Generator {
  #seedLo = 0;
  #seedHi = 0;
  #offsetLo = 0;
  #offsetHi = 0;

  /**
   * @param options - `seed` (default: random, from node:crypto) and `offset` (default: 0)
   * @throws TypeError `ERR_SDPA_INVALID_ARG_TYPE`: neither integer nor bigint; unknown option
   * @throws RangeError `ERR_SDPA_INVALID_ARG_VALUE`: negative, beyond 64 bits, or not an integer
   *
   * @example
   * ```js
   * import { Generator } from 'node-sdpa';
   * import assert from 'node:assert';
   * assert.strictEqual(new Generator({ seed: 3 }).getState().seed, 3n);
   * assert.notStrictEqual(new Generator().getState().seed, new Generator().getState().seed);
   * ```
   */
  constructor(options: GeneratorOptions = {}) {
    const given = readOptions<GeneratorOptions>(options, NO_OPTIONS);
    const { seed = randomBytes(8).readBigUInt64LE(), offset = 0 } = given;
    this.#set(checkUint64('seed', seed), checkUint64('offset', offset));
  }

  static {
    isGeneratorObject = (value) => #seedLo in value;
    drawFrom = (generator, target, count) => generator.#draw(target, count);
  }

  /**
   * Starts again from a seed, at offset 0.
   *
   * @param seed - a safe non-negative integer, or a bigint below 2^64
   * @returns the generator itself
   * @throws TypeError `ERR_SDPA_INVALID_ARG_TYPE`: neither integer nor bigint
   * @throws RangeError `ERR_SDPA_INVALID_ARG_VALUE`: negative, beyond 64 bits, or not an integer
   *
   * @example
   * ```js
   * import { Generator } from 'node-sdpa';
   * import assert from 'node:assert';
   * const generator = new Generator({ offset: 9 }).manualSeed(1);
   * assert.deepStrictEqual(generator.getState(), { seed: 1n, offset: 0n });
   * ```
   */
  manualSeed(seed: number | bigint): this {
    this.#set(checkUint64('seed', seed), 0);
    return this;
  }

  /**
   * The seed and the next offset, for a checkpoint.
   *
   * @example
   * ```js
   * import { Generator } from 'node-sdpa';
   * import assert from 'node:assert';
   * const { seed, offset } = new Generator({ seed: 8 }).getState();
   * assert.deepStrictEqual([seed, offset], [8n, 0n]);
   * ```
   */
  getState(): GeneratorState {
    return {
      seed: joinWords(this.#seedLo, this.#seedHi),
      offset: joinWords(this.#offsetLo, this.#offsetHi),
    };
  }

  /**
   * Goes on from a state that `getState()` gave.
   *
   * @param state - `seed` and `offset`, both needed
   * @throws TypeError `ERR_SDPA_INVALID_ARG_TYPE`: not such an object
   * @throws RangeError `ERR_SDPA_INVALID_ARG_VALUE`: a number that is out of range
   *
   * @example
   * ```js
   * import { Generator } from 'node-sdpa';
   * import assert from 'node:assert';
   * const generator = new Generator();
   * generator.setState({ seed: 6n, offset: 11n });
   * assert.deepStrictEqual(generator.getState(), { seed: 6n, offset: 11n });
   * ```
   */
  setState(state: { readonly seed: number | bigint; readonly offset: number | bigint }): void {
    checkPlainObject('state', state);
    const { seed, offset } = state;
    this.#set(checkUint64('state.seed', seed), checkUint64('state.offset', offset));
  }

  /**
   * A new generator whose masks have nothing to do with this one's: its seed is derived from this
   * seed and offset by Philox, and this generator goes on one offset further. So forks are
   * reproducible, and each is different: one for every layer, worker or data loader.
   *
   * @example
   * ```js
   * import { Generator } from 'node-sdpa';
   * import assert from 'node:assert';
   * const parent = new Generator({ seed: 1 });
   * const [first, second] = [parent.fork(), parent.fork()];
   * assert.notDeepStrictEqual(first.getState(), second.getState());
   * assert.deepStrictEqual(new Generator({ seed: 1 }).fork().getState(), first.getState());
   * assert.strictEqual(parent.getState().offset, 2n);
   * ```
   */
  fork(): Generator {
    const { seedLo, seedHi, offsetLo, offsetHi } = this.#draw(newDrawnState(), 1);
    const words = new Uint32Array(4);
    philox4x32(offsetLo, offsetHi, 0, FORK_DERIVATION, seedLo, seedHi, 10, words);
    return new Generator({ seed: joinWords(words[0], words[1]) });
  }

  #set(seed: number | bigint, offset: number | bigint): void {
    this.#seedLo = lowWord(seed);
    this.#seedHi = highWord(seed);
    this.#offsetLo = lowWord(offset);
    this.#offsetHi = highWord(offset);
  }

  /** Writes the seed and the next offset, and steps the offset by `count` modulo 2^64. */
  #draw(target: DrawnState, count: number): DrawnState {
    target.seedLo = this.#seedLo;
    target.seedHi = this.#seedHi;
    target.offsetLo = this.#offsetLo;
    target.offsetHi = this.#offsetHi;
    const low = this.#offsetLo + count;
    this.#offsetLo = low >>> 0;
    if (low !== this.#offsetLo) this.#offsetHi = (this.#offsetHi + 1) >>> 0;
    return target;
  }
}

function newDrawnState(): DrawnState {
  return { seedLo: 0, seedHi: 0, offsetLo: 0, offsetHi: 0 };
}

/**
 * Takes a seed and `count` offsets, of which the first is written, from a generator, or from the
 * default one where it is undefined.
 */
export function draw(generator: Generator | undefined, target: DrawnState, count: number): void {
  drawFrom(generator ?? getDefaultGenerator(), target, count);
}

/** A Generator, or undefined. */
export function checkGenerator(argument: string, value: unknown): Generator | undefined {
  if (value === undefined) return undefined;
  if (typeof value !== 'object' || value === null || !isGeneratorObject(value)) {
    throw invalidType(argument, 'a Generator', describe(value));
  }
  return value as Generator;
}

let defaultGenerator: Generator | undefined;

/** The generator of calls that name none; each thread has its own, randomly seeded. */
function getDefaultGenerator(): Generator {
  defaultGenerator ??= new Generator();
  return defaultGenerator;
}

/**
 * Seeds the default generator, from which every call with dropout draws that has neither a `seed`
 * nor a `generator`. Without this, it has a random seed from node:crypto. Each worker thread has
 * a default generator of its own.
 *
 * The name is that of PyTorch's `torch.manual_seed`.
 *
 * @param seed - a safe non-negative integer, or a bigint below 2^64
 * @returns the default generator, now at offset 0
 * @throws TypeError `ERR_SDPA_INVALID_ARG_TYPE`: neither integer nor bigint
 * @throws RangeError `ERR_SDPA_INVALID_ARG_VALUE`: negative, beyond 64 bits, or not an integer
 *
 * @example
 * ```js
 * import { attentionForwardSync, manualSeed } from 'node-sdpa';
 * import assert from 'node:assert';
 * const ones = { data: new Float32Array(4).fill(1), dims: [1, 1, 1, 4] };
 * manualSeed(7);
 * const { rngState } = attentionForwardSync(ones, ones, ones, { dropoutP: 0.1, training: true });
 * assert.deepStrictEqual(rngState, { seed: 7n, offset: 0n });
 * ```
 */
export function manualSeed(seed: number | bigint): Generator {
  return getDefaultGenerator().manualSeed(seed);
}
