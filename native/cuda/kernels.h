// What the CUDA kernels offer to host code: one launcher for each pass. Plain C++, so that host
// code needs no CUDA compiler to include it.
//
// Every pointer in a Problem's Inputs, ForwardOutputs and BackwardTensors is to memory of the
// current device, the small arrays (causal_offsets, kv_lengths, key_blocks) too. Launchers only
// enqueue work on the stream; they neither allocate nor synchronise. They return a cudaError_t as
// int: 0 is success. Calls of different streams may run at the same time, each with a workspace of
// its own.
//
// Invariant: the bits of a result depend on its own sequence alone: not on the batch around it, the
// number of multiprocessors, or the run.
#pragma once

#include "core/problem.h"

namespace sdpa::cuda {

/// What launchers need to know of a device.
struct DeviceLimits {
  int sm;                         // compute capability: 10 * major + minor
  int sm_count;                   // multiprocessors
  size_t shared_bytes_per_block;  // with opt-in (cudaDevAttrMaxSharedMemoryPerBlockOptin)
  size_t l2_bytes;
  bool hopper;  // whether the kernels for compute capability 9.0 alone may be chosen
};

/// A cudaStream_t.
using Stream = void*;

/// Why no kernel takes this call on this device, or null: a literal for the user. Forward takes
/// every head_dim and value_dim to 512 from compute capability 7.5 on, backward every one to 256.
const char* forward_unsupported(const Problem& problem, const DeviceLimits& limits);
const char* backward_unsupported(const Problem& problem, const DeviceLimits& limits);

/// Bytes of workspace that a forward call needs; 0 if none. It need not be cleared before.
size_t forward_workspace(const Problem& problem, const ForwardOutputs& wanted,
                         const DeviceLimits& limits);

/// `workspace` is aligned to 256 bytes, as cudaMalloc gives it.
int launch_forward(const Problem& problem, const Inputs& inputs, const ForwardOutputs& outputs,
                   void* workspace, const DeviceLimits& limits, Stream stream);

size_t backward_workspace(const Problem& problem, bool with_mask_gradient,
                          const DeviceLimits& limits);

/// Gradients are overwritten, not added to. Repeated calls give the same bits.
int launch_backward(const Problem& problem, const Inputs& inputs, const BackwardTensors& tensors,
                    void* workspace, const DeviceLimits& limits, Stream stream);

/// The dropout decisions of a call as bytes, 1 keeps: mask [batch, query_heads, query_length,
/// key_length], or value_dim in place of key_length for the context placement.
int launch_dropout_mask(const Problem& problem, uint8_t* mask, Stream stream);

}  // namespace sdpa::cuda
