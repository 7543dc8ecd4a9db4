// A case of the ONNX operator Attention as a call of the operation: what an importer of ONNX models
// does.
import { swapAxes } from './cases';
import type { ReferenceOptions, ReferenceTensor, Storage } from './reference';
import type { VectorCase, VectorTensor } from './vectors';

export interface OnnxCall {
  /** In the layout's order: rank-3 inputs are [batch, length, heads, dim] already. */
  query: ReferenceTensor;
  key: ReferenceTensor;
  value: ReferenceTensor;
  layout: 'bhsd' | 'bshd';
  type: Storage;
  options: ReferenceOptions;
  /** The options under which `scores` or `weights` is the case's qk_matmul_output. */
  matmulOutput: { name: 'scores' | 'weights'; options: ReferenceOptions } | null;
  /** Past and new keys and values together, [batch, heads, length, dim]. */
  present: { key: ArrayLike<number>; value: ArrayLike<number> };
}

export function onnxCall(c: VectorCase): OnnxCall {
  const { attrs, inputs } = c;
  const rank3 = inputs.Q.shape.length === 3;
  const query = withHeads(inputs.Q, attrs.q_num_heads);
  const key = appended(inputs.past_key, withHeads(inputs.K, attrs.kv_num_heads), rank3);
  const value = appended(inputs.past_value, withHeads(inputs.V, attrs.kv_num_heads), rank3);
  const pastLength = inputs.past_key?.shape[2] ?? 0;
  const queryLength = query.dims[rank3 ? 1 : 2];
  const keyLength = key.dims[2];
  const nonpad = inputs.nonpad_kv_seqlen?.data as Int32Array | undefined;
  const scaleAndCap: ReferenceOptions = {
    ...(attrs.scale !== null && { scale: attrs.scale }),
    ...(attrs.softcap > 0 && { softcap: attrs.softcap }),
  };
  const options: ReferenceOptions = {
    ...scaleAndCap,
    ...(inputs.attn_mask && { attnMask: paddedMask(inputs.attn_mask, keyLength) }),
    ...(attrs.is_causal === 1 && {
      isCausal: true,
      causalOffset: nonpad ? Array.from(nonpad, (length) => length - queryLength) : pastLength,
    }),
    ...(nonpad && { kvLengths: nonpad }),
  };
  const orient = (t: ReferenceTensor) => (rank3 ? swapAxes(t) : t);
  return {
    query,
    key: orient(key),
    value: orient(value),
    layout: rank3 ? 'bshd' : 'bhsd',
    type: inputs.Q.dtype as Storage,
    options,
    matmulOutput: c.outputs.qk_matmul_output
      ? matmulOutput(attrs.qk_matmul_output_mode ?? 0, options, scaleAndCap)
      : null,
    present: { key: key.data, value: value.data },
  };
}

/** Modes: 0 before the cap, 1 after it, 2 with masks and bias, 3 the weights. */
function matmulOutput(mode: number, full: ReferenceOptions, scaleAndCap: ReferenceOptions) {
  const { softcap: _, ...scaleOnly } = scaleAndCap;
  const options = [scaleOnly, scaleAndCap, full, full][mode];
  return { name: mode === 3 ? ('weights' as const) : ('scores' as const), options };
}

/** Splits the last axis of a rank-3 tensor into heads. */
function withHeads(tensor: VectorTensor, heads: number | null | undefined): ReferenceTensor {
  const [batch, length, width] = tensor.shape;
  if (tensor.shape.length === 4) return { data: tensor.data, dims: tensor.shape };
  return { data: tensor.data, dims: [batch, length, heads!, width / heads!] };
}

/** Past and new rows along the length, as [batch, heads, length, dim]. */
function appended(past: VectorTensor | undefined, fresh: ReferenceTensor, rank3: boolean) {
  const tail = rank3 ? swapAxes(fresh) : fresh;
  if (!past) return tail;
  const [batch, heads, length, width] = tail.dims;
  const total = past.shape[2] + length;
  const pastSize = past.shape[2] * width;
  const tailSize = length * width;
  const data = new Float32Array(batch * heads * total * width);
  for (let head = 0; head < batch * heads; head++) {
    const at = head * total * width;
    for (let i = 0; i < pastSize; i++) data[at + i] = past.data[head * pastSize + i];
    for (let i = 0; i < tailSize; i++) data[at + pastSize + i] = tail.data[head * tailSize + i];
  }
  return { data, dims: [batch, heads, total, width] };
}

/** A mask shorter than the keys excludes the rest. */
function paddedMask(mask: VectorTensor, keyLength: number): ReferenceTensor {
  const last = mask.shape[mask.shape.length - 1];
  const data = mask.data as Uint8Array | Float32Array;
  if (last === keyLength || last === 1) return { data, dims: mask.shape };
  const rows = data.length / last;
  const excluded = data instanceof Uint8Array ? 0 : -Infinity;
  const make = data instanceof Uint8Array ? Uint8Array : Float32Array;
  const padded = new make(rows * keyLength).fill(excluded);
  for (let row = 0; row < rows; row++) {
    padded.set(data.subarray(row * last, (row + 1) * last), row * keyLength);
  }
  return { data: padded, dims: [...mask.shape.slice(0, -1), keyLength] };
}
