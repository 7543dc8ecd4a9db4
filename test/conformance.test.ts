// The conformance cases on every backend and several thread counts, with a table of counts at the
// end.
import { relative } from 'node:path';
import { afterAll, describe, expect, test } from 'vitest';
import {
  type AttentionOptions,
  attentionForwardSync,
  backendInfo,
  dropoutMask,
} from '../lib/index';
import { philox4x32 } from '../lib/js-dropout';
import { forward, numbers, RUNNERS, type Runner, stored, withThreads } from './harness';
import { type OnnxCall, onnxCall } from './onnx-case';
import type { ReferenceOptions } from './reference';
import { biasGradient, torchCall } from './torch-case';
import {
  generatedOnnxCases,
  PUBLISHED,
  philoxVectors,
  publishedOnnxCases,
  torchCases,
  type VectorCase,
  type VectorTensor,
} from './vectors';

const PUBLISHED_COUNT = 51;

type Counts = { passed: number; failed: number; skipped: number };
const table = new Map<string, Map<string, Counts>>();

function counts(row: string, suite: string): Counts {
  const suites = table.get(row) ?? new Map<string, Counts>();
  table.set(row, suites);
  const found = suites.get(suite) ?? { passed: 0, failed: 0, skipped: 0 };
  suites.set(suite, found);
  return found;
}

/** A test that enters its outcome into the table. */
function countedTest(name: string, row: string, suite: string, body: () => void) {
  test(name, () => {
    const cell = counts(row, suite);
    try {
      body();
      cell.passed++;
    } catch (error) {
      cell.failed++;
      throw error;
    }
  });
}

afterAll(() => {
  const suites = ['torch', 'onnx generated', 'onnx published', 'philox'];
  const widths = suites.map((suite) => Math.max(suite.length, 11) + 3);
  const lines = [`${'backend'.padEnd(18)}${suites.map((s, i) => s.padStart(widths[i])).join('')}`];
  for (const [row, cells] of table) {
    const text = suites.map((suite, i) => {
      const { passed, failed, skipped } = cells.get(suite) ?? { passed: 0, failed: 0, skipped: 0 };
      return `${passed}/${failed}/${skipped}`.padStart(widths[i]);
    });
    lines.push(row.padEnd(18) + text.join(''));
  }
  for (const { backend, ok, reason } of backendInfo().tried) {
    if (!ok) lines.push(`${backend.padEnd(18)}   not available: ${reason}`);
  }
  console.log(`Conformance cases: passed/failed/skipped\n${lines.join('\n')}`);
});

function expectTensor(name: string, actual: ArrayLike<number>, c: VectorCase, key: string) {
  const { data } = c.outputs[key];
  const { atol, rtol, exact = [] } = c.tol;
  expect(actual.length, `${name}: length`).toBe(data.length);
  for (let i = 0; i < data.length; i++) {
    if (actual[i] === data[i]) continue;
    const bound = exact.includes(key) ? 0 : atol + rtol * Math.abs(data[i]);
    if (Math.abs(actual[i] - data[i]) <= bound && Number.isFinite(data[i])) continue;
    expect.fail(`${c.name}: ${name}[${i}] = ${actual[i]}, expected ${data[i]} within ${bound}`);
  }
}

function checkTorch(runner: Runner, c: VectorCase): void {
  const call = torchCall(c);
  const result = forward(runner.backend, call, { outputs: ['lse'] });
  expectTensor('output', result.output.data, c, 'Y');
  expectTensor('lse', result.lse!.data, c, 'lse');
  const gradients = result.backwardSync(call.gradOutput);
  expectTensor('gradQuery', gradients.gradQuery.data, c, 'dQ');
  expectTensor('gradKey', gradients.gradKey.data, c, 'dK');
  expectTensor('gradValue', gradients.gradValue.data, c, 'dV');
  if (c.outputs.dBias) {
    expectTensor('gradAttnMask', biasGradient(c, gradients.gradAttnMask!.data), c, 'dBias');
  } else {
    expect(gradients.gradAttnMask).toBeUndefined();
  }
}

function checkOnnx(runner: Runner, c: VectorCase): void {
  const call = onnxCall(c);
  expectTensor('output', runOnnx(runner, c, call, call.options, 'output'), c, 'Y');
  if (c.outputs.present_key) {
    expectTensor('present_key', call.present.key, c, 'present_key');
    expectTensor('present_value', call.present.value, c, 'present_value');
  }
  if (call.matmulOutput) {
    const { name, options } = call.matmulOutput;
    expectTensor(name, runOnnx(runner, c, call, options, name), c, 'qk_matmul_output');
  }
}

