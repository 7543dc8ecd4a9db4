// Worker threads, worker.terminate() and process exit during calls; in child processes, so that a
// crash shows as a signal.
import { describe, expect, test } from 'vitest';
import { runNode, runProgram } from './child';
import { BACKENDS } from './harness';

describe.each(BACKENDS)('%s', (backend) => {
  const env = { SDPA_BACKEND: backend };

  test('four workers and the main thread at once give the same bits', async () => {
    const { results, exitCodes } = await runProgram('workers', { env });
    expect(exitCodes).toEqual([0, 0, 0, 0]);
    const [main, ...workers] = results;
    // One fingerprint of outputs, one of gradients, one count of the mask: each the same every
    // time.
    expect(main).toHaveLength(3);
    for (const worker of workers) expect(worker).toEqual(main);
  });

  test('worker.terminate() during calls leaves the process whole', async () => {
    const { before, after } = await runProgram('terminate', { env });
    expect(after).toBe(before);
  });

  test.each([
    ['exit', 7],
    ['exit at once', 7],
    ['throw', 1],
    ['wait', 0],
  ])('a process that ends during calls has its own status: %s', async (how, status) => {
    const args = [require.resolve('./programs/exit.mjs'), how];
    const finished = await runNode({ args, env });
    expect(finished, finished.stderr).toMatchObject({ status, signal: null });
    if (how === 'throw') expect(finished.stderr).toContain('thrown on purpose');
    else expect(finished.stderr).toBe('');
  });
});
