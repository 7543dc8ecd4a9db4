// Random problems for fast-check: every shape, mask, option, type and kind of number that the
// operation takes. A problem is plain JSON, so that one line says all about it; its numbers are
// drawn from a seed in it.
import fc from 'fast-check';
import { randomTensor, uniform } from './cases';
import { type Call, type Layout, representable } from './harness';
import type {
  BroadcastAxis,
  Placement,
  Precision,
  ReferenceOptions,
  ReferenceTensor,
  Storage,
} from './reference';

/** SDPA_TEST_SEED and SDPA_TEST_RUNS choose other problems and more of them. */
export const SEED = Number(process.env.SDPA_TEST_SEED ?? 20260801);
export const RUNS = Number(process.env.SDPA_TEST_RUNS ?? 60);

/** How each property runs; a failure names its seed and path by itself. */
export const settings = (runs = RUNS) => ({ seed: SEED, numRuns: runs });

// Around the widths of vectors, tiles and chunks.
const SHORT = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17];
const LENGTHS = [...SHORT, 23, 24, 25, 31, 32, 33, 47, 48, 49, 63, 64, 65];
const LONG = [95, 97, 127, 128, 129, 191, 193, 255, 257, 511, 513, 700, 1025, 2049];
const NARROW = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17];
const DIMS = [...NARROW, 24, 31, 32, 33, 40, 63, 64, 65, 80, 96, 127, 128, 129];
const LARGEST = [192, 255, 256, 257, 511, 512];

const AXES: BroadcastAxis[] = ['batch', 'head', 'query'];
const MAX = 2 ** 32 - 1;

const among = <T>(...values: T[]) => fc.constantFrom(...values);
/** `usual` times in ten one of `values`, else one of `rare`. */
const mostly = <T>(usual: number, values: T[], rare: T[]) =>
  fc.oneof(
    { weight: usual, arbitrary: fc.constantFrom(...values) },
    { weight: 10 - usual, arbitrary: fc.constantFrom(...rare) },
  );

interface Sizes {
  batch: number;
  kvHeads: number;
  /** Query heads to a head of key and value. */
  group: number;
  queryLength: number;
  keyLength: number;
  headDim: number;
  valueDim: number;
}

/** Multiplications of the reference's forward pass. */
function cost(s: Sizes): number {
  const scores = s.batch * s.kvHeads * s.group * s.queryLength * s.keyLength;
  return scores * (s.headDim + s.valueDim);
}

/** Shapes for which the reference takes microseconds to a few hundredths of a second. */
function shapes(
  length: fc.Arbitrary<number>,
  dim: fc.Arbitrary<number>,
  largestCost: number,
): fc.Arbitrary<Sizes> {
  return fc
    .record({
      batch: fc.integer({ min: 1, max: 3 }),
      kvHeads: fc.integer({ min: 1, max: 3 }),
      group: fc.integer({ min: 1, max: 3 }),
      queryLength: length,
      keyLength: length,
      headDim: dim,
      valueDim: dim,
    })
    .filter((s) => cost(s) <= largestCost);
}

/** Most are small, and are checked in milliseconds. */
const shape = fc.oneof(
  { weight: 150, arbitrary: shapes(among(...SHORT), among(...NARROW), 1e4) },
  { weight: 40, arbitrary: shapes(among(...LENGTHS), among(...DIMS), 1e5) },
  { weight: 10, arbitrary: shapes(mostly(7, LENGTHS, LONG), mostly(8, DIMS, LARGEST), 1e6) },
  { weight: 1, arbitrary: shapes(mostly(5, LENGTHS, LONG), mostly(8, DIMS, LARGEST), 4e6) },
);

/** What the numbers of a tensor are like; `fill` says it in numbers. */
const KINDS = [
  'normal',
  'large', // peaked rows as queries
  'steep', // one key a row
  'zero',
  'equal', // every row the same
  'huge',
  'tiny',
  'denormal',
  'mixed', // sizes all over the range
  'special', // some NaN and infinities
] as const;
export type Kind = (typeof KINDS)[number];
const kind = mostly<Kind>(7, ['normal', 'normal', 'normal', 'large'], KINDS.slice(2));

const shift = fc.integer({ min: -40, max: 140 });
const u64 = fc.bigInt({ min: 0n, max: 2n ** 64n - 1n }).map(String);
const seed = fc.integer({ min: 0, max: 2 ** 31 - 1 });
/** Steps back from the last position there is, or forth from the first. */
const position = fc.oneof(
  { weight: 3, arbitrary: fc.integer({ min: 0, max: 150 }) },
  { weight: 1, arbitrary: fc.integer({ min: -40, max: -1 }) },
);

