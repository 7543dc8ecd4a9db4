// examples/tfjs: the operation and its gradients against TensorFlow.js' own arithmetic and
// automatic differentiation, and the layer in a model.
import '@tensorflow/tfjs-backend-cpu';
import * as tf from '@tensorflow/tfjs-core';
import { layers, models, sequential } from '@tensorflow/tfjs-layers';
import { dropoutMask } from 'node-sdpa';
import { beforeAll, describe, expect, test } from 'vitest';
import { attention, MultiHeadAttention } from '../../examples/tfjs/attention';
import { runNode } from '../child';

const DIMS: [number, number, number, number] = [2, 3, 7, 4];
const P = 0.25; // takes effect exactly
const SEED = 5;

beforeAll(async () => {
  await tf.setBackend('cpu');
});

const inputs = () => [1, 2, 3, 4].map((seed) => tf.randomNormal(DIMS, 0, 1, 'float32', seed));

/** Causal attention in operations of TensorFlow.js, told what to drop. */
function ownAttention(placement?: 'weights' | 'context' | 'scores') {
  const [batch, heads, length, headDim] = DIMS;
  const later = tf.linalg.bandPart(tf.ones([length, length]), 0, -1);
  const isHidden = tf.sub(later, tf.eye(length)); // 1 above the diagonal
  const columns = placement === 'context' ? headDim : length;
  const mask = dropoutMask([batch, heads, length, columns], { p: P, seed: SEED, placement });
  const keep = tf.tensor(Float32Array.from(mask), [batch, heads, length, columns]);
  const scale = 1 / (1 - P);
  return (q: tf.Tensor, k: tf.Tensor, v: tf.Tensor) => {
    let scores = tf.div(tf.matMul(q, k, false, true), Math.sqrt(headDim));
    scores = tf.sub(scores, tf.mul(isHidden, 1e9));
    if (placement === 'scores') scores = tf.sub(scores, tf.mul(tf.sub(1, keep), 1e9));
    let weights = tf.softmax(scores);
    if (placement === 'weights') weights = tf.mul(weights, tf.mul(keep, scale));
    const context = tf.matMul(weights, v);
    return placement === 'context' ? tf.mul(context, tf.mul(keep, scale)) : context;
  };
}

function expectNear(actual: tf.Tensor, wanted: tf.Tensor): void {
  expect(actual.shape).toEqual(wanted.shape);
  const [a, b] = [actual.dataSync(), wanted.dataSync()];
  expect(Math.max(...b.map(Math.abs))).toBeGreaterThan(0.1);
  a.forEach((x, i) => {
    expect(Math.abs(x - b[i]), `[${i}]`).toBeLessThan(2e-6);
  });
}

/** Rows whose every visible score is dropped: node-sdpa gives 0, a softmax cannot. */
const emptyRows = (keep: Uint8Array) => {
  const [, , length] = DIMS;
  return Array.from({ length: keep.length / length }, (_, row) => row).filter((row) =>
    keep.subarray(row * length, row * length + (row % length) + 1).every((kept) => kept === 0),
  );
};

describe.each([undefined, 'weights', 'context', 'scores'] as const)('dropout %s', (placement) => {
  const options = {
    isCausal: true,
    ...(placement && { dropoutP: P, dropoutPlacement: placement, training: true, seed: SEED }),
  };

  test('the output and all gradients are those of TensorFlow.js itself', () => {
    const [query, key, value, weight] = inputs();
    const [batch, heads, length] = DIMS;
    const keep = dropoutMask([batch, heads, length, length], { p: P, seed: SEED });
    const rows = placement === 'scores' ? emptyRows(keep) : [];
    if (placement === 'scores') expect(rows.length).toBeGreaterThan(0);
    // Their output is compared with 0, and they are left out of the loss.
    const isUsed = tf.tensor4d(
      Float32Array.from({ length: batch * heads * length }, (_, row) =>
        Number(!rows.includes(row)),
      ),
      [batch, heads, length, 1],
    );
    const ours = (q: tf.Tensor, k: tf.Tensor, v: tf.Tensor) =>
      attention(q as tf.Tensor4D, k as tf.Tensor4D, v as tf.Tensor4D, options);
    const theirs = ownAttention(placement);
    const arguments_ = [query, key, value] as const;
    expectNear(ours(...arguments_), tf.mul(theirs(...arguments_), isUsed));
    const gradients = [ours, theirs].map((compute) =>
      tf.grads((q, k, v) => tf.sum(tf.mul(tf.mul(compute(q, k, v), isUsed), weight)))([
        ...arguments_,
      ]),
    );
    gradients[0].forEach((gradient, i) => {
      expectNear(gradient, gradients[1][i]);
    });
  });
});

