// What 'auto' does where there is a GPU: it takes calls there that are worth the way, and computes on
// the CPU whatever fails there.
import { subscribe, unsubscribe } from 'node:diagnostics_channel';
import { describe, expect, test } from 'vitest';
import { selectForCall } from '../../lib/backends';
import { prefersGpu } from '../../lib/cost-model';
import {
  type AttentionOptions,
  attentionForward,
  attentionForwardSync,
  backendInfo,
  type CallMessage,
  setNumThreads,
  Tensor,
} from '../../lib/index';
import { newProblem, type Problem } from '../../lib/problem';
import { wave, withFault } from './gpu';

setNumThreads(2);
const HOST = -1;
const LARGE = [1, 12, 1024, 64];

function problem(length: number, more: Partial<Problem> = {}): Problem {
  const heads = { batch: 1, queryHeads: 12, kvHeads: 12, headDim: 64, valueDim: 64 };
  return { ...newProblem(), ...heads, queryLength: length, keyLength: length, ...more };
}

const auto = (p: Problem, mayCopy = true) => selectForCall('auto', p, HOST, mayCopy);

describe('auto', () => {
  test('leaves small calls on the CPU, and takes large ones to the GPU', () => {
    expect(auto(problem(64)).backend.name).toMatch(/^cpu:/);
    const { backend, fallback } = auto(problem(8192));
    expect([backend.name, fallback?.name]).toEqual(['cuda', backendInfo().selected]);
    expect(selectForCall(undefined, problem(8192), HOST, true).backend.name).toBe('cuda');
  });

  test('leaves on the CPU what has no backward pass there, and what would copy a cache', () => {
    expect(auto(problem(8192, { headDim: 512 })).backend.name).toMatch(/^cpu:/);
    expect(auto(problem(8192), false).backend.name).toMatch(/^cpu:/);
  });

  test('takes a name at its word', () => {
    expect(selectForCall('cpu', problem(8192), HOST, true).backend.name).toMatch(/^cpu:/);
    expect(selectForCall('cuda', problem(4), HOST, true)).toMatchObject({
      backend: { name: 'cuda' },
      fallback: null,
    });
    expect(selectForCall('cuda:1', problem(4), HOST, true).backend.name).toBe('cuda:1');
  });

  test('has no use for a GPU where copies take longer than the work', () => {
    const decode = problem(1, { keyLength: 4096 }); // one query: each key is used once
    expect(prefersGpu(decode, 'cpu:avx2', 2)).toBe(false);
    expect(prefersGpu(problem(8192), 'cpu:avx2', 2)).toBe(true);
  });

  test.each([true, false])('computes on the CPU where the GPU fails (sync: %s)', async (isSync) => {
    const tensor = wave(1, LARGE);
    const out = new Tensor('float32', new Float32Array(tensor.data.length), LARGE);
    const run = (options: AttentionOptions = {}) =>
      isSync
        ? attentionForwardSync(tensor, tensor, tensor, options)
        : attentionForward(tensor, tensor, tensor, options);
    const wanted = await run({ backend: 'cpu' });
    for (const fault of ['1:999', '2:2']) {
      const result = await withFault(fault, () => run({ out }));
      expect(result.backend).toBe(wanted.backend);
      expect(result.output).toBe(out);
      expect(Buffer.compare(bytes(out), bytes(wanted.output))).toBe(0);
      out.data.fill(0);
    }
  });

  test('tells the channel of the call that failed, and of the one in its place', async () => {
    const told: CallMessage[] = [];
    const listen = (message: unknown) => void told.push(message as CallMessage);
    const tensor = wave(1, LARGE);
    subscribe('node-sdpa:call', listen);
    await withFault('1:999', () => attentionForward(tensor, tensor, tensor));
    unsubscribe('node-sdpa:call', listen);
    const { selected } = backendInfo();
    expect(told.map(({ backend, error }) => [backend, error === null])).toEqual([
      ['cuda', false],
      [selected, true],
    ]);
  });
});

function bytes({ data }: Tensor): Uint8Array {
  return new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
}
