// What clients may send: the fields of each request, their limits and defaults, and how a mistake
// is told.
import { randomBytes } from 'node:crypto';
import type { FastifyError } from 'fastify';
import { UsageError, type Vocabulary } from '../gpt/text';
import { invalidField, RequestError } from './errors';
import { MOST_SAMPLES } from './uncertainty';

/** What one client, and all together, may ask for. */
export interface Limits {
  /** Bytes of a request */
  readonly body: number;
  /** Characters of a prompt; the model sees the last ones */
  readonly prompt: number;
  /** Characters that one request may have written */
  readonly characters: number;
  /** Dropout samples */
  readonly samples: number;
  /** Texts that wait to be written while the batch is full */
  readonly waiting: number;
  /** Questions about texts that are open at once */
  readonly questions: number;
  /** Connections at once */
  readonly connections: number;
  /** Milliseconds until a request has arrived as a whole */
  readonly requestMs: number;
  /** Milliseconds until an answer has left as a whole */
  readonly answerMs: number;
}

export const LIMITS: Limits = {
  body: 64 * 1024,
  prompt: 8192,
  characters: 2000,
  samples: 256,
  waiting: 64,
  questions: 8,
  connections: 1024,
  requestMs: 10_000,
  answerMs: 5 * 60_000,
};

export interface GenerateBody {
  readonly prompt: string;
  readonly characters: number;
  readonly temperature: number;
  readonly topK?: number;
  readonly seed?: unknown;
}

export interface UncertaintyBody {
  readonly text: string;
  readonly placement: 'weights' | 'context' | 'scores';
  readonly p: number;
  readonly samples: number;
  readonly seed?: unknown;
}

export interface AttentionBody {
  readonly text: string;
}

/** The bodies as JSON schemas. @param length - the longest text that the model sees */
export function schemasOf(limits: Limits, length: number) {
  const text = (maxLength: number) => ({ type: 'string', minLength: 1, maxLength });
  const body = (required: string, properties: Record<string, object>) => ({
    body: { type: 'object', required: [required], properties, additionalProperties: false },
  });
  const samples = Math.min(limits.samples, MOST_SAMPLES);
  return {
    generate: body('prompt', {
      prompt: text(limits.prompt),
      characters: { type: 'integer', minimum: 1, maximum: limits.characters, default: 200 },
      temperature: { type: 'number', minimum: 0, maximum: 100, default: 0.8 },
      topK: { type: 'integer', minimum: 1, maximum: 1_000_000 },
      seed: {},
    }),
    uncertainty: body('text', {
      text: text(length),
      placement: { enum: ['weights', 'context', 'scores'], default: 'weights' },
      p: { type: 'number', minimum: 0, maximum: 1, default: 0.1 },
      samples: { type: 'integer', minimum: 2, maximum: samples, default: Math.min(32, samples) },
      seed: {},
    }),
    attention: body('text', { text: text(length) }),
  };
}

/**
 * A seed in decimal: a string of digits, or a number where JSON's are exact.
 * @returns the seed given, or a random one
 */
export function readSeed(seed: unknown): string {
  if (seed === undefined) return `${randomBytes(8).readBigUInt64LE()}`;
  const isExact = Number.isSafeInteger(seed) && (seed as number) >= 0;
  const isText = typeof seed === 'string' && /^\d{1,20}$/.test(seed);
  if (!isExact && !isText) {
    throw invalidField('seed', 'a whole number to 2^53 - 1, or a string of one', seed);
  }
  const value = BigInt(seed as number | string);
  if (value >= 1n << 64n) throw invalidField('seed', 'a whole number below 2^64', seed);
  return `${value}`;
}

/** The tokens of a text. */
export function readTokens(vocabulary: Vocabulary, text: string): number[] {
  try {
    return [...vocabulary.encode(text)];
  } catch (error) {
    if (!(error instanceof UsageError)) throw error;
    throw new RequestError(400, 'UNKNOWN_CHARACTER', error.message);
  }
}

const CODES: Record<string, string> = {
  FST_ERR_CTP_BODY_TOO_LARGE: 'BODY_TOO_LARGE',
  FST_ERR_CTP_INVALID_MEDIA_TYPE: 'UNSUPPORTED_MEDIA_TYPE',
  FST_ERR_CTP_EMPTY_JSON_BODY: 'MALFORMED_JSON',
  FST_ERR_CTP_INVALID_JSON_BODY: 'MALFORMED_JSON',
};

/** An error as clients see it: theirs with the reason, ours without. */
export function toRequestError(error: Error): RequestError {
  if (error instanceof RequestError) return error;
  const { validation, statusCode = 500, code, message } = error as FastifyError;
  const first = validation?.[0];
  if (first !== undefined) {
    const { keyword, params, instancePath } = first;
    if (keyword === 'additionalProperties') {
      const name = JSON.stringify(params.additionalProperty);
      return new RequestError(400, 'UNKNOWN_FIELD', `unknown field ${name}`);
    }
    const field = instancePath.slice(1).replaceAll('/', '.') || 'body';
    return new RequestError(400, 'INVALID_FIELD', `${field}: ${first.message}`);
  }
  if (code === 'ERR_SDPA_QUEUE_FULL' || code === 'ERR_SDPA_OUT_OF_MEMORY') {
    return new RequestError(503, 'BUSY', 'the machine has no room for this now');
  }
  if (statusCode < 400 || statusCode >= 500) {
    return new RequestError(500, 'INTERNAL', 'an error of the server; its log has more');
  }
  const fallback = error instanceof SyntaxError ? 'MALFORMED_JSON' : 'BAD_REQUEST';
  return new RequestError(statusCode, CODES[code] ?? fallback, message);
}
