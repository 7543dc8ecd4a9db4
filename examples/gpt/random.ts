// Random numbers for weights, batches and sampling, by pure-rand; dropout has node-sdpa's own.
import { uniformFloat64 } from 'pure-rand/distribution/uniformFloat64';
import { uniformInt } from 'pure-rand/distribution/uniformInt';
import { xoroshiro128plus, xoroshiro128plusFromState } from 'pure-rand/generator/xoroshiro128plus';
import type { JumpableRandomGenerator } from 'pure-rand/types/JumpableRandomGenerator';

export type Random = JumpableRandomGenerator;

/**
 * Independent streams of a seed: each is 2^64 numbers away from the one before.
 * @param seed - a 32-bit integer
 * @param count - how many streams
 */
export function randomStreams(seed: number, count: number): Random[] {
  const source = xoroshiro128plus(seed);
  return Array.from({ length: count }, () => {
    source.jump();
    return source.clone();
  });
}

/** The stream that goes on where `getState()` was called. */
export function randomFromState(state: readonly number[]): Random {
  return xoroshiro128plusFromState(state);
}

/** 0 to below 1. */
export const uniform = (random: Random): number => uniformFloat64(random);

/** 0 to count - 1. */
export const below = (random: Random, count: number): number => uniformInt(random, 0, count - 1);

/** Mean 0, variance 1, by Box and Muller. */
export function standardNormal(random: Random): number {
  const radius = Math.sqrt(-2 * Math.log(1 - uniform(random)));
  return radius * Math.cos(2 * Math.PI * uniform(random));
}
