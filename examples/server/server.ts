// The server: routes, and what holds its load: a bounded queue, limits, deadlines, a clean end.
import path from 'node:path';
import fastifyStatic from '@fastify/static';
import Fastify, { type FastifyInstance, type FastifyReply, type FastifyRequest } from 'fastify';
import { backendInfo } from 'node-sdpa';
import { loadModel } from '../gpt/checkpoint';
import { UsageError } from '../gpt/text';
import { Answering } from './answering';
import { Cluster } from './cluster/coordinator';
import { blocksOf, type Step } from './engine';
import { RequestError } from './errors';
import { Lines } from './lines';
import { createMetrics, steps } from './metrics';
import {
  type AttentionBody,
  type GenerateBody,
  LIMITS,
  type Limits,
  readSeed,
  readTokens,
  schemasOf,
  toRequestError,
  type UncertaintyBody,
} from './requests';
import { AnalysisThread, EngineThread, sentModel } from './threads';
import type { Uncertainty, UncertaintyJob } from './uncertainty';

/** Who computes uncertainty: a thread of the server, or the workers of a cluster. */
export interface Sampler {
  /** @param onBegin - tells when the job no longer waits for others */
  uncertainty(job: UncertaintyJob, signal: AbortSignal, onBegin: () => void): Promise<Uncertainty>;
}

export interface ServerOptions {
  /** A safetensors file of examples/gpt */
  readonly checkpoint: string;
  /** Texts that are written at once. Default: 16 */
  readonly batch?: number;
  /** Blocks of the cache. Default: as many as the batch can need */
  readonly blocks?: number;
  readonly limits?: Partial<Limits>;
  /** The Redis whose workers compute uncertainty (see cluster/). Default: a thread of the server */
  readonly redis?: string;
  /** Of the log. Default: 'warn' */
  readonly logLevel?: string;
}

/** Of a connection without a request. */
const KEEP_ALIVE_MS = 5000;

/**
 * A server that is ready to listen. Its `close()` refuses what comes, finishes what was accepted,
 * and ends the threads.
 * @throws UsageError, SafetensorsError where the checkpoint is none, or the blocks are too few
 */