/** What is chosen; `toCall` fits it to the shape. */
export const problems = fc.record({
  shape,
  dataSeed: seed,
  query: kind,
  key: kind,
  value: kind,
  gradOutput: kind,
  type: among<Storage>('float32', 'float32', 'float32', 'float16', 'bfloat16'),
  layout: among<Layout>('bhsd', 'bshd'),
  precision: among<Precision>('highest', 'highest', 'highest', 'highest', 'high', 'medium'),
  mask: among('none', 'none', 'bool', 'float', 'typed float'),
  maskAxes: fc.array(fc.boolean(), { minLength: 4, maxLength: 4 }),
  maskDropsLeading: fc.boolean(),
  maskSize: among(1, 1, 1, 30, 1e4, 1e30),
  /** Whole rows of the mask that exclude every key. */
  maskHasDeadRows: fc.boolean(),
  isCausal: fc.boolean(),
  causalOffset: fc.oneof(
    fc.constant<'none' | 'bottom-right' | 'each'>('none'),
    fc.constant<'none' | 'bottom-right' | 'each'>('bottom-right'),
    fc.constant<'none' | 'bottom-right' | 'each'>('each'),
    shift,
  ),
  window: fc.option(fc.tuple(fc.integer({ min: -1, max: 40 }), fc.integer({ min: -1, max: 40 }))),
  kvLengths: fc.boolean(),
  scale: fc.option(mostly(8, [0.05, 0.3, 1, -0.5, 0], [2 ** -70, -(2 ** -30), 2 ** 30, 2 ** 90])),
  softcap: fc.option(mostly(8, [0.5, 2, 30], [2 ** -20, 1e4])),
  dropout: fc.option(
    fc.record({
      dropoutP: mostly(7, [0.1, 0.25, 0.5, 0.9], [1e-9, 1 / 65536, 65535 / 65536, 1 - 1e-9, 1]),
      dropoutPlacement: among<Placement>('weights', 'context', 'scores'),
      dropoutBroadcast: fc.subarray(AXES),
      seed: u64,
      offset: u64,
      /** Decisions given by the caller in place of random ones. */
      explicit: among(false, false, false, true),
    }),
    { freq: 2 },
  ),
  shard: fc.option(fc.tuple(position, position, position, position)),
});

export type Problem = typeof problems extends fc.Arbitrary<infer T> ? T : never;

/** Calls with all their data; under `toString` a failing one shows its problem alone. */
export const calls: fc.Arbitrary<Call> = problems.map((problem) => {
  const call = toCall(problem);
  return Object.defineProperty(call, fc.toStringMethod, { value: () => JSON.stringify(problem) });
});

/** The call that a problem describes. */
export function toCall(c: Problem): Call {
  const { batch, group, kvHeads, queryLength, keyLength, headDim, valueDim } = c.shape;
  const queryHeads = kvHeads * group;
  return representable({
    query: fill(c, 'query', 0, [batch, queryHeads, queryLength, headDim]),
    key: fill(c, 'key', 1, [batch, kvHeads, keyLength, headDim]),
    value: fill(c, 'value', 2, [batch, kvHeads, keyLength, valueDim]),
    gradOutput: fill(c, 'gradOutput', 3, [batch, queryHeads, queryLength, valueDim]),
    type: c.type,
    maskType: c.mask === 'typed float' ? c.type : 'float32',
    layout: c.layout,
    options: resolveOptions(c),
  });
}

type Operand = 'query' | 'key' | 'value' | 'gradOutput';

/**
 * The numbers of a tensor. float16 ends at 65504, so what is large is less so there; beside an
 * infinity everything stays in range, since an overflow, or a denormal that AMX takes for 0, would
 * meet it in another way on every backend.
 */
function fill(c: Problem, operand: Operand, stream: number, dims: number[]): ReferenceTensor {
  const data = randomTensor(c.dataSeed + stream, dims).data;
  const next = uniform(c.dataSeed + stream + 100);
  const width = dims[3];
  const isSpecial = [c.query, c.key, c.value, c.gradOutput].includes('special');
  const reach = c.type === 'float16' ? 12 : 62;
  const exponent = () => Math.round((2 * next() - 1) * reach);
  const scaled = (power: number) => data.map((x) => x * 2 ** power);
  const kind = c[operand];
  switch (kind) {
    case 'large':
      return { data: scaled(2), dims };
    case 'steep':
      return { data: scaled(5), dims };
    case 'zero':
      return { data: scaled(0).fill(0), dims };
    case 'equal':
      return { data: data.map((_, at) => data[at % width]), dims };
    case 'huge':
      return { data: isSpecial ? data : scaled(reach), dims };
    case 'tiny':
      return { data: scaled(-reach), dims };
    case 'denormal':
      return { data: isSpecial ? data : scaled(c.type === 'float16' ? -18 : -134), dims };
    case 'mixed':
      return { data: isSpecial ? data : data.map((x) => x * 2 ** exponent()), dims };
    case 'special':
      return { data: data.map((x) => (next() < 0.02 ? SPECIAL[Math.floor(next() * 3)] : x)), dims };
    default:
      return { data, dims };
  }
}

const SPECIAL = [Number.NaN, Infinity, -Infinity];

