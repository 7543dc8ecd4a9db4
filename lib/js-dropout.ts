// Which element drops, and its rescale: Philox4x32-10 (Salmon et al., SC'11) and the keep rule,
// the twin of native/core/dropout.h.

import type { Problem } from './problem';

/** A call's dropout, resolved once: element u of 16 random bits is kept where u >= threshold. */
export interface ResolvedDropout {
  /** 0 (keeps all) to 65536 (keeps none) */
  readonly threshold: number;
  /** What kept elements are multiplied by: exact for the effective probability, as float32 */
  readonly keepScale: number;
  /** The generator's key for every decision of the call */
  readonly k0: number;
  readonly k1: number;
}

/** Value channels rather than keys are dropped: `dropoutPlacement` of a Problem. */
const CONTEXT = 1;
const BROADCAST_BATCH = 1;
const BROADCAST_HEAD = 2;
const BROADCAST_QUERY = 4;

/** Marks the counters that derive a call's key. */
const KEY_DERIVATION = 0x4e545441;

const words = new Uint32Array(4);
/** The eight decisions of a call: the words' 16-bit halves, low half first on any machine. */
const halves = new Uint16Array(words.buffer);
const HALF_SWAP = new Uint8Array(new Uint32Array([1]).buffer)[0] === 1 ? 0 : 1;

/** One Philox call: four random words from a counter and a key, all unsigned 32-bit. */
export function philox4x32(
  c0: number,
  c1: number,
  c2: number,
  c3: number,
  k0: number,
  k1: number,
  rounds: number,
  out: Uint32Array,
): void {
  let x0 = c0 | 0;
  let x1 = c1 | 0;
  let x2 = c2 | 0;
  let x3 = c3 | 0;
  let key0 = k0 | 0;
  let key1 = k1 | 0;
  for (let round = 0; round < rounds; round++) {
    const high0 = multiplyHigh(0xd251, 0x1f53, x0);
    const high1 = multiplyHigh(0xcd9e, 0x8d57, x2);
    const low0 = Math.imul(0xd2511f53, x0);
    const low1 = Math.imul(0xcd9e8d57, x2);
    x0 = high1 ^ x1 ^ key0;
    x1 = low1;
    x2 = high0 ^ x3 ^ key1;
    x3 = low0;
    key0 = (key0 + 0x9e3779b9) | 0;
    key1 = (key1 + 0xbb67ae85) | 0;
  }
  out[0] = x0;
  out[1] = x1;
  out[2] = x2;
  out[3] = x3;
}

/** The high word of a 32 x 32 bit product, from 16-bit halves: `a` is given as its two halves. */
function multiplyHigh(aHigh: number, aLow: number, b: number): number {
  const bHigh = b >>> 16;
  const bLow = b & 0xffff;
  const middle = (Math.imul(aHigh, bLow) + (Math.imul(aLow, bLow) >>> 16)) | 0;
  const carry = (Math.imul(aLow, bHigh) + (middle & 0xffff)) | 0;
  return (Math.imul(aHigh, bHigh) + (middle >>> 16) + (carry >>> 16)) | 0;
}

/** Threshold, scale and key of a call's dropout. */
export function resolveDropout(problem: Problem): ResolvedDropout {
  const p = problem.dropoutP;
  const rounded = Math.min(65535, Math.max(1, Math.floor(p * 65536 + 0.5)));
  const threshold = p === 0 ? 0 : p === 1 ? 65536 : rounded;
  const keepScale = threshold === 65536 ? 0 : Math.fround(65536 / (65536 - threshold));
  const lattice = problem.dropoutPlacement === CONTEXT ? 1 : 0;
  const stream = lattice + 256 * problem.dropoutBroadcast;
  const { offsetLo, offsetHi, seedLo, seedHi } = problem;
  philox4x32(offsetLo, offsetHi, stream, KEY_DERIVATION, seedLo, seedHi, 10, words);
  return { threshold, keepScale, k0: words[0], k1: words[1] };
}

/**
 * Writes the decisions (1 keeps) of one query row: `count` of them, for the keys or channels
 * from `first` on. Batch, head, query and `first` are positions in this call, not in the whole.
 */
export function fillKeepRow(
  problem: Problem,
  dropout: ResolvedDropout,
  batch: number,
  head: number,
  query: number,
  first: number,
  count: number,
  out: Uint8Array,
  outStart: number,
): void {
  const { dropoutBroadcast: broadcast, batchOffset, headOffset, queryOffset } = problem;
  const b = broadcast & BROADCAST_BATCH ? 0 : batchOffset + batch;
  const h = broadcast & BROADCAST_HEAD ? 0 : headOffset + head;
  const q = broadcast & BROADCAST_QUERY ? 0 : queryOffset + query;
  const columnOffset = problem.dropoutPlacement === CONTEXT ? 0 : problem.keyOffset;
  const { threshold, k0, k1 } = dropout;
  // One Philox call decides for eight columns aligned in the whole, so the first may be cut.
  let column = columnOffset + first;
  let done = 0;
  while (done < count) {
    philox4x32(column >>> 3, q, h, b, k0, k1, 10, words);
    const end = Math.min(8, (column & 7) + count - done);
    for (let i = column & 7; i < end; i++) {
      out[outStart + done] = halves[i ^ HALF_SWAP] >= threshold ? 1 : 0;
      done++;
    }
    column = columnOffset + first + done;
  }
}

/** Every decision of a call (1 keeps): [B, Hq, Lq, Lk], or [B, Hq, Lq, Dv] for context dropout. */
export function fillKeepMask(problem: Problem, out: Uint8Array): void {
  const dropout = resolveDropout(problem);
  const isContext = problem.dropoutPlacement === CONTEXT;
  const columns = isContext ? problem.valueDim : problem.keyLength;
  let start = 0;
  for (let batch = 0; batch < problem.batch; batch++) {
    for (let head = 0; head < problem.queryHeads; head++) {
      for (let query = 0; query < problem.queryLength; query++) {
        fillKeepRow(problem, dropout, batch, head, query, 0, columns, out, start);
        start += columns;
      }
    }
  }
}
