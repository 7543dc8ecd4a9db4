// Many samples of dropout in one call: sample s is, bit for bit, the call with offset + s.
//
// Dropout of weights or context changes neither scores nor row maxima nor row sums, so these are
// computed once; from where dropout acts on, each sample goes its own way through the arithmetic of
// a call of its own. Under `scores` dropout nothing is shared, and samples are so many calls.

/// What samples of one call share, and where they go: an output each, or running sums from which
/// mean and variance are made (Youngs and Cramer, Technometrics 13, 1971), or under `context`
/// dropout mean and variance alone, from counted decisions. Samples come in order.
struct SampleResults {
  Problem problem;  // of the whole call
  ForwardOutputs outputs;
  double* sums = nullptr;     // as one output, of what the samples gave so far; null: not summed
  double* squares = nullptr;  // as one output, of the distances from their mean

  /// Where a sample goes; its output only where there are no moments.
  ForwardOutputs of_sample(uint32_t sample) const {
    const Problem& p = problem;
    const size_t element = p.type == Type::float32 ? sizeof(float) : sizeof(uint16_t);
    ForwardOutputs one{};
    if (outputs.output) {
      one.output = static_cast<uint8_t*>(outputs.output) + sample * output_size(p) * element;
    }
    if (outputs.lse && p.dropout_placement == Placement::scores) {
      one.lse = outputs.lse + sample * (output_size(p) / p.value_dim);
    } else if (sample == 0) {
      one.lse = outputs.lse;
    }
    return one;
  }

  /// Adds `count` consecutive elements of a sample's output.
  void add(uint32_t sample, const float* values, size_t first, size_t count) const {
    const double n = double(sample) + 1, share = sample > 0 ? 1 / (n * (n - 1)) : 0;
    for (size_t i = 0; i < count; ++i) {
      const double sum = sums[first + i] + values[i];
      const double distance = n * values[i] - sum;
      sums[first + i] = sum;
      squares[first + i] += distance * distance * share;
    }
  }

  /// Whether samples drop nothing but elements of one context, so that counting suffices.
  bool counts_decisions() const { return outputs.mean && !sums; }

  void finish_moments() const {
    const double n = problem.samples;
    for (size_t i = 0; i < output_size(problem); ++i) {
      outputs.mean[i] = float(sums[i] / n);
      outputs.variance[i] = float(squares[i] / (n - 1));
    }
  }
};

/// The call of a sample; `call` is that of sample 0.
inline Call call_of_sample(const Call& call, uint32_t sample) {
  const Problem p = problem_of_sample(call.problem, sample);
  return {p, call.inputs, resolve_dropout(p, call.inputs.keep_mask != nullptr)};
}

/// Outputs of samples are as a rule more than any cache holds, and are not read on the way.
constexpr size_t kLargestCached = size_t{1} << 22;

/// Copies floats past the caches, in whole lines of them.
inline void stream_floats(const float* from, size_t count, float* to) {
  constexpr size_t line = 64;
  const size_t head =
      std::min(count, (line - reinterpret_cast<uintptr_t>(to) % line) % line / sizeof(float));
  std::memcpy(to, from, head * sizeof(float));
  size_t i = head;
  for (; i + kLanes <= count; i += kLanes) stream(to + i, load(from + i));
  std::memcpy(to + i, from + i, (count - i) * sizeof(float));
  end_streams();
}

/// Writes a block's context past the caches where its rows follow each other; false elsewhere.
inline bool stream_context(const Call& call, const QueryBlock& q, void* output,
                           const ForwardBuffers& f) {
  const Problem& p = call.problem;
  const bool consecutive = row_stride(p.layout, p.query_heads, p.value_dim) == p.value_dim;
  if (p.type != Type::float32 || p.value_dim % kLanes != 0 || !consecutive) return false;
  const size_t first =
      row_offset(p.layout, p.query_heads, p.query_length, p.value_dim, q.b, q.head, q.first);
  transpose(f.context, kQueryBlock, p.value_dim, kQueryBlock, f.rows, p.value_dim);
  stream_floats(f.rows, size_t{q.count} * p.value_dim, static_cast<float*>(output) + first);
  return true;
}

