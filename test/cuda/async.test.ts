// Asynchronous calls on a GPU: they overlap, the event loop goes on, those that wait can be stopped,
// and workers and processes may end meanwhile. The emulated GPU takes its time for that.
import { setTimeout as pause } from 'node:timers/promises';
import { afterEach, describe, expect, test } from 'vitest';
import { attentionForwardSync, backendInfo, scaledDotProductAttention } from '../../lib/index';
import { runNode, runProgram } from '../child';
import { code, usedBytes, wave } from './gpu';

const DELAY_MS = 300;
const LANES = 4;
const CUDA = { backend: 'cuda' } as const;

function slowDown(): void {
  process.env.SDPA_EMULATED_DELAY = String(DELAY_MS);
}

afterEach(() => {
  delete process.env.SDPA_EMULATED_DELAY;
});

describe('calls under way', () => {
  test('overlap, and the event loop goes on', async () => {
    const there = await wave(1).to('cuda');
    slowDown();
    let turns = 0;
    const ticking = setInterval(() => turns++, 10);
    const begin = performance.now();
    const calls = Array.from({ length: LANES }, () =>
      scaledDotProductAttention(there, there, there),
    );
    const started = performance.now() - begin;
    const outputs = await Promise.all(calls);
    const ended = performance.now() - begin;
    clearInterval(ticking);
    expect(started).toBeLessThan(DELAY_MS / 2);
    expect(ended).toBeGreaterThanOrEqual(DELAY_MS);
    expect(ended).toBeLessThan(2 * DELAY_MS); // one after the other they would take four times that
    expect(turns).toBeGreaterThan(5);
    for (const tensor of [there, ...outputs]) tensor.dispose();
  });

  test('of one GPU do not wait for those of another', async () => {
    const [first, second] = await Promise.all([wave(1).to('cuda'), wave(1).to('cuda:1')]);
    slowDown();
    const many = Array.from({ length: 3 * LANES }, () =>
      scaledDotProductAttention(first, first, first),
    );
    const begin = performance.now();
    const output = await scaledDotProductAttention(second, second, second);
    expect(performance.now() - begin).toBeLessThan(2 * DELAY_MS);
    for (const tensor of [first, second, output, ...(await Promise.all(many))]) tensor.dispose();
  });

  test('that still wait are dropped when they are stopped', async () => {
    const small = wave(1);
    const large = wave(1, [1, 1, 40, 400]); // a size that nothing else here has
    slowDown();
    const running = Array.from({ length: LANES }, () =>
      scaledDotProductAttention(small, small, small, CUDA),
    );
    const signal = AbortSignal.timeout(20);
    const waiting = scaledDotProductAttention(large, large, large, { ...CUDA, signal });
    await expect(waiting).rejects.toEqual(code('ABORTED'));
    const { cachedBytes, usedBytes } = backendInfo().gpus[0];
    await Promise.all(running);
    await pause(50);
    const after = backendInfo().gpus[0];
    expect(after.usedBytes + after.cachedBytes).toBe(cachedBytes + usedBytes);
  });

  test('that run and are stopped give their memory back', async () => {
    const there = await wave(1).to('cuda');
    slowDown();
    const stop = new AbortController();
    const call = scaledDotProductAttention(there, there, there, { signal: stop.signal });
    await pause(50);
    stop.abort();
    await expect(call).rejects.toEqual(code('ABORTED'));
    there.dispose();
    await pause(2 * DELAY_MS);
    expect(usedBytes()).toBe(0);
  });
});

test('garbage on a GPU is collected', async () => {
  const { before, after } = await runProgram('gpu-garbage', { args: [] });
  expect(before).toBeGreaterThan(0);
  expect(after).toBe(0);
});

describe('a process that ends during calls', () => {
  test.each([
    ['exit', 7],
    ['throw', 1],
    ['wait', 0],
    ['terminate a worker', 0],
  ])('has its own status: %s', async (how, status) => {
    const args = [require.resolve('../programs/gpu-exit.mjs'), how];
    const finished = await runNode({ args, env: { SDPA_EMULATED_DELAY: '200' } });
    expect(finished, finished.stderr).toMatchObject({ status, signal: null });
    if (how !== 'throw') expect(finished.stderr).toBe('');
  });
});

test('workers compute on the same GPU, with the same bits', async () => {
  const args = ['4'];
  const { results, used } = await runProgram('gpu-workers', { args });
  const tensor = wave(1);
  const { output } = attentionForwardSync(tensor, tensor, tensor, CUDA);
  expect(results).toEqual(Array(4).fill(Array.from(output.data)));
  expect(used, 'what terminated workers held').toBe(0);
});
