// Chapter 3 of "Build a Large Language Model (From Scratch)" on this package: four steps from the
// simplest self-attention to multi-head attention, with the place of dropout as a switch.
//
//   npm run build && node --import tsx examples/multi-head-attention.ts
//
// The words, for one row of queries: scores are scale * query . key, before the softmax; weights
// are softmax(scores), and sum to 1; context is weights times value. The book's
// `dropout(attn_weights)` is the placement 'weights'.
import path from 'node:path';
import {
  type AttentionOptions,
  type DropoutPlacement,
  Generator,
  scaledDotProductAttentionSync,
} from 'node-sdpa';
import { addProduct } from './gpt/matmul';
import { type Random, randomStreams, uniform } from './gpt/random';

/** Numbers and their shape: [batch, tokens, channels]. */
export interface Texts {
  readonly data: Float32Array;
  readonly shape: readonly [batch: number, tokens: number, channels: number];
}

/** Dropout as a layer is told of it. */
export interface DropoutChoice {
  readonly p: number;
  readonly placement: DropoutPlacement;
  /** Each call takes its next offset, and so other masks */
  readonly generator: Generator;
}

/** One head: [batch, tokens, channels] is [batch, 1, tokens, headDim]. */
function attendOneHead(query: Texts, key: Texts, value: Texts, options: AttentionOptions): Texts {
  const head = ({ data, shape: [batch, tokens, channels] }: Texts) => ({
    data,
    dims: [batch, 1, tokens, channels],
  });
  const output = scaledDotProductAttentionSync(head(query), head(key), head(value), options);
  return { data: output.data as Float32Array, shape: value.shape };
}

/** Step 1: no weights to learn. Each token is a mean of all, by how alike they are. */
export function simpleSelfAttention(inputs: Texts): Texts {
  return attendOneHead(inputs, inputs, inputs, { scale: 1 });
}

/** A matrix [inputs, outputs] that is learned; a `torch.nn.Linear` without a bias. */
export class Projection {
  readonly weight: Float32Array;

  constructor(
    readonly inputs: number,
    readonly outputs: number,
    random: Random,
  ) {
    const bound = 1 / Math.sqrt(inputs); // as torch does
    const draw = () => bound * (2 * uniform(random) - 1);
    this.weight = Float32Array.from({ length: inputs * outputs }, draw);
  }

  apply({ data, shape: [batch, tokens] }: Texts): Texts {
    const projected = new Float32Array(batch * tokens * this.outputs);
    addProduct(projected, data, this.weight, batch * tokens, this.inputs, this.outputs);
    return { data: projected, shape: [batch, tokens, this.outputs] };
  }
}

/** Step 2: queries, keys and values are learned; scores are divided by sqrt(headDim). */
export class SelfAttention {
  readonly query: Projection;
  readonly key: Projection;
  readonly value: Projection;

  constructor(inputs: number, outputs: number, random: Random) {
    this.query = new Projection(inputs, outputs, random);
    this.key = new Projection(inputs, outputs, random);
    this.value = new Projection(inputs, outputs, random);
  }

  forward(inputs: Texts): Texts {
    return this.attend(inputs, {});
  }

  protected attend(inputs: Texts, options: AttentionOptions): Texts {
    const [query, key, value] = [this.query, this.key, this.value].map((p) => p.apply(inputs));
    return attendOneHead(query, key, value, options);
  }
}

/** Step 3: no token sees a later one, and dropout where it is asked for. */
export class CausalAttention extends SelfAttention {
  constructor(
    inputs: number,
    outputs: number,
    random: Random,
    readonly dropout: DropoutChoice,
    /** Its number among the heads of a layer, so that each drops something else */
    readonly head = 0,
  ) {
    super(inputs, outputs, random);
  }

  override forward(inputs: Texts, training = false): Texts {
    return this.attend(inputs, {
      ...dropoutOptions(this.dropout, training),
      headOffset: this.head,
    });
  }
}

/** Step 4a: several heads, one after the other, their contexts side by side. */
export class MultiHeadAttentionWrapper {
  readonly heads: readonly CausalAttention[];

  constructor(
    inputs: number,
    outputs: number,
    heads: number,
    random: Random,
    readonly dropout: DropoutChoice,
  ) {
    this.heads = Array.from({ length: heads }, (_, head) => {
      return new CausalAttention(inputs, outputs / heads, random, dropout, head);
    });
  }

