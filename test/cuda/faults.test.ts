// What fails on a GPU is an error with a code: whichever call of the CUDA runtime it is, nothing is
// lost but that call. A fault from which a GPU does not recover is found in a process of its own.
import { describe, expect, test } from 'vitest';
import { attentionForward, attentionForwardSync, backendInfo, type Tensor } from '../../lib/index';
import { runProgram } from '../child';
import { code, usedBytes, waves, withFault } from './gpu';

const OUT_OF_MEMORY = 2;
const UNKNOWN = 999;
const CODES: Readonly<Record<number, string>> = {
  [OUT_OF_MEMORY]: 'OUT_OF_MEMORY',
  [UNKNOWN]: 'INTERNAL',
};

/** Forward and backward, to a copy of a gradient; gives back what it holds. */
async function train(inputs: readonly Tensor[], isSync: boolean) {
  const [query, key, value, gradOutput] = inputs;
  const options = { backend: 'cuda', isCausal: true, kvLengths: Int32Array.of(7) } as const;
  const result = isSync
    ? attentionForwardSync(query, key, value, options)
    : await attentionForward(query, key, value, options);
  using _output = result.output;
  using _lse = result.lse;
  try {
    const gradients = isSync ? result.backwardSync(gradOutput) : await result.backward(gradOutput);
    const { gradQuery, gradKey, gradValue } = gradients;
    using _gradQuery = gradQuery;
    using _gradKey = gradKey;
    using _gradValue = gradValue;
    return await gradKey.getData();
  } finally {
    result.dispose();
  }
}

describe.each([OUT_OF_MEMORY, UNKNOWN])('the error %s of any one runtime call', (error) => {
  test.each([
    ['arrays, at once', true, false],
    ['arrays, as a promise', false, false],
    ['tensors there, at once', true, true],
    ['tensors there, as a promise', false, true],
  ])('%s: fails that call alone', async (_, isSync, isThere) => {
    const home = waves();
    const inputs = isThere ? await Promise.all(home.map((t) => t.to('cuda'))) : home;
    const before = usedBytes();
    const wanted = await train(inputs, isSync);
    let failures = 0;
    for (let call = 1; call < 1000; call++) {
      const run = () => train(inputs, isSync);
      const outcome = await withFault(`${call}:${error}`, () => run().catch((e) => e));
      expect(usedBytes(), `memory after a fault in call ${call}`).toBe(before);
      if (outcome instanceof Error) {
        failures++;
        expect(outcome, `call ${call}: ${outcome.message}`).toEqual(code(CODES[error]));
      } else {
        expect(outcome).toEqual(wanted);
        if (failures > 0 && call > failures + 40) break; // behind the last call
      }
    }
    expect(failures).toBeGreaterThan(20);
    expect(await train(inputs, isSync)).toEqual(wanted);
    if (isThere) for (const tensor of inputs) tensor.dispose();
    expect(usedBytes()).toBe(0);
  });
});

describe('a fault that the GPU does not recover from', () => {
  test.each(['sync', 'async'])('in a call (%s)', async (how) => {
    const args = [how];
    const report = await runProgram('gpu-lost', { args, env: { SDPA_EMULATED_DEVICES: '2' } });
    expect(report).toEqual({
      first: 'ERR_SDPA_DEVICE_LOST',
      message: expect.stringContaining('illegal memory access'),
      later: 'ERR_SDPA_DEVICE_LOST',
      tensor: 'ERR_SDPA_DEVICE_LOST',
      copy: 'ERR_SDPA_DEVICE_LOST',
      other: 'cuda:1',
      auto: expect.stringMatching(/^cpu:/),
    });
  });
});

test('every error leaves the GPU as it was', () => {
  expect(backendInfo().tried.filter(({ ok }) => ok)).toContainEqual({ backend: 'cuda', ok: true });
});
