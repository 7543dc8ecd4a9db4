// Times calls turn by turn, and sums their times up.
import { countFlops } from './cases.mjs';

/** What a subject computes in its turn: calls for this long, and at least one. */
const TURN_MS = 15;
/** Before that it wakes its threads and fills the caches by calls for this long, untimed. */
const WARM_UP_MS = 5;
/** A call of more milliseconds than this needs no other before it. */
const LONG_MS = 1000;

/** @typedef {import('./cases.mjs').Case} Case */
/**
 * @typedef {object} Result
 * @property {string} case
 * @property {string} backend
 * @property {number} threads
 * @property {number} calls
 * @property {number} minMs
 * @property {number} medianMs
 * @property {number} p90Ms
 * @property {number} gflops at the median
 * @property {number} error relative L2 error of one head
 */

/** Calls for a while and notes each call's time. @param {{call: () => any, times: number[]}} run */
export async function takeTurn({ call, times }) {
  const isLong = times.some((ms) => ms > LONG_MS);
  let end = performance.now() + (isLong ? 0 : WARM_UP_MS);
  while (performance.now() < end) await call();
  end = performance.now() + TURN_MS;
  do {
    const start = performance.now();
    await call();
    times.push(performance.now() - start);
  } while (performance.now() < end);
}

/**
 * @param {Case} problem
 * @param {{backend: string, threads: number, times: number[], error: number}} run
 * @returns {Result}
 */
export function summarize(problem, { backend, threads, times, error }) {
  const sorted = times.sort((a, b) => a - b);
  const quantile = (/** @type {number} */ q) => sorted[Math.round(q * (sorted.length - 1))];
  const medianMs = quantile(0.5);
  return {
    case: problem.name,
    backend,
    threads,
    calls: sorted.length,
    minMs: quantile(0),
    medianMs,
    p90Ms: quantile(0.9),
    gflops: countFlops(problem) / medianMs / 1e6,
    error,
  };
}