  forward(inputs: Texts, training = false): Texts {
    // All heads of a call share an offset; their head numbers tell them apart.
    const { generator } = this.dropout;
    const state = generator.getState();
    const contexts = this.heads.map((head) => {
      generator.setState(state);
      return head.forward(inputs, training).data;
    });
    const [batch, tokens] = inputs.shape;
    const headDim = contexts[0].length / (batch * tokens);
    const data = new Float32Array(contexts.length * contexts[0].length);
    contexts.forEach((context, head) => {
      for (let row = 0; row < batch * tokens; row++) {
        const channels = context.subarray(row * headDim, (row + 1) * headDim);
        data.set(channels, (row * contexts.length + head) * headDim);
      }
    });
    return { data, shape: [batch, tokens, contexts.length * headDim] };
  }
}

/** Step 4b: the same in one call. Layout 'bshd' takes the heads side by side, as they are. */
export class MultiHeadAttention {
  readonly query: Projection;
  readonly key: Projection;
  readonly value: Projection;
  readonly output: Projection;

  constructor(
    inputs: number,
    readonly outputs: number,
    readonly heads: number,
    random: Random,
    readonly dropout: DropoutChoice,
  ) {
    this.query = new Projection(inputs, outputs, random);
    this.key = new Projection(inputs, outputs, random);
    this.value = new Projection(inputs, outputs, random);
    this.output = new Projection(outputs, outputs, random);
  }

  forward(inputs: Texts, training = false): Texts {
    return this.output.apply(this.context(inputs, training));
  }

  /** The contexts of all heads side by side: what the wrapper gives. */
  context(inputs: Texts, training = false): Texts {
    const [batch, tokens] = inputs.shape;
    const dims = [batch, tokens, this.heads, this.outputs / this.heads];
    const [query, key, value] = [this.query, this.key, this.value].map((projection) => ({
      data: projection.apply(inputs).data,
      dims,
    }));
    const context = scaledDotProductAttentionSync(query, key, value, {
      layout: 'bshd',
      ...dropoutOptions(this.dropout, training),
    });
    return { data: context.data as Float32Array, shape: [batch, tokens, this.outputs] };
  }
}

function dropoutOptions({ p, placement, generator }: DropoutChoice, training: boolean) {
  // `training: false` turns dropout off; it has to be stated, for it is too easily forgotten.
  return { isCausal: true, dropoutP: p, dropoutPlacement: placement, generator, training };
}

/** "Your journey starts with one step", three numbers a word: the example of the chapter. */
export const JOURNEY: Texts = {
  data: Float32Array.of(
    ...[0.43, 0.15, 0.89], // Your
    ...[0.55, 0.87, 0.66], // journey
    ...[0.57, 0.85, 0.64], // starts
    ...[0.22, 0.58, 0.33], // with
    ...[0.77, 0.25, 0.1], // one
    ...[0.05, 0.8, 0.55], // step
  ),
  shape: [1, 6, 3],
};

function show(title: string, { data, shape: [, tokens, channels] }: Texts): void {
  console.log(`\n${title}`);
  for (let token = 0; token < tokens; token++) {
    const row = [...data.subarray(token * channels, (token + 1) * channels)];
    console.log(`  ${row.map((x) => x.toFixed(4).padStart(8)).join('')}`);
  }
}

function main(): void {
  const dropout = (placement: DropoutPlacement): DropoutChoice => ({
    p: 0.5,
    placement,
    generator: new Generator({ seed: 123 }),
  });
  const random = () => randomStreams(123, 1)[0];
  show('1. Simple self-attention', simpleSelfAttention(JOURNEY));
  show(
    '2. Self-attention with learned weights',
    new SelfAttention(3, 2, random()).forward(JOURNEY),
  );
  const causal = new CausalAttention(3, 2, random(), dropout('weights'));
  show('3. Causal attention, evaluation', causal.forward(JOURNEY));
  for (const placement of ['weights', 'context', 'scores'] as const) {
    const layer = new CausalAttention(3, 2, random(), dropout(placement));
    show(`   training, half of the ${placement} dropped`, layer.forward(JOURNEY, true));
  }
  const wrapper = new MultiHeadAttentionWrapper(3, 4, 2, random(), dropout('weights'));
  show('4a. Two heads, one after the other', wrapper.forward(JOURNEY));
  const heads = new MultiHeadAttention(3, 4, 2, random(), dropout('weights'));
  show('4b. Two heads in one call, and an output projection', heads.forward(JOURNEY));
}

if (path.resolve(process.argv[1] ?? '') === __filename) main();
