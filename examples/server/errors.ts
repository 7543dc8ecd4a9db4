// Mistakes of a client: each has a status, a stable code, and a message that says what to change.

/** What a request did wrong, or why it cannot be served now. */
export class RequestError extends Error {
  override name = 'RequestError';

  constructor(
    readonly status: number,
    readonly code: string,
    message: string,
  ) {
    super(message);
  }
}

/** A field with a value that is not allowed. */
export function invalidField(field: string, expected: string, got: unknown): RequestError {
  const shown = typeof got === 'string' && got.length > 40 ? `${got.slice(0, 40)}…` : got;
  const message = `${field}: expected ${expected}, got ${JSON.stringify(shown) ?? 'nothing'}`;
  return new RequestError(400, 'INVALID_FIELD', message);
}