/// Takes the finished context of a block as part of a sample.
inline void store_sample(const Call& call, const QueryBlock& q, const SampleResults& results,
                         uint32_t sample, const ForwardBuffers& f) {
  const Problem& p = call.problem;
  const ForwardOutputs out = results.of_sample(sample);
  if (!results.sums) {
    const bool streams = output_size(p) * results.problem.samples * sizeof(float) > kLargestCached;
    if (!streams || !stream_context(call, q, out.output, f)) return store_context(call, q, out, f);
    return store_lse(p, q, out, f);
  }
  const size_t width = padded(p.value_dim);
  const size_t first =
      row_offset(p.layout, p.query_heads, p.query_length, p.value_dim, q.b, q.head, q.first);
  transpose(f.context, kQueryBlock, width, kQueryBlock, f.rows, width);
  for (uint32_t i = 0; i < q.count; ++i) {
    float* const row = f.rows + i * width;
    if (p.type != Type::float32) {  // the moments are those of the outputs, which are rounded
      uint16_t rounded[kMaxHeadDim];
      narrow(p.type, row, p.value_dim, rounded, 0);
      widen(p.type, rounded, 0, p.value_dim, row);
    }
    results.add(sample, row, first + i * row_stride(p.layout, p.query_heads, p.value_dim),
                p.value_dim);
  }
  store_lse(p, q, out, f);
}

/// The samples that one pass computes together.
struct SampleGroup {
  uint32_t first = 0, count = 1;
};

/// What the contexts of a group may take: about what a core's cache holds beside the rest.
constexpr size_t kGroupBytes = size_t{1} << 18;

/// Samples a group: as even as possible, of `bytes` each, at most `most` in all.
inline uint32_t group_size(uint32_t samples, size_t bytes, size_t most) {
  const uint32_t largest = uint32_t(std::clamp<size_t>(most / bytes, 1, samples));
  const uint32_t groups = (samples + largest - 1) / largest;
  return (samples + groups - 1) / groups;
}

/// One thread's buffers for samples beside those of the forward pass.
struct SampleBuffers {
  float* contexts;  // [samples][padded value_dim][kQueryBlock]; only where weights drop
  float* dropped;   // [max(kKeyBlock, padded value_dim)][kQueryBlock]
  float row_max[kQueryBlock], row_sum[kQueryBlock];

  bool allocate(const Problem& p, uint32_t contexts_count) {
    const size_t value = padded(p.value_dim);
    const size_t dropped_size = std::max<size_t>(kKeyBlock, value) * kQueryBlock;
    const size_t contexts_size = contexts_count * value * kQueryBlock;
    if (!scratch_.reserve(contexts_size + dropped_size, 2)) return false;
    contexts = scratch_.take(contexts_size);
    dropped = scratch_.take(dropped_size);
    std::memset(dropped, 0, dropped_size * sizeof(float));
    return !scratch_.overrun();
  }

 private:
  Scratch scratch_;
};

/// Counts the decisions to keep.
struct CountRows {
  float* counts;  // [rows][kQueryBlock]; exact to 2^24
  inline void take(int at, Mask kept) const {
    store(counts + at, add(load(counts + at), one_or_zero(kept)));
  }
};

constexpr uint32_t kMostCounted = uint32_t{1} << 24;

/// Mean and variance of `samples` numbers of which `count` are `value` and the others 0. As by the
/// definition, all is NaN where one of them is infinite.
inline void moments_of_counts(size_t elements, double samples, float* values, float* counts) {
  const double share = 1 / samples, pairs = 1 / (samples * (samples - 1));
  for (size_t i = 0; i < elements; ++i) {
    const double value = values[i], count = counts[i], others = samples - count;
    const double variance = value * value * (count * others * pairs) + (value - value);
    values[i] = float(count > 0 ? value * count * share : 0);
    counts[i] = float(count > 0 ? variance : 0);
  }
}

/// Writes a block of [value_dim][kQueryBlock] where its rows lie in a float32 output.
inline void store_rows(const Problem& p, const QueryBlock& q, const float* block, float* rows,
                       float* output) {
  const size_t width = padded(p.value_dim);
  const size_t stride = row_stride(p.layout, p.query_heads, p.value_dim);
  const size_t first =
      row_offset(p.layout, p.query_heads, p.query_length, p.value_dim, q.b, q.head, q.first);
  transpose(block, kQueryBlock, width, kQueryBlock, rows, width);
  for (uint32_t i = 0; i < q.count; ++i) {
    std::memcpy(output + first + i * stride, rows + i * width, p.value_dim * sizeof(float));
  }
}

