// The forward pass: blocked attention with an online softmax (Milakov and Gimelshein,
// arXiv 1805.02867; Dao et al., arXiv 2205.14135). A task is one block of queries of one head.

struct ForwardWork final : ParallelWork {
  Call call;
  ForwardOutputs outputs;

  ForwardWork(const Call& call, const ForwardOutputs& outputs) : call(call), outputs(outputs) {}
  void work(TaskCursor& cursor) override;
};

/// One thread's buffers of the forward pass.
struct ForwardBuffers {
  ScoreBuffers scores;
  float* rows;        // [kQueryBlock][padded max(head_dim, value_dim)], for transposing
  float* context;     // [padded value_dim][kQueryBlock], the running sum of weights * value
  float* tile;        // [kKeyBlock][kQueryBlock], scores, then weights
  float* keep;        // [max(kKeyBlock, padded value_dim)][kQueryBlock]
  float* value_copy;  // [kKeyBlock][value_dim]; unused for float32
  float* row_max;     // [kQueryBlock]
  float* row_sum;     // [kQueryBlock]
  float* lse;         // [kQueryBlock]

  bool allocate(const Call& call) {
    const Problem& p = call.problem;
    const size_t head = padded(p.head_dim), value = padded(p.value_dim);
    const size_t widest = std::max(head, value), half = p.key_type != Type::float32;
    const size_t masked = p.mask_type != MaskType::none, dropping = call.dropout.on();
    const size_t tile_size = size_t{kKeyBlock} * kQueryBlock;
    const size_t keep_size = dropping * std::max<size_t>(kKeyBlock, value) * kQueryBlock;
    const size_t copies = half * kKeyBlock * (head + value);
    if (!scratch_.reserve(kQueryBlock * (head + value + widest + 3) + copies + keep_size +
                              tile_size * (1 + 2 * masked),
                          12)) {
      return false;
    }
    scores = {scratch_.take(head * kQueryBlock), scratch_.take(half * kKeyBlock * head),
              scratch_.take(masked * tile_size), scratch_.take(masked * tile_size)};
    rows = scratch_.take(kQueryBlock * widest);
    context = scratch_.take(value * kQueryBlock);
    tile = scratch_.take(tile_size);
    keep = scratch_.take(keep_size);
    value_copy = scratch_.take(half * kKeyBlock * value);
    row_max = scratch_.take(kQueryBlock);
    row_sum = scratch_.take(kQueryBlock);
    lse = scratch_.take(kQueryBlock);
    return !scratch_.overrun();
  }

 private:
  Scratch scratch_;
};

/// One step of the online softmax for a tile: turns scores into exp(score - row maximum) and brings
/// the running maximum, sum and context up to date.
inline void softmax_step(const QueryBlock& q, KeyTile tile, size_t value_dim, ForwardBuffers& f) {
  const Floats zero = broadcast(0.0f), one = broadcast(1.0f);
  for (int v = 0; v < q.vectors; ++v) {
    float* const column = f.tile + v * kLanes;
    const Floats old_max = load(f.row_max + v * kLanes);
    Floats row_max = old_max;
    for (int k = 0; k < tile.count; ++k) {
      row_max = max_ignoring_nan(load(column + k * kQueryBlock), row_max);
    }
    store(f.row_max + v * kLanes, row_max);
    const Floats shift = select(equal(row_max, broadcast(-kInfinity)), zero, row_max);
    Floats sum = zero;
    for (int k = 0; k < tile.count; ++k) {
      const Floats weight = exponential(sub(load(column + k * kQueryBlock), shift));
      store(column + k * kQueryBlock, weight);
      sum = add(sum, weight);
    }
    const Floats correction = exponential(sub(old_max, shift));
    float* const row_sum = f.row_sum + v * kLanes;
    store(row_sum, multiply_add(load(row_sum), correction, sum));
    if (!any(less(correction, one))) continue;
    for (size_t d = 0; d < value_dim; ++d) {
      float* const c = f.context + d * kQueryBlock + v * kLanes;
      store(c, mul(load(c), correction));
    }
  }
}

/// Sets dropped elements of `rows` rows to 0.
inline void drop_elements(const QueryBlock& q, int rows, const float* keep, float* elements) {
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < q.vectors; ++v) {
      const int i = r * kQueryBlock + v * kLanes;
      const Mask dropped = equal(load(keep + i), broadcast(0.0f));
      store(elements + i, select(dropped, broadcast(0.0f), load(elements + i)));
    }
  }
}

/// Makes `rows` rows of context, row maxima and row sums ready for the first tile.
inline void start_context(size_t rows, ForwardBuffers& f) {
  std::memset(f.context, 0, rows * kQueryBlock * sizeof(float));
  for (int i = 0; i < kQueryBlock; ++i) {
    f.row_max[i] = -kInfinity;
    f.row_sum[i] = 0;
  }
}

// Ordinary calls and samples share the two functions below, each in one body: inlined into both,
// the products lose what the compiler knows of their strides (2 to 4 % of a call).

