// The reference itself, against values that others computed: it must be right before it judges.
import { describe, expect, test } from 'vitest';
import { randomTensor, swapAxes } from './cases';
import { onnxCall } from './onnx-case';
import {
  type BroadcastAxis,
  dropoutKey,
  dropThreshold,
  keepDecisions,
  type Placement,
  philox,
  type ReferenceOptions,
  type ReferenceTensor,
  reference,
} from './reference';
import { biasGradient, torchCall } from './torch-case';
import {
  generatedOnnxCases,
  philoxVectors,
  publishedOnnxCases,
  torchCases,
  type VectorCase,
} from './vectors';

/** Both sides are float64; the stored one was rounded to float32 (relative 2^-24). */
function expectStored(name: string, actual: ArrayLike<number>, c: VectorCase, key: string) {
  const expected = c.outputs[key].data;
  expect(actual.length, name).toBe(expected.length);
  for (let i = 0; i < expected.length; i++) {
    const bound = 1e-9 + 2 ** -23 * Math.abs(expected[i]);
    const same = Object.is(actual[i], expected[i]) || Math.abs(actual[i] - expected[i]) <= bound;
    if (!same) expect.fail(`${c.name}: ${name}[${i}] = ${actual[i]}, stored ${expected[i]}`);
  }
}

describe('reference against the torch cases, to the rounding of the stored values', () => {
  for (const c of torchCases()) {
    test(c.name, () => {
      const call = torchCall(c);
      const result = reference(call.query, call.key, call.value, call.options);
      const gradients = result.backward(call.gradOutput.data);
      expectStored('output', result.output.values, c, 'Y');
      expectStored('lse', result.lse.values, c, 'lse');
      expectStored('gradQuery', gradients.gradQuery.values, c, 'dQ');
      expectStored('gradKey', gradients.gradKey.values, c, 'dK');
      expectStored('gradValue', gradients.gradValue.values, c, 'dV');
      if (c.outputs.dBias) {
        const summed = biasGradient(c, gradients.gradAttnMask!.values);
        expectStored('gradAttnMask', summed, c, 'dBias');
      }
    });
  }
});

describe('reference against the onnx cases, within their tolerance', () => {
  for (const c of [...generatedOnnxCases(), ...(publishedOnnxCases() ?? [])]) {
    test(c.name, () => {
      const call = onnxCall(c);
      const toBhsd = (t: ReferenceTensor) => (call.layout === 'bshd' ? swapAxes(t) : t);
      const compute = (options: ReferenceOptions) =>
        reference(toBhsd(call.query), toBhsd(call.key), toBhsd(call.value), options, call.type);
      const { output } = compute(call.options);
      const [batch, heads, length] = toBhsd(call.query).dims;
      const dims = [batch, heads, length, output.values.length / (batch * heads * length)];
      expectTolerated('output', toBhsd({ data: output.values, dims }).data, c, 'Y');
      expectTolerated('key', call.present.key, c, 'present_key');
      expectTolerated('value', call.present.value, c, 'present_value');
      if (!call.matmulOutput) return;
      const { name, options } = call.matmulOutput;
      expectTolerated(name, compute(options)[name].values, c, 'qk_matmul_output');
    });
  }
});

function expectTolerated(name: string, actual: ArrayLike<number>, c: VectorCase, key: string) {
  if (!c.outputs[key]) return;
  const expected = c.outputs[key].data;
  expect(actual.length, name).toBe(expected.length);
  for (let i = 0; i < expected.length; i++) {
    const bound = c.tol.atol + c.tol.rtol * Math.abs(expected[i]);
    if (actual[i] === expected[i] || Math.abs(actual[i] - expected[i]) <= bound) continue;
    expect.fail(`${c.name}: ${name}[${i}] = ${actual[i]}, stored ${expected[i]}`);
  }
}

