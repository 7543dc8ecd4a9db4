// What the measured times say: this package against the fastest form of each other library, against
// plain JavaScript, and against what the machine can do.
import { countKeyBytes, PEER_CASES } from '../cases.mjs';
import { nameSubject, ONNXRUNTIME, OURS, PYTORCH, TFJS } from './subjects.mjs';

/** @typedef {import('./compare.mjs').Result} Result */
/** @typedef {Record<string, number>} Peaks GFLOP/s of one core */
/** @typedef {{case: string, threads: number, gigabytes: number}} Read GB/s of a plain read */
/**
 * One case at one number of threads.
 * @typedef {object} Standing
 * @property {string} case
 * @property {number} threads
 * @property {Result} best this package's own choice at precision 'highest'
 * @property {Result | null} onnxruntime its fastest form and setting
 * @property {Result | null} pytorch
 * @property {Result | null} tfjs has one thread only
 * @property {Result | null} js has one thread only
 * @property {Result[]} ours all native backends and precisions
 */

/**
 * @param {Result[]} results
 * @returns {Standing[]} for each case and number of threads
 */
export function rank(results) {
  const names = [...new Set(results.map((result) => result.case))];
  const counts = [...new Set(results.map(({ threads }) => threads))].sort((a, b) => a - b);
  return names.flatMap((name) =>
    counts.flatMap((threads) => {
      const all = results.filter((result) => result.case === name);
      const alike = all.filter((result) => result.threads === threads);
      const ours = alike.filter(({ library, form }) => library === OURS && form !== 'js');
      if (ours.length === 0) return [];
      const standing = {
        ours,
        best: ours.find(({ precision }) => precision === 'highest') ?? ours[0],
        onnxruntime: fastest(alike, ONNXRUNTIME),
        pytorch: fastest(alike, PYTORCH),
        tfjs: fastest(all, TFJS),
        js: all.find(({ form }) => form === 'js') ?? null,
      };
      return [{ case: name, threads, ...standing }];
    }),
  );
}

/** @param {Result[]} results @param {string} name of a library */
function fastest(results, name) {
  const candidates = results.filter(({ library }) => library === name);
  candidates.sort((a, b) => a.medianMs - b.medianMs);
  return candidates[0] ?? null;
}

/** How many times faster. @param {Result} result @param {Result | null} other */
export function ratio(result, other) {
  return other === null ? null : other.medianMs / result.medianMs;
}

/** The highest peak of float32 arithmetic: beyond it, products are split into narrower ones. */
export function floatPeak(/** @type {Peaks} */ peaks) {
  const rates = Object.entries(peaks).flatMap(([name, rate]) =>
    name.includes('float32') ? [rate] : [],
  );
  return rates.length === 0 ? null : Math.max(...rates);
}

/** @typedef {ReturnType<typeof describeRatios>[number]} Ratios */

/**
 * All ratios as plain data: how many times faster than each, and the part of the float32 peak.
 * @param {Standing[]} standings
 * @param {Peaks} peaks
 * @param {Read[]} reads
 */
export function describeRatios(standings, peaks, reads) {
  const peak = floatPeak(peaks);
  const causal = ' causal';
  const at = (/** @type {string} */ name, /** @type {number} */ threads) =>
    standings.find((other) => other.case === name && other.threads === threads)?.best ?? null;
  return standings.map((standing) => {
    const { best, threads, ours, onnxruntime } = standing;
    const read = reads.find((one) => one.case === standing.case && one.threads === threads);
    const problem = PEER_CASES.find(({ name }) => name === standing.case);
    const againstPeer = ours.map((result) => [nameSubject(result), ratio(result, onnxruntime)]);
    return {
      case: standing.case,
      threads,
      best: nameSubject(best),
      fastestOnnxruntime: onnxruntime && nameSubject(onnxruntime),
      onnxruntime: ratio(best, onnxruntime),
      pytorch: ratio(best, standing.pytorch),
      tfjs: ratio(best, standing.tfjs),
      js: ratio(best, standing.js),
      ofFloatPeak: peak && best.gflops / (peak * threads),
      ofRead:
        read && problem ? countKeyBytes(problem) / (best.medianMs * 1e6) / read.gigabytes : null,
      oneThread: threads === 1 ? null : ratio(best, at(standing.case, 1)),
      notCausal: standing.case.endsWith(causal)
        ? ratio(best, at(standing.case.replace(causal, ''), threads))
        : null,
      againstFastestOnnxruntime: Object.fromEntries(againstPeer),
    };
  });
}
