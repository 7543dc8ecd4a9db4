// A small GPT: embedding, pre-norm blocks of causal multi-head attention and an MLP, and a linear
// layer to the logits of the next token (Radford et al., GPT-2, 2019).
import type { Attended, Attention, AttentionRequest } from './attention';
import { Embedding, Gelu, kept, LayerNorm, Linear, type Parameter } from './layers';
import { type Floats, zeros } from './matmul';
import { type Random, standardNormal } from './random';

export interface ModelSizes {
  readonly layers: number;
  readonly heads: number;
  /** Channels of a token; a multiple of `heads` */
  readonly width: number;
  /** The longest text that the model sees at once */
  readonly length: number;
  /** How many different tokens there are */
  readonly vocabulary: number;
}

/** Standard deviation of the initial embeddings. */
const EMBEDDING_DEVIATION = 0.1;

export class Gpt {
  readonly parameters: Parameter[] = [];
  readonly #embedding: Embedding;
  readonly #blocks: Block[] = [];
  readonly #norm: LayerNorm;
  readonly #head: Linear;

  /**
   * @param sizes - see {@link ModelSizes}
   * @param precision - an array of the kind that holds all numbers of the model
   */
  constructor(
    readonly sizes: ModelSizes,
    precision: Floats = new Float32Array(0),
  ) {
    const { layers, width, length, vocabulary } = sizes;
    const parameter = (name: string, ...shape: number[]): Parameter => {
      const count = shape.reduce((product, size) => product * size);
      const [value, gradient] = [zeros(precision, count), zeros(precision, count)];
      const created = { name, shape, value, gradient };
      this.parameters.push(created);
      return created;
    };
    const linear = (name: string, inputs: number, outputs: number) =>
      new Linear(parameter(`${name}.weight`, inputs, outputs), parameter(`${name}.bias`, outputs));
    const norm = (name: string) =>
      new LayerNorm(parameter(`${name}.gain`, width), parameter(`${name}.bias`, width));

    this.#embedding = new Embedding(
      parameter('embedding.tokens', vocabulary, width),
      parameter('embedding.positions', length, width),
    );
    for (let i = 0; i < layers; i++) {
      const name = `blocks.${i}`;
      this.#blocks.push(
        new Block(
          norm(`${name}.norm1`),
          new MultiHeadAttention(
            linear(`${name}.attention.query`, width, width),
            linear(`${name}.attention.key`, width, width),
            linear(`${name}.attention.value`, width, width),
            linear(`${name}.attention.output`, width, width),
          ),
          norm(`${name}.norm2`),
          linear(`${name}.mlp.up`, width, 4 * width),
          linear(`${name}.mlp.down`, 4 * width, width),
        ),
      );
    }
    this.#norm = norm('norm');
    this.#head = linear('head', width, vocabulary);
  }

  /**
   * Random weights that keep the size of what goes through a layer; gains 1 and biases 0. Layers
   * that add to the residual stream start smaller, as in GPT-2.
   */
  initialize(random: Random): void {
    const shrink = 1 / Math.sqrt(2 * this.sizes.layers);
    for (const { name, shape, value } of this.parameters) {
      if (shape.length === 1) {
        value.fill(name.endsWith('.gain') ? 1 : 0);
        continue;
      }
      const isResidual = name.includes('.attention.output.') || name.includes('.mlp.down.');
      const isEmbedding = name.startsWith('embedding.');
      const size = isEmbedding ? EMBEDDING_DEVIATION : 1 / Math.sqrt(shape[0]);
      const deviation = size * (isResidual ? shrink : 1);
      for (let i = 0; i < value.length; i++) value[i] = deviation * standardNormal(random);
    }
  }

  /**
   * Tokens [batch, length] -> logits [batch, length, vocabulary].
   * @param tokens - of each text, at the positions from `start` on
   * @param batch - how many texts there are
   * @param attention - computes attention
   * @param start - the first token's position: more than 0 where `attention` remembers others
   */
  forward(tokens: Int32Array, batch: number, attention: Attention, start = 0): Floats {
    const { heads, width } = this.sizes;
    const length = tokens.length / batch;
    const shape = { batch, length, heads, headDim: width / heads };
    const steps = this.#steps(
      tokens,
      tokens.map((_, i) => start + (i % length)),
    );
    let step = steps.next();
    while (!step.done) {
      const { query, key, value, layer } = step.value;
      step = steps.next(attention(query, key, value, shape, layer));
    }
    return step.value;
  }

  /**
   * As `forward`, for tokens of any texts side by side and an attention that works beside the event
   * loop. A row of the logits has the same bits with any other rows beside it, if attention does.
   * @param tokens - [rows]
   * @param positions - [rows]: where each token stands in its text
   * @param attention - gives the output [rows, width] of each request
   * @returns logits [rows, vocabulary]
   */
  async forwardRows(
    tokens: Int32Array,
    positions: Int32Array,
    attention: (request: AttentionRequest) => Promise<Floats>,
  ): Promise<Floats> {
    const steps = this.#steps(tokens, positions);
    let step = steps.next();
    while (!step.done) step = steps.next({ output: await attention(step.value) });
    return step.value;
  }

  /** All of the model but attention, which is asked for and waited for. */
  *#steps(tokens: Int32Array, positions: Int32Array): Steps {
    let x = this.#embedding.forward(tokens, positions);
    for (const [layer, block] of this.#blocks.entries()) x = yield* block.forward(x, layer);
    return this.#head.forward(this.#norm.forward(x));
  }

  /** Adds to the gradients of all parameters, for the gradient of the last `forward`'s logits. */
  backward(gradLogits: Floats): void {
    let grad = this.#norm.backward(this.#head.backward(gradLogits));
    for (let i = this.#blocks.length - 1; i >= 0; i--) grad = this.#blocks[i].backward(grad);
    this.#embedding.backward(grad);
  }
}

