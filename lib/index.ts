// The public names of node-sdpa, and nothing else.

export type {
  AttentionMoments,
  AttentionResult,
  BackwardOptions,
  Gradients,
  RngState,
} from './attention';
export {
  attentionForward,
  attentionForwardSync,
  scaledDotProductAttention,
  scaledDotProductAttentionSync,
} from './attention';
export type { BackendInfo, GpuInfo, TriedBackend } from './backend-info';
export { backendInfo, setNumThreads } from './backend-info';
export type { Location } from './cuda';
export type { CallMessage } from './diagnostics';
export type { DropoutMaskOptions } from './dropout-mask';
export { dropoutMask } from './dropout-mask';
export type { SdpaError, SdpaErrorCode } from './errors';
export type { GeneratorOptions, GeneratorState } from './generator';
export { Generator, manualSeed } from './generator';
export type {
  AppendOptions,
  AttendOptions,
  CacheType,
  KVCacheOptions,
  KVCachePoolOptions,
  TruncateOptions,
} from './kv-cache';
export { KVCache, KVCachePool } from './kv-cache';
export type { AttentionPart, MergedAttention, MergeOptions } from './merge-attention';
export { mergeAttention } from './merge-attention';
export type {
  AttentionOptions,
  AttentionOutputName,
  BackendName,
  CuSeqlens,
  DropoutBroadcastAxis,
  DropoutPlacement,
  Layout,
  MomentsOptions,
  Precision,
} from './problem';
export type { TensorData, TensorLike, TensorType } from './tensor';
export { Tensor } from './tensor';