/// A tile's weights before their dropout, in f.tile; `rows` rows of context are rescaled with them.
__attribute__((noinline)) inline void weights_tile(const Call& call, const QueryBlock& q,
                                                   KeyTile tile, size_t rows, ForwardBuffers& f) {
  const Dropout& d = call.dropout;
  size_t key_stride;
  const float* const keys = tile_rows(key_rows(call, q.b, q.kv_head, tile.first), tile.count,
                                      f.scores.key_copy, key_stride);
  score_tile(call, q, tile, keys, key_stride, f.scores, f.tile, nullptr);
  if (d.on() && d.placement == Placement::scores) drop_scores(call, q, tile, f.keep, f.tile);
  softmax_step(q, tile, rows, f);
}

/// Adds a tile's values times weights [key][kQueryBlock] to a context.
__attribute__((noinline)) inline void add_values(const Call& call, const QueryBlock& q,
                                                 KeyTile tile, const float* values,
                                                 size_t value_stride, const float* weights,
                                                 float* context, bool careful) {
  add_weighted({values, 1, value_stride, weights, kQueryBlock, context, kQueryBlock,
                int(call.problem.value_dim), q.vectors, tile.count},
               Weight::b, careful);
}

/// Runs over all tiles that the block sees: leaves the context's sum, row maxima and row sums.
inline void accumulate_context(const Call& call, const QueryBlock& q, ForwardBuffers& f,
                               bool careful) {
  const Problem& p = call.problem;
  const Dropout& d = call.dropout;
  start_context(padded(p.value_dim), f);
  for (TileRange range(q.any, p.key_length); !range.done(); range.advance()) {
    const KeyTile tile = range.tile();
    size_t value_stride;
    weights_tile(call, q, tile, p.value_dim, f);
    if (d.on() && d.placement == Placement::weights) {
      keep_tile(call, q, tile.first, tile.count, f.keep);
      drop_elements(q, tile.count, f.keep, f.tile);
    }
    const float* const values = tile_rows(value_rows(call, q.b, q.kv_head, tile.first), tile.count,
                                          f.value_copy, value_stride);
    add_values(call, q, tile, values, value_stride, f.tile, f.context, careful);
  }
}

/// Divides the context by the row sums and rescales for dropout; fills lse. True if a NaN came out.
inline bool normalise_context(const Call& call, const QueryBlock& q, ForwardBuffers& f) {
  const Problem& p = call.problem;
  const Dropout& d = call.dropout;
  const bool rescale = d.on() && d.placement != Placement::scores;
  const float numerator = rescale ? d.keep_scale : 1.0f;
  for (uint32_t i = 0; i < kQueryBlock; ++i) {
    const float sum = f.row_sum[i];
    f.lse[i] = sum == 0 ? -kInfinity : f.row_max[i] + std::log(sum);
    f.row_sum[i] = sum == 0 || numerator == 0 ? 0 : numerator / sum;
  }
  float is_number[kQueryBlock];  // per query: 1, or 0 if its context holds a NaN
  for (int v = 0; v < q.vectors; ++v) {
    const Floats scale = load(f.row_sum + v * kLanes);
    Floats numbers = broadcast(1.0f);
    for (size_t c = 0; c < p.value_dim; ++c) {
      float* const element = f.context + c * kQueryBlock + v * kLanes;
      const Floats scaled = mul(load(element), scale);
      store(element, scaled);
      numbers = select(equal(scaled, scaled), numbers, broadcast(0.0f));
    }
    store(is_number + v * kLanes, numbers);
  }
  return std::find(is_number, is_number + q.count, 0.0f) != is_number + q.count;
}

/// `context` dropout of a normalised context.
inline void drop_context(const Call& call, const QueryBlock& q, ForwardBuffers& f) {
  if (!call.dropout.on() || call.dropout.placement != Placement::context) return;
  const int channels = int(call.problem.value_dim);
  keep_tile(call, q, 0, channels, f.keep);
  drop_elements(q, channels, f.keep, f.context);
}

/// Writes a tile [key][kQueryBlock] into rows of a tensor [batch, heads, queries, keys].
inline void store_tile(const Problem& p, const QueryBlock& q, KeyTile tile, const float* from,
                       float* to) {
  const size_t row = (size_t{q.b} * p.query_heads + q.head) * p.query_length + q.first;
  for (uint32_t i = 0; i < q.count; ++i) {
    float* const out = to + (row + i) * p.key_length + tile.first;
    for (int k = 0; k < tile.count; ++k) out[k] = from[k * kQueryBlock + i];
  }
}

