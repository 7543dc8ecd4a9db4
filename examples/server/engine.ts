// Continuous batching over a paged cache (Orca, Yu et al., OSDI '22; vLLM, arXiv 2309.06180): one
// loop of steps, in each of which every sequence that runs reads its next tokens. Sequences join
// and leave between steps.
//
// A sequence's tokens are the same to the bit alone and in any company: rows of the linear layers
// and sequences of a cache are, and in which pieces a text is read depends on the text alone.
import { setImmediate } from 'node:timers/promises';
import { KVCache, KVCachePool } from 'node-sdpa';
import type { AttentionRequest } from '../gpt/attention';
import type { Floats } from '../gpt/matmul';
import type { Gpt, ModelSizes } from '../gpt/model';
import { type Random, randomStreams } from '../gpt/random';
import { choose } from '../gpt/writer';
import { entropyOf, softmax } from './uncertainty';

/** A text to be written on, as JSON. */
export interface Writing {
  readonly id: number;
  /** The prompt, at least one */
  readonly tokens: readonly number[];
  /** How many to write */
  readonly count: number;
  readonly temperature: number;
  readonly topK?: number;
  /** 0 to 2^64 - 1, in decimal */
  readonly seed: string;
}

/** A token that was written, and what the model thought of it, at temperature 1. */
export interface WrittenToken {
  readonly id: number;
  readonly token: number;
  readonly probability: number;
  /** Of the distribution that it was chosen from, in nats */
  readonly entropy: number;
}

/** What one step did. */
export interface Step {
  readonly written: readonly WrittenToken[];
  /** Sequences that began to be read */
  readonly begun: readonly number[];
  /** Sequences that are written to their end */
  readonly ended: readonly number[];
  /** Sequences that an error ended */
  readonly failed: readonly { readonly id: number; readonly message: string }[];
  readonly milliseconds: number;
  /** Tokens that were read */
  readonly rows: number;
  readonly freeBlocks: number;
}

export interface EngineSizes {
  /** Sequences that run at once */
  readonly batch: number;
  /** Blocks of the pool that they share; at least what one text of the model's length needs */
  readonly blocks: number;
}

/** Positions in a block. */
const BLOCK = 64;

/** Blocks that a text takes up, in all layers. */
export function blocksOf({ layers }: ModelSizes, length: number): number {
  return layers * Math.ceil(length / BLOCK);
}

/** Tokens of prompts that one step reads: bounds how long the others wait for it. */
const PIECE = 64;

/** A sequence that runs. */
interface Sequence {
  readonly writing: Writing;
  /** Its number in every cache */
  readonly slot: number;
  /** Blocks that are kept for it */
  readonly blocks: number;
  readonly random: Random;
  /** The tokens that the model sees: the prompt's last and all since, up to the model's length */
  text: number[];
  /** How many of them the caches hold */
  read: number;
  written: number;
}

/** The next tokens of a sequence. */
interface Piece {
  readonly sequence: Sequence;
  readonly length: number;
}

export class Engine {
  readonly #pool: KVCachePool;
  /** One of each layer, with a sequence for each slot. */
  readonly #caches: readonly KVCache[];
  readonly #waiting: Writing[] = [];
  #running: Sequence[] = [];
  readonly #cancelled = new Set<number>();
  readonly #freeSlots: number[];
  #unpromised: number;
  #isLooping = false;

  /**
   * @param onStep - is told of each step, after it
   * @throws RangeError where `blocks` are too few
   */
  constructor(
    readonly model: Gpt,
    { batch, blocks }: EngineSizes,
    readonly onStep: (step: Step) => void,
  ) {
    const { layers, heads, width, length } = model.sizes;
    const least = blocksOf(model.sizes, length);
    if (blocks < least) throw new RangeError(`blocks: expected at least ${least}, got ${blocks}`);
    const shape = { kvHeads: heads, headDim: width / heads };
    this.#pool = new KVCachePool({ blocks, blockLength: BLOCK, ...shape });
    this.#caches = Array.from({ length: layers }, () => new KVCache({ batch, pool: this.#pool }));
    this.#freeSlots = Array.from({ length: batch }, (_, slot) => slot);
    this.#unpromised = blocks;
  }

