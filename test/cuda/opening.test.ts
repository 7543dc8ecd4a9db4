// Opening the plugin: what is missing or wrong is said, and everything but the GPU goes on.
import { spawnSync } from 'node:child_process';
import {
  copyFileSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { backendInfo } from '../../lib/index';
import { runNode, runProgram } from '../child';

const NO_CUDA = 'ERR_SDPA_BACKEND_UNAVAILABLE';
const ORIGIN = join(process.env.NODE_SDPA_PREBUILD as string, 'build/Release');

let folder: string;
const addon = () => join(folder, 'build/Release/node_sdpa.node');
const plugin = () => join(folder, 'build/Release/libsdpa_cuda.so');

beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'node-sdpa-cuda-'));
  mkdirSync(join(folder, 'build/Release'), { recursive: true });
  copyFileSync(join(ORIGIN, 'node_sdpa.node'), addon());
});
afterAll(() => rmSync(folder, { recursive: true }));

/** What a process finds out about its GPUs, and what calls give there. */
async function probe(env: Record<string, string>) {
  const report = await runProgram('gpu-probe', { env });
  expect(report.selected).toMatch(/^cpu:/);
  expect(report.auto).toMatch(/^cpu:/);
  return report;
}

async function expectNone(env: Record<string, string>, ...parts: (string | RegExp)[]) {
  const { cuda, call, tensor, gpus } = await probe(env);
  expect(cuda).toMatchObject({ ok: false, code: NO_CUDA });
  for (const part of parts) expect(cuda.reason).toMatch(part);
  expect([call, tensor]).toEqual([cuda, cuda].map(({ reason }) => `${NO_CUDA} ${reason}`));
  expect(gpus).toEqual([]);
}

describe('a plugin file', () => {
  const env = () => ({ NODE_SDPA_PREBUILD: folder });

  test('that is missing', async () => {
    rmSync(plugin(), { force: true });
    await expectNone(env(), 'cuda: there is no ', plugin(), 'npm run build:cuda');
  });

  test('that is cut off', async () => {
    copyFileSync(join(ORIGIN, 'libsdpa_cuda.so'), plugin());
    truncateSync(plugin(), 100_000);
    await expectNone(env(), 'is cut off after 100000 of ');
  });

  test('that is no library', async () => {
    writeFileSync(plugin(), 'not a library');
    await expectNone(env(), `cuda: ${plugin()} is no `);
  });

  test('that is another library', async () => {
    copyFileSync(addon(), plugin());
    await expectNone(env(), 'is of another version of node-sdpa than this');
  });

  test.each([
    ['ABI', 'extern "C" const void* sdpa_cuda_plugin(unsigned) { return nullptr; }'],
    [
      'version',
      'struct { unsigned abi; const char* version; } plugin = {1, "0.0.1"};\n' +
        'extern "C" const void* sdpa_cuda_plugin(unsigned) { return &plugin; }',
    ],
  ])('of another %s', async (_, source) => {
    const compiler = process.env.CXX ?? 'c++';
    const args = ['-shared', '-fPIC', '-x', 'c++', '-', '-o', plugin()];
    const { status, stderr } = spawnSync(compiler, args, { input: source, encoding: 'utf8' });
    expect(status, stderr).toBe(0);
    await expectNone(env(), plugin(), 'is of another version of node-sdpa than this');
  });

  test('is taken from beside the addon, whatever LD_LIBRARY_PATH says', async () => {
    rmSync(plugin(), { force: true });
    await expectNone({ ...env(), LD_LIBRARY_PATH: ORIGIN }, 'cuda: there is no ');
  });
});

