// Asynchronous calls: what callers do to their arrays meanwhile, aborting, the event loop, libuv's
// pool.
import { monitorEventLoopDelay } from 'node:perf_hooks';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import {
  type AttentionOptions,
  attentionForward,
  attentionForwardSync,
  backendInfo,
  scaledDotProductAttention,
  scaledDotProductAttentionSync,
  setNumThreads,
  Tensor,
} from '../lib/index';
import { randomTensor } from './cases';
import { runProgram } from './child';
import { BACKENDS, expectSame, withThreads } from './harness';

const DROPOUT = { dropoutP: 0.2, training: true, seed: 9, offset: 1 } as const;

type Arrays = { data: Float32Array<ArrayBuffer>; dims: readonly number[] }[];

/** Query, key, value and a bias in ordinary arrays, and an upstream gradient. */
function plainArrays(length = 96): Arrays {
  const dims = [2, 4, length, 32];
  const plain = (seed: number, shape: number[]) => ({
    data: Float32Array.from(randomTensor(seed, shape).data),
    dims: shape,
  });
  return [
    plain(1, dims),
    plain(2, dims),
    plain(3, dims),
    plain(4, [length, length]),
    plain(5, dims),
  ];
}

/** Every backend by its name and as an option. */
const EACH = BACKENDS.map((name) => [name, name as AttentionOptions['backend']] as const);

type Three = [Tensor, Tensor, Tensor];

/** Inputs whose call takes at least so many milliseconds on one thread. */
function slowTensors(backend: AttentionOptions['backend'], milliseconds: number): Three {
  for (let length = 256; ; length *= 2) {
    const dims = [1, 8, length, 64];
    const [query, key, value] = [1, 2, 3].map((seed) => {
      return new Tensor('float32', Float32Array.from(randomTensor(seed, dims).data), dims);
    });
    const start = performance.now();
    withThreads(1, () => scaledDotProductAttentionSync(query, key, value, { backend }));
    if (performance.now() - start > milliseconds) return [query, key, value];
  }
}

/** What a caller may do to an array as soon as a call has returned its promise. */
const DISTURBANCES: [string, (array: Float32Array<ArrayBuffer>) => void][] = [
  ['overwritten', (array) => array.fill(Number.NaN)],
  [
    'transferred',
    (array) => {
      structuredClone(array.buffer, { transfer: [array.buffer] });
      expect(array.length).toBe(0);
    },
  ],
  [
    'moved by ArrayBuffer.prototype.transfer',
    (array) => {
      const buffer = array.buffer as ArrayBuffer & { transfer?(length: number): ArrayBuffer };
      // Runtimes older than Node 22 have only structuredClone.
      if (buffer.transfer) buffer.transfer(8);
      else structuredClone(buffer, { transfer: [buffer] });
    },
  ],
];

describe.each(EACH)('%s, arrays that change during a call', (name, backend) => {
  describe.each(DISTURBANCES)('arrays are %s during a call', (_, disturb) => {
    test('forward and backward see them as they were', async () => {
      const options = { ...DROPOUT, backend };
      const [q, k, v, bias, g] = plainArrays();
      const wanted = attentionForwardSync(q, k, v, { ...options, attnMask: bias });
      const wantedGradients = wanted.backwardSync(g);
      const [query, key, value, attnMask, gradOutput] = plainArrays();
      const promise = attentionForward(query, key, value, { ...options, attnMask });
      for (const { data } of [query, key, value, attnMask]) disturb(data);
      const result = await promise;
      expect(result.backend).toBe(name);
      expectSame('output', result.output.data, wanted.output.data);
      const backward = result.backward(gradOutput);
      disturb(gradOutput.data);
      const gradients = await backward;
      for (const key of ['gradQuery', 'gradKey', 'gradValue', 'gradAttnMask'] as const) {
        expectSame(key, gradients[key]!.data, wantedGradients[key]!.data);
      }
    });

    test('a later backward of a synchronous forward sees them as they were', () => {
      const options = { ...DROPOUT, backend };
      const [q, k, v, , g] = plainArrays();
      const wanted = attentionForwardSync(q, k, v, options).backwardSync(g);
      const [query, key, value, , gradOutput] = plainArrays();
      const result = attentionForwardSync(query, key, value, options);
      for (const { data } of [query, key, value]) disturb(data);
      const gradients = result.backwardSync(gradOutput);
      expectSame('gradQuery', gradients.gradQuery.data, wanted.gradQuery.data);
      expectSame('gradKey', gradients.gradKey.data, wanted.gradKey.data);
      expectSame('gradValue', gradients.gradValue.data, wanted.gradValue.data);
    });

    test('the small arrays of options too', async () => {
      const [query, key, value] = plainArrays();
      const causalOffset = [3, -5];
      const kvLengths = Int32Array.of(40, 60);
      const keep = new Uint8Array(2 * 4 * 96 * 96).map((_, i) => (i % 3 === 0 ? 0 : 1));
      const keepMask = { data: keep, dims: [2, 4, 96, 96] };
      const options = { isCausal: true, dropoutP: 0.3, training: true, backend } as const;
      const given = { ...options, causalOffset, kvLengths, keepMask };
      const wanted = scaledDotProductAttentionSync(query, key, value, given);
      const promise = scaledDotProductAttention(query, key, value, given);
      causalOffset.fill(1e9);
      kvLengths.fill(0);
      keep.fill(0);
      expectSame('output', (await promise).data, wanted.data);
    });
  });
});

