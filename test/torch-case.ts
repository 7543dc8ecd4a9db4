// A torch case as a call of the operation: options under their public names, one merged mask.
import type { ReferenceOptions, ReferenceTensor } from './reference';
import type { VectorCase, VectorTensor } from './vectors';

export interface TorchCall {
  query: ReferenceTensor & { data: Float32Array };
  key: ReferenceTensor & { data: Float32Array };
  value: ReferenceTensor & { data: Float32Array };
  gradOutput: ReferenceTensor & { data: Float32Array };
  options: ReferenceOptions;
}

export function torchCall(c: VectorCase): TorchCall {
  const { attrs, inputs } = c;
  const { dropout } = attrs;
  return {
    query: float32(inputs.Q),
    key: float32(inputs.K),
    value: float32(inputs.V),
    gradOutput: float32(inputs.dOut),
    options: {
      isCausal: attrs.is_causal === 1,
      ...(attrs.scale !== null && { scale: attrs.scale }),
      ...(attrs.softcap > 0 && { softcap: attrs.softcap }),
      ...((inputs.bias || inputs.mask) && { attnMask: mergedMask(inputs.bias, inputs.mask) }),
      ...(inputs.kv_lengths && { kvLengths: inputs.kv_lengths.data as Int32Array }),
      ...(dropout && {
        dropoutP: dropout.p,
        dropoutPlacement: dropout.placement,
        training: true,
        keepMask: { data: inputs.keep.data as Uint8Array, dims: inputs.keep.shape },
      }),
    },
  };
}

/**
 * A gradient of the merged mask as the gradient of the bias: summed over the axes along which the
 * mask was wider than the bias.
 */
export function biasGradient(c: VectorCase, gradMask: ArrayLike<number>): Float64Array {
  const { bias, mask } = c.inputs;
  const dims = broadcastShape(bias.shape, mask?.shape ?? []);
  const sums = new Float64Array(bias.data.length);
  for (let at = 0; at < gradMask.length; at++) {
    sums[broadcastIndex(at, dims, bias.shape)] += gradMask[at];
  }
  return sums;
}

function float32(t: VectorTensor) {
  return { data: t.data as Float32Array, dims: t.shape };
}

/** The operation takes one mask: a bias and a boolean mask together are a bias with -inf. */
function mergedMask(bias: VectorTensor | undefined, mask: VectorTensor | undefined) {
  if (!bias) return { data: mask!.data as Uint8Array, dims: mask!.shape };
  if (!mask) return float32(bias);
  const dims = broadcastShape(bias.shape, mask.shape);
  const length = dims.reduce((product, n) => product * n, 1);
  const data = Float32Array.from({ length }, (_, at) =>
    mask.data[broadcastIndex(at, dims, mask.shape)]
      ? bias.data[broadcastIndex(at, dims, bias.shape)]
      : -Infinity,
  );
  return { data, dims };
}

export function broadcastShape(a: readonly number[], b: readonly number[]): number[] {
  const rank = Math.max(a.length, b.length);
  const size = (dims: readonly number[], axis: number) => dims[axis - rank + dims.length] ?? 1;
  return Array.from({ length: rank }, (_, axis) => Math.max(size(a, axis), size(b, axis)));
}

/**
 * Where element `at` of an array of shape `dims` lies in an array of `narrow`, which broadcasts to
 * it.
 */
export function broadcastIndex(
  at: number,
  dims: readonly number[],
  narrow: readonly number[],
): number {
  let index = 0;
  let stride = 1;
  for (let axis = dims.length - 1, rest = at; axis >= 0; axis--) {
    const coordinate = rest % dims[axis];
    rest = Math.floor(rest / dims[axis]);
    const own = axis - dims.length + narrow.length;
    if (own < 0) continue;
    if (narrow[own] > 1) index += coordinate * stride;
    stride *= narrow[own];
  }
  return index;
}
