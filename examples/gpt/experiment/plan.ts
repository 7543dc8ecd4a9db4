// What the experiment compares: dropout placements and probabilities, and the one training run that
// all of them share.
import type { DropoutPlacement } from 'node-sdpa';
import { type Corpus, readBook, splitText } from '../text';
import type { Settings } from '../trainer';

export const PLACEMENTS = ['weights', 'context', 'scores'] as const;
export const PROBABILITIES = [0.1, 0.2, 0.3, 0.5] as const;

/** A placement and its probability; `none` with 0 is what all are compared with. */
export interface Configuration {
  readonly placement: DropoutPlacement | 'none';
  readonly p: number;
}

/** One training run. */
export interface Job extends Configuration {
  readonly seed: number;
}

/** The run: small enough for an hour in all, on a text short enough to be learned by heart. */
export const RUN = {
  model: { layers: 2, heads: 3, width: 48, length: 32 },
  batch: 8,
  steps: 1200,
  rate: 0.006,
  warmup: 50,
  weightDecay: 0.1,
  clip: 1,
} as const;

/** Characters from the start of the book: one half to learn, the other for validation. */
export const TEXT = { characters: 12_000, validationShare: 0.5 } as const;

/** The run is evaluated at the start, after every so many steps, and at the end. */
export const EVALUATED_EVERY = 100;

export const CONFIGURATIONS: readonly Configuration[] = [
  { placement: 'none', p: 0 },
  ...PLACEMENTS.flatMap((placement) => PROBABILITIES.map((p) => ({ placement, p }))),
];

/** All runs, seed by seed, so that an unfinished experiment has whole comparisons. */
export function listJobs(seeds: number): Job[] {
  return Array.from({ length: seeds }, (_, i) => i + 1).flatMap((seed) =>
    CONFIGURATIONS.map((configuration) => ({ ...configuration, seed })),
  );
}

export function settingsOf({ placement, p, seed }: Job, steps: number): Settings {
  return { ...RUN, steps, dropout: { placement, p }, seed };
}

export function readCorpus(): Corpus {
  const { title, text } = readBook();
  const book = { title, text: text.slice(0, TEXT.characters) };
  return splitText(book, TEXT.validationShare, TEXT.characters, RUN.model.length);
}
