// Random numbers for weights, batches and sampling, by pure-rand; dropout has node-sdpa's own.
import { uniformFloat64 } from 'pure-rand/distribution/uniformFloat64';
import { uniformInt } from 'pure-rand/distribution/uniformInt';
import { xoroshiro128plusFromState } from 'pure-rand/generator/xoroshiro128plus';
import type { JumpableRandomGenerator } from 'pure-rand/types/JumpableRandomGenerator';

export type Random = JumpableRandomGenerator;

/**
 * Independent streams of a seed: each is 2^64 numbers away from the one before.
 * @param seed - 0 to 2^64 - 1; below 2^32 the state is that of pure-rand's own seeds
 * @param count - how many streams
 */
export function randomStreams(seed: number | bigint, count: number): Random[] {
  const low = Number(BigInt.asIntN(32, BigInt(seed)));
  const high = Number(BigInt.asIntN(32, BigInt(seed) >> 32n));
  const source = xoroshiro128plusFromState([~high, ~low, low, high]);
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
