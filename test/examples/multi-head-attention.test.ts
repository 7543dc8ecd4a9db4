// examples/multi-head-attention.ts: each step against the book's printed numbers or a float64
// reference, with dropout at each placement.
import { Generator } from 'node-sdpa';
import { describe, expect, test } from 'vitest';
import { randomStreams } from '../../examples/gpt/random';
import {
  CausalAttention,
  JOURNEY,
  MultiHeadAttention,
  MultiHeadAttentionWrapper,
  type Projection,
  SelfAttention,
  simpleSelfAttention,
  type Texts,
} from '../../examples/multi-head-attention';
import { runNode } from '../child';
import { PLACEMENTS, type ReferenceOptions, reference } from '../reference';

const SEED = 123;
const random = () => randomStreams(SEED, 1)[0];
const dropout = (placement: (typeof PLACEMENTS)[number]) => ({
  p: 0.5,
  placement,
  generator: new Generator({ seed: SEED }),
});

/** x [tokens, inputs] times the weight of a projection, in float64; columns from..to of it. */
function project(x: Texts, { weight, inputs, outputs }: Projection, from = 0, to = outputs) {
  const tokens = x.data.length / inputs;
  const columns = to - from;
  return Float64Array.from({ length: tokens * columns }, (_, at) => {
    const [row, column] = [Math.floor(at / columns), from + (at % columns)];
    let sum = 0;
    for (let i = 0; i < inputs; i++) sum += x.data[row * inputs + i] * weight[i * outputs + column];
    return sum;
  });
}

function expectNear(actual: Texts, wanted: ArrayLike<number>): void {
  expect(actual.data.length).toBe(wanted.length);
  actual.data.forEach((x, i) => {
    expect(Math.abs(x - wanted[i]), `[${i}]`).toBeLessThan(1e-6);
  });
}

/** One head of a layer by the reference. */
function headOf(
  layer: { query: Projection; key: Projection; value: Projection },
  x: Texts,
  options: ReferenceOptions,
  from?: number,
  to?: number,
) {
  const [q, k, v] = [layer.query, layer.key, layer.value].map((projection) => {
    const data = project(x, projection, from, to);
    const [batch, tokens] = x.shape;
    return { data, dims: [batch, 1, tokens, data.length / batch / tokens] };
  });
  return reference(q, k, v, options).output.values;
}

test('step 1 gives the numbers that the book prints', () => {
  const printed = [
    ...[0.4421, 0.5931, 0.579],
    ...[0.4419, 0.6515, 0.5683],
    ...[0.4431, 0.6496, 0.5671],
    ...[0.4304, 0.6298, 0.551],
    ...[0.4671, 0.591, 0.5266],
    ...[0.4177, 0.6503, 0.5645],
  ];
  const { data, shape } = simpleSelfAttention(JOURNEY);
  expect(shape).toEqual([1, 6, 3]);
  expect([...data].map((x) => Number(x.toFixed(4)))).toEqual(printed);
});

test('step 2 is attention of learned queries, keys and values', () => {
  const layer = new SelfAttention(3, 2, random());
  expectNear(layer.forward(JOURNEY), headOf(layer, JOURNEY, {}));
});

describe.each(PLACEMENTS)('dropout of %s', (placement) => {
  const trained = { isCausal: true, dropoutP: 0.5, dropoutPlacement: placement, training: true };

  test('step 3 drops in training only, and something else in each call', () => {
    const layer = new CausalAttention(3, 2, random(), dropout(placement));
    const evaluated = headOf(layer, JOURNEY, { isCausal: true });
    expectNear(layer.forward(JOURNEY), evaluated);
    for (const offset of [0, 1]) {
      const wanted = headOf(layer, JOURNEY, { ...trained, seed: SEED, offset });
      expectNear(layer.forward(JOURNEY, true), wanted);
      expect(wanted).not.toEqual(evaluated);
    }
    expectNear(layer.forward(JOURNEY), evaluated);
  });

  test.each([false, true])('steps 4a and 4b give the same contexts, training %s', (training) => {
    const wrapper = new MultiHeadAttentionWrapper(3, 6, 3, random(), dropout(placement));
    const layer = new MultiHeadAttention(3, 6, 3, random(), dropout(placement));
    for (const name of ['query', 'key', 'value'] as const) {
      wrapper.heads.forEach((head, h) => {
        for (let i = 0; i < 3; i++) {
          const row = head[name].weight.subarray(i * 2, (i + 1) * 2);
          layer[name].weight.set(row, i * 6 + h * 2);
        }
      });
    }
    const texts = {
      data: Float32Array.of(...JOURNEY.data, ...JOURNEY.data.slice().reverse()),
      shape: [2, 6, 3] as const,
    };
    for (let call = 0; call < 2; call++) {
      expectNear(layer.context(texts, training), wrapper.forward(texts, training).data);
    }
    const options = training
      ? { ...trained, seed: SEED, offset: 2, headOffset: 1 }
      : { isCausal: true };
    const second = headOf(layer, texts, options, 2, 4);
    const { data } = layer.context(texts, training);
    expectNear({ ...texts, data: data.filter((_, at) => at % 6 === 2 || at % 6 === 3) }, second);
  });
});

test('the example runs from top to bottom', async () => {
  const { status, stdout } = await runNode({
    args: ['--import', 'tsx', 'examples/multi-head-attention.ts'],
  });
  expect(status).toBe(0);
  expect(stdout).toMatch(/1\. Simple self-attention\n +0\.4421 +0\.5931 +0\.5790/);
  expect(stdout).toMatch(
    /4b\. Two heads in one call, and an output projection\n( +-?\d\.\d{4}){4}/,
  );
});
