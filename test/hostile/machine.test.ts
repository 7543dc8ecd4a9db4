// Faults of the machine and limits that are set for it: AMX refused by the system, one core, memory
// that a call may not take.
import { spawnSync } from 'node:child_process';
import { afterAll, describe, expect, test } from 'vitest';
import { runNode, runProgram } from '../child';
import { BACKENDS, NATIVE_BACKENDS } from '../harness';
import { compileFaults, hasFaults } from './faults';

/** A program that prints the codes of what the expressions `works` throw or reject with. */
function codesOf(works: string[], env: Record<string, string>) {
  const program = `
    const sdpa = require('node-sdpa');
    const tensor = (...dims) => {
      const data = new Float32Array(dims.reduce((product, n) => product * n, 1)).fill(0.5);
      return new sdpa.Tensor('float32', data, dims);
    };
    const [long, few] = [tensor(1, 1, 2000, 8), tensor(1, 1, 2, 8)];
    (async () => {
      const codes = [];
      const seen = process.memoryUsage().arrayBuffers;
      for (const work of [${works.map((work) => `() => ${work}`)}]) {
        try { await work(); codes.push('none'); } catch (error) {
          codes.push(error.code + ' ' + error.message);
        }
      }
      const grown = process.memoryUsage().arrayBuffers - seen;
      console.log(JSON.stringify({ codes, grown }));
    })();`;
  return runNode({ args: ['-e', program], env });
}

describe.each(BACKENDS)('%s, SDPA_MAX_BYTES', (backend) => {
  const WORKS: [string, string][] = [
    // 16 MB of weights; 64 kB of output, and 4 MB of mask.
    [`sdpa.attentionForwardSync(long, long, long, { outputs: ['weights'] })`, '16072000 bytes'],
    [`sdpa.attentionForward(long, long, long, { outputs: ['weights'] })`, '16072000 bytes'],
    [`sdpa.dropoutMask([1, 1, 2000, 2000], { p: 0.5, seed: 1 })`, '4000000 bytes'],
    [
      `sdpa.scaledDotProductAttention(long, long, long, { samples: 60, dropoutP: 0.1, training: true })`,
      '3840000 bytes',
    ],
    [`sdpa.attentionForwardSync(few, long, long).backwardSync(few)`, 'none'],
    [`sdpa.scaledDotProductAttention(few, long, long)`, 'none'],
  ];

  test('what is beyond it is an error before anything is allocated', async () => {
    const env = { SDPA_BACKEND: backend, SDPA_MAX_BYTES: '3000000' };
    const works = WORKS.map(([work]) => work);
    const { status, stdout, stderr } = await codesOf(works, env);
    expect(status, stderr).toBe(0);
    const { codes, grown } = JSON.parse(stdout);
    for (const [i, code] of codes.entries()) {
      const [work, needed] = WORKS[i];
      if (needed === 'none') {
        expect(code, work).toBe('none');
        continue;
      }
      expect(code, work).toContain('ERR_SDPA_OUT_OF_MEMORY');
      expect(code, work).toContain(needed);
      expect(code, work).toContain('SDPA_MAX_BYTES allows it 3000000');
    }
    expect(grown).toBeLessThan(1e6);
  });
});

test.each(['0', '-5', 'much', '1.5', 'Infinity1', '9007199254740993'])(
  'SDPA_MAX_BYTES=%s is an error that says so',
  async (value) => {
    const { stdout } = await codesOf(['sdpa.attentionForwardSync(few, few, few)'], {
      SDPA_MAX_BYTES: value,
    });
    expect(JSON.parse(stdout).codes[0]).toContain(
      'ERR_SDPA_INVALID_ARG_VALUE SDPA_MAX_BYTES: expected',
    );
  },
);

if (process.platform !== 'linux') console.log('skipped: one core (made for Linux)');
if (process.platform === 'linux') {
  test('on one core a call has one thread, and the same bits', async () => {
    const program = 'test/programs/info.mjs';
    const args = ['--cpu-list', '0', process.execPath, program];
    const { status, stdout, stderr } = spawnSync('taskset', args, { encoding: 'utf8' });
    expect(status, stderr).toBe(0);
    const { info, hash } = JSON.parse(stdout);
    expect(info.threads).toBe(1);
    const four = await runProgram('info', { env: { SDPA_NUM_THREADS: '4' } });
    expect(hash).toBe(four.hash);
  });
}

if (!hasFaults) console.log('skipped: limits of native memory, AMX refused (Linux with glibc)');
if (hasFaults) {
  const faults = compileFaults();
  afterAll(faults.remove);

  test.each(BACKENDS.filter((name) => name !== 'js'))(
    '%s keeps its working buffers within the limit',
    async (backend) => {
      const env = { SDPA_BACKEND: backend };
      const report: Record<string, Record<string, number>> = await faults.run('limits', { env });
      for (const [name, { same, outOfMemory, beyond, wrong }] of Object.entries(report)) {
        expect({ beyond, wrong }, name).toEqual({ beyond: 0, wrong: 0 });
        expect(same, name).toBeGreaterThan(3);
        expect(outOfMemory, name).toBeGreaterThan(3);
      }
      expect(Object.keys(report)).toHaveLength(10);
    },
  );

  const hasAmx = NATIVE_BACKENDS.includes('cpu:amx');
  if (!hasAmx) console.log('skipped: AMX refused by the system (no AMX here)');
  if (hasAmx) {
    test('AMX refused by the system: the next best computes', async () => {
      const env = { SDPA_REFUSE_AMX: '1' };
      const { info, backend } = await faults.run('../info', { env });
      expect(backend).toBe('cpu:avx512');
      const tried = info.tried.find((entry: { backend: string }) => entry.backend === 'cpu:amx');
      expect(tried).toMatchObject({ ok: false, code: 'ERR_SDPA_BACKEND_UNAVAILABLE' });
    });
  }
}