describe('the layer', () => {
  /** A small model whose initial weights are the same in every run. */
  const build = (placement: 'weights' | 'context' | 'scores', dropout: number) => {
    const model = sequential({
      layers: [
        layers.dense({ inputShape: [5, 6], units: 8 }),
        new MultiHeadAttention({ heads: 2, dropout, placement, seed: 3 }),
        layers.dense({ units: 2 }),
      ],
    });
    model.setWeights(
      model
        .getWeights()
        .map(({ shape }, seed) => tf.randomNormal(shape, 0, 0.4, 'float32', seed + 1)),
    );
    return model;
  };

  test('trains all of its weights, and drops in training only', async () => {
    const model = build('scores', 0.5);
    const x = tf.randomNormal([16, 5, 6], 0, 1, 'float32', 1);
    const y = tf.cumsum(tf.slice(x, [0, 0, 0], [16, 5, 2]), 1); // needs the tokens before
    expect((model.predict(x) as tf.Tensor).dataSync()).toEqual(
      (model.predict(x) as tf.Tensor).dataSync(),
    );
    const before = model.getWeights().map((weight) => weight.dataSync().slice());
    expect(before).toHaveLength(2 + 4 + 2);
    model.compile({ optimizer: tf.train.adam(0.01), loss: 'meanSquaredError' });
    const { history } = await model.fit(x, y, { epochs: 40, shuffle: false, verbose: 0 });
    expect(Number(history.loss.at(-1))).toBeLessThan(0.5 * Number(history.loss[0]));
    model.getWeights().forEach((weight, i) => {
      expect(weight.dataSync(), `${i}`).not.toEqual(before[i]);
    });
    const drop = (seed: number) => {
      const layer = new MultiHeadAttention({ heads: 2, dropout: 0.5, seed });
      const input = tf.ones([1, 4, 4]);
      layer.build(input.shape);
      layer.setWeights(Array(4).fill(tf.eye(4)));
      return (layer.apply(input, { training: true }) as tf.Tensor).dataSync();
    };
    expect(drop(1)).toEqual(drop(1));
    expect(drop(1)).not.toEqual(drop(2));
  });

  test('is saved and loaded with its settings', async () => {
    const model = build('context', 0.2);
    const text = model.toJSON(null, false) as object;
    const loaded = await models.modelFromJSON({ modelTopology: text } as never);
    loaded.setWeights(model.getWeights());
    const x = tf.randomNormal([2, 5, 6], 0, 1, 'float32', 2);
    const [a, b] = [model, loaded].map((m) => (m.predict(x) as tf.Tensor).dataSync());
    expect(a).toEqual(b);
    expect(loaded.layers[1].getConfig()).toMatchObject({ heads: 2, placement: 'context' });
  });

  test('refuses a width that its heads do not divide', () => {
    const layer = new MultiHeadAttention({ heads: 3 });
    expect(() => layer.apply(tf.ones([1, 2, 8]))).toThrow('8 channels are not a multiple of 3');
  });
});

test('the example learns its task', async () => {
  const args = ['--import', 'tsx', 'examples/tfjs/main.ts', 'context'];
  const finished = await runNode({ args });
  expect(finished, finished.stderr).toMatchObject({ status: 0 });
  const [, share] = finished.stdout.match(/right answers: ([\d.]+) %/) ?? [];
  expect(Number(share)).toBeGreaterThan(99);
});
