// What each head of each layer looks at in a text: the weights of attention.
import { attentionForward } from 'node-sdpa';
import type { Gpt } from '../gpt/model';
import { encodeFloats } from './floats';

/** As JSON. */
export interface AttentionMaps {
  readonly layers: number;
  readonly heads: number;
  /** Tokens of the text */
  readonly length: number;
  /** float32 [layers, heads, length, length], little-endian, in base64; rows are queries */
  readonly weights: string;
}

/** @param tokens - 1 to the model's length */
export async function attentionMaps(
  model: Gpt,
  tokens: readonly number[],
  signal?: AbortSignal,
): Promise<AttentionMaps> {
  const { layers, heads, width } = model.sizes;
  const { length } = tokens;
  const weights = new Float32Array(layers * heads * length * length);
  await model.forwardRows(
    Int32Array.from(tokens),
    Int32Array.from(tokens.keys()),
    async (request) => {
      const [query, key, value] = [request.query, request.key, request.value].map((rows) => ({
        data: rows as Float32Array,
        dims: [1, length, heads, width / heads],
      }));
      const result = await attentionForward(query, key, value, {
        layout: 'bshd',
        isCausal: true,
        outputs: ['weights'],
        signal,
      });
      weights.set(result.weights?.data as Float32Array, request.layer * heads * length * length);
      return result.output.data as Float32Array;
    },
  );
  return { layers, heads, length, weights: encodeFloats(weights) };
}