/// The moments of samples of `context` dropout, from the block's normalised context.
inline void store_context_moments(const Call& call, const QueryBlock& q,
                                  const SampleResults& results, ForwardBuffers& f, float* counts) {
  const Problem& p = call.problem;
  const size_t elements = padded(p.value_dim) * kQueryBlock;
  std::fill_n(counts, elements, 0.0f);
  for (uint32_t s = 0; s < results.problem.samples; ++s) {
    draw_tile(call_of_sample(call, s), q, 0, int(p.value_dim), CountRows{counts});
  }
  if (p.type != Type::float32) {  // the moments are those of the outputs, which are rounded
    for (size_t i = 0; i < elements; i += kQueryBlock) {
      uint16_t rounded[kMaxHeadDim];
      narrow(p.type, f.context + i, kQueryBlock, rounded, 0);
      widen(p.type, rounded, 0, kQueryBlock, f.context + i);
    }
  }
  moments_of_counts(elements, results.problem.samples, f.context, counts);
  store_rows(p, q, f.context, f.rows, results.outputs.mean);
  store_rows(p, q, counts, f.rows, results.outputs.variance);
  store_lse(p, q, results.of_sample(0), f);
}

/// Samples of `context` dropout, from the block's normalised context.
inline void store_context_samples(const Call& call, const QueryBlock& q, SampleGroup group,
                                  const SampleResults& results, ForwardBuffers& f, float* dropped) {
  if (results.counts_decisions()) return store_context_moments(call, q, results, f, dropped);
  const int channels = int(call.problem.value_dim);
  float* const context = f.context;
  for (uint32_t s = group.first; s < group.first + group.count; ++s) {
    const Call sample = call_of_sample(call, s);
    draw_tile(sample, q, 0, channels, DropRows{context, dropped});
    f.context = dropped;
    store_sample(sample, q, results, s, f);
  }
  f.context = context;
}

/// The running contexts of a group of samples of `weights` dropout.
inline void accumulate_samples(const Call& call, const QueryBlock& q, SampleGroup group,
                               ForwardBuffers& f, const SampleBuffers& b) {
  const Problem& p = call.problem;
  const size_t context_rows = padded(p.value_dim);
  f.context = b.contexts;
  start_context(group.count * context_rows, f);
  for (TileRange range(q.any, p.key_length); !range.done(); range.advance()) {
    const KeyTile tile = range.tile();
    size_t value_stride;
    weights_tile(call, q, tile, group.count * context_rows, f);
    const float* const values = tile_rows(value_rows(call, q.b, q.kv_head, tile.first), tile.count,
                                          f.value_copy, value_stride);
    for (uint32_t s = 0; s < group.count; ++s) {
      draw_tile(call_of_sample(call, group.first + s), q, tile.first, tile.count,
                DropRows{f.tile, b.dropped});
      float* const context = b.contexts + s * context_rows * kQueryBlock;
      add_values(call, q, tile, values, value_stride, b.dropped, context, false);
    }
  }
}

/// A task is one block of queries of one head, for all samples of a group.
struct SamplesWork final : ParallelWork {
  Call call;
  SampleGroup group;
  const SampleResults& results;

  SamplesWork(const Call& call, SampleGroup group, const SampleResults& results)
      : call(call), group(group), results(results) {}
  bool drops_weights() const { return call.dropout.placement == Placement::weights; }

  void work(TaskCursor& cursor) override {
    ForwardBuffers f;
    SampleBuffers b;
    if (!f.allocate(call) || !b.allocate(call.problem, drops_weights() ? group.count : 0)) return;
    for (size_t task; cursor.next(task);) {
      const QueryBlock q = block_of_task(call, task);
      if (drops_weights()) {
        block_of_weights(q, f, b);
      } else {
        compute_context(call, q, f);
        store_context_samples(call, q, group, results, f, b.dropped);
      }
    }
  }

 private:
  void block_of_weights(const QueryBlock& q, ForwardBuffers& f, SampleBuffers& b) const {
    float* const context = f.context;
    load_queries(call, q, f.rows, f.scores.queries);
    accumulate_samples(call, q, group, f, b);
    std::memcpy(b.row_max, f.row_max, sizeof(b.row_max));
    std::memcpy(b.row_sum, f.row_sum, sizeof(b.row_sum));
    for (uint32_t s = 0; s < group.count; ++s) {
      const Call sample = call_of_sample(call, group.first + s);
      f.context = b.contexts + s * padded(call.problem.value_dim) * kQueryBlock;
      std::memcpy(f.row_max, b.row_max, sizeof(b.row_max));
      std::memcpy(f.row_sum, b.row_sum, sizeof(b.row_sum));
      if (normalise_context(sample, q, f)) compute_context(sample, q, f);
      store_sample(sample, q, results, group.first + s, f);
    }
    f.context = context;
  }
};

