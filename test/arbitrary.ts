// Random problems for fast-check: every shape, mask, option and type that the operation takes.
import fc from 'fast-check';
import { randomTensor, uniform } from './cases';
import { type Call, type Layout, representable } from './harness';
import type {
  BroadcastAxis,
  Placement,
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
const LENGTHS = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 32, 33, 47, 48, 49, 63, 64, 65];
const LONG = [127, 128, 129, 255, 257, 511, 513, 700, 1025];
const DIMS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 40, 63, 64, 65, 80, 128];
const LARGEST = [127, 256, 511, 512];
/** Products that the reference forms: it stays at some tens of milliseconds. */
const LARGEST_COST = 2e6;

const AXES: BroadcastAxis[] = ['batch', 'head', 'query'];
const MAX = 2 ** 32 - 1;

const length = fc.oneof(
  { weight: 5, arbitrary: fc.constantFrom(...LENGTHS) },
  { weight: 1, arbitrary: fc.constantFrom(...LONG) },
);
const dim = fc.oneof(
  { weight: 8, arbitrary: fc.constantFrom(...DIMS) },
  { weight: 1, arbitrary: fc.constantFrom(...LARGEST) },
);

const shape = fc
  .record({
    batch: fc.integer({ min: 1, max: 3 }),
    kvHeads: fc.integer({ min: 1, max: 3 }),
    group: fc.integer({ min: 1, max: 3 }),
    queryLength: length,
    keyLength: length,
    headDim: dim,
    valueDim: dim,
  })
  .map((s) => ({ ...s, queryHeads: s.kvHeads * s.group }))
  .filter((s) => cost(s) <= LARGEST_COST);

/** Multiplications of the reference's forward pass. */
function cost(s: Sizes): number {
  const scores = s.batch * s.kvHeads * s.group * s.queryLength * s.keyLength;
  return scores * (s.headDim + s.valueDim);
}

interface Sizes {
  batch: number;
  kvHeads: number;
  group: number;
  queryLength: number;
  keyLength: number;
  headDim: number;
  valueDim: number;
}

const shift = fc.integer({ min: -40, max: 140 });

/** What is chosen without knowing the shape; `resolve` fits it to one. */
const choices = fc.record({
  shape,
  dataSeed: fc.integer({ min: 0, max: 2 ** 31 - 1 }),
  /** 4 makes rows peaked, 30 leaves one key a row. */
  spread: fc.constantFrom(1, 1, 1, 4, 4, 30),
  type: fc.constantFrom<Storage>('float32', 'float32', 'float32', 'float16', 'bfloat16'),
  layout: fc.constantFrom<Layout>('bhsd', 'bshd'),
  mask: fc.constantFrom('none', 'none', 'bool', 'float', 'typed float'),
  maskAxes: fc.array(fc.boolean(), { minLength: 4, maxLength: 4 }),
  maskDropsLeading: fc.boolean(),
  isCausal: fc.boolean(),
  causalOffset: fc.oneof(
    fc.constant<'none' | 'bottom-right' | 'each'>('none'),
    fc.constant<'none' | 'bottom-right' | 'each'>('bottom-right'),
    fc.constant<'none' | 'bottom-right' | 'each'>('each'),
    shift,
  ),
  window: fc.option(fc.tuple(fc.integer({ min: -1, max: 40 }), fc.integer({ min: -1, max: 40 }))),
  kvLengths: fc.boolean(),
  scale: fc.option(fc.constantFrom(0.05, 0.3, 1, -0.5, 0)),
  softcap: fc.option(fc.constantFrom(0.5, 2, 30)),
  dropout: fc.option(dropoutChoice(), { freq: 2 }),
  shard: fc.option(
    fc.record({ batchOffset: u16(), headOffset: u16(), queryOffset: u16(), keyOffset: u16() }),
  ),
});

function u16() {
  return fc.integer({ min: 0, max: 150 });
}

function dropoutChoice() {
  return fc.record({
    dropoutP: fc.constantFrom(0.1, 0.25, 0.5, 0.9, 1 / 65536, 1),
    dropoutPlacement: fc.constantFrom<Placement>('weights', 'context', 'scores'),
    dropoutBroadcast: fc.subarray(AXES),
    seed: fc.bigInt({ min: 0n, max: 2n ** 64n - 1n }),
    offset: fc.bigInt({ min: 0n, max: 2n ** 64n - 1n }),
    /** Decisions given by the caller in place of random ones. */
    explicit: fc.constantFrom(false, false, false, true),
  });
}

type Choices = typeof choices extends fc.Arbitrary<infer T> ? T : never;

/** A call with all its data; under `toString` a failing one shows its choices alone. */
export const calls: fc.Arbitrary<Call> = choices.map((c) => {
  const call = resolveCall(c);
  return Object.defineProperty(call, fc.toStringMethod, { value: () => fc.stringify(c) });
});

function resolveCall(c: Choices): Call {
  const { batch, queryHeads, kvHeads, queryLength, keyLength, headDim, valueDim } = c.shape;
  const spread = (t: ReferenceTensor) => ({ ...t, data: Array.from(t.data, (x) => x * c.spread) });
  const data = (i: number, dims: number[]) => randomTensor(c.dataSeed + i, dims);
  return representable({
    query: spread(data(0, [batch, queryHeads, queryLength, headDim])),
    key: data(1, [batch, kvHeads, keyLength, headDim]),
    value: data(2, [batch, kvHeads, keyLength, valueDim]),
    gradOutput: data(3, [batch, queryHeads, queryLength, valueDim]),
    type: c.type,
    maskType: c.mask === 'typed float' ? c.type : 'float32',
    layout: c.layout,
    options: resolveOptions(c),
  });
}

function resolveOptions(c: Choices): ReferenceOptions {
  const { batch, queryLength, keyLength } = c.shape;
  const next = uniform(c.dataSeed + 4);
  const below = (n: number) => Math.floor(next() * n);
  const each = (make: () => number) => Array.from({ length: batch }, make);
  const options: ReferenceOptions = { isCausal: c.isCausal, ...c.shard };
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

function resolveMask(c: Choices, next: () => number): ReferenceTensor {
  const { batch, queryHeads, queryLength, keyLength } = c.shape;
  const full = [batch, queryHeads, queryLength, keyLength];
  let dims = full.map((size, axis) => (c.maskAxes[axis] ? size : 1));
  while (c.maskDropsLeading && dims[0] === 1) dims = dims.slice(1);
  const size = dims.reduce((product, n) => product * n, 1);
  const allowed = Uint8Array.from({ length: size }, () => (next() < 0.75 ? 1 : 0));
  if (c.mask === 'bool') return { data: allowed, dims };
  const bias = randomTensor(c.dataSeed + 5, dims).data;
  return { data: bias.map((x, i) => (allowed[i] || next() < 0.5 ? x : -Infinity)), dims };
}

function resolveDropout(c: Choices, next: () => number): ReferenceOptions {
  const { explicit, seed, offset, dropoutBroadcast, ...dropout } = c.dropout!;
  if (!explicit) return { ...dropout, seed, offset, dropoutBroadcast, training: true };
  const { batch, queryHeads, queryLength, keyLength, valueDim } = c.shape;
  const columns = dropout.dropoutPlacement === 'context' ? valueDim : keyLength;
  const dims = [batch, queryHeads, queryLength, columns];
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
