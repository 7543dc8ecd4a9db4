// Where seeds and offsets come from, and that each call has a mask of its own.
import { describe, expect, test } from 'vitest';
import {
  type AttentionOptions,
  attentionForward,
  attentionForwardSync,
  Generator,
  manualSeed,
} from '../lib/index';
import { expectSame } from './harness';
import { keepDecisions } from './reference';

const zeros = { data: new Float32Array(40), dims: [1, 1, 40, 1] };
const ones = { data: new Float32Array(40).fill(1), dims: [1, 1, 40, 1] };
const DROPOUT = { dropoutP: 0.5, training: true } as const;

function forward(options: AttentionOptions = {}) {
  const outputs = ['droppedWeights'] as const;
  return attentionForwardSync(zeros, zeros, ones, {
    ...DROPOUT,
    outputs: [...outputs],
    ...options,
  });
}

function maskOf(result: ReturnType<typeof forward>): Uint8Array {
  return Uint8Array.from(result.droppedWeights!.data, (x: number) => (x === 0 ? 0 : 1));
}

function wantedMask(seed: bigint, offset: bigint): Uint8Array {
  return keepDecisions([1, 1, 40, 40], { p: 0.5, placement: 'weights', seed, offset });
}

describe('a generator', () => {
  test('gives each call its seed and the next offset', () => {
    const generator = new Generator({ seed: 2n ** 64n - 1n, offset: 2n ** 32n - 1n });
    for (const offset of [2n ** 32n - 1n, 2n ** 32n, 2n ** 32n + 1n]) {
      const result = forward({ generator });
      expect(result.rngState).toEqual({ seed: 2n ** 64n - 1n, offset });
      expectSame('mask', maskOf(result), wantedMask(2n ** 64n - 1n, offset));
    }
  });

  test('wraps its offset at 2^64', () => {
    const generator = new Generator({ seed: 1, offset: 2n ** 64n - 1n });
    forward({ generator });
    expect(generator.getState()).toEqual({ seed: 1n, offset: 0n });
  });

  test('gives asynchronous calls their offsets in the order of the calls', async () => {
    const generator = new Generator({ seed: 6 });
    const options = { ...DROPOUT, generator };
    const results = await Promise.all(
      [0, 1, 2].map(() => attentionForward(zeros, zeros, ones, options)),
    );
    expect(results.map(({ rngState }) => rngState?.offset)).toEqual([0n, 1n, 2n]);
  });

  test('is left alone by calls without dropout and by calls that fail', () => {
    const generator = new Generator({ seed: 1 });
    expect(forward({ generator, dropoutP: 0 }).rngState).toBeNull();
    expect(forward({ generator, training: false }).rngState).toBeNull();
    expect(() => forward({ generator, scale: Number.NaN })).toThrow();
    expect(generator.getState().offset).toBe(0n);
  });

  test('goes on from a state, and starts again from a seed', () => {
    const generator = new Generator({ seed: 4 });
    const first = maskOf(forward({ generator }));
    const state = generator.getState();
    const second = maskOf(forward({ generator }));
    expect(second).not.toEqual(first);
    generator.setState(state);
    expectSame('second', maskOf(forward({ generator })), second);
    expect(generator.manualSeed(4)).toBe(generator);
    expectSame('first', maskOf(forward({ generator })), first);
  });

  test('is random without a seed', () => {
    expect(new Generator().getState().seed).not.toBe(new Generator().getState().seed);
    expect(new Generator().getState().offset).toBe(0n);
  });

  test('forks into others, the same ones every time', () => {
    const parent = new Generator({ seed: 12 });
    const forks = [parent.fork(), parent.fork(), parent.fork()].map((fork) => fork.getState());
    expect(new Set(forks.map(({ seed }) => seed)).size).toBe(3);
    const again = new Generator({ seed: 12 });
    expect([again.fork(), again.fork(), again.fork()].map((fork) => fork.getState())).toEqual(
      forks,
    );
    expect(forks.every(({ seed }) => seed !== 12n)).toBe(true);
  });
});

describe('the default generator', () => {
  test('is seeded by manualSeed', () => {
    manualSeed(99n);
    const results = [forward(), forward()];
    expect(results.map(({ rngState }) => rngState)).toEqual([
      { seed: 99n, offset: 0n },
      { seed: 99n, offset: 1n },
    ]);
    expectSame('mask', maskOf(results[1]), wantedMask(99n, 1n));
    expect(manualSeed(3).getState()).toEqual({ seed: 3n, offset: 0n });
  });

  test('gives each call another mask', () => {
    expect(maskOf(forward())).not.toEqual(maskOf(forward()));
  });
});

describe('seed and offset of a call', () => {
  test('are taken as they are, as numbers or bigints', () => {
    for (const [seed, offset] of [
      [5, 6],
      [5n, 6n],
      [2 ** 53 - 1, 2 ** 40],
      [2n ** 63n + 5n, 2n ** 64n - 1n],
    ]) {
      const result = forward({ seed, offset });
      expect(result.rngState).toEqual({ seed: BigInt(seed), offset: BigInt(offset) });
      expectSame('mask', maskOf(result), wantedMask(BigInt(seed), BigInt(offset)));
    }
  });

  test('a seed alone means offset 0', () => {
    expect(forward({ seed: 8 }).rngState).toEqual({ seed: 8n, offset: 0n });
  });

  test('the backward has the mask of its forward, whatever came between', () => {
    const generator = new Generator({ seed: 31 });
    const result = forward({ generator });
    const first = result.backwardSync(ones).gradValue.data;
    forward({ generator });
    expectSame('gradValue', result.backwardSync(ones).gradValue.data, first);
  });
});
