// Trains a TensorFlow.js model around node-sdpa's attention: each token of a random text has to
// name the text's first token, which only attention can carry to it.
//
//   npm run build && node --import tsx examples/tfjs/main.ts [scores | weights | context]
import '@tensorflow/tfjs-backend-cpu';
import * as tf from '@tensorflow/tfjs-core';
import { initializers, layers, sequential } from '@tensorflow/tfjs-layers';
import { backendInfo, type DropoutPlacement } from 'node-sdpa';
import { MultiHeadAttention } from './attention';

const TEXTS = 512;
const LENGTH = 8;
const TOKENS = 6;
const EPOCHS = 4;

/** Tokens and positions, both one-hot, and the answers. */
function createTexts(): { inputs: tf.Tensor3D; answers: tf.Tensor3D } {
  const tokens = tf.randomUniform([TEXTS, LENGTH], 0, TOKENS, 'int32', 1);
  const positions = tf.tile(tf.oneHot(tf.range(0, LENGTH, 1, 'int32'), LENGTH), [TEXTS, 1]);
  const first = tf.tile(tf.slice(tokens, [0, 0], [TEXTS, 1]), [1, LENGTH]);
  const shape: [number, number, number] = [TEXTS, LENGTH, LENGTH];
  return {
    inputs: tf.concat([tf.oneHot(tokens, TOKENS), tf.reshape(positions, shape)], 2) as tf.Tensor3D,
    answers: tf.oneHot(first, TOKENS) as tf.Tensor3D,
  };
}

async function main(): Promise<void> {
  const placement = (process.argv[2] ?? 'weights') as DropoutPlacement;
  await tf.setBackend('cpu');
  const { inputs, answers } = createTexts();
  const model = sequential({
    layers: [
      layers.dense({
        inputShape: [LENGTH, TOKENS + LENGTH],
        units: 16,
        kernelInitializer: initializers.glorotUniform({ seed: 5 }),
      }),
      new MultiHeadAttention({ heads: 2, dropout: 0.1, placement, seed: 7 }),
      layers.dense({
        units: TOKENS,
        activation: 'softmax',
        kernelInitializer: initializers.glorotUniform({ seed: 6 }),
      }),
    ],
  });
  model.compile({ optimizer: tf.train.adam(0.02), loss: 'categoricalCrossentropy' });
  console.log(`attention by ${backendInfo().selected}, dropout of ${placement}`);
  await model.fit(inputs, answers, {
    epochs: EPOCHS,
    batchSize: 32,
    shuffle: false, // the texts are random, and every run is to be the same
    verbose: 0,
    callbacks: {
      onEpochEnd: (epoch, logs) => console.log(`epoch ${epoch + 1}: loss ${logs?.loss.toFixed(3)}`),
    },
  });
  const found = tf.argMax(model.predict(inputs) as tf.Tensor, 2);
  const share = tf.mean(tf.cast(tf.equal(found, tf.argMax(answers, 2)), 'float32'));
  console.log(`right answers: ${(100 * share.dataSync()[0]).toFixed(1)} %`);
}

main();
