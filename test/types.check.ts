// What the types promise, and which mistakes they catch. `npm run typecheck` checks it: a line that
// should be an error and is none fails as well. Nothing here runs.

import {
  type AttentionOptions,
  type AttentionResult,
  attentionForward,
  attentionForwardSync,
  type BackendName,
  backendInfo,
  dropoutMask,
  Generator,
  type Gradients,
  type SdpaError,
  scaledDotProductAttention,
  scaledDotProductAttentionSync,
  Tensor,
  type TensorLike,
} from 'node-sdpa';
import { expectTypeOf } from 'vitest';

declare const tensor: Tensor;

// What goes in: this package's tensors, onnxruntime's, and anything with data and a shape.
declare const onnx: {
  type: 'float32';
  data: Float32Array;
  dims: readonly number[];
  location: string;
};
expectTypeOf(onnx).toExtend<TensorLike>();
expectTypeOf<{ data: Uint16Array; shape: number[]; type: 'bfloat16' }>().toExtend<TensorLike>();
expectTypeOf<{ data: Float64Array; dims: number[] }>().not.toExtend<TensorLike>();
expectTypeOf(tensor).toExtend<TensorLike>();

// What comes out.
expectTypeOf(scaledDotProductAttention(tensor, tensor, tensor)).resolves.toEqualTypeOf<Tensor>();
expectTypeOf(scaledDotProductAttentionSync(tensor, tensor, tensor)).toEqualTypeOf<Tensor>();
expectTypeOf(attentionForward(tensor, tensor, tensor)).resolves.toEqualTypeOf<AttentionResult>();
const result = attentionForwardSync(tensor, tensor, tensor);
expectTypeOf(result.backwardSync(tensor)).toEqualTypeOf<Gradients>();
expectTypeOf(result.backward(tensor)).resolves.toEqualTypeOf<Gradients>();
expectTypeOf<Gradients['gradQuery']>().toEqualTypeOf<Tensor>();
expectTypeOf(result.scores).toEqualTypeOf<Tensor | undefined>();
expectTypeOf(dropoutMask([1, 1, 2, 2], { p: 0.1, seed: 1, offset: 0 })).toEqualTypeOf<
  Uint8Array<ArrayBuffer>
>();
expectTypeOf(backendInfo().binary).toEqualTypeOf<string | null>();
expectTypeOf<SdpaError>().toExtend<Error>();
expectTypeOf<BackendName>().extract<'auto' | 'cpu' | 'js' | 'cpu:avx2'>().not.toBeNever();

// Options by name, none of them required.
expectTypeOf<Record<string, never>>().toExtend<AttentionOptions>();
attentionForward(tensor, tensor, tensor, {
  ...{ isCausal: true, windowSize: [4, 0], scale: 0.5, kvLengths: Int32Array.of(1) },
  ...{ dropoutP: 0.1, dropoutPlacement: 'context', training: true, seed: 7n, layout: 'bshd' },
  ...{ precision: 'high', signal: new AbortController().signal, outputs: ['lse', 'weights'] },
});
attentionForward(tensor, tensor, tensor, { generator: new Generator({ seed: 1 }) });

// Mistakes.
// @ts-expect-error: the value is missing
scaledDotProductAttention(tensor, tensor);
// @ts-expect-error: a misspelled option
scaledDotProductAttention(tensor, tensor, tensor, { iscausal: true });
// @ts-expect-error: no such placement
scaledDotProductAttention(tensor, tensor, tensor, { dropoutPlacement: 'logits' });
// @ts-expect-error: no such precision
scaledDotProductAttention(tensor, tensor, tensor, { precision: 'low' });
// @ts-expect-error: a window has two sides
scaledDotProductAttention(tensor, tensor, tensor, { windowSize: [4] });
// @ts-expect-error: lengths are integers
scaledDotProductAttention(tensor, tensor, tensor, { kvLengths: Float32Array.of(1) });
// @ts-expect-error: no such type
new Tensor('float64', new Float32Array(1), [1, 1, 1, 1]);
// @ts-expect-error: a result cannot be assigned to
result.output = tensor;
