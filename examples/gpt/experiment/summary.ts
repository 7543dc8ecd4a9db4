// What the runs say: the losses of each configuration, and paired differences between them.
import { type Configuration, PLACEMENTS, PROBABILITIES } from './plan';
import type { Point, Row } from './results';
import { type Interval, intervalOf, jointConfidence, meanOf } from './statistics';

/** A loss of a run that configurations are compared by. */
export type Measure = 'best' | 'final';

/** All runs of one configuration, in the order of their seeds. */
export interface Group extends Configuration {
  readonly name: string;
  readonly rows: readonly Row[];
  /** Lowest validation loss of each run: what stopping early would keep */
  readonly best: readonly number[];
  /** Validation loss of each run at its end */
  readonly final: readonly number[];
  /** Training loss of each run at its end */
  readonly finalTraining: readonly number[];
  /** Mean step of the lowest validation loss */
  readonly bestStep: number;
}

/** First minus second, seed by seed. */
export interface Difference {
  readonly first: Group;
  readonly second: Group;
  readonly interval: Interval;
  /** Wider, so that all intervals of a table hold at once */
  readonly joint: Interval;
}

export interface Summary {
  readonly seeds: readonly number[];
  readonly none: Group;
  /** By placement, then by p */
  readonly groups: readonly Group[];
}

/** @throws Error where a run is missing, or runs of a seed did not start alike */
export function summarize(rows: readonly Row[]): Summary {
  const seeds = [...new Set(rows.map(({ seed }) => seed))].sort((a, b) => a - b);
  if (seeds.length < 2) throw new Error('There is no interval without two seeds at least');
  const group = (placement: Configuration['placement'], p: number) =>
    groupOf(rows, seeds, { placement, p });
  const none = group('none', 0);
  const groups = PLACEMENTS.flatMap((placement) => PROBABILITIES.map((p) => group(placement, p)));
  for (const { name, rows } of groups) {
    const isPaired = rows.every(
      ({ curve }, i) => curve[0].validation === none.rows[i].curve[0].validation,
    );
    if (!isPaired) throw new Error(`${name}: its runs did not start as those without dropout did`);
  }
  return { seeds, none, groups };
}

function groupOf(all: readonly Row[], seeds: readonly number[], wanted: Configuration): Group {
  const { placement, p } = wanted;
  const name = nameOf(wanted);
  const rows = seeds.map((seed) => {
    const found = all.filter(
      (row) => row.placement === placement && row.p === p && row.seed === seed,
    );
    if (found.length === 1) return found[0];
    throw new Error(`${name}, seed ${seed}: expected one run, found ${found.length}`);
  });
  const best = rows.map(bestOf);
  return {
    ...{ placement, p, name, rows },
    best: best.map(({ validation }) => validation),
    final: rows.map(({ curve }) => curve[curve.length - 1].validation),
    finalTraining: rows.map(({ curve }) => curve[curve.length - 1].training),
    bestStep: meanOf(best.map(({ step }) => step)),
  };
}

export function nameOf({ placement, p }: Configuration): string {
  return placement === 'none' ? 'no dropout' : `${placement}, p = ${p}`;
}

function bestOf({ curve }: Row): Point {
  return curve.reduce((best, point) => (point.validation < best.validation ? point : best));
}

/** Paired differences, with joint intervals over all of them. */
export function differences(pairs: readonly (readonly [Group, Group])[], measure: Measure) {
  return pairs.map(([first, second]): Difference => {
    const numbers = first[measure].map((loss, i) => loss - second[measure][i]);
    const joint = intervalOf(numbers, jointConfidence(pairs.length));
    return { first, second, interval: intervalOf(numbers), joint };
  });
}

/** Every configuration against no dropout. */
export function againstNone({ none, groups }: Summary, measure: Measure): Difference[] {
  return differences(
    groups.map((group) => [group, none]),
    measure,
  );
}

/** Every placement against every other at the same p. */
export function againstEachOther({ groups }: Summary, measure: Measure): Difference[] {
  return differences(
    PROBABILITIES.flatMap((p) => pairsOf(groups.filter((group) => group.p === p))),
    measure,
  );
}

/** The configuration of each placement with the lowest mean. */
export function bestGroups({ groups }: Summary, measure: Measure): Group[] {
  return PLACEMENTS.map((placement) =>
    groups
      .filter((group) => group.placement === placement)
      .reduce((a, b) => (meanOf(b[measure]) < meanOf(a[measure]) ? b : a)),
  );
}

export function pairsOf<T>(items: readonly T[]): [T, T][] {
  return items.flatMap((a, i) => items.slice(i + 1).map((b): [T, T] => [a, b]));
}
