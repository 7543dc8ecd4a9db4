// Batches whose entries have lengths of their own, as calls of their own: one task an entry, the
// longest first. Threads that find no further entry join in on those still being computed.
#include "cpu/sequences.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "cpu/thread_pool.h"

namespace sdpa {
namespace {

void clear(const Problem& p, void* data, size_t rows, size_t width) {
  if (data) std::memset(data, 0, rows * width * element_size(p.type));
}

constexpr Status kNoMemory = {StatusCode::out_of_memory, "no memory for the sequences of a batch"};

Status forward_entry(const Backend& backend, const Entry& e, const ForwardOutputs& batch,
                     const CancelToken& cancel) {
  const Problem& p = e.problem;
  if (p.query_length == 0) return {};
  Block<float> lse;  // the entry's, [query_heads, query_length] without gaps
  if (!lse.allocate(e.queries())) return kNoMemory;
  ForwardOutputs outputs{};
  outputs.output = skip(p, batch.output, e.query_rows, p.value_dim);
  outputs.lse = lse.get();
  if (p.key_length == 0) {
    clear(p, outputs.output, e.queries(), p.value_dim);
    std::fill_n(lse.get(), e.queries(), -std::numeric_limits<float>::infinity());
  } else {
    const Status status = backend.forward(p, e.inputs, outputs, cancel);
    if (!status.ok()) return status;
  }
  for (size_t head = 0; batch.lse && head < p.query_heads; ++head) {
    std::memcpy(batch.lse + e.lse_first + head * e.lse_stride, lse.get() + head * p.query_length,
                p.query_length * sizeof(float));
  }
  return {};
}

Status backward_entry(const Backend& backend, const Entry& e, const BackwardTensors& batch,
                      const CancelToken& cancel) {
  const Problem& p = e.problem;
  BackwardTensors tensors{};
  tensors.output = skip(p, batch.output, e.query_rows, p.value_dim);
  tensors.grad_output = skip(p, batch.grad_output, e.query_rows, p.value_dim);
  tensors.grad_query = skip(p, batch.grad_query, e.query_rows, p.head_dim);
  tensors.grad_key = skip(p, batch.grad_key, e.key_rows, p.head_dim);
  tensors.grad_value = skip(p, batch.grad_value, e.key_rows, p.value_dim);
  if (p.query_length == 0 || p.key_length == 0) {
    clear(p, tensors.grad_query, e.queries(), p.head_dim);
    clear(p, tensors.grad_key, e.keys(), p.head_dim);
    clear(p, tensors.grad_value, e.keys(), p.value_dim);
    return {};
  }
  Block<float> lse;  // the entry's, [query_heads, query_length] without gaps
  if (!lse.allocate(e.queries())) return kNoMemory;
  for (size_t head = 0; head < p.query_heads; ++head) {
    std::memcpy(lse.get() + head * p.query_length, batch.lse + e.lse_first + head * e.lse_stride,
                p.query_length * sizeof(float));
  }
  tensors.lse = lse.get();
  return backend.backward(p, e.inputs, tensors, cancel);
}

/// A task is one entry of the batch. `Run` computes it. What several threads have no memory for at
/// once is left to one of them in the end.
template <typename Run>
struct SequenceWork final : ParallelWork {
  const std::vector<Entry>& entries;
  const Run& run;
  std::vector<Status> statuses;

  SequenceWork(const std::vector<Entry>& entries, const Run& run)
      : entries(entries), run(run), statuses(entries.size()) {}
  void work(TaskCursor& cursor) override {
    for (size_t task; cursor.next(task);) {
      statuses[task] = run(entries[task]);
    }
  }
  Status finish() {
    for (size_t task = 0; task < entries.size(); ++task) {
      if (statuses[task].code == StatusCode::out_of_memory) statuses[task] = run(entries[task]);
      if (!statuses[task].ok()) return statuses[task];
    }
    return {};
  }
};

/// Runs all entries; the status of one that failed, if one has.
template <typename Run>
Status run_entries(const Sequences& s, const Problem& p, const Inputs& inputs,
                   const CancelToken& cancel, const Run& run) {
  std::vector<Entry> entries;
  entries.reserve(p.batch);
  double size = 0;
  for (uint32_t b = 0; b < p.batch; ++b) {
    entries.push_back(entry_of(s, p, inputs, b));
    size += multiply_adds(entries.back().problem);
  }
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return multiply_adds(a.problem) > multiply_adds(b.problem);
  });
  SequenceWork<Run> work(entries, run);
  const Status status =
      ThreadPool::shared().run(entries.size(), size > kWorthSharing, cancel, work);
  return status.ok() ? work.finish() : status;
}

}  // namespace

Status forward_sequences(const Backend& backend, const Sequences& sequences, const Problem& p,
                         const Inputs& inputs, const ForwardOutputs& outputs,
                         const CancelToken& cancel) {
  return run_entries(sequences, p, inputs, cancel, [&](const Entry& entry) {
    return forward_entry(backend, entry, outputs, cancel);
  });
}

Status backward_sequences(const Backend& backend, const Sequences& sequences, const Problem& p,
                          const Inputs& inputs, const BackwardTensors& tensors,
                          const CancelToken& cancel) {
  return run_entries(sequences, p, inputs, cancel, [&](const Entry& entry) {
    return backward_entry(backend, entry, tensors, cancel);
  });
}

}  // namespace sdpa
