// The channel of calls: what it says of each kind of call, and of those that fail.
import { subscribe, unsubscribe } from 'node:diagnostics_channel';
import { afterEach, beforeEach, expect, test } from 'vitest';
import {
  attentionForward,
  attentionForwardSync,
  type CallMessage,
  KVCache,
  scaledDotProductAttention,
} from '../lib/index';
import { randomTensor } from './cases';
import { BACKENDS, stored } from './harness';

const messages: CallMessage[] = [];
const listen = (message: unknown) => void messages.push(message as CallMessage);
beforeEach(() => {
  messages.length = 0;
  subscribe('node-sdpa:call', listen);
});
afterEach(() => void unsubscribe('node-sdpa:call', listen));

const query = stored(randomTensor(1, [2, 4, 5, 8]));
const key = stored(randomTensor(2, [2, 4, 7, 8]));
const shape = { batch: 2, queryHeads: 4, queryLength: 5, keyLength: 7, headDim: 8 };

test.each(BACKENDS)('%s: one message for each pass, synchronous or not', async (backend) => {
  const passes = ['forward', 'backward', 'forward', 'backward'];
  const result = attentionForwardSync(query, key, key, { backend: backend as never });
  result.backwardSync(result.output);
  const again = await attentionForward(query, key, key, { backend: backend as never });
  await again.backward(again.output);
  expect(messages).toEqual(
    passes.map((pass) => ({
      pass,
      backend,
      ...shape,
      milliseconds: expect.any(Number),
      error: null,
    })),
  );
  for (const { milliseconds } of messages) expect(milliseconds).toBeGreaterThan(0);
});

test('a call that is aborted, and one over a cache', async () => {
  const stopped = new AbortController();
  const call = scaledDotProductAttention(query, key, key, { signal: stopped.signal });
  stopped.abort();
  const error = await call.catch((reason) => reason);
  expect(messages).toEqual([expect.objectContaining({ pass: 'forward', error })]);
  expect(error).toMatchObject({ code: 'ERR_SDPA_ABORTED' });

  const cache = new KVCache({ kvHeads: 4, headDim: 8, maxLength: 8, batch: 2 });
  cache.append(key, key);
  await cache.attend(query);
  expect(messages[1]).toMatchObject({ pass: 'forward', batch: 2, queryLength: 5, error: null });
});

test('nothing is said of a call that was refused, nor after unsubscribing', async () => {
  expect(() => attentionForwardSync(query, key, query)).toThrow();
  unsubscribe('node-sdpa:call', listen);
  attentionForwardSync(query, key, key);
  await attentionForward(query, key, key);
  expect(messages).toEqual([]);
});
