// The fuzzer finds what is planted, makes it small and prints a line that replays it.
import { spawnSync } from 'node:child_process';
import { join } from 'node:path';
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { SEED } from './arbitrary';
import { type Compute, check, computeHere, type FuzzCase, fuzzCases } from './fuzz/check';
import { BACKENDS } from './harness';

/** Runs problems until one fails, on the best backend, with results that `change` has been at. */
async function failureOf(change: (results: Record<string, Float64Array>) => void) {
  const compute: Compute = async (backend, call, manner) => {
    const results = await computeHere(backend, call, manner);
    const copies = Object.entries(results).map(([name, data]) => [name, Float64Array.from(data)]);
    const changed: Record<string, Float64Array> = Object.fromEntries(copies);
    change(changed);
    return changed;
  };
  const property = fc.asyncProperty(fuzzCases, (one) => check(one, [BACKENDS[0]], compute));
  const result = await fc.check(property, { seed: SEED, numRuns: 300 });
  expect(result.failed).toBe(true);
  const { problem } = result.counterexample![0];
  return { message: String((result.errorInstance as Error).message), problem };
}

describe('a planted fault is found and made small', () => {
  test('the last row of an output, off by a thousandth', async () => {
    const { message, problem } = await failureOf(({ output }) => {
      output[output.length - 1] *= 1.001;
    });
    expect(message).toMatch(/output\[\d+\] = .*, expected .* within/);
    const { batch, kvHeads, group, queryLength, keyLength } = problem.shape;
    expect([batch, kvHeads, group, queryLength, keyLength]).toEqual([1, 1, 1, 1, 1]);
  });

  test('a dropped weight that is a little more than 0', async () => {
    const { message } = await failureOf(({ droppedWeights }) => {
      const at = droppedWeights?.indexOf(0) ?? -1;
      if (at >= 0) droppedWeights[at] = 1e-40;
    });
    expect(message).toMatch(/droppedWeights\[\d+\]/);
  });

  test('a gradient of a key that loses its sign', async () => {
    const { message } = await failureOf(({ gradKey }) => {
      gradKey[0] = Math.abs(gradKey[0]);
    });
    expect(message).toMatch(/gradKey\[0\]/);
  });
});

describe('npm run fuzz', () => {
  const fuzz = (...args: string[]) => {
    const program = join(__dirname, 'fuzz/main.ts');
    const options = { encoding: 'utf8', timeout: 120_000 } as const;
    return spawnSync(process.execPath, ['--import', 'tsx', program, ...args], options);
  };

  test('checks as many problems as it is told, from a seed that it names', () => {
    const { stdout, stderr, status } = fuzz('--count', '12', '--seed', '3');
    expect(status, stderr).toBe(0);
    expect(stdout).toMatch(/^seed 3, backends /);
    expect(stdout).toMatch(/^12 problems in .*, no failure$/m);
  });

  test('replays a line, and says what fails', () => {
    const [good] = fc.sample(fuzzCases, { seed: SEED, numRuns: 1 });
    expect(fuzz('--replay', JSON.stringify(good)).stdout).toContain('no failure');
    // A shape that no call has: what is thrown is reported with the line that replays it.
    const shape = { ...good.problem.shape, headDim: 513 };
    const bad: FuzzCase = { ...good, problem: { ...good.problem, shape } };
    const { stdout, status } = fuzz('--replay', JSON.stringify(bad));
    expect(status).toBe(1);
    expect(stdout).toContain('FAILED: RangeError: query: expected a headDim up to 512');
    expect(stdout).toContain(`--replay '${JSON.stringify(bad)}'`);
  });

  test('refuses a backend that is not there', () => {
    expect(fuzz('--backend', 'cpu:none').status).toBe(2);
  });
});
