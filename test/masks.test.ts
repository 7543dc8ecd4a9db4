// Statistics of dropout masks, in short (npm run masks:statistics takes 10^9 decisions): nothing is
// found in ours, and the same tests find generators that are not as good.
import { describe, expect, test } from 'vitest';
import { dropoutMask } from '../lib/index';
import { evenness, type MaskMaker, testMasks } from './masks/battery';
import { dropoutKey, dropThreshold, philox } from './reference';

const DIMS = [2, 4, 32, 256] as const;

/** The generator of the specification with fewer rounds, or with decisions that are not as they were. */
function weakened(
  rounds: number,
  drops = (u: number, threshold: number) => u < threshold,
): MaskMaker {
  return ([batch, heads, queries, columns], spec) => {
    const { seed = 0, offset = 0, placement = 'weights' } = spec;
    const key = dropoutKey({ ...spec, seed, offset, placement });
    const threshold = dropThreshold(spec.p);
    const mask = new Uint8Array(batch * heads * queries * columns);
    let at = 0;
    for (let b = 0; b < batch; b++)
      for (let h = 0; h < heads; h++)
        for (let q = 0; q < queries; q++)
          for (let c = 0; c < columns; c += 8) {
            const words = philox([c / 8, q, h, b], key, rounds);
            for (let i = 0; i < 8; i++) {
              const u = (words[i >> 1] >>> (16 * (i & 1))) & 0xffff;
              mask[at++] = drops(u, threshold) ? 0 : 1;
            }
          }
    return mask;
  };
}

describe('statistics of masks', () => {
  test('4 * 10^6 decisions: rates, axes, neighbours, patterns', () => {
    const { results, smallest, isRejected } = testMasks(dropoutMask, 4e6, 2026n, DIMS);
    expect(results.length).toBeGreaterThan(100);
    expect(isRejected, `${smallest.name}: p-value ${smallest.p}`).toBe(false);
    expect(evenness(results)).toBeGreaterThan(1e-4);
  });

  test.each([
    ['two rounds of Philox', weakened(2)],
    ['three rounds of Philox', weakened(3)],
    ['a rate that is off by a hundredth', weakened(10, (u, t) => u < t + 655)],
  ])('found out: %s', (_, make) => {
    expect(testMasks(make, 4e5, 2026n, DIMS).isRejected).toBe(true);
  });
});