export async function createServer(options: ServerOptions): Promise<FastifyInstance> {
  const limits = { ...LIMITS, ...options.limits };
  const { model, vocabulary, step: trainedSteps, title } = loadModel(options.checkpoint);
  const { sizes } = model;
  const blocksOfText = blocksOf(sizes, sizes.length);
  const { batch = 16, blocks = batch * blocksOfText } = options;
  if (blocks < blocksOfText) {
    throw new UsageError(`blocks: expected at least ${blocksOfText}, got ${blocks}`);
  }

  const { redis } = options;
  const cluster = redis === undefined ? undefined : new Cluster(model, { redis });
  const app = createApp(limits, options.logLevel ?? 'warn');
  let failure: Error | undefined;
  const onFailure = (error: Error) => {
    failure ??= error;
    app.log.fatal(error);
  };
  const data = { model: sentModel(model), engine: { batch, blocks } };
  const backlog = new Backlog();
  const onStep = (step: Step) => {
    backlog.stepped(step);
    steps.publish(step);
  };
  const engine = new EngineThread(data, onStep, onFailure);
  const analysis = new AnalysisThread(data, onFailure);
  const sampler: Sampler = cluster ?? analysis;
  const metrics = createMetrics(engine);
  const schemas = schemasOf(limits, sizes.length);
  let isStopping = false;
  let questions = 0;

  app.addHook('onRequest', async (request, reply) => {
    request.answering = new Answering(request, reply, limits.answerMs);
    if (isStopping) throw new RequestError(503, 'STOPPING', 'the server is stopping');
  });

  app.post('/generate', { schema: schemas.generate }, (request, reply) => {
    const { prompt, characters, temperature, topK, seed: given } = request.body as GenerateBody;
    const tokens = readTokens(vocabulary, prompt);
    const seed = readSeed(given);
    if (failure !== undefined) throw new RequestError(503, 'FAILED', 'the server needs a restart');
    if (engine.size >= batch + limits.waiting) throw busy(reply, backlog.seconds);

    request.answering.signal.throwIfAborted(); // or its end would never be seen
    const lines = new Lines();
    lines.send({ type: 'start', seed });
    let left = characters;
    backlog.add(left);
    const cancel = engine.write(
      { tokens, count: characters, temperature, topK, seed },
      {
        begun: () => request.answering.begin(),
        written({ token, probability, entropy }) {
          left--;
          backlog.add(-1);
          lines.send({ type: 'token', text: vocabulary.decode([token]), probability, entropy });
        },
        ended(error) {
          if (error === undefined) lines.send({ type: 'end', characters });
          else {
            request.log.error(error);
            const { code, message } = toRequestError(error);
            lines.send({ type: 'error', code, message });
          }
          lines.end();
        },
      },
    );
    reply.raw.on('close', () => {
      cancel();
      backlog.add(-left);
    });
    return reply
      .type('application/x-ndjson')
      .header('cache-control', 'no-store')
      .send(lines.stream);
  });

  /** Asks about a text, if not too many do. */
  async function ask<T>(
    { answering }: FastifyRequest,
    reply: FastifyReply,
    question: (signal: AbortSignal, onBegin: () => void) => Promise<T>,
  ): Promise<T> {
    if (failure !== undefined) throw new RequestError(503, 'FAILED', 'the server needs a restart');
    if (questions >= limits.questions) throw busy(reply, 1);
    answering.signal.throwIfAborted();
    questions++;
    try {
      return await question(answering.signal, () => answering.begin());
    } finally {
      questions--;
    }
  }

  app.post('/uncertainty', { schema: schemas.uncertainty }, async (request, reply) => {
    const { text, seed: given, placement, p, samples } = request.body as UncertaintyBody;
    const seed = readSeed(given);
    const job = { tokens: readTokens(vocabulary, text), placement, p, seed, samples };
    const result = await ask(request, reply, (...how) => sampler.uncertainty(job, ...how));
    const character = (token: number) => vocabulary.decode([token]);
    const predictions = result.predictions.map(({ token, likeliest, ...numbers }) => ({
      character: token === null ? null : character(token),
      ...numbers,
      likeliest: likeliest.map(({ token, mean }) => ({ character: character(token), mean })),
    }));
    return { ...result, seed, predictions };
  });

  app.post('/attention', { schema: schemas.attention }, async (request, reply) => {
    const tokens = readTokens(vocabulary, (request.body as AttentionBody).text);
    return ask(request, reply, (...how) => analysis.attentionMaps(tokens, ...how));
  });

  app.get('/model', async () => {
    const { prompt, characters, samples } = limits;
    const known = { title, step: trainedSteps, sizes, characters: vocabulary.characters };
    return { ...known, limits: { prompt, characters, samples } };
  });

  app.get('/healthz', async (_request, reply) => {
    if (failure !== undefined) reply.code(503);
    const samplers = await cluster?.health();
    const isDegraded = samplers !== undefined && !samplers.workers;
    const status = failure !== undefined ? 'failed' : isDegraded ? 'degraded' : 'ok';
    const { waiting, running } = engine;
    return { status, waiting, running, questions, backend: backendInfo(), cluster: samplers };
  });

  app.get('/metrics', async (_request, reply) => {
    reply.type(metrics.registry.contentType);
    return metrics.registry.metrics();
  });

  app.register(fastifyStatic, { root: path.join(__dirname, 'public'), wildcard: false });

  let closingIdle: NodeJS.Timeout;
  app.addHook('preClose', async () => {
    isStopping = true;
    // A connection that has had its last answer would stay open for another request.
    closingIdle = setInterval(() => app.server.closeIdleConnections(), 50);
  });
  app.addHook('onClose', async () => {
    clearInterval(closingIdle);
    metrics.close();
    await Promise.all([engine.close(), analysis.close(), cluster?.close()]);
  });
  await app.ready();
  return app;
}