/// The [query_length, key_length] outputs, by a second run over all keys with the known lse.
inline void write_matrices(const Call& call, const QueryBlock& q, const ForwardOutputs& out,
                           ForwardBuffers& f) {
  const Problem& p = call.problem;
  const Dropout& d = call.dropout;
  for (TileRange range({0, p.key_length}, p.key_length); !range.done(); range.advance()) {
    const KeyTile tile = range.tile();
    size_t key_stride;
    const float* const keys = tile_rows(key_rows(call, q.b, q.kv_head, tile.first), tile.count,
                                        f.scores.key_copy, key_stride);
    score_tile(call, q, tile, keys, key_stride, f.scores, f.tile, nullptr);
    if (out.scores) store_tile(p, q, tile, f.tile, out.scores);
    if (d.on() && d.placement == Placement::scores) drop_scores(call, q, tile, f.keep, f.tile);
    weights_from_lse(q, tile, f.lse, f.tile, f.tile);
    if (out.weights) store_tile(p, q, tile, f.tile, out.weights);
    if (!out.dropped_weights) continue;
    if (d.on() && d.placement == Placement::weights) {
      keep_tile(call, q, tile.first, tile.count, f.keep);
      drop_elements(q, tile.count, f.keep, f.tile);
      for (int i = 0; i < tile.count * kQueryBlock; i += kLanes) {
        store(f.tile + i, mul(load(f.tile + i), broadcast(d.keep_scale)));
      }
    }
    store_tile(p, q, tile, f.tile, out.dropped_weights);
  }
}

inline void store_lse(const Problem& p, const QueryBlock& q, const ForwardOutputs& out,
                      const ForwardBuffers& f) {
  if (!out.lse) return;
  const size_t row = (size_t{q.b} * p.query_heads + q.head) * p.query_length + q.first;
  std::memcpy(out.lse + row, f.lse, q.count * sizeof(float));
}

/// Writes the finished context and lse.
inline void store_context(const Call& call, const QueryBlock& q, const ForwardOutputs& out,
                          const ForwardBuffers& f) {
  const Problem& p = call.problem;
  const size_t first =
      row_offset(p.layout, p.query_heads, p.query_length, p.value_dim, q.b, q.head, q.first);
  const size_t stride = row_stride(p.layout, p.query_heads, p.value_dim);
  if (p.type == Type::float32 && q.count == kQueryBlock && p.value_dim % kLanes == 0) {
    transpose(f.context, kQueryBlock, p.value_dim, kQueryBlock,
              static_cast<float*>(out.output) + first, stride);
  } else {
    const size_t width = padded(p.value_dim);
    transpose(f.context, kQueryBlock, width, kQueryBlock, f.rows, width);
    for (uint32_t i = 0; i < q.count; ++i) {
      narrow(p.type, f.rows + i * width, p.value_dim, out.output, first + i * stride);
    }
  }
  store_lse(p, q, out, f);
}

inline bool wants_matrices(const ForwardOutputs& out) {
  return out.scores || out.weights || out.dropped_weights;
}

/// The block's normalised context, before dropout of context.
inline void compute_context(const Call& call, const QueryBlock& q, ForwardBuffers& f) {
  load_queries(call, q, f.rows, f.scores.queries);
  accumulate_context(call, q, f, false);
  if (normalise_context(call, q, f)) {
    // A NaN may have come from a key or value that its row does not see: 0 * NaN is NaN.
    accumulate_context(call, q, f, true);
    normalise_context(call, q, f);
  }
}

inline void forward_block(const Call& call, const QueryBlock& q, const ForwardOutputs& out,
                          ForwardBuffers& f) {
  compute_context(call, q, f);
  drop_context(call, q, f);
  store_context(call, q, out, f);
  if (wants_matrices(out)) write_matrices(call, q, out, f);
}

/// A call with samples: see attention_samples.inl.
Status forward_samples(const Problem& p, const Inputs& inputs, const ForwardOutputs& outputs,
                       const CancelToken& cancel);

inline size_t blocks_per_head(const Problem& p) {
  return (size_t{p.query_length} + kQueryBlock - 1) / kQueryBlock;
}

/// The block of queries of a task.
inline QueryBlock block_of_task(const Call& call, size_t task) {
  // Later blocks see more keys under the causal rule: the longest task goes first.
  const size_t blocks = blocks_per_head(call.problem);
  const size_t head = task / blocks, block = blocks - 1 - task % blocks;
  return query_block(call, uint32_t(head / call.problem.query_heads),
                     uint32_t(head % call.problem.query_heads), uint32_t(block * kQueryBlock));
}

void ForwardWork::work(TaskCursor& cursor) {
  ForwardBuffers buffers;
  if (!buffers.allocate(call)) return;
  for (size_t task; cursor.next(task);) {
    forward_block(call, block_of_task(call, task), outputs, buffers);
  }
}

Status forward(const Problem& p, const Inputs& inputs, const ForwardOutputs& outputs,
               const CancelToken& cancel) {
  if (p.samples > 0) return forward_samples(p, inputs, outputs, cancel);
  const Call call{p, inputs, resolve_dropout(p, inputs.keep_mask != nullptr)};
  if (is_decode(p, outputs)) return decode(call, outputs, cancel);
  ForwardWork work(call, outputs);
  const size_t tasks = size_t{p.batch} * p.query_heads * blocks_per_head(p);
  return ThreadPool::shared().run(tasks, worth_sharing(p), cancel, work);
}