describe('reference random numbers', () => {
  const stored = philoxVectors();

  test('Philox4x32 gives the published known answers', () => {
    for (const v of [...stored.vectors, ...stored.vectors_7_rounds, ...stored.derived]) {
      expect(philox(v.counter, v.key, v.rounds)).toEqual(v.result);
    }
    const { index, key, value } = stored.stream_checkpoint;
    expect(philox([Math.floor(index / 4), 0, 0, 0], key)[index % 4]).toBe(value);
  });

  test.each([
    [0, 'weights', 'df7f2af7', 'd3c77fff', [0x0e4cafae, 0xa3d5f5f6]],
    [0, 'scores', 'df7f2af7', 'd3c77fff', [0x0e4cafae, 0xa3d5f5f6]],
    [1, 'context', 'f8fffeea', 'ff7fffef', [0xf8b8359c, 0xae9f99d4]],
  ] as const)(
    'keep bits of lattice %i (%s) are the specified ones',
    (_, placement, q0, q1, key) => {
      const spec = { p: 0.1, placement, seed: 0x123456789abcdef0n, offset: 7 };
      expect(dropThreshold(0.1)).toBe(6554);
      expect(dropoutKey(spec)).toEqual(key);
      const keep = keepDecisions([1, 1, 2, 32], { ...spec, batchOffset: 1, headOffset: 2 });
      expect(packBits(keep.subarray(0, 32))).toBe(q0);
      expect(packBits(keep.subarray(32))).toBe(q1);
    },
  );
});

/** Eight decisions a byte, the lowest index in the lowest bit, as hexadecimal digits. */
function packBits(bits: Uint8Array): string {
  let text = '';
  for (let at = 0; at < bits.length; at += 8) {
    const byte = bits.subarray(at, at + 8).reduce((sum, bit, i) => sum + (bit << i), 0);
    text += byte.toString(16).padStart(2, '0');
  }
  return text;
}

describe('reference gradients against central differences in float64', () => {
  const broadcast: BroadcastAxis[] = ['head'];
  const variants: [string, ReferenceOptions][] = [
    ['no dropout', {}],
    ...(['weights', 'context', 'scores'] as Placement[]).flatMap(
      (dropoutPlacement): [string, ReferenceOptions][] => [
        [dropoutPlacement, { dropoutP: 0.3, dropoutPlacement, seed: 11, offset: 2 }],
        [
          `${dropoutPlacement}, capped, causal, window, lengths, broadcast`,
          {
            ...{ dropoutP: 0.4, dropoutPlacement, dropoutBroadcast: broadcast, seed: 5, offset: 1 },
            ...{ softcap: 1.5, isCausal: true, causalOffset: [2, 1], windowSize: [4, -1] },
            ...{ kvLengths: [6, 5], scale: 0.7 },
          },
        ],
      ],
    ),
  ];

  test.each(variants)('%s', (_, options) => {
    const query = randomTensor(1, [2, 4, 5, 3]);
    const key = randomTensor(2, [2, 2, 6, 3]);
    const value = randomTensor(3, [2, 2, 6, 4]);
    const attnMask = randomTensor(4, [4, 1, 6]);
    const upstream = randomTensor(5, [2, 4, 5, 4]).data;
    const loss = (): number => {
      const { output } = reference(query, key, value, { ...options, attnMask });
      return output.values.reduce((sum, x, i) => sum + x * upstream[i], 0);
    };
    const result = reference(query, key, value, { ...options, attnMask });
    const gradients = result.backward(upstream);
    expectDifferences(loss, query, gradients.gradQuery.values);
    expectDifferences(loss, key, gradients.gradKey.values);
    expectDifferences(loss, value, gradients.gradValue.values);
    expectDifferences(loss, attnMask, gradients.gradAttnMask!.values);
  });
});

/**
 * Step 1e-5: truncation about 1e-10 of the third derivative, rounding about 1e-11; 1e-7 has margin.
 */
function expectDifferences(loss: () => number, input: ReferenceTensor, gradient: Float64Array) {
  const data = input.data as Float64Array;
  const step = 1e-5;
  for (let i = 0; i < data.length; i++) {
    const before = data[i];
    data[i] = before + step;
    const above = loss();
    data[i] = before - step;
    const below = loss();
    data[i] = before;
    expect(Math.abs((above - below) / (2 * step) - gradient[i])).toBeLessThan(1e-7);
  }
}
