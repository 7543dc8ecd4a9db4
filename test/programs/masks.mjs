// Prints fingerprints of dropout masks: what dropoutMask gives, and where the results of the
// backend that SDPA_BACKEND names are zero.
import { attentionForwardSync, backendInfo, dropoutMask, Tensor } from 'node-sdpa';
import { fingerprint } from './inputs.mjs';

const PLACEMENTS = /** @type {const} */ (['weights', 'context', 'scores']);

/** More than one block of queries and one tile of keys; then few queries, which decode. */
const SHAPES = /** @type {[number, number, number, number][]} */ ([
  [2, 3, 37, 130],
  [1, 2, 3, 130],
]);

/** @type {Omit<import('node-sdpa').DropoutMaskOptions, 'placement'>[]} */
const SPECS = [
  { p: 0.1, seed: 5, offset: 0 },
  { p: 0.5, seed: 2n ** 63n + 11n, offset: 7, broadcast: ['head'], keyOffset: 13 },
  { p: 0.9, seed: 3, offset: 2n ** 40n, broadcast: ['batch', 'query'], queryOffset: 4000000000 },
  { p: 1 / 65536, seed: 1, offset: 1, batchOffset: 9, headOffset: 4000000000 },
];

const { selected } = backendInfo();
const masks = SHAPES.flatMap((dims) =>
  SPECS.flatMap((spec) =>
    PLACEMENTS.map((placement) => ({
      name: `${placement}, ${dims.join(' x ')}, p = ${spec.p}`,
      mask: fingerprint({ data: dropoutMask(dims, { ...spec, placement }) }),
      kernel: fingerprint({ data: keptByKernel(dims, placement, spec) }),
    })),
  ),
);
process.stdout.write(JSON.stringify({ arch: process.arch, selected, masks }));

/**
 * Keys of equal weight, and channels of one: a result is zero where its element was dropped.
 * @param {[number, number, number, number]} dims
 * @param {typeof PLACEMENTS[number]} dropoutPlacement
 * @param {typeof SPECS[number]} spec
 */
function keptByKernel([batch, heads, queries, columns], dropoutPlacement, { p, broadcast, ...at }) {
  const onContext = dropoutPlacement === 'context';
  const keys = onContext ? 5 : columns;
  const query = filled([batch, heads, queries, 1], 0);
  const key = filled([batch, heads, keys, 1], 0);
  const value = filled([batch, heads, keys, onContext ? columns : 1], 1);
  const { output, droppedWeights } = attentionForwardSync(query, key, value, {
    ...{ ...at, dropoutP: p, dropoutPlacement, dropoutBroadcast: broadcast, training: true },
    outputs: onContext ? [] : ['droppedWeights'],
  });
  return Uint8Array.from((droppedWeights ?? output).data, (x) => (x === 0 ? 0 : 1));
}

/**
 * @param {number[]} dims
 * @param {number} value
 */
function filled(dims, value) {
  const size = dims.reduce((product, n) => product * n, 1);
  return new Tensor('float32', new Float32Array(size).fill(value), dims);
}
