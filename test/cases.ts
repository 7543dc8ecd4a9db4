// Deterministic inputs and the named problems that tests, and benchmarks where they like, share.
import type { ReferenceOptions, ReferenceTensor } from './reference';

/** Mulberry32: uniform numbers in [0, 1) from a 32-bit seed. */
export function uniform(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t = (t + Math.imul(t ^ (t >>> 7), t | 61)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** Standard normal numbers (Box and Muller), in float64. */
export function randomNormals(seed: number, length: number): Float64Array {
  const next = uniform(seed);
  return Float64Array.from({ length }, () => {
    const radius = Math.sqrt(-2 * Math.log(1 - next()));
    return radius * Math.cos(2 * Math.PI * next());
  });
}

/** A float64 tensor of standard normal numbers. */
export function randomTensor(seed: number, dims: readonly number[]) {
  const length = dims.reduce((product, n) => product * n, 1);
  return { data: randomNormals(seed, length), dims };
}

/** Swaps the axes 1 and 2 of a rank-4 tensor: heads and length. */
export function swapAxes({ data, dims }: ReferenceTensor) {
  const [batch, rows, columns, width] = dims;
  const swapped = new Float64Array(data.length);
  let at = 0;
  for (let b = 0; b < batch; b++)
    for (let column = 0; column < columns; column++)
      for (let row = 0; row < rows; row++) {
        const from = ((b * rows + row) * columns + column) * width;
        for (let d = 0; d < width; d++) swapped[at++] = data[from + d];
      }
  return { data: swapped, dims: [batch, columns, rows, width] };
}

/** A problem by name: shape and options; the data comes from `seed`. */
export interface NamedCase {
  readonly name: string;
  readonly seed: number;
  /** batch, query heads, key/value heads, query length, key length, head dim, value dim */
  readonly shape: readonly [number, number, number, number, number, number, number];
  readonly options: ReferenceOptions;
}

const FULL = { seed: 7, offset: 3, training: true };

/** One problem for each thing that a kernel treats apart. */
export const NAMED_CASES: readonly NamedCase[] = [
  { name: 'plain', seed: 101, shape: [2, 2, 2, 33, 65, 32, 32], options: {} },
  { name: 'causal', seed: 102, shape: [1, 4, 4, 129, 129, 64, 64], options: { isCausal: true } },
  {
    name: 'decode, grouped heads',
    seed: 103,
    shape: [2, 8, 2, 1, 257, 64, 64],
    options: { isCausal: true, causalOffset: 'bottom-right', kvLengths: [257, 100] },
  },
  {
    name: 'window and cap',
    seed: 104,
    shape: [1, 3, 1, 70, 90, 40, 24],
    options: { windowSize: [16, 5], softcap: 3, causalOffset: 10 },
  },
  {
    name: 'dropped weights',
    seed: 105,
    shape: [2, 2, 1, 49, 63, 24, 40],
    options: { ...FULL, dropoutP: 0.2, dropoutPlacement: 'weights' },
  },
  {
    name: 'dropped context, causal',
    seed: 106,
    shape: [2, 2, 2, 49, 63, 24, 40],
    options: { ...FULL, isCausal: true, dropoutP: 0.3, dropoutPlacement: 'context' },
  },
  {
    name: 'dropped scores, shared by heads',
    seed: 107,
    shape: [2, 4, 2, 49, 63, 24, 40],
    options: {
      ...{ ...FULL, dropoutP: 0.5, dropoutPlacement: 'scores' },
      dropoutBroadcast: ['head'],
    },
  },
  {
    name: 'many keys',
    seed: 110,
    shape: [1, 2, 1, 40, 1100, 16, 24],
    options: { isCausal: true, causalOffset: 'bottom-right' },
  },
  {
    name: 'more keys, dropped weights',
    seed: 111,
    shape: [1, 2, 2, 5, 4500, 8, 8],
    options: { ...FULL, dropoutP: 0.1, windowSize: [-1, -1], kvLengths: [4400] },
  },
  {
    name: 'wide heads, whose keys do not fit a cache at once',
    seed: 112,
    shape: [2, 2, 1, 70, 420, 320, 320],
    options: { isCausal: true, causalOffset: 215, kvLengths: [420, 0] },
  },
  { name: 'one of everything', seed: 108, shape: [1, 1, 1, 1, 1, 1, 1], options: {} },
  { name: 'widest heads', seed: 109, shape: [1, 1, 1, 17, 33, 512, 512], options: {} },
];

/** The tensors of a named case: unit normals, float64. */
export function namedTensors({ seed, shape }: NamedCase) {
  const [batch, queryHeads, kvHeads, queryLength, keyLength, headDim, valueDim] = shape;
  return {
    query: randomTensor(seed * 10, [batch, queryHeads, queryLength, headDim]),
    key: randomTensor(seed * 10 + 1, [batch, kvHeads, keyLength, headDim]),
    value: randomTensor(seed * 10 + 2, [batch, kvHeads, keyLength, valueDim]),
    gradOutput: randomTensor(seed * 10 + 3, [batch, queryHeads, queryLength, valueDim]),
  };
}
