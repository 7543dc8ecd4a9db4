// Runs one call on a device: brings its arrays there, launches the kernels, fetches the results,
// and waits.
#pragma once

#include "cuda/device.h"
#include "cuda/plugin.h"

namespace sdpa::cuda {

/// The calling thread has entered the device.
Status run_forward(Device& device, const Call& call, const ForwardOutputs& outputs,
                   const CancelToken& cancel);
Status run_backward(Device& device, const Call& call, const BackwardTensors& tensors,
                    const CancelToken& cancel);
Status run_dropout_mask(Device& device, const Problem& problem, uint8_t* mask, size_t bytes);
Status run_copy(Device& device, const Copy& copy, const CancelToken& cancel);

}  // namespace sdpa::cuda
