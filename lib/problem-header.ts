// What one attention call is, as every backend gets it: a Problem of plain numbers, its arrays, and
// the flat header that carries it to native code. The twin of native/core/problem.h.
/** Elements of query, key, value, output and their gradients, as stored. */
export type FloatArray = Float32Array | Uint16Array;

/** What one attention call is: plain numbers, every default resolved, in header order. */
export interface Problem {
  readonly batch: number;
  readonly queryHeads: number;
  readonly kvHeads: number;
  readonly queryLength: number;
  readonly keyLength: number;
  readonly headDim: number;
  readonly valueDim: number;
  /** 0 bhsd, 1 bshd */
  readonly layout: number;
  /** 0 float32, 1 float16, 2 bfloat16: query, output and all gradients */
  readonly type: number;
  /** Of key and value: `type`, but in a cache */
  readonly keyType: number;
  /** Keys in a block of a cache; 0 where there are no blocks */
  readonly keyBlockLength: number;
  /** 0 none, 1 bool, 2 float32, 3 float16, 4 bfloat16 */
  readonly maskType: number;
  /** The mask's size along each axis of [B, Hq, Lq, Lk]: 1 (broadcast) or the full size */
  readonly maskBatch: number;
  readonly maskHeads: number;
  readonly maskQueries: number;
  readonly maskKeys: number;
  /** 0 or 1 */
  readonly isCausal: number;
  /** Used where Inputs.causalOffsets is null */
  readonly causalOffset: number;
  /** Keys seen to the left and right of the diagonal; -1 is unlimited */
  readonly windowLeft: number;
  readonly windowRight: number;
  readonly scale: number;
  /** 0 is none */
  readonly softcap: number;
  /** 0 where dropout is off (p = 0, or training: false) */
  readonly dropoutP: number;
  /** 0 weights, 1 context, 2 scores */
  readonly dropoutPlacement: number;
  /** bit 0 batch, bit 1 head, bit 2 query */
  readonly dropoutBroadcast: number;
  /** seed and offset as two unsigned 32-bit halves each */
  readonly seedLo: number;
  readonly seedHi: number;
  readonly offsetLo: number;
  readonly offsetHi: number;
  /** Position of this shard in the whole; unsigned 32-bit */
  readonly batchOffset: number;
  readonly headOffset: number;
  readonly queryOffset: number;
  readonly keyOffset: number;
  /** 0 highest, 1 high, 2 medium */
  readonly precision: number;
  /** 0 for an ordinary call; else this many outputs, with offset, offset + 1, ... */
  readonly samples: number;
}

/**
 * The sequences of a packed batch, B + 1 running totals each. Tensors are then [totalQ, Hq, D],
 * [totalK, Hkv, D] and so on, lse is [Hq, totalQ]; the Problem has the largest lengths.
 */
export interface Sequences {
  readonly queryStarts: Int32Array;
  readonly keyStarts: Int32Array;
}

/** The arrays that a call reads. Shapes as in the Problem and its layout. */
export interface Inputs {
  readonly query: FloatArray; // [B, Hq, Lq, D]
  readonly key: FloatArray; // [B, Hkv, Lk, D]
  readonly value: FloatArray; // [B, Hkv, Lk, Dv]
  readonly mask: Uint8Array | FloatArray | null; // [maskBatch, maskHeads, maskQueries, maskKeys]
  readonly keepMask: Uint8Array | null; // [B, Hq, Lq, Lk], or [B, Hq, Lq, Dv] for context
  readonly causalOffsets: Int32Array | null; // [B]
  readonly kvLengths: Int32Array | null; // [B], each 0..Lk
  readonly sequences: Sequences | null; // of a packed batch
  /**
   * [B, n]: which blocks of a cache hold each entry's keys, kvLengths of them; key is then [blocks,
   * Hkv, keyBlockLength, D], and so is value. null: no cache
   */
  readonly keyBlocks: Int32Array | null;
}

