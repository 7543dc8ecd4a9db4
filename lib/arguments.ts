// Checks that any function of the package makes of its arguments, and the words for what came.

import { abortedError, invalidType, invalidValue, typeError } from './errors';

/** A value in the words of an error message: short, and never throwing itself. */
export function describe(value: unknown): string {
  switch (typeof value) {
    case 'string':
      return JSON.stringify(value.length > 40 ? `${value.slice(0, 40)}...` : value);
    case 'bigint':
      return `${value}n`;
    case 'symbol':
      return 'a symbol';
    case 'function':
      return 'a function';
    case 'object':
      return value === null ? 'null' : describeObject(value);
    default:
      return String(value);
  }
}

function describeObject(value: object): string {
  try {
    if (Array.isArray(value)) {
      const more = value.length > 8 ? ', ...' : '';
      return `[${value.slice(0, 8).map(describe).join(', ')}${more}]`;
    }
    const name: unknown = value.constructor?.name;
    if (typeof name !== 'string' || name === '' || name === 'Object') return 'an object';
    return ArrayBuffer.isView(value) ? `${name}(${(value as Uint8Array).length})` : name;
  } catch {
    return 'an object';
  }
}

/** Requires an options object that is plain: no class instance whose fields might be missed. */
export function checkPlainObject(argument: string, value: unknown): asserts value is object {
  if (typeof value !== 'object' || value === null) {
    throw invalidType(argument, 'a plain object', describe(value));
  }
  const prototype: unknown = Object.getPrototypeOf(value);
  // Objects of another realm have another Object.prototype, which has no prototype itself.
  if (prototype !== Object.prototype && prototype !== null) {
    if (Array.isArray(value) || Object.getPrototypeOf(prototype) !== null) {
      throw invalidType(argument, 'a plain object', describe(value));
    }
  }
}

/** The names of all options, each undefined. */
export type NoOptions<Options> = { readonly [Name in keyof Required<Options>]: undefined };

/**
 * A copy of an options object, on which every known name is an own property: the object's own are
 * read once each, and what its prototype may have does not count. Rejects unknown names, with a
 * suggestion for a misspelled one.
 */
export function readOptions<Options>(
  value: unknown,
  none: NoOptions<Options>,
  argument = 'options',
): Options {
  checkPlainObject(argument, value);
  const options: Record<string, unknown> = { ...none };
  for (const name of Object.keys(value)) {
    if (!Object.hasOwn(none, name)) throw unknownOption(argument, name, Object.keys(none));
    options[name] = (value as Record<string, unknown>)[name];
  }
  return options as Options;
}

function unknownOption(argument: string, name: string, known: readonly string[]): Error {
  const suggestion = closestName(name, known);
  return typeError(
    suggestion === undefined
      ? `${argument}: unknown option "${name}"; the options are ${known.join(', ')}`
      : `${argument}: unknown option "${name}"; did you mean "${suggestion}"?`,
  );
}

/** The known name nearest to a misspelled or shortened one; undefined if none is near. */
export function closestName(name: string, known: Iterable<string>): string | undefined {
  const plainName = plain(name);
  let closest: string | undefined;
  let least = 1 + Math.max(2, Math.floor(plainName.length / 3));
  for (const candidate of known) {
    const distance = distanceTo(plainName, plain(candidate));
    if (distance < least) {
      least = distance;
      closest = candidate;
    }
  }
  return closest;
}

/** How far a name is from a known one; "mask" is as good as one slip away from "attnMask". */
function distanceTo(name: string, known: string): number {
  return name.length >= 3 && known.includes(name) ? 1 : editDistance(name, known);
}

/** Spelling without case, `_` and `-`: dropout_p and dropoutP are the same word. */
function plain(name: string): string {
  return name.slice(0, 64).replace(/[_-]/g, '').toLowerCase();
}

/** Levenshtein's distance: insertions, deletions and replacements that lead from a to b. */
function editDistance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++) {
      const replaced = row[j - 1] + (a[i - 1] === b[j - 1] ? 0 : 1);
      next.push(Math.min(replaced, row[j] + 1, next[j - 1] + 1));
    }
    row = next;
  }
  return row[b.length];
}

/** A boolean; `fallback` where the value is undefined. */
export function checkBoolean(argument: string, value: unknown, fallback: boolean): boolean {
  if (value === undefined) return fallback;
  if (typeof value !== 'boolean') throw invalidType(argument, 'a boolean', describe(value));
  return value;
}

