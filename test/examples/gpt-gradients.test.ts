// The gradients of the GPT of examples/gpt: its layers in float64 against finite differences, with
// an independent attention; then the float32 model on the package against the float64 one.
import { Generator } from 'node-sdpa';
import { describe, expect, test } from 'vitest';
import { type Attention, trainingAttention } from '../../examples/gpt/attention';
import { crossEntropy } from '../../examples/gpt/layers';
import { addProduct, type Floats, transpose } from '../../examples/gpt/matmul';
import { Gpt } from '../../examples/gpt/model';
import { AdamW, clipGradients, rateAt } from '../../examples/gpt/optimizer';
import { below, randomStreams, standardNormal } from '../../examples/gpt/random';
import { swapAxes } from '../cases';
import { PLACEMENTS, type ReferenceOptions, reference } from '../reference';

const SIZES = { layers: 2, heads: 2, width: 8, length: 6, vocabulary: 5 };
const BATCH = 2;
const SEED = 11;
const P = 0.3;

/** Attention in float64, of none of the package's code; each layer has its own dropout. */
function referenceAttention(options: ReferenceOptions): Attention {
  return (query, key, value, { batch, length, heads, headDim }, layer) => {
    const dims = [batch, length, heads, headDim];
    const [q, k, v] = [query, key, value].map((data) => swapAxes({ data, dims }));
    const result = reference(q, k, v, { ...options, isCausal: true, offset: layer });
    const back = (data: ArrayLike<number>) =>
      swapAxes({ data, dims: [batch, heads, length, headDim] }).data as Float64Array;
    return {
      output: back(result.output.values),
      backward(gradOutput) {
        const gradients = result.backward(swapAxes({ data: gradOutput, dims }).data);
        return {
          gradQuery: back(gradients.gradQuery.values),
          gradKey: back(gradients.gradKey.values),
          gradValue: back(gradients.gradValue.values),
        };
      },
    };
  };
}

const [random] = randomStreams(SEED, 1);
const tokens = Int32Array.from({ length: BATCH * SIZES.length }, () =>
  below(random, SIZES.vocabulary),
);
const targets = tokens.map(() => below(random, SIZES.vocabulary));

/** A model whose gains and biases are random too, so that nothing is tested at 0 or 1 only. */
function createModel(precision: Floats): Gpt {
  const [numbers] = randomStreams(SEED, 1);
  const model = new Gpt(SIZES, precision);
  model.initialize(numbers);
  for (const { value } of model.parameters) {
    for (let i = 0; i < value.length; i++) {
      value[i] = Math.fround(value[i] + 0.2 * standardNormal(numbers));
    }
  }
  return model;
}

function lossAndGradients(model: Gpt, attention: Attention): number {
  const { loss, gradLogits } = crossEntropy(model.forward(tokens, BATCH, attention), targets);
  model.backward(gradLogits);
  return loss;
}

const lengthOf = (x: ArrayLike<number>) => Math.hypot(...Array.from(x));
const DROPOUTS = [undefined, ...PLACEMENTS];

function optionsOf(placement: (typeof DROPOUTS)[number]): ReferenceOptions {
  if (placement === undefined) return {};
  return { dropoutP: P, dropoutPlacement: placement, training: true, seed: SEED };
}

