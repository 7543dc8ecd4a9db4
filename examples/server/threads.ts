// The threads that compute, so that the event loop of the server never waits: one writes, one
// answers questions about texts. This is the server's end of both, and what passes between.
import { channel, subscribe } from 'node:diagnostics_channel';
import path from 'node:path';
import { Worker } from 'node:worker_threads';
import type { CallMessage } from 'node-sdpa';
import { Gpt, type ModelSizes } from '../gpt/model';
import type { AttentionMaps } from './attention-maps';
import type { EngineSizes, Step, Writing, WrittenToken } from './engine';
import { RequestError } from './errors';
import type { Uncertainty, UncertaintyJob } from './uncertainty';

/** A model as a thread is given it. */
export interface SentModel {
  readonly sizes: ModelSizes;
  /** Of all parameters, in their order; shared memory */
  readonly weights: readonly Float32Array[];
}

export interface ThreadData {
  readonly model: SentModel;
  readonly engine: EngineSizes;
}

export interface ToEngine {
  readonly add?: Writing;
  readonly cancel?: number;
}

export interface FromEngine {
  readonly step: Step;
  /** Of attention since the last message */
  readonly calls: readonly CallMessage[];
}

/** Uncertainty where there is a job, else maps of attention. */
export type Question =
  | { readonly job: UncertaintyJob; readonly tokens?: undefined }
  | { readonly job?: undefined; readonly tokens: readonly number[] };

/** A question; without one, what cancels it. */
export interface ToAnalysis {
  readonly id: number;
  readonly question?: Question;
}

export interface FromAnalysis {
  readonly id: number;
  readonly begun?: true;
  readonly result?: unknown;
  readonly error?: { readonly message: string; readonly code?: string };
  readonly calls?: readonly CallMessage[];
}

export function sentModel(model: Gpt): SentModel {
  const weights = model.parameters.map(({ value }) => {
    const shared = new Float32Array(new SharedArrayBuffer(value.length * value.BYTES_PER_ELEMENT));
    shared.set(value);
    return shared;
  });
  return { sizes: model.sizes, weights };
}

export function modelFrom({ sizes, weights }: SentModel): Gpt {
  const model = new Gpt(sizes);
  model.parameters.forEach(({ value }, i) => {
    value.set(weights[i]);
  });
  return model;
}

// Channels are a thread's own: what the package publishes in the others is published here again.
const CALLS = 'node-sdpa:call';

/** In a thread: starts to listen; returns what gives the calls since it was asked last. */
export function hearCalls(): () => CallMessage[] {
  const heard: CallMessage[] = [];
  subscribe(CALLS, (message) => {
    const call = message as CallMessage;
    heard.push({ ...call, error: call.error && `${call.error}` });
  });
  return () => heard.splice(0);
}

function republish(calls: readonly CallMessage[]): void {
  for (const call of calls) channel(CALLS).publish(call);
}

/** Starts the program of a thread; `onEnd` is told why it has ended of itself. */
function start(program: string, data: ThreadData, onEnd: (error: Error) => void): Worker {
  // Node 20 does not take TypeScript for the file that a thread begins with, even with tsx.
  const file = JSON.stringify(path.join(__dirname, program));
  const worker = new Worker(`require('tsx/cjs'); require(${file});`, {
    eval: true,
    workerData: data,
    execArgv: [],
  });
  let cause = new Error(`${program} has ended`);
  worker.on('error', (error) => {
    cause = error;
  });
  worker.on('exit', () => onEnd(cause));
  return worker;
}

const STOPPED = () => new RequestError(500, 'INTERNAL', 'the thread that computes has ended');

/** Who waits for a text. */
export interface Reader {
  begun(): void;
  written(token: WrittenToken): void;
  /** Nothing comes after it */
  ended(error?: Error): void;
}

export class EngineThread {
  readonly #worker: Worker;
  readonly #readers = new Map<number, Reader>();
  readonly #begun = new Set<number>();
  #next = 0;

