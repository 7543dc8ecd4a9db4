// What Prometheus is told: counted from channels of node:diagnostics_channel, to which anyone else
// may listen too.
import { channel, subscribe, unsubscribe } from 'node:diagnostics_channel';
import { monitorEventLoopDelay } from 'node:perf_hooks';
import { backendInfo, type CallMessage } from 'node-sdpa';
import { Counter, collectDefaultMetrics, Gauge, Histogram, Registry } from 'prom-client';
import type { Step } from './engine';

/** An answer that has left, or was given up. */
export interface Answer {
  readonly route: string;
  /** 499 where the client had gone */
  readonly status: number;
  /** Until its work began; undefined where it never did */
  readonly queueMs?: number;
  /** From there to the end */
  readonly runMs?: number;
}

/** Publishes each {@link Answer}. */
export const answers = channel('node-sdpa-server:answer');
/** Publishes each {@link Step}. */
export const steps = channel('node-sdpa-server:step');

const SECONDS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100];
/** Attention of a step takes less. */
const CALL_SECONDS = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1];

/** How often the event loop is looked at. */
const LOOP_MS = 1;

/** How many texts wait and are written now. */
export interface Load {
  readonly waiting: number;
  readonly running: number;
}

/** @returns the registry, and what makes it deaf again */
export function createMetrics(load: Load): { registry: Registry; close: () => void } {
  const registry = new Registry();
  const registers = [registry];
  collectDefaultMetrics({ register: registry });
  const name = (rest: string) => `gpt_server_${rest}`;
  const histogram = (rest: string, help: string, buckets: number[], labelNames: string[] = []) =>
    new Histogram({ name: name(rest), help, buckets, labelNames, registers });
  const counter = (rest: string, help: string, labelNames: string[] = []) =>
    new Counter({ name: name(rest), help, labelNames, registers });
  const gauge = (rest: string, help: string, read: () => number) =>
    new Gauge({
      ...{ name: name(rest), help, registers },
      collect() {
        this.set(read());
      },
    });
  gauge('waiting', 'Texts that wait to be written', () => load.waiting);
  gauge('running', 'Texts that are being written', () => load.running);
  const delay = monitorEventLoopDelay({ resolution: LOOP_MS });
  delay.enable();
  gauge('event_loop_delay_p99_seconds', 'Since it was asked for last', () => {
    // The histogram is of whole intervals between two looks.
    const milliseconds = delay.percentile(99) / 1e6 - LOOP_MS;
    delay.reset();
    return Math.max(0, milliseconds) / 1000;
  });

  const answered = counter('answers_total', 'Answers by status', ['route', 'status']);
  const queued = histogram('queue_seconds', 'Wait until the work began', SECONDS, ['route']);
  const ran = histogram('run_seconds', 'From there to the end', SECONDS, ['route']);
  const stepped = histogram('step_seconds', 'Steps of the engine', SECONDS);
  const written = counter('tokens_total', 'Tokens that were written; its rate is tokens/s');
  const read = counter('rows_total', 'Tokens that the model read, prompts included');
  const freeBlocks = new Gauge({
    name: name('free_blocks'),
    help: 'Of the cache, after the last step',
    registers,
  });
  const called = histogram('attention_seconds', 'Calls of attention', CALL_SECONDS, ['backend']);
  const backend = new Gauge({
    name: name('backend'),
    help: 'What computes attention',
    labelNames: ['backend'],
    registers,
  });
  backend.set({ backend: `${backendInfo().selected}` }, 1);

  const listeners: [string, (message: unknown) => void][] = [
    [
      'node-sdpa-server:answer',
      (message) => {
        const { route, status, queueMs, runMs } = message as Answer;
        answered.inc({ route, status });
        if (queueMs !== undefined) queued.observe({ route }, queueMs / 1000);
        if (runMs !== undefined) ran.observe({ route }, runMs / 1000);
      },
    ],
    [
      'node-sdpa-server:step',
      (message) => {
        const step = message as Step;
        stepped.observe(step.milliseconds / 1000);
        written.inc(step.written.length);
        read.inc(step.rows);
        freeBlocks.set(step.freeBlocks);
      },
    ],
    [
      'node-sdpa:call',
      (message) => {
        const { backend, milliseconds } = message as CallMessage;
        called.observe({ backend }, milliseconds / 1000);
      },
    ],
  ];
  for (const [channel, listener] of listeners) subscribe(channel, listener);
  return {
    registry,
    close: () => {
      delay.disable();
      for (const [channel, listener] of listeners) unsubscribe(channel, listener);
    },
  };
}
