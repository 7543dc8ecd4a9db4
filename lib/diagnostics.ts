// What the package tells whoever listens: each call, on a channel of node:diagnostics_channel.

import { channel } from 'node:diagnostics_channel';
import type { Call } from './problem';

/**
 * A call of attention that has ended, as the channel `node-sdpa:call` of node:diagnostics_channel
 * publishes it. Where nobody subscribes nothing is measured. Each thread has channels of its own. Of
 * a call that `'auto'` brings to a GPU that fails there are two: the GPU's, and that of the CPU in its
 * place.
 *
 * @example
 * ```js
 * import { subscribe } from 'node:diagnostics_channel';
 * import { scaledDotProductAttentionSync } from 'node-sdpa';
 * import assert from 'node:assert';
 * const messages = [];
 * subscribe('node-sdpa:call', (message) => messages.push(message));
 * const tensor = { data: Float32Array.of(1, 2, 3, 4), dims: [1, 1, 2, 2] };
 * scaledDotProductAttentionSync(tensor, tensor, tensor, { backend: 'js' });
 * const [{ pass, backend, queryLength }] = messages;
 * assert.deepStrictEqual({ pass, backend, queryLength }, {
 *   pass: 'forward', backend: 'js', queryLength: 2,
 * });
 * ```
 */
export interface CallMessage {
  /** Which of an operation's two */
  readonly pass: 'forward' | 'backward';
  /** What computed, such as `'cpu:avx2'` or `'cuda'` */
  readonly backend: string;
  /** From the call to its end; of an asynchronous one with its wait for a thread */
  readonly milliseconds: number;
  /** B; of a packed batch, how many sequences there are */
  readonly batch: number;
  /** Hq */
  readonly queryHeads: number;
  /** Lq, the largest of the batch */
  readonly queryLength: number;
  /** Lk, the largest of the batch */
  readonly keyLength: number;
  /** D */
  readonly headDim: number;
  /** Why it failed or was aborted; null where it did not */
  readonly error: unknown;
}

const calls = channel('node-sdpa:call');

/** Runs a call, and tells those who listen when it has ended. */
export function reported(pass: CallMessage['pass'], call: Call, run: () => void): void {
  if (!calls.hasSubscribers) {
    run();
    return;
  }
  const end = measure(pass, call);
  try {
    run();
  } catch (error) {
    end(error);
    throw error;
  }
  end(null);
}

/** As {@link reported}, of asynchronous work. */
export function reportedAsync(
  pass: CallMessage['pass'],
  call: Call,
  run: () => Promise<void>,
): Promise<void> {
  if (!calls.hasSubscribers) return run();
  const end = measure(pass, call);
  const work = run();
  work.then(() => end(null), end);
  return work;
}

function measure(pass: CallMessage['pass'], { problem, backend }: Call): (error: unknown) => void {
  const { batch, queryHeads, queryLength, keyLength, headDim } = problem;
  const start = performance.now();
  return (error) => {
    const milliseconds = performance.now() - start;
    const shape = { batch, queryHeads, queryLength, keyLength, headDim };
    const message: CallMessage = { pass, backend: backend.name, milliseconds, ...shape, error };
    calls.publish(message);
  };
}
