// How the model asks for attention, and node-sdpa's answer to it.
import {
  type AttentionOptions,
  attentionForwardSync,
  type BackendName,
  type DropoutPlacement,
  type Generator,
  scaledDotProductAttentionSync,
  type Tensor,
} from 'node-sdpa';
import type { Floats } from './matmul';

/** Query, key, value and output are [batch, length, heads, headDim]. */
export interface AttentionShape {
  readonly batch: number;
  readonly length: number;
  readonly heads: number;
  readonly headDim: number;
}

export interface AttentionGradients {
  readonly gradQuery: Floats;
  readonly gradKey: Floats;
  readonly gradValue: Floats;
}

/** What attention gives; `backward` only where it was computed for training. */
export interface Attended {
  readonly output: Floats;
  backward?(gradOutput: Floats): AttentionGradients;
}

/** What a layer asks attention for: all [rows, width], the heads of a row side by side. */
export interface AttentionRequest {
  readonly query: Floats;
  readonly key: Floats;
  readonly value: Floats;
  readonly layer: number;
}

/**
 * Causal attention of one layer. The model is given one with each call, so that training,
 * evaluation and decoding from a cache differ in this and in nothing else.
 */
export type Attention = (
  query: Floats,
  key: Floats,
  value: Floats,
  shape: AttentionShape,
  layer: number,
) => Attended;

/** Dropout of attention: where, how much, and from which random numbers. */
export interface Dropout {
  readonly placement: DropoutPlacement;
  readonly p: number;
  /** Each layer of each step takes its next offset */
  readonly generator: Generator;
}

/** Attention with gradients; without dropout where `dropout` is undefined. */
export function trainingAttention(dropout?: Dropout, backend: BackendName = 'auto'): Attention {
  const options: AttentionOptions = {
    layout: 'bshd',
    isCausal: true,
    backend,
    ...(dropout && {
      dropoutP: dropout.p,
      dropoutPlacement: dropout.placement,
      generator: dropout.generator,
      training: true,
    }),
  };
  return (query, key, value, shape) => {
    const tensor = (data: Floats) => asTensor(data, shape);
    const result = attentionForwardSync(tensor(query), tensor(key), tensor(value), options);
    return {
      output: numbersOf(result.output),
      backward(gradOutput) {
        const { gradQuery, gradKey, gradValue } = result.backwardSync(tensor(gradOutput));
        return {
          gradQuery: numbersOf(gradQuery),
          gradKey: numbersOf(gradKey),
          gradValue: numbersOf(gradValue),
        };
      },
    };
  };
}

/** Attention without dropout and without gradients. */
export function evaluationAttention(backend: BackendName = 'auto'): Attention {
  const options = { layout: 'bshd', isCausal: true, backend } as const;
  return (query, key, value, shape) => {
    const [q, k, v] = [query, key, value].map((data) => asTensor(data, shape));
    return { output: numbersOf(scaledDotProductAttentionSync(q, k, v, options)) };
  };
}

function asTensor(data: Floats, { batch, length, heads, headDim }: AttentionShape) {
  return { data: data as Float32Array, dims: [batch, length, heads, headDim] };
}

function numbersOf(tensor: Tensor): Float32Array {
  return tensor.data as Float32Array;
}
