// How the tests run: one process a file, so that a native crash ends one file and not the run.
import { existsSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { defineConfig } from 'vitest/config';

const chosen = process.env.NODE_SDPA_PREBUILD;
const emulated = resolve(chosen ?? 'build', 'emulated');
const hasEmulatedGpu = existsSync(join(emulated, 'build/Release/libsdpa_cuda.so'));

/**
 * The tests of the GPU alone, and those that go through every backend and end soon on a GPU that is
 * played by the CPU; all others run on a real one (npm run test:gpu).
 */
const OF_GPU = ['test/cuda/*.test.ts', 'test/gpu/*.test.ts'];
const OF_BACKENDS = ['conformance', 'dropout', 'precision', 'special-values', 'splits'].map(fileOf);

function fileOf(name: string): string {
  return `test/${name}.test.ts`;
}

function onEmulatedGpu(name: string, include: string[], more: Record<string, string>) {
  const env = {
    NODE_SDPA_PREBUILD: emulated,
    SDPA_TEST_BACKENDS: 'cuda',
    SDPA_EMULATED_DEVICES: '2',
    SDPA_TEST_SMALL: '1',
    ...more,
  };
  return {
    extends: true as const,
    test: { name, include, setupFiles: ['tools/prove-binary.ts'], env },
  };
}

export default defineConfig({
  test: {
    globalSetup: ['test/global-setup.ts'],
    pool: 'forks',
    maxWorkers: 2,
    testTimeout: 60_000,
    hookTimeout: 60_000,
    reporters: ['default', 'json'],
    outputFile: { json: 'out/tests.json' },
    coverage: {
      provider: 'v8',
      include: ['lib/**/*.ts'],
      reporter: ['text', 'json-summary'],
      thresholds: { statements: 95, branches: 95, functions: 95, lines: 95 },
    },
    projects: [
      {
        extends: true,
        test: {
          name: 'cpu',
          include: ['test/**/*.test.ts'],
          exclude: ['test/cuda/**', 'test/gpu/**'],
          // A run against a chosen addon proves in every file that it was the one in use.
          setupFiles: chosen ? ['tools/prove-binary.ts'] : [],
        },
      },
      // The emulated plugin lies beside an addon of its own: see CMakeLists.txt.
      ...(hasEmulatedGpu
        ? [
            onEmulatedGpu('cuda', [...OF_GPU, ...OF_BACKENDS], {}),
            onEmulatedGpu('hopper', OF_BACKENDS, { SDPA_CUDA_HOPPER: '1' }),
          ]
        : []),
    ],
  },
});
