// Batches whose entries have lengths of their own, on the CPU.
#pragma once

#include "core/backend.h"
#include "core/sequences.h"

namespace sdpa {

/// Each entry is computed by the backend as a call of its own, and so has the bits that it has
/// alone. Entries without keys give zeros (and lse = -infinity), those without queries nothing.
/// There is no mask, no keep mask and no [query_length, key_length] output. lse is
/// [query_heads, total query length] of packed queries. Keys in a cache have no gradients.
Status forward_sequences(const Backend& backend, const Sequences& sequences, const Problem& p,
                         const Inputs& inputs, const ForwardOutputs& outputs,
                         const CancelToken& cancel);
Status backward_sequences(const Backend& backend, const Sequences& sequences, const Problem& p,
                          const Inputs& inputs, const BackwardTensors& tensors,
                          const CancelToken& cancel);

}  // namespace sdpa