/** Yields what attention is to compute, is given its result, and returns its own. */
type Steps = Generator<AttentionRequest, Floats, Attended>;

/** x + attention(norm(x)), then x + mlp(norm(x)). */
class Block {
  readonly #gelu = new Gelu();

  constructor(
    readonly norm1: LayerNorm,
    readonly attention: MultiHeadAttention,
    readonly norm2: LayerNorm,
    readonly up: Linear,
    readonly down: Linear,
  ) {}

  *forward(x: Floats, layer: number): Steps {
    const attended = yield* this.attention.forward(this.norm1.forward(x), layer);
    const middle = add(x, attended);
    const hidden = this.#gelu.forward(this.up.forward(this.norm2.forward(middle)));
    return add(middle, this.down.forward(hidden));
  }

  backward(gradY: Floats): Floats {
    const gradHidden = this.#gelu.backward(this.down.backward(gradY));
    const gradMiddle = add(gradY, this.norm2.backward(this.up.backward(gradHidden)));
    return add(gradMiddle, this.norm1.backward(this.attention.backward(gradMiddle)));
  }
}

/** Queries, keys and values of all heads lie side by side in a row: layout [B, L, H, D]. */
class MultiHeadAttention {
  #attended: Attended | undefined;

  constructor(
    readonly query: Linear,
    readonly key: Linear,
    readonly value: Linear,
    readonly output: Linear,
  ) {}

  *forward(x: Floats, layer: number): Steps {
    const [query, key, value] = [this.query, this.key, this.value].map((l) => l.forward(x));
    this.#attended = yield { query, key, value, layer };
    return this.output.forward(this.#attended.output);
  }

  backward(gradY: Floats): Floats {
    const { backward } = kept(this.#attended);
    const { gradQuery, gradKey, gradValue } = kept(backward)(this.output.backward(gradY));
    const gradX = add(this.query.backward(gradQuery), this.key.backward(gradKey));
    return add(gradX, this.value.backward(gradValue));
  }
}

function add(a: Floats, b: Floats): Floats {
  const sum = zeros(a, a.length);
  for (let i = 0; i < a.length; i++) sum[i] = a[i] + b[i];
  return sum;
}