  /**
   * @param onStep - is told of each step
   * @param onFailure - the thread has ended, and with it all that it did
   */
  constructor(data: ThreadData, onStep: (step: Step) => void, onFailure: (error: Error) => void) {
    this.#worker = start('engine-thread.ts', data, (error) => {
      onFailure(error);
      for (const id of [...this.#readers.keys()]) this.#end(id, STOPPED());
    });
    this.#worker.on('message', ({ step, calls }: FromEngine) => {
      republish(calls);
      onStep(step);
      for (const id of step.begun) this.#begin(id);
      for (const token of step.written) this.#readers.get(token.id)?.written(token);
      for (const id of step.ended) this.#end(id);
      for (const { id, message } of step.failed) this.#end(id, new Error(message));
    });
  }

  /** Texts that are being written, or wait for it. */
  get size(): number {
    return this.#readers.size;
  }

  get running(): number {
    return this.#begun.size;
  }

  get waiting(): number {
    return this.size - this.running;
  }

  /** Lets a text be written; returns what cancels it. */
  write(writing: Omit<Writing, 'id'>, reader: Reader): () => void {
    const id = this.#next++;
    this.#readers.set(id, reader);
    this.#post({ add: { ...writing, id } });
    return () => {
      if (!this.#readers.delete(id)) return;
      this.#begun.delete(id);
      this.#post({ cancel: id });
    };
  }

  async close(): Promise<void> {
    this.#worker.removeAllListeners();
    await this.#worker.terminate();
  }

  #post(message: ToEngine): void {
    this.#worker.postMessage(message);
  }

  #begin(id: number): void {
    const reader = this.#readers.get(id);
    if (reader === undefined) return; // cancelled meanwhile
    this.#begun.add(id);
    reader.begun();
  }

  #end(id: number, error?: Error): void {
    const reader = this.#readers.get(id);
    this.#readers.delete(id);
    this.#begun.delete(id);
    reader?.ended(error);
  }
}

/** A question that is open. */
interface Asked {
  readonly onBegin: () => void;
  readonly resolve: (result: unknown) => void;
  readonly reject: (error: Error) => void;
}

export class AnalysisThread {
  readonly #worker: Worker;
  readonly #asked = new Map<number, Asked>();
  #next = 0;

  constructor(data: ThreadData, onFailure: (error: Error) => void) {
    this.#worker = start('analysis-thread.ts', data, (error) => {
      onFailure(error);
      for (const { reject } of this.#asked.values()) reject(STOPPED());
      this.#asked.clear();
    });
    this.#worker.on('message', ({ id, begun, result, error, calls = [] }: FromAnalysis) => {
      republish(calls);
      const asked = this.#asked.get(id);
      if (begun) {
        asked?.onBegin();
        return;
      }
      this.#asked.delete(id);
      if (error === undefined) asked?.resolve(result);
      else asked?.reject(Object.assign(new Error(error.message), { code: error.code }));
    });
  }

  /** Questions that are open. */
  get size(): number {
    return this.#asked.size;
  }

  uncertainty(job: UncertaintyJob, signal: AbortSignal, onBegin: () => void): Promise<Uncertainty> {
    return this.#ask({ job }, signal, onBegin) as Promise<Uncertainty>;
  }

  attentionMaps(
    tokens: readonly number[],
    signal: AbortSignal,
    onBegin: () => void,
  ): Promise<AttentionMaps> {
    return this.#ask({ tokens }, signal, onBegin) as Promise<AttentionMaps>;
  }

  async close(): Promise<void> {
    this.#worker.removeAllListeners();
    await this.#worker.terminate();
  }

  #ask(question: Question, signal: AbortSignal, onBegin: () => void): Promise<unknown> {
    const id = this.#next++;
    const post = (message: ToAnalysis) => this.#worker.postMessage(message);
    return new Promise((resolve, reject) => {
      this.#asked.set(id, { onBegin, resolve, reject });
      post({ id, question });
      // It answers with an error soon after, and counts as open until then.
      signal.addEventListener('abort', () => post({ id }), { once: true });
    });
  }
}