  /** Takes a text; it begins when a slot and enough blocks are free, in the order of arrival. */
  add(writing: Writing): void {
    this.#waiting.push(writing);
    if (!this.#isLooping) this.#loop();
  }

  /** Forgets a text; its blocks are free before the next step. */
  cancel(id: number): void {
    const index = this.#waiting.findIndex((writing) => writing.id === id);
    if (index >= 0) this.#waiting.splice(index, 1);
    else if (this.#running.some(({ writing }) => writing.id === id)) this.#cancelled.add(id);
  }

  async #loop(): Promise<void> {
    this.#isLooping = true;
    while (this.#waiting.length + this.#running.length > 0) {
      await setImmediate(); // whoever adds and cancels has a turn
      this.#drop(this.#cancelled);
      this.#cancelled.clear();
      const begun = this.#admit();
      if (this.#running.length > 0) await this.#step(begun);
    }
    this.#isLooping = false;
  }

  /**
   * Lets waiting texts run. All blocks that one will need are kept for it from its beginning: it
   * writes exactly as many tokens as were asked for, so little lies idle, and nothing that runs is
   * ever stopped half-way for want of a block.
   */
  #admit(): number[] {
    const begun: number[] = [];
    for (;;) {
      const next = this.#waiting.at(0);
      if (next === undefined) return begun;
      const { sizes } = this.model;
      const text = next.tokens.slice(-sizes.length);
      const blocks = blocksOf(sizes, Math.min(sizes.length, text.length + next.count));
      const slot = this.#freeSlots.at(-1);
      if (slot === undefined || blocks > this.#unpromised) return begun;
      this.#waiting.shift();
      this.#freeSlots.pop();
      this.#unpromised -= blocks;
      const [random] = randomStreams(BigInt(next.seed), 1);
      this.#running.push({ writing: next, slot, blocks, random, text, read: 0, written: 0 });
      begun.push(next.id);
    }
  }

  async #step(begun: readonly number[]): Promise<void> {
    const start = performance.now();
    const pieces = this.#choosePieces();
    const written: WrittenToken[] = [];
    const ended: number[] = [];
    let failed: { id: number; message: string }[] = [];
    try {
      const logits = await this.#read(pieces);
      for (const [i, { sequence }] of pieces.entries()) {
        if (sequence.read < sequence.text.length) continue; // more of its prompt is to come
        written.push(this.#write(sequence, logits[i]));
        if (sequence.written === sequence.writing.count) ended.push(sequence.writing.id);
      }
    } catch (error) {
      // The caches of these hold a part of the step; the others are as they were.
      const { message } = error as Error;
      failed = pieces.map(({ sequence }) => ({ id: sequence.writing.id, message }));
    }
    this.#drop(new Set([...ended, ...failed.map(({ id }) => id)]));
    this.onStep({
      written: written.filter(({ id }) => !this.#cancelled.has(id)),
      begun,
      ended: ended.filter((id) => !this.#cancelled.has(id)),
      failed,
      milliseconds: performance.now() - start,
      rows: pieces.reduce((sum, { length }) => sum + length, 0),
      freeBlocks: this.#pool.freeBlocks,
    });
  }

  /** One token of each sequence that writes, and as much of prompts as a step may read. */
  #choosePieces(): Piece[] {
    let left = PIECE;
    const pieces: Piece[] = [];
    for (const sequence of this.#running) {
      const length = Math.min(PIECE, sequence.text.length - sequence.read);
      if (length > 1 && length > left) continue;
      if (length > 1) left -= length;
      pieces.push({ sequence, length });
    }
    // Pieces of one length lie together, and are one call of attention.
    return pieces.sort((a, b) => a.length - b.length);
  }

  /** Reads pieces in one pass through the model; gives the logits after each. */
  async #read(pieces: readonly Piece[]): Promise<Float32Array[]> {
    const { vocabulary } = this.model.sizes;
    const tokens: number[] = [];
    const positions: number[] = [];
    const ends: number[] = [];
    for (const { sequence, length } of pieces) {
      for (let i = sequence.read; i < sequence.read + length; i++) {
        tokens.push(sequence.text[i]);
        positions.push(i);
      }
      ends.push(tokens.length);
    }
    const logits = await this.model.forwardRows(
      Int32Array.from(tokens),
      Int32Array.from(positions),
      (request) => this.#attend(request, pieces),
    );
    for (const { sequence, length } of pieces) sequence.read += length;
    return ends.map(
      (end) => logits.subarray((end - 1) * vocabulary, end * vocabulary) as Float32Array,
    );
  }

  /**
   * Attention of one layer: a call for all pieces of one length, and at once, as this thread has
   * nothing else to do.
   */
  async #attend(request: AttentionRequest, pieces: readonly Piece[]): Promise<Floats> {
    const { heads, width } = this.model.sizes;
    const cache = this.#caches[request.layer];
    const output = new Float32Array(request.query.length);
    let row = 0;
    for (let i = 0; i < pieces.length; ) {
      const { length } = pieces[i];
      const group = pieces.slice(i).filter((piece) => piece.length === length);
      const [from, to] = [row * width, (row + group.length * length) * width];
      const [query, key, value] = [request.query, request.key, request.value].map((rows) => ({
        data: rows.subarray(from, to) as Float32Array,
        dims: [group.length, length, heads, width / heads],
      }));
      const options = {
        sequences: group.map(({ sequence }) => sequence.slot),
        layout: 'bshd',
      } as const;
      cache.append(key, value, options);
      output.set(cache.attendSync(query, options).output.data as Float32Array, from);
      i += group.length;
      row += group.length * length;
    }
    return output;
  }

  /** Chooses the next token of a sequence, and makes room where the text has grown too long. */
  #write(sequence: Sequence, logits: Float32Array): WrittenToken {
    const { writing, random, text } = sequence;
    const { length } = this.model.sizes;
    const token = choose(logits, { ...writing, random });
    const probabilities = softmax(logits);
    sequence.written++;
    text.push(token);
    if (sequence.read === length) {
      // As in examples/gpt/writer.ts: the last half is read again from position 0 on.
      sequence.text = text.slice(-Math.ceil(length / 2));
      this.#forget(sequence);
    }
    const entropy = entropyOf(probabilities);
    return { id: writing.id, token, probability: probabilities[token], entropy };
  }

  #forget(sequence: Sequence): void {
    for (const cache of this.#caches) cache.truncate(0, { sequences: [sequence.slot] });
    sequence.read = 0;
  }

  #drop(ids: ReadonlySet<number>): void {
    if (ids.size === 0) return;
    for (const sequence of this.#running.filter(({ writing }) => ids.has(writing.id))) {
      this.#forget(sequence);
      this.#freeSlots.push(sequence.slot);
      this.#unpromised += sequence.blocks;
    }
    this.#running = this.#running.filter(({ writing }) => !ids.has(writing.id));
  }
}