describe('a machine', () => {
  test('without a driver', async () => {
    await expectNone({ SDPA_EMULATED_DRIVER: '0' }, 'cuda: no NVIDIA driver is installed');
  });

  test('with an old driver', async () => {
    const env = { SDPA_EMULATED_DRIVER: '12040' };
    await expectNone(env, 'driver is for CUDA 12.4, and a driver for CUDA 13 or later is needed');
  });

  test('without a GPU', async () => {
    await expectNone({ SDPA_EMULATED_DEVICES: '0' }, 'finds no GPU');
  });

  test('with an old GPU', async () => {
    await expectNone({ SDPA_EMULATED_SM: '61' }, 'cuda: its compute capability is below 7.5');
  });

  test.each(['1', '2', '3', '4'])('whose runtime fails in call %s', async (call) => {
    await expectNone({ SDPA_EMULATED_FAULT: `${call}:999` }, 'cuda: an emulated error');
  });

  test('with a GPU', async () => {
    const { cuda, call, tensor, gpus } = await probe({});
    expect(backendInfo().gpus).toHaveLength(2); // here SDPA_EMULATED_DEVICES is 2
    expect([cuda.ok, call, tensor]).toEqual([true, 'cuda', 'cuda']);
    expect(gpus).toEqual([
      {
        backend: 'cuda',
        name: 'emulated GPU 0',
        computeCapability: 9,
        memoryBytes: 2 ** 30,
        usedBytes: 0,
        cachedBytes: 0,
        limitBytes: 2 ** 30,
      },
    ]);
  });
});

describe('SDPA_CUDA_MEMORY_LIMIT', () => {
  test('is the most that the package takes', async () => {
    const { refused, next, cached, limit } = await runProgram('gpu-limit', {
      env: { SDPA_CUDA_MEMORY_LIMIT: '1000000' },
    });
    expect(refused.code).toBe('ERR_SDPA_OUT_OF_MEMORY');
    expect(refused.message).toMatch(
      /^No memory for 800000 bytes on cuda: [\d,]+ of 1000000 are in use/,
    );
    expect(next).toBe('cuda');
    expect(cached).toBeLessThanOrEqual(1_000_000);
    expect(limit).toBe(1_000_000);
  });

  test.each(['all', '0', '-1', '1.5'])('is an error where it is %s', async (limit) => {
    const env = { SDPA_CUDA_MEMORY_LIMIT: limit, SDPA_BACKEND: 'cuda' };
    const { status, stderr } = await runNode({
      env,
      args: ['-e', 'require("node-sdpa").backendInfo()'],
    });
    expect(status).toBe(1);
    expect(stderr).toContain('ERR_SDPA_INVALID_ARG_VALUE');
    expect(stderr).toContain('SDPA_CUDA_MEMORY_LIMIT: expected a number of bytes');
  });
});

test('SDPA_CUDA_HOPPER is an error where it is neither 0 nor 1', async () => {
  const env = { SDPA_CUDA_HOPPER: 'yes', SDPA_BACKEND: 'cuda' };
  const args = ['-e', 'require("node-sdpa").backendInfo()'];
  const { status, stderr } = await runNode({ env, args });
  expect(status).toBe(1);
  expect(stderr).toContain('ERR_SDPA_INVALID_ARG_VALUE');
  expect(stderr).toContain('SDPA_CUDA_HOPPER: expected 0 or 1');
});

test('SDPA_MAX_BYTES counts results on a GPU', async () => {
  const result = await runProgram('gpu-bytes', { env: { SDPA_MAX_BYTES: '10000' } });
  expect(result).toEqual({
    backend: 'cuda',
    refused: {
      code: 'ERR_SDPA_OUT_OF_MEMORY',
      message: 'The call needs 18688 bytes, and SDPA_MAX_BYTES allows it 10000',
    },
    grows: 0,
  });
});

test('SDPA_BACKEND=cuda makes it the default', async () => {
  const { auto } = await runProgram('gpu-probe', { env: { SDPA_BACKEND: 'cuda' } });
  expect(auto).toBe('cuda');
});

test('importing the package opens nothing', async () => {
  const program = `
    const { setNumThreads, attentionForwardSync } = require('node-sdpa');
    setNumThreads(1);
    const tensor = { data: new Float32Array(4), dims: [1, 1, 1, 4] };
    attentionForwardSync(tensor, tensor, tensor);
    const maps = require('node:fs').readFileSync('/proc/self/maps', 'utf8');
    console.log(/libsdpa_cuda/.test(maps), /node_sdpa.node/.test(maps));`;
  const { stdout } = await runNode({ args: ['-e', program] });
  expect(stdout.trim()).toBe('false true');
  expect(readFileSync(join(ORIGIN, 'libsdpa_cuda.so')).length).toBeGreaterThan(0);
});
