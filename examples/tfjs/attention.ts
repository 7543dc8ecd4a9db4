// node-sdpa as an operation of TensorFlow.js, with a gradient of its own, and as a layer.
import * as tf from '@tensorflow/tfjs-core';
import { initializers, layers, type Shape } from '@tensorflow/tfjs-layers';
import {
  type AttentionOptions,
  attentionForwardSync,
  type DropoutPlacement,
  Generator,
} from 'node-sdpa';

/**
 * `scaledDotProductAttention` of this package for tensors of TensorFlow.js.
 *
 * @param query - [batch, heads, length, headDim], or as `options.layout` says; float32
 * @param key - see the package
 * @param value - see the package
 * @param options - of `attentionForward`; a float `attnMask` gets no gradient here
 * @returns the output, which `tf.grads`, optimizers and `model.fit` can differentiate once
 */
export function attention(
  query: tf.Tensor4D,
  key: tf.Tensor4D,
  value: tf.Tensor4D,
  options: AttentionOptions = {},
): tf.Tensor4D {
  const operation = tf.customGrad((...args) => {
    const inputs = args.slice(0, 3) as tf.Tensor4D[];
    const [q, k, v] = inputs.map(toPackage);
    const result = attentionForwardSync(q, k, v, options);
    return {
      value: fromPackage(result.output),
      gradFunc: (gradOutput: tf.Tensor) => {
        // Drops what the forward pass dropped.
        const gradients = result.backwardSync(toPackage(gradOutput as tf.Tensor4D));
        return [gradients.gradQuery, gradients.gradKey, gradients.gradValue].map(fromPackage);
      },
    };
  });
  return operation(query, key, value) as tf.Tensor4D;
}

function toPackage(tensor: tf.Tensor4D) {
  return { data: tensor.dataSync<'float32'>(), dims: tensor.shape };
}

function fromPackage(tensor: { toFloat32Array(): Float32Array; dims: readonly number[] }) {
  return tf.tensor4d(tensor.toFloat32Array(), tensor.dims as [number, number, number, number]);
}

export interface MultiHeadAttentionConfig {
  readonly heads: number;
  /** Probability of a drop while training. Default: 0 */
  readonly dropout?: number;
  /** Default: `'weights'` */
  readonly placement?: DropoutPlacement;
  /** Whether a token sees earlier tokens only. Default: true */
  readonly isCausal?: boolean;
  /** Of the masks and of the initial weights. Default: others each time */
  readonly seed?: number;
  readonly name?: string;
}

type Weight = ReturnType<layers.Layer['addWeight']>;

/** Multi-head self-attention: [batch, length, width] -> [batch, length, width]. */
export class MultiHeadAttention extends layers.Layer {
  static readonly className = 'NodeSdpaMultiHeadAttention';
  readonly #config: MultiHeadAttentionConfig;
  readonly #generator: Generator;
  #weights: Weight[] = [];

  constructor(config: MultiHeadAttentionConfig) {
    super({ name: config.name });
    this.#config = config;
    this.#generator = new Generator(config.seed === undefined ? {} : { seed: config.seed });
  }

  override build(inputShape: Shape | Shape[]): void {
    const width = Number((inputShape as Shape).at(-1));
    if (width % this.#config.heads !== 0) {
      throw new RangeError(`${width} channels are not a multiple of ${this.#config.heads} heads`);
    }
    const { seed } = this.#config;
    this.#weights = ['query', 'key', 'value', 'output'].map((name, i) => {
      const initial = initializers.glorotUniform(seed === undefined ? {} : { seed: seed + i + 1 });
      return this.addWeight(name, [width, width], 'float32', initial);
    });
    this.built = true;
  }

  override call(inputs: tf.Tensor | tf.Tensor[], kwargs: { training?: boolean }): tf.Tensor {
    return tf.tidy(() => {
      const x = (Array.isArray(inputs) ? inputs[0] : inputs) as tf.Tensor3D;
      const [batch, length, width] = x.shape;
      const { heads, dropout = 0, placement = 'weights', isCausal = true } = this.#config;
      const rows = tf.reshape(x, [batch * length, width]) as tf.Tensor2D;
      const project = (input: tf.Tensor2D, weight: Weight) =>
        tf.matMul(input, weight.read() as tf.Tensor2D);
      // Layout 'bshd' takes the heads side by side, as they are: nothing is transposed.
      const [query, key, value] = this.#weights
        .slice(0, 3)
        .map((weight) =>
          tf.reshape(project(rows, weight), [batch, length, heads, width / heads]),
        ) as tf.Tensor4D[];
      const context = attention(query, key, value, {
        layout: 'bshd',
        isCausal,
        dropoutP: dropout,
        dropoutPlacement: placement,
        training: kwargs.training === true,
        generator: this.#generator,
      });
      const joined = tf.reshape(context, [batch * length, width]) as tf.Tensor2D;
      return tf.reshape(project(joined, this.#weights[3]), x.shape);
    });
  }

  override computeOutputShape(inputShape: Shape | Shape[]): Shape | Shape[] {
    return inputShape;
  }

  override getConfig(): tf.serialization.ConfigDict {
    return { ...super.getConfig(), ...this.#config } as tf.serialization.ConfigDict;
  }
}

tf.serialization.registerClass(MultiHeadAttention);