/** Fastify with the limits of connections, and with errors in one form. */
function createApp(limits: Limits, level: string): FastifyInstance {
  const app = Fastify({
    logger: { level },
    bodyLimit: limits.body,
    requestTimeout: limits.requestMs,
    keepAliveTimeout: KEEP_ALIVE_MS,
    http: {
      headersTimeout: limits.requestMs,
      connectionsCheckingInterval: limits.requestMs / 4,
    },
    return503OnClosing: false, // the hook above says so in our form
    // What a client has misspelled is an error, and what it has sent is not turned into another.
    ajv: { customOptions: { removeAdditional: false, coerceTypes: false } },
    frameworkErrors: (error, _request, reply) => sendError(reply as FastifyReply, error),
    clientErrorHandler: (error, socket) => {
      const [status, code, message] = HTTP_ERRORS[error.code] ?? HTTP_ERRORS.other;
      const body = JSON.stringify({ error: { code, message } });
      const head = `HTTP/1.1 ${status}\r\nconnection: close\r\ncontent-type: application/json`;
      if (!socket.writable) return void socket.destroy();
      socket.end(`${head}\r\ncontent-length: ${Buffer.byteLength(body)}\r\n\r\n${body}`, () =>
        socket.destroy(),
      );
    },
  });
  app.server.maxConnections = limits.connections;
  app.removeContentTypeParser('text/plain'); // bodies are JSON
  app.decorateRequest('answering');
  app.addHook('onSend', async (_request, reply) => {
    reply.header('x-content-type-options', 'nosniff');
    reply.header('content-security-policy', "default-src 'self'");
  });
  app.setNotFoundHandler(async (request) => {
    throw new RequestError(404, 'NOT_FOUND', `there is no ${request.method} ${request.url}`);
  });
  app.setErrorHandler((error: Error, request, reply) => {
    const status = sendError(reply, error);
    if (status === 500 && !request.answering.signal.aborted) request.log.error(error);
  });
  return app;
}

/** What is wrong with bytes that are no request, by Node's codes. */
const HTTP_ERRORS: Record<string, [status: string, code: string, message: string]> = {
  ERR_HTTP_REQUEST_TIMEOUT: ['408 Request Timeout', 'TIMEOUT', 'the request came too slowly'],
  HPE_HEADER_OVERFLOW: ['431 Too Large', 'HEAD_TOO_LARGE', 'the head of the request is too large'],
  other: ['400 Bad Request', 'MALFORMED_HTTP', 'this is not a request in HTTP'],
};

function sendError(reply: FastifyReply, error: Error): number {
  const { status, code, message } = toRequestError(error);
  reply.code(status).send({ error: { code, message } });
  return status;
}

function busy(reply: FastifyReply, seconds: number): RequestError {
  reply.header('retry-after', seconds);
  return new RequestError(503, 'BUSY', `too many requests; try again in ${seconds} s`);
}

/** How many characters have been promised, and how long writing them will take. */
class Backlog {
  static readonly #LONGEST_S = 60;
  #owed = 0;
  #perSecond = 0;

  add(characters: number): void {
    this.#owed += characters;
  }

  /** Learns how fast it goes, from about the last second. */
  stepped({ written, milliseconds }: Step): void {
    const share = Math.min(1, milliseconds / 1000);
    this.#perSecond += share * ((1000 * written.length) / milliseconds - this.#perSecond);
  }

  /** In whole seconds, at least 1. */
  get seconds(): number {
    const seconds = Math.ceil(this.#owed / Math.max(1, this.#perSecond));
    return Math.min(Math.max(1, seconds), Backlog.#LONGEST_S);
  }
}