function resolveOptions(c: Problem): ReferenceOptions {
  const { batch, queryLength, keyLength } = c.shape;
  const next = uniform(c.dataSeed + 4);
  const below = (n: number) => Math.floor(next() * n);
  const each = (make: () => number) => Array.from({ length: batch }, make);
  const options: ReferenceOptions = { isCausal: c.isCausal, ...resolveShard(c) };
  if (c.precision !== 'highest') options.precision = c.precision;
  if (c.causalOffset === 'each') {
    options.causalOffset = each(() => below(keyLength + queryLength) - queryLength);
  } else if (c.causalOffset !== 'none') {
    options.causalOffset = c.causalOffset;
  }
  if (c.window) options.windowSize = c.window;
  if (c.kvLengths) options.kvLengths = each(() => below(keyLength + 1));
  if (c.scale !== null) options.scale = c.scale;
  if (c.softcap !== null) options.softcap = c.softcap;
  if (c.mask !== 'none') options.attnMask = resolveMask(c, next);
  return c.dropout ? { ...options, ...resolveDropout(c, next) } : options;
}

/** Offsets below 0 count from the end of the range that is left for a shard of this shape. */
function resolveShard(c: Problem): ReferenceOptions {
  if (!c.shard) return {};
  const { batch, kvHeads, group, queryLength, keyLength } = c.shape;
  const sizes = [batch, kvHeads * group, queryLength, keyLength];
  const at = (axis: number) => {
    const steps = c.shard![axis];
    return steps >= 0 ? steps : 2 ** 32 - sizes[axis] + steps + 1;
  };
  return { batchOffset: at(0), headOffset: at(1), queryOffset: at(2), keyOffset: at(3) };
}

function resolveMask(c: Problem, next: () => number): ReferenceTensor {
  const { batch, kvHeads, group, queryLength, keyLength } = c.shape;
  const full = [batch, kvHeads * group, queryLength, keyLength];
  let dims = full.map((size, axis) => (c.maskAxes[axis] ? size : 1));
  while (c.maskDropsLeading && dims[0] === 1) dims = dims.slice(1);
  const size = dims.reduce((product, n) => product * n, 1);
  const width = dims[dims.length - 1] ?? 1;
  const isDead = Array.from({ length: size / width }, () => c.maskHasDeadRows && next() < 0.3);
  const allows = (at: number) => !isDead[Math.floor(at / width)] && next() < 0.75;
  const allowed = Uint8Array.from({ length: size }, (_, at) => (allows(at) ? 1 : 0));
  if (c.mask === 'bool') return { data: allowed, dims };
  const largest = c.mask === 'typed float' && c.type === 'float16' ? 1e4 : 1e30;
  const bias = randomTensor(c.dataSeed + 5, dims).data;
  const data = bias.map((x, at) => {
    const excludes = !allowed[at] && (isDead[Math.floor(at / width)] || next() < 0.5);
    return excludes ? -Infinity : x * Math.min(c.maskSize, largest);
  });
  return { data, dims };
}

function resolveDropout(c: Problem, next: () => number): ReferenceOptions {
  const { explicit, seed, offset, dropoutBroadcast, ...dropout } = c.dropout!;
  if (!explicit) {
    const random = { seed: BigInt(seed), offset: BigInt(offset), dropoutBroadcast };
    return { ...dropout, ...random, training: true };
  }
  const { batch, kvHeads, group, queryLength, keyLength, valueDim } = c.shape;
  const columns = dropout.dropoutPlacement === 'context' ? valueDim : keyLength;
  const dims = [batch, kvHeads * group, queryLength, columns];
  const count = dims.reduce((product, n) => product * n, 1);
  const data = Uint8Array.from({ length: count }, () => (next() < dropout.dropoutP ? 0 : 1));
  return { ...dropout, training: true, keepMask: { data, dims } };
}

/** Masks over random coordinates, up to the end of their range. */
export const maskSpecs = fc
  .record({
    dims: fc.tuple(
      fc.integer({ min: 1, max: 3 }),
      fc.integer({ min: 1, max: 3 }),
      fc.integer({ min: 1, max: 20 }),
      fc.integer({ min: 1, max: 70 }),
    ),
    p: fc.oneof(
      fc.constantFrom(1e-9, 1 / 65536, 0.5, 65535 / 65536, 1 - 1e-9, 1),
      fc.double({ min: 0, max: 1, noNaN: true }),
    ),
    placement: fc.constantFrom<Placement>('weights', 'context', 'scores'),
    broadcast: fc.subarray(AXES),
    seed: fc.bigInt({ min: 0n, max: 2n ** 64n - 1n }),
    offset: fc.bigInt({ min: 0n, max: 2n ** 64n - 1n }),
    offsets: fc.array(fc.oneof(fc.integer({ min: 0, max: 40 }), fc.integer({ min: 0, max: MAX })), {
      minLength: 4,
      maxLength: 4,
    }),
  })
  .map(({ offsets, ...spec }) => {
    const inRange = (offset: number, size: number) => Math.min(offset, 2 ** 32 - size);
    return {
      ...spec,
      batchOffset: inRange(offsets[0], spec.dims[0]),
      headOffset: inRange(offsets[1], spec.dims[1]),
      queryOffset: inRange(offsets[2], spec.dims[2]),
      keyOffset: inRange(offsets[3], spec.dims[3]),
    };
  });

export type MaskSpec = typeof maskSpecs extends fc.Arbitrary<infer T> ? T : never;