function runOnnx(
  runner: Runner,
  c: VectorCase,
  call: OnnxCall,
  { attnMask, ...options }: ReferenceOptions,
  name: 'output' | 'scores' | 'weights',
): Float64Array {
  const maskType = (c.inputs.attn_mask as VectorTensor | undefined)?.dtype;
  const mask = attnMask?.data instanceof Uint8Array ? { ...attnMask, data: attnMask.data } : null;
  const result = attentionForwardSync(
    stored(call.query, call.type),
    stored(call.key, call.type),
    stored(call.value, call.type),
    {
      ...(options as AttentionOptions),
      ...(attnMask && {
        attnMask: mask ?? stored(attnMask, maskType === 'float16' ? maskType : 'float32'),
      }),
      layout: call.layout,
      enableGqa: true,
      backend: runner.backend as AttentionOptions['backend'],
      outputs: name === 'output' ? [] : [name],
    },
  );
  expect(result.backend).toBe(runner.backend);
  return numbers(result[name]!);
}

const published = publishedOnnxCases();
if (!published) {
  console.log(
    `skipped: ${PUBLISHED_COUNT} published ONNX cases (no folder ${relative('.', PUBLISHED)})`,
  );
}

describe.each(RUNNERS.map((r) => [r.name, r] as const))('%s', (_, runner) => {
  const check = (suite: string, c: VectorCase, body: (r: Runner, c: VectorCase) => void) =>
    countedTest(c.name, runner.name, suite, () =>
      withThreads(runner.threads, () => body(runner, c)),
    );
  for (const c of torchCases()) check('torch', c, checkTorch);
  for (const c of generatedOnnxCases()) check('onnx generated', c, checkOnnx);
  for (const c of published ?? []) check('onnx published', c, checkOnnx);
  if (!published) counts(runner.name, 'onnx published').skipped = PUBLISHED_COUNT;
});

describe('random numbers', () => {
  const vectors = philoxVectors();
  const groups = [...vectors.vectors, ...vectors.vectors_7_rounds, ...vectors.derived];
  for (const { counter, key, rounds, result } of groups) {
    const name = `philox4x32-${rounds}, counter ${counter}, key ${key}`;
    countedTest(name, 'TypeScript', 'philox', () => {
      const words = new Uint32Array(4);
      philox4x32(...counter, ...key, rounds, words);
      expect([...words]).toEqual(result);
    });
  }

  countedTest('the 10000th output of the standard stream', 'TypeScript', 'philox', () => {
    const { index, key, value, rounds } = vectors.stream_checkpoint;
    const words = new Uint32Array(4);
    philox4x32(Math.floor(index / 4), 0, 0, 0, ...key, rounds, words);
    expect(words[index % 4]).toBe(value);
  });

  // DROPOUT.md's table: bits, lowest index first, of b = 1, h = 2, q = 0 and 1, c = 0..31.
  const spec = { p: 0.1, seed: 0x123456789abcdef0n, offset: 7, batchOffset: 1, headOffset: 2 };
  const answers = [
    ['weights', 'df7f2af7', 'd3c77fff'],
    ['scores', 'df7f2af7', 'd3c77fff'],
    ['context', 'f8fffeea', 'ff7fffef'],
  ] as const;

  for (const [placement, q0, q1] of answers) {
    const bits = unpackBits(q0 + q1);
    countedTest(`dropoutMask, ${placement}`, 'dropoutMask', 'philox', () => {
      expect([...dropoutMask([1, 1, 2, 32], { ...spec, placement })]).toEqual(bits);
    });
    for (const runner of RUNNERS) {
      countedTest(`${runner.name} kernel, ${placement}`, runner.name, 'philox', () => {
        const kept = withThreads(runner.threads, () => keptByKernel(runner, placement, spec));
        expect(kept).toEqual(bits);
      });
    }
  }
});

/**
 * The bits that a kernel used, read off its results: 32 keys of equal weight, 32 channels of one.
 */
function keptByKernel(
  runner: Runner,
  dropoutPlacement: 'weights' | 'context' | 'scores',
  { p, ...spec }: { p: number; seed: bigint; offset: number; batchOffset: number },
): number[] {
  const zeros = { data: new Float32Array(2), dims: [1, 1, 2, 1] };
  const result = attentionForwardSync(
    zeros,
    { data: new Float32Array(32), dims: [1, 1, 32, 1] },
    { data: new Float32Array(32 * 32).fill(1), dims: [1, 1, 32, 32] },
    {
      ...{ ...spec, dropoutP: p, dropoutPlacement, training: true, outputs: ['droppedWeights'] },
      backend: runner.backend as AttentionOptions['backend'],
    },
  );
  expect(result.backend).toBe(runner.backend);
  const shown = dropoutPlacement === 'context' ? result.output : result.droppedWeights!;
  return Array.from(shown.data as Float32Array, (x) => (x === 0 ? 0 : 1));
}

function unpackBits(hex: string): number[] {
  const bytes = hex.match(/../g)!.map((digits) => Number.parseInt(digits, 16));
  return bytes.flatMap((byte) => Array.from({ length: 8 }, (_, i) => (byte >> i) & 1));
}
