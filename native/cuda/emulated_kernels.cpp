// The launchers on the portable CPU backend: device memory of the emulated plugin is host memory.
#include "core/keep_mask.h"
#include "cpu/cpu_backends.h"
#include "cuda/kernels.h"

namespace sdpa::cuda {

const char* backward_unsupported(const Problem& p, const DeviceLimits&) {
  return p.head_dim > 256 || p.value_dim > 256 ? "head dims above 256 have no backward" : nullptr;
}

size_t backward_workspace(const Problem&, bool, const DeviceLimits&) { return 256; }

int launch_backward(const Problem& p, const Inputs& inputs, const BackwardTensors& tensors, void*,
                    const DeviceLimits&, Stream) {
  return kPortableBackend.backward(p, inputs, tensors, CancelToken()).ok() ? 0 : 999;
}

int launch_dropout_mask(const Problem& p, uint8_t* mask, Stream) {
  fill_keep_mask(p, mask);
  return 0;
}

}  // namespace sdpa::cuda
