// Means with confidence intervals, and paired differences between runs of the same seed.
import jStat from 'jstat';

export interface Interval {
  readonly mean: number;
  readonly low: number;
  readonly high: number;
}

/** How sure an interval is to hold the mean of endlessly many seeds. */
export const CONFIDENCE = 0.95;

/**
 * The mean of independent numbers with Student's interval.
 * @param numbers - two at least
 * @param confidence - 0 to 1
 */
export function intervalOf(numbers: readonly number[], confidence = CONFIDENCE): Interval {
  const mean = meanOf(numbers);
  const quantile = jStat.studentt.inv((1 + confidence) / 2, numbers.length - 1);
  const margin = (quantile * deviationOf(numbers)) / Math.sqrt(numbers.length);
  return { mean, low: mean - margin, high: mean + margin };
}

/** The confidence of each of `count` intervals with which all hold at once (Bonferroni). */
export function jointConfidence(count: number): number {
  return 1 - (1 - CONFIDENCE) / count;
}

/** Whether an interval leaves out 0. */
export const isClear = ({ low, high }: Interval): boolean => low > 0 || high < 0;

export function meanOf(numbers: readonly number[]): number {
  return numbers.reduce((sum, x) => sum + x) / numbers.length;
}

/** The sample's standard deviation. */
export function deviationOf(numbers: readonly number[]): number {
  const mean = meanOf(numbers);
  const squares = numbers.reduce((sum, x) => sum + (x - mean) ** 2, 0);
  return Math.sqrt(squares / (numbers.length - 1));
}
