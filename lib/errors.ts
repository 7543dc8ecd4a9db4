// The errors that this package throws: TypeError for a wrong kind, RangeError for a wrong value
// or shape, Error for everything that is not the caller's argument; each with a stable `code`.

/**
 * The `code` of every error thrown by this package.
 *
 * | code | class | meaning |
 * | --- | --- | --- |
 * | `ERR_SDPA_INVALID_ARG_TYPE` | TypeError | an argument of the wrong kind, or an unknown option |
 * | `ERR_SDPA_INVALID_ARG_VALUE` | RangeError | the right kind, a value that is not allowed |
 * | `ERR_SDPA_SHAPE_MISMATCH` | RangeError | shapes that do not fit each other or their data |
 * | `ERR_SDPA_UNSUPPORTED` | RangeError | a size or a combination that is not computed |
 * | `ERR_SDPA_BACKEND_UNAVAILABLE` | Error | the named backend cannot run here |
 * | `ERR_SDPA_LOAD_FAILED` | Error | the native binary is missing or does not load |
 * | `ERR_SDPA_QUEUE_FULL` | Error | too many asynchronous calls wait already |
 * | `ERR_SDPA_ABORTED` | Error | the call's AbortSignal fired; `cause` is its reason |
 * | `ERR_SDPA_DISPOSED` | Error | a tensor or result was used after `dispose()` |
 * | `ERR_SDPA_OUT_OF_MEMORY` | Error | memory for a result could not be had |
 * | `ERR_SDPA_INTERNAL` | Error | a fault of this package: please report it |
 *
 * @example
 * ```js
 * import { scaledDotProductAttentionSync } from 'node-sdpa';
 * import assert from 'node:assert';
 * const query = { data: new Float32Array(4), dims: [1, 1, 1, 4] };
 * const key = { data: new Float32Array(2), dims: [1, 1, 1, 2] };
 * assert.throws(() => scaledDotProductAttentionSync(query, key, key), {
 *   name: 'RangeError',
 *   code: 'ERR_SDPA_SHAPE_MISMATCH',
 *   message: 'key: expected [1, 1, Lk, 4] to match query [1, 1, 1, 4], got [1, 1, 1, 2]',
 * });
 * ```
 */
export type SdpaErrorCode =
  | 'ERR_SDPA_INVALID_ARG_TYPE'
  | 'ERR_SDPA_INVALID_ARG_VALUE'
  | 'ERR_SDPA_SHAPE_MISMATCH'
  | 'ERR_SDPA_UNSUPPORTED'
  | 'ERR_SDPA_BACKEND_UNAVAILABLE'
  | 'ERR_SDPA_LOAD_FAILED'
  | 'ERR_SDPA_QUEUE_FULL'
  | 'ERR_SDPA_ABORTED'
  | 'ERR_SDPA_DISPOSED'
  | 'ERR_SDPA_OUT_OF_MEMORY'
  | 'ERR_SDPA_INTERNAL';

/**
 * An error of this package: a TypeError, RangeError or Error that carries a stable `code`. Its
 * message names the argument, what was expected and what came.
 *
 * @example
 * ```js
 * import { Generator } from 'node-sdpa';
 * import assert from 'node:assert';
 * try {
 *   new Generator({ seed: -1 });
 *   assert.fail('a negative seed is an error');
 * } catch (error) {
 *   assert.ok(error instanceof RangeError);
 *   assert.strictEqual(error.code, 'ERR_SDPA_INVALID_ARG_VALUE');
 *   assert.match(error.message, /^seed: expected .*, got -1$/);
 * }
 * ```
 */
export interface SdpaError extends Error {
  /** What went wrong, for programs */
  code: SdpaErrorCode;
}

function withCode(error: Error, code: SdpaErrorCode): SdpaError {
  return Object.assign(error, { code });
}

/** A wrong kind of argument: TypeError `ERR_SDPA_INVALID_ARG_TYPE`. */
export function invalidType(argument: string, expected: string, got: string): SdpaError {
  return typeError(`${argument}: expected ${expected}, got ${got}`);
}

/** TypeError `ERR_SDPA_INVALID_ARG_TYPE` with a message of its own. */
export function typeError(message: string): SdpaError {
  return withCode(new TypeError(message), 'ERR_SDPA_INVALID_ARG_TYPE');
}

/** A value that is not allowed: RangeError `ERR_SDPA_INVALID_ARG_VALUE`. */
export function invalidValue(argument: string, expected: string, got: string): SdpaError {
  return valueError(`${argument}: expected ${expected}, got ${got}`);
}

/** RangeError `ERR_SDPA_INVALID_ARG_VALUE` with a message of its own. */
export function valueError(message: string): SdpaError {
  return withCode(new RangeError(message), 'ERR_SDPA_INVALID_ARG_VALUE');
}

/** Shapes that do not fit: RangeError `ERR_SDPA_SHAPE_MISMATCH`. */
export function shapeMismatch(argument: string, expected: string, got: string): SdpaError {
  const message = `${argument}: expected ${expected}, got ${got}`;
  return withCode(new RangeError(message), 'ERR_SDPA_SHAPE_MISMATCH');
}

/** A size or a combination that is not computed: RangeError `ERR_SDPA_UNSUPPORTED`. */
export function unsupported(argument: string, expected: string, got: string): SdpaError {
  const message = `${argument}: expected ${expected}, got ${got}`;
  return withCode(new RangeError(message), 'ERR_SDPA_UNSUPPORTED');
}

/** An operational error, whose cause is not an argument: Error with the given code. */
export function sdpaError(code: SdpaErrorCode, message: string, cause?: unknown): SdpaError {
  const error = cause === undefined ? new Error(message) : new Error(message, { cause });
  return withCode(error, code);
}

/** The AbortError of a call whose signal fired; `cause` is the signal's reason. */
export function abortedError(signal: AbortSignal): SdpaError {
  const error = new Error('The attention call was aborted', { cause: signal.reason });
  error.name = 'AbortError';
  return withCode(error, 'ERR_SDPA_ABORTED');
}

/** Use after dispose(): Error `ERR_SDPA_DISPOSED`. */
export function disposedError(what: string): SdpaError {
  return sdpaError('ERR_SDPA_DISPOSED', `${what}: used after dispose()`);
}