describe.each(EACH)('%s, many calls', (name, backend) => {
  test('many concurrent calls give the same bits as one after the other', async () => {
    const lengths = Array.from({ length: 40 }, (_, i) => 1 + ((i * 37) % 90));
    const inputs = lengths.map((length) => plainArrays(length));
    const run = ([query, key, value]: Arrays) =>
      scaledDotProductAttention(query, key, value, { ...DROPOUT, backend });
    const together = await Promise.all(inputs.map(run));
    for (const [i, [query, key, value]] of inputs.entries()) {
      const alone = scaledDotProductAttentionSync(query, key, value, { ...DROPOUT, backend });
      expectSame(`call ${i}`, together[i].data, alone.data);
    }
  });

  test('the pool of libuv is not used', async () => {
    const env = { SDPA_BACKEND: name, UV_THREADPOOL_SIZE: '1' };
    const { busyAfterCalls } = await runProgram('libuv', { env });
    expect(busyAfterCalls).toBeGreaterThan(0);
  });
});

/** Slow inputs, computed by one thread: a call in the way of others. */
function useSlowCall(backend: AttentionOptions['backend'], milliseconds: number) {
  const slow = { inputs: [] as unknown as Three, dims: [] as readonly number[] };
  const threadsBefore = backendInfo().threads;
  beforeAll(() => {
    slow.inputs = slowTensors(backend, milliseconds);
    slow.dims = slow.inputs[0].dims;
    setNumThreads(1);
  });
  afterAll(() => setNumThreads(threadsBefore));
  return slow;
}

// Another program may hold the processor for a while: a failure counts when it repeats.
const TIMED = { retry: 2 };

describe.each(EACH)('%s, a call of half a second', (_, backend) => {
  const slow = useSlowCall(backend, 400);

  test('lets the event loop turn', TIMED, async () => {
    const delay = monitorEventLoopDelay({ resolution: 1 });
    let ticks = 0;
    const timer = setInterval(() => ticks++, 2);
    delay.enable();
    const { elapsed } = await timed(() => scaledDotProductAttention(...slow.inputs, { backend }));
    delay.disable();
    clearInterval(timer);
    // A call on this thread would be one gap as long as itself, and no tick.
    expect(elapsed).toBeGreaterThan(30);
    expect(delay.max / 1e6).toBeLessThan(elapsed * 0.7);
    expect(ticks).toBeGreaterThan(2);
  });

  test('aborted meanwhile: rejects, stops computing, leaves out as it was', TIMED, async () => {
    const full = await timed(() => scaledDotProductAttention(...slow.inputs, { backend }));
    const controller = new AbortController();
    const { signal } = controller;
    const out = filledOut(slow.dims);
    const [query, key, value] = plainArrays(8);
    const aborted = await timed(async () => {
      const promise = scaledDotProductAttention(...slow.inputs, { backend, signal, out });
      setTimeout(() => controller.abort('too late'), full.elapsed / 10);
      await expect(promise).rejects.toMatchObject(abortedBy('too late'));
      // The only thread is free for others.
      await scaledDotProductAttention(query, key, value, { backend });
    });
    expect(aborted.elapsed).toBeLessThan(full.elapsed * 0.7);
    expectUntouched(out);
  });
});

describe.each(EACH.filter(([name]) => name !== 'js'))('%s, a queue', (_, backend) => {
  const slow = useSlowCall(backend, 120);

  test('takes thousands of calls, refuses those beyond, and computes the others', async () => {
    // Large enough to be queued: what is over sooner than a thread wakes up is computed at once.
    const dims = [1, 1, 48, 32];
    const small = new Tensor('float32', new Float32Array(48 * 32).fill(1), dims);
    const controller = new AbortController();
    const { signal } = controller;
    // Two seconds of work for the one thread, so that the queue fills behind it.
    const first = Array.from({ length: 16 }, () => {
      return scaledDotProductAttention(...slow.inputs, { backend, signal }).catch((error) => error);
    });
    const calls = Array.from({ length: 4200 }, () => {
      return scaledDotProductAttention(small, small, small, { backend });
    });
    controller.abort();
    const settled = await Promise.allSettled([...first, ...calls]);
    const refused = settled.filter(({ status }) => status === 'rejected');
    expect(refused.length).toBeGreaterThan(0);
    expect(refused.length).toBeLessThan(200);
    for (const { reason } of refused as PromiseRejectedResult[]) {
      expect(reason).toMatchObject({ name: 'Error', code: 'ERR_SDPA_QUEUE_FULL' });
    }
  });
});