describe.each(DROPOUTS)('dropout %s', (placement) => {
  const attention = referenceAttention(optionsOf(placement));

  test('every parameter of the float64 model against finite differences', () => {
    const model = createModel(new Float64Array());
    lossAndGradients(model, attention);
    const h = 1e-5;
    const loss = () => crossEntropy(model.forward(tokens, BATCH, attention), targets).loss;
    for (const { name, value, gradient } of model.parameters) {
      for (let i = 0; i < value.length; i++) {
        const before = value[i];
        value[i] = before + h;
        const above = loss();
        value[i] = before - h;
        const slope = (above - loss()) / (2 * h);
        value[i] = before;
        // h^2 of the third derivative, and the rounding of the losses divided by h.
        expect(Math.abs(gradient[i] - slope), `${name}[${i}]`).toBeLessThan(1e-8);
      }
    }
  });

  test('the float32 model on the package against the float64 model', () => {
    const exact = createModel(new Float64Array());
    const exactLoss = lossAndGradients(exact, attention);
    const model = createModel(new Float32Array());
    const generator = new Generator({ seed: SEED });
    const dropout = placement && { placement, p: P, generator };
    const loss = lossAndGradients(model, trainingAttention(dropout));
    expect(Math.abs(loss - exactLoss)).toBeLessThan(1e-6 * exactLoss);
    const all = lengthOf(exact.parameters.map(({ gradient }) => lengthOf(gradient)));
    model.parameters.forEach(({ name, gradient }, at) => {
      const want = exact.parameters[at].gradient;
      const error = lengthOf(gradient.map((x, i) => x - want[i]));
      // A key's bias shifts all scores of a row alike: its gradient is 0, but for rounding.
      expect(error, name).toBeLessThan(1e-6 * lengthOf(want) + 1e-7 * all);
      expect(lengthOf(want), name).toBeGreaterThan(name.endsWith('key.bias') ? -1 : 1e-3 * all);
    });
  });
});

describe('arithmetic of the layers', () => {
  test.each([
    [1, 1, 1],
    [4, 3, 2],
    [5, 7, 3],
    [9, 2, 8],
    [3, 64, 63],
  ])('the product of [%i, %i] and [.., %i]', (n, k, m) => {
    const numbers = (length: number) => Float64Array.from({ length }, () => standardNormal(random));
    const [a, b, out] = [numbers(n * k), numbers(k * m), numbers(n * m)];
    const want = out.map((x, at) => {
      const [row, column] = [Math.floor(at / m), at % m];
      return Array.from({ length: k }).reduce<number>(
        (sum, _, p) => sum + a[row * k + p] * b[p * m + column],
        x,
      );
    });
    addProduct(out, a, b, n, k, m);
    out.forEach((x, at) => {
      expect(x).toBeCloseTo(want[at], 12);
    });
    expect(transpose(transpose(a, n, k), k, n)).toEqual(a);
  });

  test('AdamW against its definition, summed up from all gradients so far', () => {
    const gradients = [0.5, -2, 0.25, 3];
    const value = Float64Array.of(1);
    const parameter = { name: 'x', shape: [1, 1], value, gradient: new Float64Array(1) };
    const optimizer = new AdamW([parameter], 0.1);
    let want = 1;
    gradients.forEach((g, t) => {
      parameter.gradient[0] = g;
      optimizer.update(0.01);
      const average = (beta: number, power: number) =>
        gradients
          .slice(0, t + 1)
          .reduce((sum, x, i) => sum + (1 - beta) * beta ** (t - i) * x ** power, 0) /
        (1 - beta ** (t + 1));
      want -= 0.01 * 0.1 * want;
      want -= (0.01 * average(0.9, 1)) / (Math.sqrt(average(0.99, 2)) + 1e-8);
      expect(value[0]).toBeCloseTo(want, 12);
    });
    expect(parameter.gradient[0]).toBe(0);
  });

  test('clipping shortens long gradients only', () => {
    const gradient = Float64Array.of(3, 4);
    const parameter = { name: 'x', shape: [2], value: new Float64Array(2), gradient };
    expect(clipGradients([parameter], 10)).toBe(5);
    expect([...gradient]).toEqual([3, 4]);
    expect(clipGradients([parameter], 1)).toBe(5);
    expect(Math.hypot(...gradient)).toBeCloseTo(1, 12);
  });

  test('the learning rate rises, and falls to a tenth', () => {
    const schedule = { rate: 2, warmup: 10, steps: 111 };
    const rates = Array.from({ length: 111 }, (_, step) => rateAt(step, schedule));
    expect(rates[0]).toBeCloseTo(0.2, 12);
    expect(rates[9]).toBeCloseTo(2, 12);
    expect(rates[60]).toBeCloseTo(1.1, 12); // half-way
    expect(rates[110]).toBeCloseTo(0.2, 12);
    expect(Math.max(...rates)).toBeCloseTo(2, 12);
  });
});