/**
 * The arrays that a forward call writes; null where not wanted. A call with samples writes N
 * outputs or, instead, their mean and variance, and no matrices.
 */
export interface ForwardOutputs {
  readonly output: FloatArray | null; // [B, Hq, Lq, Dv]; [N, B, Hq, Lq, Dv] with samples
  readonly lse: Float32Array | null; // [B, Hq, Lq]; [N, B, Hq, Lq] with samples of `scores` dropout
  readonly scores: Float32Array | null; // [B, Hq, Lq, Lk]
  readonly weights: Float32Array | null; // [B, Hq, Lq, Lk]
  readonly droppedWeights: Float32Array | null; // [B, Hq, Lq, Lk]
  readonly mean: Float32Array | null; // [B, Hq, Lq, Dv]
  readonly variance: Float32Array | null; // [B, Hq, Lq, Dv]
}

/** What a backward call reads (output, lse, gradOutput) and writes (the gradients). */
export interface BackwardTensors {
  readonly output: FloatArray; // [B, Hq, Lq, Dv]
  readonly lse: Float32Array; // [B, Hq, Lq]
  readonly gradOutput: FloatArray; // [B, Hq, Lq, Dv]
  readonly gradQuery: FloatArray; // [B, Hq, Lq, D]
  readonly gradKey: FloatArray; // [B, Hkv, Lk, D]
  readonly gradValue: FloatArray; // [B, Hkv, Lk, Dv]
  readonly gradMask: FloatArray | null; // as Inputs.mask
}

/** The fields of a Problem in header order. */
export const PROBLEM_FIELDS: readonly (keyof Problem)[] = [
  'batch',
  'queryHeads',
  'kvHeads',
  'queryLength',
  'keyLength',
  'headDim',
  'valueDim',
  'layout',
  'type',
  'keyType',
  'keyBlockLength',
  'maskType',
  'maskBatch',
  'maskHeads',
  'maskQueries',
  'maskKeys',
  'isCausal',
  'causalOffset',
  'windowLeft',
  'windowRight',
  'scale',
  'softcap',
  'dropoutP',
  'dropoutPlacement',
  'dropoutBroadcast',
  'seedLo',
  'seedHi',
  'offsetLo',
  'offsetHi',
  'batchOffset',
  'headOffset',
  'queryOffset',
  'keyOffset',
  'precision',
  'samples',
];

/** Writes a Problem as one flat header for the native addon: its fields in order. */
export function encodeProblem(
  p: Problem,
  header: Float64Array = new Float64Array(PROBLEM_FIELDS.length),
): Float64Array {
  header[0] = p.batch;
  header[1] = p.queryHeads;
  header[2] = p.kvHeads;
  header[3] = p.queryLength;
  header[4] = p.keyLength;
  header[5] = p.headDim;
  header[6] = p.valueDim;
  header[7] = p.layout;
  header[8] = p.type;
  header[9] = p.keyType;
  header[10] = p.keyBlockLength;
  header[11] = p.maskType;
  header[12] = p.maskBatch;
  header[13] = p.maskHeads;
  header[14] = p.maskQueries;
  header[15] = p.maskKeys;
  header[16] = p.isCausal;
  header[17] = p.causalOffset;
  header[18] = p.windowLeft;
  header[19] = p.windowRight;
  header[20] = p.scale;
  header[21] = p.softcap;
  header[22] = p.dropoutP;
  header[23] = p.dropoutPlacement;
  header[24] = p.dropoutBroadcast;
  header[25] = p.seedLo;
  header[26] = p.seedHi;
  header[27] = p.offsetLo;
  header[28] = p.offsetHi;
  header[29] = p.batchOffset;
  header[30] = p.headOffset;
  header[31] = p.queryOffset;
  header[32] = p.keyOffset;
  header[33] = p.precision;
  header[34] = p.samples;
  return header;
}