describe.each(EACH)('%s, a signal', (_, backend) => {
  const slow = useSlowCall(backend, 120);

  test('aborted before the call: rejects at once, with the reason', async () => {
    const reason = new Error('no longer wanted');
    const signal = AbortSignal.abort(reason);
    const out = filledOut(slow.dims);
    const promise = scaledDotProductAttention(...slow.inputs, { backend, signal, out });
    await expect(promise).rejects.toMatchObject(abortedBy(reason));
    expectUntouched(out);
  });

  test('aborted before its turn: the ones before and after it are computed', async () => {
    const controller = new AbortController();
    const [query, key, value] = plainArrays(8);
    const first = scaledDotProductAttention(...slow.inputs, { backend });
    const { signal } = controller;
    const second = scaledDotProductAttention(query, key, value, { backend, signal });
    const third = scaledDotProductAttention(query, key, value, { backend });
    controller.abort();
    await expect(second).rejects.toMatchObject({ code: 'ERR_SDPA_ABORTED' });
    expect((await first).dims).toEqual(slow.dims);
    const wanted = scaledDotProductAttentionSync(query, key, value, { backend });
    expectSame('third', (await third).data, wanted.data);
  });

  test('aborted during backward', async () => {
    const result = await attentionForward(...slow.inputs, { backend });
    const controller = new AbortController();
    const promise = result.backward(slow.inputs[0], { signal: controller.signal });
    controller.abort();
    await expect(promise).rejects.toMatchObject({ code: 'ERR_SDPA_ABORTED' });
    // The result is still good for another try.
    const { gradQuery } = await result.backward(slow.inputs[0]);
    expect(gradQuery.dims).toEqual(slow.dims);
  });

  test('aborted after the call: nothing happens', async () => {
    const controller = new AbortController();
    const out = filledOut(slow.dims);
    const { signal } = controller;
    const output = await scaledDotProductAttention(...slow.inputs, { backend, signal, out });
    controller.abort();
    expect(output).toBe(out);
    expectSame('out', out.data, scaledDotProductAttentionSync(...slow.inputs, { backend }).data);
  });

  test('a signal that lives long collects no listeners', async () => {
    const { signal } = new AbortController();
    let listeners = 0;
    const { addEventListener, removeEventListener } = signal;
    signal.addEventListener = (...args: unknown[]) => {
      listeners++;
      return addEventListener.apply(signal, args as Parameters<typeof addEventListener>);
    };
    signal.removeEventListener = (...args: unknown[]) => {
      listeners--;
      return removeEventListener.apply(signal, args as Parameters<typeof removeEventListener>);
    };
    const [query, key, value] = plainArrays(8);
    for (let i = 0; i < 5; i++) {
      await scaledDotProductAttention(query, key, value, { backend, signal });
    }
    expect(listeners).toBe(0);
  });
});

describe.each(EACH)('%s, out and dispose', (_, backend) => {
  test('out receives the output and is returned, sync and async', async () => {
    const [query, key, value] = plainArrays();
    const wanted = scaledDotProductAttentionSync(query, key, value, { backend });
    const out = filledOut(query.dims);
    expect(scaledDotProductAttentionSync(query, key, value, { backend, out })).toBe(out);
    expectSame('sync', out.data, wanted.data);
    out.data.fill(7);
    expect(await scaledDotProductAttention(query, key, value, { backend, out })).toBe(out);
    expectSame('async', out.data, wanted.data);
    out.data.fill(7);
    const result = await attentionForward(query, key, value, { backend, out });
    expect(result.output).toBe(out);
    expectSame('attentionForward', out.data, wanted.data);
  });

  test('dispose() of inputs during a call does not disturb it', async () => {
    const arrays = plainArrays();
    const wanted = scaledDotProductAttentionSync(arrays[0], arrays[1], arrays[2], { backend });
    const [query, key, value] = arrays.map(({ data, dims }) => new Tensor('float32', data, dims));
    const promise = scaledDotProductAttention(query, key, value, { backend });
    for (const tensor of [query, key, value]) tensor.dispose();
    expectSame('output', (await promise).data, wanted.data);
  });

  test('dispose() of a result during backward does not disturb it, and ends it', async () => {
    const [query, key, value, , gradOutput] = plainArrays();
    const result = await attentionForward(query, key, value, { backend });
    const wanted = result.backwardSync(gradOutput);
    const promise = result.backward(gradOutput);
    result.dispose();
    expectSame('gradKey', (await promise).gradKey.data, wanted.gradKey.data);
    await expect(result.backward(gradOutput)).rejects.toMatchObject({
      code: 'ERR_SDPA_DISPOSED',
    });
    expect(() => result.backwardSync(gradOutput)).toThrow(/dispose/);
  });
});

function filledOut(dims: readonly number[]): Tensor {
  const size = dims.reduce((product, n) => product * n, 1);
  return new Tensor('float32', new Float32Array(size).fill(7), dims);
}

function expectUntouched(out: Tensor): void {
  expect(out.data.every((x: number) => x === 7)).toBe(true);
}

function abortedBy(cause: unknown) {
  return { name: 'AbortError', code: 'ERR_SDPA_ABORTED', cause };
}

async function timed(work: () => Promise<unknown>) {
  const start = performance.now();
  await work();
  return { elapsed: performance.now() - start };
}