/** A number in lowest..highest, both included; never NaN. */
export function checkNumber(
  argument: string,
  value: unknown,
  lowest: number,
  highest: number,
  expected: string,
): number {
  if (typeof value !== 'number') throw invalidType(argument, expected, describe(value));
  if (!(value >= lowest && value <= highest)) {
    throw invalidValue(argument, expected, describe(value));
  }
  return value;
}

/** An integer in lowest..highest, both included. */
export function checkInteger(
  argument: string,
  value: unknown,
  lowest: number,
  highest: number,
): number {
  if (typeof value !== 'number' || !Number.isInteger(value) || value < lowest || value > highest) {
    const expected = `an integer from ${lowest} to ${highest}`;
    if (typeof value !== 'number') throw invalidType(argument, expected, describe(value));
    throw invalidValue(argument, expected, describe(value));
  }
  return value + 0; // -0 becomes 0
}

/** The index of a word among the allowed ones; 0 where the value is undefined. */
export function checkWord(argument: string, value: unknown, words: readonly string[]): number {
  if (value === undefined) return 0;
  const index = words.indexOf(value as string);
  if (index === -1) throw wrongWord(argument, value, words);
  return index;
}

/** The error for a value that is none of the allowed words. */
export function wrongWord(argument: string, value: unknown, words: readonly string[]): Error {
  const expected = words.map((word) => `"${word}"`).join(', ');
  if (typeof value !== 'string') return invalidType(argument, expected, describe(value));
  const suggestion = closestName(value, words);
  const hint = suggestion === undefined ? '' : `; did you mean "${suggestion}"?`;
  return invalidValue(argument, expected, describe(value) + hint);
}

/** One bit per listed word: bit i is set where `words[i]` is in the list. */
export function checkWordList(argument: string, value: unknown, words: readonly string[]): number {
  if (value === undefined) return 0;
  if (!Array.isArray(value)) {
    throw invalidType(argument, `an array of "${words.join('", "')}"`, describe(value));
  }
  let bits = 0;
  for (let i = 0; i < value.length; i++) {
    const word: unknown = value[i];
    const index = words.indexOf(word as string);
    if (index === -1) throw wrongWord(`${argument}[${i}]`, word, words);
    bits |= 1 << index;
  }
  return bits;
}

const MAX_U64 = 0xffff_ffff_ffff_ffffn;

/** A seed or offset: a safe non-negative integer, or a bigint that 64 bits hold. */
export function checkUint64(argument: string, value: unknown): number | bigint {
  if (typeof value === 'number') {
    if (Number.isSafeInteger(value) && value >= 0) return value;
  } else if (typeof value === 'bigint') {
    if (value >= 0n && value <= MAX_U64) return value;
  } else {
    throw invalidType(argument, 'an integer or bigint', describe(value));
  }
  throw invalidValue(
    argument,
    'an integer from 0 to 2^53 - 1 or 0n to 2n^64 - 1n',
    describe(value),
  );
}

/** The low 32 bits of an unsigned 64-bit number. */
export function lowWord(value: number | bigint): number {
  return typeof value === 'number' ? value >>> 0 : Number(value & 0xffff_ffffn);
}

/** The high 32 bits of an unsigned 64-bit number. */
export function highWord(value: number | bigint): number {
  return typeof value === 'number' ? Math.floor(value / 2 ** 32) : Number(value >> 32n);
}

/** The unsigned 64-bit number of two 32-bit halves. */
export function joinWords(low: number, high: number): bigint {
  return (BigInt(high) << 32n) | BigInt(low);
}

/** An AbortSignal that has not fired, or undefined; throws an AbortError where it has. */
export function checkSignal(argument: string, value: unknown): AbortSignal | undefined {
  if (value === undefined) return undefined;
  const signal = value as AbortSignal | null;
  if (
    typeof signal !== 'object' ||
    signal === null ||
    typeof signal.aborted !== 'boolean' ||
    typeof signal.addEventListener !== 'function' ||
    typeof signal.removeEventListener !== 'function'
  ) {
    throw invalidType(argument, 'an AbortSignal', describe(value));
  }
  if (signal.aborted) throw abortedError(signal);
  return signal;
}