/// Samples that share scores and softmax, by the blocked kernel.
inline Status blocked_samples(const Call& call, const SampleResults& results,
                              const CancelToken& cancel) {
  const Problem& p = call.problem;
  const uint32_t samples = results.problem.samples;
  const size_t tasks = size_t{p.batch} * p.query_heads * blocks_per_head(p);
  const size_t bytes = padded(p.value_dim) * kQueryBlock * sizeof(float);
  const bool drops_weights = call.dropout.placement == Placement::weights;
  const uint32_t size = drops_weights ? group_size(samples, bytes, kGroupBytes) : samples;
  for (uint32_t first = 0; first < samples; first += size) {
    SamplesWork work(call, {first, std::min(size, samples - first)}, results);
    const Status status =
        ThreadPool::shared().run(tasks, worth_sharing(results.problem), cancel, work);
    if (!status.ok()) return status;
  }
  return {};
}

using ForwardPass = Status (*)(const Problem&, const Inputs&, const ForwardOutputs&,
                               const CancelToken&);
using SamplesPass = Status (*)(const Call&, const SampleResults&, const CancelToken&);

/// Samples as so many calls; where nothing is random, as one, copied.
inline Status samples_one_by_one(const Inputs& inputs, const SampleResults& results,
                                 const CancelToken& cancel, bool is_random, ForwardPass pass) {
  const Problem& p = results.problem;
  const size_t size = output_size(p);
  const size_t element = p.type == Type::float32 ? sizeof(float) : sizeof(uint16_t);
  Block<float> own;  // a sample's output, where only its moments are wanted
  if (results.sums && !own.allocate(size)) {
    return {StatusCode::out_of_memory, "no memory for a sample"};
  }
  const ForwardOutputs first = results.of_sample(0);
  for (uint32_t s = 0; s < p.samples; ++s) {
    ForwardOutputs one = results.of_sample(s);
    if (results.sums) one.output = own.get();
    if (is_random || s == 0) {
      const Status status = pass(problem_of_sample(p, s), inputs, one, cancel);
      if (!status.ok()) return status;
    } else {
      if (cancel.cancelled()) return {StatusCode::aborted, "the call was aborted"};
      if (!results.sums) std::memcpy(one.output, first.output, size * element);
      if (one.lse) std::memcpy(one.lse, first.lse, size / p.value_dim * sizeof(float));
    }
    if (!results.sums) continue;
    for (size_t i = 0; i < size; i += kMaxHeadDim) {
      float values[kMaxHeadDim];
      const size_t count = std::min<size_t>(kMaxHeadDim, size - i);
      widen(p.type, own.get(), i, count, values);
      results.add(s, values, i, count);
    }
  }
  return {};
}

/// A call with samples. `pass` computes an ordinary one, `together` the samples of a call whose
/// scores are shared.
inline Status run_samples(const Problem& p, const Inputs& inputs, const ForwardOutputs& outputs,
                          const CancelToken& cancel, ForwardPass pass, SamplesPass together) {
  SampleResults results{p, outputs};
  const Problem first = problem_of_sample(p, 0);
  const Call call{first, inputs, resolve_dropout(first, inputs.keep_mask != nullptr)};
  const bool is_random = call.dropout.on() && !inputs.keep_mask;
  const bool shares =
      is_random && p.dropout_placement != Placement::scores && !is_decode(first, outputs);
  const bool counts =
      shares && p.dropout_placement == Placement::context && p.samples <= kMostCounted;
  Block<double> moments;
  if (outputs.mean && !counts) {
    if (!moments.allocate(2 * output_size(p))) {
      return {StatusCode::out_of_memory, "no memory for mean and variance"};
    }
    std::fill_n(moments.get(), 2 * output_size(p), 0.0);
    results.sums = moments.get();
    results.squares = moments.get() + output_size(p);
  }
  const Status status = shares ? together(call, results, cancel)
                               : samples_one_by_one(inputs, results, cancel, is_random, pass);
  if (status.ok() && results.sums) results.finish_moments();
  return status;
}

Status forward_samples(const Problem& p, const Inputs& inputs, const ForwardOutputs& outputs,
                       const CancelToken& cancel) {
  return run_samples(p, inputs, outputs, cancel, forward, blocked_samples);
}
