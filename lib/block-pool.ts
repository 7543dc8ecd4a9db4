// Blocks of keys and values with counts of who uses them: what caches store, share and copy.

import { floatsToBfloat16s, floatsToHalves } from './float16';
import { allocateFloats, BFLOAT16, FLOAT16 } from './memory';
import type { FloatArray } from './problem-header';

/** What the blocks of a pool are. */
export interface BlockShape {
  readonly kvHeads: number;
  readonly headDim: number;
  readonly valueDim: number;
  /** FLOAT32, FLOAT16 or BFLOAT16 */
  readonly type: number;
  /** Positions in a block */
  readonly blockLength: number;
}

/**
 * Rows for one sequence: those of `entry` in tensors [n, heads, length, width] or, with heads inside,
 * [n, length, heads, width].
 */
export interface SourceRows {
  readonly key: FloatArray;
  readonly value: FloatArray;
  /** FLOAT32, or the pool's type */
  readonly type: number;
  readonly entry: number;
  readonly length: number;
  readonly headsInside: boolean;
}

/**
 * Memory for `count` blocks of keys [kvHeads, blockLength, headDim] and values.
 *
 * Invariant: a row that more than one holder can see is never written. A block with several
 * holders takes a row only where no holder has come yet, at its high-water mark; all else goes
 * to a copy. Calls that run hold their blocks, so nothing that they read changes.
 */
export class BlockPool {
  readonly key: FloatArray; // [count, kvHeads, blockLength, headDim]
  readonly value: FloatArray; // [count, kvHeads, blockLength, valueDim]
  private readonly holders: Int32Array;
  /** Rows of each block that have been written. */
  private readonly filled: Int32Array;
  /** Stack of the free blocks. */
  private readonly free: Int32Array;
  private freeBlocks: number;

  constructor(
    readonly shape: BlockShape,
    readonly count: number,
  ) {
    const rows = count * shape.kvHeads * shape.blockLength;
    this.key = allocateFloats(shape.type, rows * shape.headDim);
    this.value = allocateFloats(shape.type, rows * shape.valueDim);
    this.holders = new Int32Array(count);
    this.filled = new Int32Array(count);
    this.free = Int32Array.from({ length: count }, (_, i) => count - 1 - i);
    this.freeBlocks = count;
  }

  get freeCount(): number {
    return this.freeBlocks;
  }

  holdersOf(block: number): number {
    return this.holders[block];
  }

  filledOf(block: number): number {
    return this.filled[block];
  }

  /** A block with one holder; there must be a free one. */
  take(): number {
    const block = this.free[--this.freeBlocks];
    this.holders[block] = 1;
    this.filled[block] = 0;
    return block;
  }

  retain(block: number): void {
    this.holders[block]++;
  }

  release(block: number): void {
    if (--this.holders[block] === 0) this.free[this.freeBlocks++] = block;
  }

  /** A new block with the first `rows` rows of another, which loses a holder. */
  moveToCopy(block: number, rows: number): number {
    const copy = this.take();
    const { kvHeads, blockLength, headDim, valueDim } = this.shape;
    for (let head = 0; head < kvHeads; head++) {
      const from = (block * kvHeads + head) * blockLength;
      const to = (copy * kvHeads + head) * blockLength;
      this.key.copyWithin(to * headDim, from * headDim, (from + rows) * headDim);
      this.value.copyWithin(to * valueDim, from * valueDim, (from + rows) * valueDim);
    }
    this.filled[copy] = rows;
    this.release(block);
    return copy;
  }

  /** Writes `count` rows, from row `first` of the source on, to a block from row `at` on. */
  write(block: number, at: number, source: SourceRows, first: number, count: number): void {
    const { headDim, valueDim } = this.shape;
    this.writeRows(this.key, headDim, source.key, block, at, source, first, count);
    this.writeRows(this.value, valueDim, source.value, block, at, source, first, count);
    this.filled[block] = at + count;
  }

  private writeRows(
    to: FloatArray,
    width: number,
    from: FloatArray,
    block: number,
    at: number,
    { type, entry, length, headsInside }: SourceRows,
    first: number,
    count: number,
  ): void {
    const { kvHeads, blockLength } = this.shape;
    // Rows of one head lie together, unless heads are inside.
    const run = headsInside ? 1 : count;
    for (let head = 0; head < kvHeads; head++) {
      const target = (block * kvHeads + head) * blockLength + at;
      for (let i = 0; i < count; i += run) {
        const row = headsInside
          ? (entry * length + first + i) * kvHeads + head
          : (entry * kvHeads + head) * length + first;
        const rows = from.subarray(row * width, (row + run) * width);
        this.store(to, (target + i) * width, rows, type);
      }
    }
  }

  /** Stores elements in the pool's type, rounded once. */
  private store(to: FloatArray, at: number, elements: FloatArray, type: number): void {
    const own = this.shape.type;
    if (type === own) to.set(elements, at);
    else {
      const target = to.subarray(at, at + elements.length) as Uint16Array;
      if (own === FLOAT16) floatsToHalves(elements, target);
      if (own === BFLOAT16) floatsToBfloat16s(elements, target);
    }
  }
}

/** The blocks that a call reads: none is written to or given away before its end. */
export class Hold {
  private readonly blocks: number[] = [];

  constructor(private readonly pool: BlockPool) {}

  add(block: number): void {
    this.pool.retain(block);
    this.blocks.push(block);
  }

  end(): void {
    for (const block of this.blocks) this.pool.release(block);
  }
}
