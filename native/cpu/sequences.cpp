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

/// One entry of the batch as a call of its own; its arrays are parts of the batch's.
struct Entry {
  Problem problem;
  Inputs inputs;
  size_t query_rows, key_rows;  // rows of the tensors before it, all heads counted
  size_t lse_first, lse_stride;

  size_t queries() const { return size_t{problem.query_heads} * problem.query_length; }
  size_t keys() const { return size_t{problem.kv_heads} * problem.key_length; }
};

size_t element_size(Type type) { return type == Type::float32 ? sizeof(float) : sizeof(uint16_t); }

/// `rows` rows of `width` elements further on; null stays null.
const void* skip(const Problem& p, const void* data, size_t rows, size_t width) {
  return data ? static_cast<const char*>(data) + rows * width * element_size(p.type) : nullptr;
}

void* skip(const Problem& p, void* data, size_t rows, size_t width) {
  return const_cast<void*>(skip(p, static_cast<const void*>(data), rows, width));
}

void clear(const Problem& p, void* data, size_t rows, size_t width) {
  if (data) std::memset(data, 0, rows * width * element_size(p.type));
}

Entry entry_of(const Sequences& s, const Problem& p, const Inputs& inputs, uint32_t b) {
  Entry e{p, inputs, 0, 0, 0, 0};
  e.problem.batch = 1;
  e.problem.batch_offset = p.batch_offset + b;
  if (inputs.causal_offsets) e.problem.causal_offset = inputs.causal_offsets[b];
  e.inputs.causal_offsets = nullptr;
  if (s.query_starts) {
    e.problem.query_length = uint32_t(s.query_starts[b + 1] - s.query_starts[b]);
    e.query_rows = size_t(s.query_starts[b]) * p.query_heads;
    e.lse_first = size_t(s.query_starts[b]);
    e.lse_stride = size_t(s.query_starts[p.batch]);
  } else {
    e.query_rows = b * e.queries();
    e.lse_first = e.query_rows;
    e.lse_stride = p.query_length;
  }
  e.inputs.query = skip(p, inputs.query, e.query_rows, p.head_dim);
  if (s.key_blocks) {
    e.inputs.key_blocks = s.key_blocks + b * s.table_width;
    e.problem.key_length = uint32_t(inputs.kv_lengths[b]);
    e.inputs.kv_lengths = nullptr;
    return e;
  }
  e.problem.key_length = uint32_t(s.key_starts[b + 1] - s.key_starts[b]);
  if (inputs.kv_lengths) e.inputs.kv_lengths = inputs.kv_lengths + b;
  e.key_rows = size_t(s.key_starts[b]) * p.kv_heads;
  e.inputs.key = skip(p, inputs.key, e.key_rows, p.head_dim);
  e.inputs.value = skip(p, inputs.value, e.key_rows, p.value_dim);
  return e;
}

constexpr Status kNoMemory = {StatusCode::out_of_memory, "no memory for the sequences of a batch"};

/// The entry's lse, [query_heads, query_length] without gaps.
std::unique_ptr<float[]> entry_lse(const Entry& e) {
  return std::unique_ptr<float[]>(new (std::nothrow) float[e.queries()]);
}

Status forward_entry(const Backend& backend, const Entry& e, const ForwardOutputs& batch,
                     const CancelToken& cancel) {
  const Problem& p = e.problem;
  if (p.query_length == 0) return {};
  const std::unique_ptr<float[]> lse = entry_lse(e);
  if (!lse) return kNoMemory;
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
  const std::unique_ptr<float[]> lse = entry_lse(e);
  if (!lse) return kNoMemory;
  for (size_t head = 0; head < p.query_heads; ++head) {
    std::memcpy(lse.get() + head * p.query_length, batch.lse + e.lse_first + head * e.lse_stride,
                p.query_length * sizeof(float));
  }
  tensors.lse = lse.get();
  return backend.backward(p, e.inputs, tensors, cancel);
}

/// A task is one entry of the batch. `Run` computes it.
template <typename Run>
struct SequenceWork final : ParallelWork {
  const std::vector<Entry>& entries;
  const Run& run;
  std::atomic<const Status*> failure{nullptr};
  std::vector<Status> statuses;

  SequenceWork(const std::vector<Entry>& entries, const Run& run)
      : entries(entries), run(run), statuses(entries.size()) {}
  void work(TaskCursor& cursor) override {
    for (size_t task; cursor.next(task);) {
      statuses[task] = run(entries[task]);
      if (!statuses[task].ok()) failure.store(&statuses[task], std::memory_order_relaxed);
    }
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
  const Status* const failure = work.failure.load();
  return failure ? *failure : status;
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
