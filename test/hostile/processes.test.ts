// Processes and workers that end, are interrupted, run out of stack or memory, or collect garbage
// while calls run; in child processes, so that a crash shows as a signal and a hang as SIGKILL.
import { afterAll, describe, expect, test } from 'vitest';
import { ROOT, runNode, runProgram } from '../child';
import { BACKENDS } from '../harness';
import { compileFaults, hasFaults } from './faults';

const onLinux = process.platform === 'linux';

describe('a process or worker that ends during calls', () => {
  // How; the status or signal that it ends by, its last line of output, and a part of its errors.
  const endings: [string, number | NodeJS.Signals, string, string?][] = [
    ['an exception that is handled', 0, 'computed'],
    ['a rejection that nobody handles', 1, '', 'rejected on purpose'],
    ['a call that fails and nobody handles', 1, '', 'ERR_SDPA_ABORTED'],
    ['SIGTERM', 'SIGTERM', ''],
    ['SIGKILL', 'SIGKILL', ''],
    ['signals that are handled', 3, 'computed'],
    ['calls in exit handlers', 0, 'exit'],
    ['process.exit in a worker', 0, 'exit 5'],
    ['an exception in a worker', 0, 'thrown on purpose'],
    ['no memory in a worker', 0, 'ERR_WORKER_OUT_OF_MEMORY'],
    ['process.exit with workers in synchronous calls', 4, ''],
  ];

  test.each(endings)('%s', async (how, end, line, error = '') => {
    const finished = await runNode({ args: [`${ROOT}/test/programs/hostile/ending.mjs`, how] });
    const { status, signal, stdout, stderr } = finished;
    expect(status ?? signal, stderr).toBe(end);
    expect(stdout.trim().split('\n').at(-1)).toBe(line);
    expect(stderr).toContain(error);
  });

  test('1,000 workers, half of them terminated in the middle of calls', {
    timeout: 240_000,
  }, async () => {
    const options = { args: ['1000'], timeout: 230_000 };
    const { finished, terminated, wrong, growth, isSame } = await runProgram(
      'hostile/worker-cycles',
      options,
    );
    expect({ wrong, isSame }).toEqual({ wrong: 0, isSame: true });
    expect(finished + terminated).toBe(1000);
    expect(terminated).toBeGreaterThan(50);
    expect(growth).toBeLessThan(64 * 2 ** 20);
  });

  test('processes that fork while they compute, and one of theirs that is killed', async () => {
    expect(await runProgram('hostile/cluster')).toEqual({
      isSame: true,
      spawned: '42',
      ends: [0, 'SIGKILL'],
    });
  });
});

describe.each(BACKENDS)('%s', (backend) => {
  const env = { SDPA_BACKEND: backend };

  test('arrays that another thread writes to', async () => {
    const { calls, outOfRange, codes } = await runProgram('hostile/races', { env, args: ['700'] });
    expect(calls).toBeGreaterThan(6);
    expect(outOfRange).toBe(0);
    const known = ['ERR_SDPA_INVALID_ARG_VALUE', 'ERR_SDPA_SHAPE_MISMATCH'];
    expect(Object.keys(codes).filter((code) => !known.includes(code))).toEqual([]);
  });

  test('garbage collected at every turn', async () => {
    const program = `${ROOT}/test/programs/hostile/garbage.mjs`;
    const args = ['--expose-gc', '--max-semi-space-size=1', program, '25'];
    const { status, signal, stdout, stderr } = await runNode({ args, env });
    expect({ status, signal }, stderr).toEqual({ status: 0, signal: null });
    expect(JSON.parse(stdout)).toEqual({ rounds: 25, wrong: 0 });
  });
});

test('the smallest heap that Node runs in is enough for calls without end', async () => {
  const heap = ['--max-old-space-size=24', '--max-semi-space-size=1'];
  const args = [...heap, `${ROOT}/test/programs/memory.mjs`, 'many calls'];
  const { status, signal, stderr } = await runNode({ args });
  expect({ status, signal }, stderr).toEqual({ status: 0, signal: null });
});

test.each(['', 'js'])(
  'calls at the end of the stack, from the first one on (%j)',
  async (backend) => {
    const { seen, prints, selected } = await runProgram('hostile/deep-recursion', {
      env: { SDPA_BACKEND: backend },
    });
    // V8's own error; and a first call without stack has not chosen JavaScript for all later ones.
    expect(Object.keys(seen)).toEqual(['RangeError Maximum call stack size exceeded']);
    expect(prints).toHaveLength(1);
    expect(selected).toBe(backend || BACKENDS[0]);
  },
);

if (!onLinux) console.log('skipped: limits of the system (made for Linux)');
if (onLinux) {
  test('RLIMIT_AS: what does not fit is an error, what fits is computed', async () => {
    const { codes, isSame } = await runProgram('hostile/address-space');
    const outOfMemory = 'ERR_SDPA_OUT_OF_MEMORY';
    expect(codes).toEqual({
      ...{ tensor: outOfMemory, weights: outOfMemory, 'weights, asynchronous': outOfMemory },
      ...{ mask: outOfMemory, cache: outOfMemory, 'many calls': outOfMemory },
      backward: 'none',
      'backward, asynchronous': 'none',
    });
    expect(isSame).toBe(true);
  });
}

if (!hasFaults) console.log('skipped: failing memory and threads (made for Linux with glibc)');
if (hasFaults) {
  const faults = compileFaults();
  afterAll(faults.remove);

  describe('native code that gets', () => {
    const refused = Array(3).fill('ERR_SDPA_OUT_OF_MEMORY');

    test('no thread: synchronous calls do without, asynchronous ones say so', async () => {
      const seen = await faults.run('no-threads');
      expect(seen).toMatchObject({ codes: refused, threadsThen: 0, later: seen.sync });
      expect(seen.threads).toBeGreaterThan(0);
    });

    test('no thread from the system (RLIMIT_NPROC)', async () => {
      // The limit is no limit to root.
      const user = process.getuid?.() === 0 ? 61_234 : undefined;
      const seen = await faults.run('no-threads', { args: ['limit'], uid: user });
      expect(seen).toMatchObject({ codes: refused, uid: user ?? process.getuid?.() });
      const wanted = await faults.run('no-threads');
      expect(seen.sync).toBe(wanted.sync);
    });

    test.each(BACKENDS.filter((name) => name !== 'js'))(
      'no memory, for any one of its allocations or from any on (%s)',
      async (backend) => {
        const report: Record<string, Record<string, number>> = await faults.run('out-of-memory', {
          env: { SDPA_BACKEND: backend },
        });
        const failed = { halfWritten: 0, wrong: 0, other: 0 };
        for (const [name, { allocations, same, outOfMemory, ...seen }] of Object.entries(report)) {
          expect(seen, name).toEqual(failed);
          expect(allocations, name).toBeGreaterThan(0);
          expect(outOfMemory, name).toBeGreaterThan(0);
          expect(same + outOfMemory, name).toBe(3 * allocations);
        }
        expect(Object.keys(report).length).toBeGreaterThan(20);
      },
    );
  });
}
