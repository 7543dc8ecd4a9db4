// One request on its way: how long it waited and ran, and a signal for when nobody waits for it.
import type { FastifyReply, FastifyRequest } from 'fastify';
import { answers } from './metrics';

declare module 'fastify' {
  interface FastifyRequest {
    answering: Answering;
  }
}

/** As nginx has it: the client went away first. */
const CLIENT_GONE = 499;

export class Answering {
  readonly #arrived = performance.now();
  #begun: number | undefined;
  readonly #given = new AbortController();

  /** @param mostMs - an answer that has not left by then is cut off */
  constructor(request: FastifyRequest, { raw }: FastifyReply, mostMs: number) {
    const deadline = setTimeout(() => raw.destroy(), mostMs);
    raw.on('close', () => {
      clearTimeout(deadline);
      const status = raw.writableFinished ? raw.statusCode : CLIENT_GONE;
      if (status === CLIENT_GONE) this.#given.abort();
      const begun = this.#begun;
      answers.publish({
        route: request.routeOptions.url ?? 'none',
        status,
        queueMs: begun && begun - this.#arrived,
        runMs: begun && performance.now() - begun,
      });
    });
  }

  /** Aborts where the client has gone before its answer. */
  get signal(): AbortSignal {
    return this.#given.signal;
  }

  /** It no longer waits for others. */
  begin(): void {
    this.#begun ??= performance.now();
  }
}
