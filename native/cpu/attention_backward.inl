// The backward pass (Dao et al., arXiv 2205.14135, with Delta = rowsum(dO * O)): weights are
// recomputed tile by tile from lse, so memory grows with the length, never with its square.
//
// A task is one chunk of the keys of one key/value head: it owns those rows of grad_key and
// grad_value, and runs over the query heads of its group and their blocks in a fixed order. What it
// adds to grad_query goes to a slice of its own where keys come in several chunks; the slices are
// summed in order afterwards. Chunks depend on the key length only: the bits do not depend on the
// number of threads, nor on what else is in the batch.

constexpr uint32_t kSmallestChunk = 1024;  // keys
constexpr uint32_t kMostChunks = 8;

inline uint32_t chunk_length(const Problem& p) {
  const uint32_t even = uint32_t((uint64_t{p.key_length} + kMostChunks - 1) / kMostChunks);
  const uint32_t whole_tiles = (even + kKeyBlock - 1) / kKeyBlock * kKeyBlock;
  return std::max(kSmallestChunk, whole_tiles);
}

inline uint32_t chunk_count(const Problem& p) {
  return uint32_t((uint64_t{p.key_length} + chunk_length(p) - 1) / chunk_length(p));
}

/// One thread's buffers of the backward pass.
struct BackwardBuffers {
  ScoreBuffers scores;
  float* rows;              // [kQueryBlock][padded max(head_dim, value_dim)], for transposing
  float* query_rows;        // [kQueryBlock][padded head_dim], times the scale
  float* grad_output_rows;  // [kQueryBlock][padded value_dim]; context dropout applied
  float* grad_output;       // the same, transposed: [padded value_dim][kQueryBlock]
  float* value_copy;        // [kKeyBlock][value_dim]; unused for float32
  float* weights;           // [kKeyBlock][kQueryBlock]; after dropout in the end
  float* grad_scores;       // [kKeyBlock][kQueryBlock]
  float* tangent;           // [kKeyBlock][kQueryBlock]; unused without softcap
  float* keep;              // [max(kKeyBlock, padded value_dim)][kQueryBlock]
  float* lse;               // [kQueryBlock]
  float* delta;             // [kQueryBlock]
  float* grad_query;        // [padded head_dim][kQueryBlock]
  float* grad_key;          // [chunk][padded head_dim]
  float* grad_value;        // [chunk][padded value_dim]
  float* grad_mask;         // [chunk][kQueryBlock]

  /// `chunk`: keys whose gradients are gathered; `mask_chunk`: the same for the mask's gradient.
  bool allocate(const Call& call, size_t chunk, size_t mask_chunk) {
    const Problem& p = call.problem;
    const size_t head = padded(p.head_dim), value = padded(p.value_dim);
    const size_t widest = std::max(head, value), half = p.key_type != Type::float32;
    const size_t masked = p.mask_type != MaskType::none, dropping = call.dropout.on();
    const size_t capped = p.softcap > 0, tile = size_t{kKeyBlock} * kQueryBlock;
    const size_t keep_size = dropping * std::max<size_t>(kKeyBlock, value) * kQueryBlock;
    if (!scratch_.reserve(kQueryBlock * (3 * head + 2 * value + widest + 2 + mask_chunk) +
                              half * kKeyBlock * (head + value) + keep_size +
                              tile * (2 + 2 * masked + capped) + chunk * (head + value),
                          20)) {
      return false;
    }
    scores = {scratch_.take(head * kQueryBlock), scratch_.take(half * kKeyBlock * head),
              scratch_.take(masked * tile), scratch_.take(masked * tile)};
    rows = scratch_.take(kQueryBlock * widest);
    query_rows = scratch_.take(kQueryBlock * head);
    grad_output_rows = scratch_.take(kQueryBlock * value);
    grad_output = scratch_.take(kQueryBlock * value);
    value_copy = scratch_.take(half * kKeyBlock * value);
    weights = scratch_.take(tile);
    grad_scores = scratch_.take(tile);
    tangent = scratch_.take(capped * tile);
    keep = scratch_.take(keep_size);
    lse = scratch_.take(kQueryBlock);
    delta = scratch_.take(kQueryBlock);
    grad_query = scratch_.take(kQueryBlock * head);
    grad_key = scratch_.take(chunk * head);
    grad_value = scratch_.take(chunk * value);
    grad_mask = scratch_.take(mask_chunk * kQueryBlock);
    return !scratch_.overrun();
  }

 private:
  Scratch scratch_;
};

// ---------------------------------------------------------------------------- one block, one tile

/// Loads the queries' side: query rows, G = grad_output (through context dropout), lse and Delta.
inline void load_backward_queries(const Call& call, const QueryBlock& q, const BackwardTensors& t,
                                  BackwardBuffers& f) {
  const Problem& p = call.problem;
  const size_t width = padded(p.value_dim);
  load_queries(call, q, f.query_rows, f.scores.queries);
  load_rows(Rows::of(p, t.output, p.query_heads, p.query_length, p.value_dim, q.b, q.head, q.first),
            q.count, f.rows);
  load_rows(
      Rows::of(p, t.grad_output, p.query_heads, p.query_length, p.value_dim, q.b, q.head, q.first),
      q.count, f.grad_output_rows);
  const size_t row = (size_t{q.b} * p.query_heads + q.head) * p.query_length + q.first;
  for (uint32_t i = 0; i < kQueryBlock; ++i) {
    double sums[kLanes] = {};
    for (size_t c = 0; c < width; c += kLanes) {
      const float* const output = f.rows + i * width + c;
      const float* const grad = f.grad_output_rows + i * width + c;
      for (int j = 0; j < kLanes; ++j) sums[j] += double(output[j]) * grad[j];
    }
    double delta = 0;
    for (const double sum : sums) delta += sum;
    f.delta[i] = float(delta);
    f.lse[i] = i < q.count ? t.lse[row + i] : -kInfinity;
  }
  transpose(f.grad_output_rows, width, kQueryBlock, width, f.grad_output, kQueryBlock);
  const Dropout& d = call.dropout;
  if (!d.on() || d.placement != Placement::context) return;
  keep_tile(call, q, 0, int(p.value_dim), f.keep);
  drop_elements(q, int(p.value_dim), f.keep, f.grad_output);
  for (size_t i = 0; i < p.value_dim * kQueryBlock; i += kLanes) {
    store(f.grad_output + i, mul(load(f.grad_output + i), broadcast(d.keep_scale)));
  }
  transpose(f.grad_output, kQueryBlock, width, kQueryBlock, f.grad_output_rows, width);
}

/// weights and grad_scores hold P and G.V: turns them into what multiplies the values, and into dS.
inline void differentiate_softmax(const Call& call, const QueryBlock& q, KeyTile tile,
                                  BackwardBuffers& f) {
  const Dropout& d = call.dropout;
  const bool dropping = d.on() && d.placement == Placement::weights;
  if (dropping) keep_tile(call, q, tile.first, tile.count, f.keep);
  const Floats zero = broadcast(0.0f), keep_scale = broadcast(d.keep_scale);
  for (int k = 0; k < tile.count; ++k) {
    for (int v = 0; v < q.vectors; ++v) {
      const int i = k * kQueryBlock + v * kLanes;
      const Floats weight = load(f.weights + i);
      Floats grad_weight = load(f.grad_scores + i);
      if (dropping) {
        const Mask dropped = equal(load(f.keep + i), zero);
        grad_weight = select(dropped, zero, mul(grad_weight, keep_scale));
        store(f.weights + i, select(dropped, zero, mul(weight, keep_scale)));
      }
      const Floats grad = mul(weight, sub(grad_weight, load(f.delta + v * kLanes)));
      store(f.grad_scores + i, select(equal(weight, zero), zero, grad));
    }
  }
}

/// For one tile: f.weights becomes what multiplied the values, f.grad_scores the gradient of the
/// scores after softcap and bias.
inline void backward_tile(const Call& call, const QueryBlock& q, KeyTile tile, const float* keys,
                          size_t key_stride, BackwardBuffers& f) {
  const Problem& p = call.problem;
  const Dropout& d = call.dropout;
  score_tile(call, q, tile, keys, key_stride, f.scores, f.weights, f.tangent);
  if (d.on() && d.placement == Placement::scores) drop_scores(call, q, tile, f.keep, f.weights);
  weights_from_lse(q, tile, f.lse, f.weights, f.weights);
  size_t value_stride;
  const float* const values = tile_rows(value_rows(call, q.b, q.kv_head, tile.first), tile.count,
                                        f.value_copy, value_stride);
  multiply({values, value_stride, 1, f.grad_output, kQueryBlock, f.grad_scores, kQueryBlock,
            tile.count, q.vectors, int(p.value_dim)},
           Start::zero);
  differentiate_softmax(call, q, tile, f);
}

/// The softcap's derivative: grad_scores *= 1 - tanh^2.
inline void differentiate_softcap(KeyTile tile, BackwardBuffers& f) {
  for (int i = 0; i < tile.count * kQueryBlock; i += kLanes) {
    const Floats t = load(f.tangent + i), grad = load(f.grad_scores + i);
    const Floats slope = sub(broadcast(1.0f), mul(t, t));
    store(f.grad_scores + i,
          select(equal(grad, broadcast(0.0f)), broadcast(0.0f), mul(grad, slope)));
  }
}

// ------------------------------------------------------------- gradients of query, key and value

/// What all tasks of a backward call share.
struct BackwardCall {
  Call call;
  BackwardTensors tensors;
  float* query_slices;  // [chunks][batch, query_heads, query_length, head_dim], or null: one chunk
};

struct BackwardWork final : ParallelWork, BackwardCall {
  explicit BackwardWork(const BackwardCall& shared) : BackwardCall(shared) {}
  void work(TaskCursor& cursor) override;
};

struct ChunkTask {
  uint32_t b, kv_head, chunk;
  KeyRange keys;
};

inline bool holds_nan(const float* values, size_t count) {
  bool nan = false;
  for (size_t i = 0; i < count; ++i) nan |= values[i] != values[i];
  return nan;
}

/// Writes the block's share of grad_query: into the result if there is one chunk, else its slice.
inline bool store_grad_query(const BackwardCall& w, const QueryBlock& q, uint32_t chunk,
                             BackwardBuffers& f) {
  const Problem& p = w.call.problem;
  const size_t width = padded(p.head_dim);
  const Floats scale = broadcast(p.scale);
  for (size_t i = 0; i < p.head_dim * kQueryBlock; i += kLanes) {
    store(f.grad_query + i, mul(load(f.grad_query + i), scale));
  }
  transpose(f.grad_query, kQueryBlock, width, kQueryBlock, f.rows, width);
  const size_t slice = size_t{p.batch} * p.query_heads * p.query_length * p.head_dim;
  for (uint32_t i = 0; i < q.count; ++i) {
    const size_t at =
        row_offset(p.layout, p.query_heads, p.query_length, p.head_dim, q.b, q.head, q.first + i);
    if (w.query_slices) {
      narrow(Type::float32, f.rows + i * width, p.head_dim, w.query_slices, chunk * slice + at);
    } else {
      narrow(p.type, f.rows + i * width, p.head_dim, w.tensors.grad_query, at);
    }
  }
  return holds_nan(f.rows, q.count * width);
}

/// One block of queries against the keys of a chunk. True if a NaN came out in grad_query.
inline bool backward_block(const BackwardCall& w, const ChunkTask& task, const QueryBlock& q,
                           BackwardBuffers& f, bool careful) {
  const Problem& p = w.call.problem;
  const size_t head = padded(p.head_dim), value = padded(p.value_dim);
  load_backward_queries(w.call, q, w.tensors, f);
  std::memset(f.grad_query, 0, head * kQueryBlock * sizeof(float));
  const KeyRange seen = {std::max(q.any.begin, task.keys.begin),
                         std::min(q.any.end, task.keys.end)};
  for (TileRange range(seen, p.key_length); !range.done(); range.advance()) {
    const KeyTile tile = range.tile();
    size_t key_stride;
    const float* const keys = tile_rows(key_rows(w.call, q.b, q.kv_head, tile.first), tile.count,
                                        f.scores.key_copy, key_stride);
    backward_tile(w.call, q, tile, keys, key_stride, f);
    const size_t row = tile.first - task.keys.begin;
    add_weighted({f.weights, kQueryBlock, 1, f.grad_output_rows, value, f.grad_value + row * value,
                  value, tile.count, int(value / kLanes), int(q.count)},
                 Weight::a, careful);
    if (p.softcap > 0) differentiate_softcap(tile, f);
    add_weighted({f.grad_scores, kQueryBlock, 1, f.query_rows, head, f.grad_key + row * head, head,
                  tile.count, int(head / kLanes), int(q.count)},
                 Weight::a, careful);
    add_weighted({keys, 1, key_stride, f.grad_scores, kQueryBlock, f.grad_query, kQueryBlock,
                  int(p.head_dim), q.vectors, tile.count},
                 Weight::b, careful);
  }
  return store_grad_query(w, q, task.chunk, f);
}

/// All query heads of the group and all their blocks. True if a NaN came out anywhere.
inline bool backward_chunk(const BackwardCall& w, const ChunkTask& task, BackwardBuffers& f,
                           bool careful) {
  const Problem& p = w.call.problem;
  const size_t keys = task.keys.end - task.keys.begin;
  const size_t head = padded(p.head_dim), value = padded(p.value_dim);
  const uint32_t group = p.query_heads / p.kv_heads;
  std::memset(f.grad_key, 0, keys * head * sizeof(float));
  std::memset(f.grad_value, 0, keys * value * sizeof(float));
  bool nan = false;
  for (uint32_t member = 0; member < group; ++member) {
    for (size_t first = 0; first < p.query_length; first += kQueryBlock) {
      const QueryBlock q =
          query_block(w.call, task.b, task.kv_head * group + member, uint32_t(first));
      nan |= backward_block(w, task, q, f, careful);
    }
  }
  return nan || holds_nan(f.grad_key, keys * head) || holds_nan(f.grad_value, keys * value);
}

inline ChunkTask chunk_task(const Problem& p, size_t number) {
  const uint32_t chunks = chunk_count(p), length = chunk_length(p);
  const size_t kv = number / chunks;
  ChunkTask task{
      uint32_t(kv / p.kv_heads), uint32_t(kv % p.kv_heads), uint32_t(number % chunks), {}};
  task.keys.begin = task.chunk * length;
  task.keys.end = task.keys.begin + std::min(p.key_length - task.keys.begin, length);
  return task;
}

/// Keys whose gradients a task gathers, at most.
inline size_t most_chunk_keys(const Problem& p) { return std::min(chunk_length(p), p.key_length); }

inline void store_key_gradients(const BackwardCall& w, const ChunkTask& task,
                                const BackwardBuffers& f) {
  const Problem& p = w.call.problem;
  const size_t head = padded(p.head_dim), value = padded(p.value_dim);
  for (uint32_t k = 0; k < task.keys.end - task.keys.begin; ++k) {
    const uint32_t key = task.keys.begin + k;
    narrow(p.type, f.grad_key + k * head, p.head_dim, w.tensors.grad_key,
           row_offset(p.layout, p.kv_heads, p.key_length, p.head_dim, task.b, task.kv_head, key));
    narrow(p.type, f.grad_value + k * value, p.value_dim, w.tensors.grad_value,
           row_offset(p.layout, p.kv_heads, p.key_length, p.value_dim, task.b, task.kv_head, key));
  }
}

/// A NaN may have come from a key or query that the other side does not see: 0 * NaN is NaN.
inline void backward_task(const BackwardCall& w, const ChunkTask& task, BackwardBuffers& f) {
  if (backward_chunk(w, task, f, false)) backward_chunk(w, task, f, true);
  store_key_gradients(w, task, f);
}

void BackwardWork::work(TaskCursor& cursor) {
  BackwardBuffers f;
  if (!f.allocate(call, most_chunk_keys(call.problem), 0)) return;
  for (size_t task; cursor.next(task);) backward_task(*this, chunk_task(call.problem, task), f);
}

/// Sums the slices of grad_query in order.
struct SliceSum final : ParallelWork {
  static constexpr size_t kBlock = 4096;  // elements a task

  Type type;
  const float* slices;
  size_t elements, chunks;
  void* to;

  SliceSum(Type type, const float* slices, size_t elements, size_t chunks, void* to)
      : type(type), slices(slices), elements(elements), chunks(chunks), to(to) {}
  void work(TaskCursor& cursor) override {
    float sum[kBlock];
    for (size_t task; cursor.next(task);) {
      const size_t first = task * kBlock, count = std::min(kBlock, elements - first);
      for (size_t i = 0; i < count; ++i) sum[i] = slices[first + i];
      for (size_t chunk = 1; chunk < chunks; ++chunk) {
        const float* const slice = slices + chunk * elements + first;
        for (size_t i = 0; i < count; ++i) sum[i] += slice[i];
      }
      narrow(type, sum, count, to, first);
    }
  }
};

// ------------------------------------------------------------------------- gradient of the mask

/// A task is one block of queries (all of them where the mask broadcasts over queries) and one
/// chunk of keys (all, where it broadcasts over keys) of one [batch, head] plane of the mask. It
/// gathers dS over the axes that broadcast, in a fixed order, in one tile-shaped sum.
struct MaskGradientWork final : ParallelWork {
  Call call;
  BackwardTensors tensors;

  MaskGradientWork(const Call& call, const BackwardTensors& tensors)
      : call(call), tensors(tensors) {}

  size_t query_tasks() const {
    return call.problem.mask_queries > 1 ? blocks_per_head(call.problem) : 1;
  }
  uint32_t key_step() const {
    return call.problem.mask_keys > 1 ? chunk_length(call.problem) : call.problem.key_length;
  }
  size_t key_tasks() const {
    return (size_t{call.problem.key_length} + key_step() - 1) / key_step();
  }
  size_t tasks() const {
    return size_t{call.problem.mask_batch} * call.problem.mask_heads * query_tasks() * key_tasks();
  }
  /// Rows of the sum: one a key of the chunk, or one tile that all tiles share.
  size_t sum_rows() const {
    return call.problem.mask_keys > 1 ? std::min(key_step(), call.problem.key_length) : kKeyBlock;
  }
  void work(TaskCursor& cursor) override;
};

struct MaskTask {
  uint32_t mask_b, mask_head;
  size_t first_query, end_query;
  KeyRange keys;
};

/// Adds the score gradients of one block of queries to the sum.
inline void gather_mask_gradient(const MaskGradientWork& w, const MaskTask& task,
                                 const QueryBlock& q, BackwardBuffers& f) {
  const Problem& p = w.call.problem;
  const KeyRange seen = {std::max(q.any.begin, task.keys.begin),
                         std::min(q.any.end, task.keys.end)};
  if (seen.begin >= seen.end) return;
  load_backward_queries(w.call, q, w.tensors, f);
  for (TileRange range(seen, p.key_length); !range.done(); range.advance()) {
    const KeyTile tile = range.tile();
    size_t key_stride;
    const float* const keys = tile_rows(key_rows(w.call, q.b, q.kv_head, tile.first), tile.count,
                                        f.scores.key_copy, key_stride);
    backward_tile(w.call, q, tile, keys, key_stride, f);
    const size_t row = p.mask_keys > 1 ? tile.first - task.keys.begin : 0;
    float* const sum = f.grad_mask + row * kQueryBlock;
    for (int k = 0; k < tile.count; ++k) {
      for (int i = k * kQueryBlock; i < k * kQueryBlock + q.vectors * kLanes; i += kLanes) {
        store(sum + i, add(load(sum + i), load(f.grad_scores + i)));
      }
    }
  }
}

/// Folds the sum along the axes that broadcast and writes it.
inline void store_mask_gradient(const MaskGradientWork& w, const MaskTask& task,
                                const BackwardBuffers& f) {
  const Problem& p = w.call.problem;
  const Type type = Type(uint32_t(p.mask_type) - uint32_t(MaskType::float32));
  const bool per_query = p.mask_queries > 1, per_key = p.mask_keys > 1;
  const size_t rows = per_key ? task.keys.end - task.keys.begin : 1;
  const size_t folded_rows = per_key ? 1 : kKeyBlock;
  const size_t columns = per_query ? task.end_query - task.first_query : 1;
  const size_t folded_columns = per_query ? 1 : kQueryBlock;
  const size_t plane = (size_t{task.mask_b} * p.mask_heads + task.mask_head) * p.mask_queries;
  for (size_t c = 0; c < columns; ++c) {
    const size_t query = plane + (per_query ? task.first_query + c : 0);
    for (size_t r = 0; r < rows; ++r) {
      double sum = 0;
      for (size_t i = 0; i < folded_rows; ++i) {
        for (size_t j = 0; j < folded_columns; ++j) {
          sum += f.grad_mask[(r + i) * kQueryBlock + c + j];
        }
      }
      const size_t key = per_key ? task.keys.begin + r : 0;
      store_element(type, w.tensors.grad_mask, query * p.mask_keys + key, float(sum));
    }
  }
}

void MaskGradientWork::work(TaskCursor& cursor) {
  const Problem& p = call.problem;
  BackwardBuffers f;
  if (!f.allocate(call, 0, sum_rows())) return;
  for (size_t number; cursor.next(number);) {
    const size_t plane = number / (query_tasks() * key_tasks());
    const size_t key_task = number % key_tasks(), query_task = number / key_tasks() % query_tasks();
    MaskTask task{uint32_t(plane / p.mask_heads),
                  uint32_t(plane % p.mask_heads),
                  0,
                  p.query_length,
                  {uint32_t(key_task * key_step()), 0}};
    task.keys.end = task.keys.begin + std::min(key_step(), p.key_length - task.keys.begin);
    if (p.mask_queries > 1) {
      task.first_query = query_task * kQueryBlock;
      task.end_query = std::min<size_t>(p.query_length, task.first_query + kQueryBlock);
    }
    std::memset(f.grad_mask, 0, sum_rows() * kQueryBlock * sizeof(float));
    const bool one_batch = p.mask_batch > 1 || p.batch == 1;
    const bool one_head = p.mask_heads > 1 || p.query_heads == 1;
    const uint32_t last_b = one_batch ? task.mask_b + 1 : p.batch;
    const uint32_t last_head = one_head ? task.mask_head + 1 : p.query_heads;
    for (uint32_t b = one_batch ? task.mask_b : 0; b < last_b; ++b) {
      for (uint32_t head = one_head ? task.mask_head : 0; head < last_head; ++head) {
        for (size_t query = task.first_query; query < task.end_query; query += kQueryBlock) {
          gather_mask_gradient(*this, task, query_block(call, b, head, uint32_t(query)), f);
        }
      }
    }
    store_mask_gradient(*this, task, f);
  }
}

// ----------------------------------------------------------------------------------- the pass

/// `Work` computes the gradients of query, key and value.
template <typename Work>
Status run_backward(const Problem& p, const Inputs& inputs, const BackwardTensors& tensors,
                    const CancelToken& cancel) {
  const Call call{p, inputs, resolve_dropout(p, inputs.keep_mask != nullptr)};
  ThreadPool& pool = ThreadPool::shared();
  const bool parallel = worth_sharing(p);
  const uint32_t chunks = chunk_count(p);
  const size_t elements = size_t{p.batch} * p.query_heads * p.query_length * p.head_dim;
  Block<float> slices;
  if (chunks > 1 && !slices.allocate(chunks * elements)) {
    return {StatusCode::out_of_memory, "no memory for the gradient of the query"};
  }
  Work work(BackwardCall{call, tensors, slices.get()});
  Status status = pool.run(size_t{p.batch} * p.kv_heads * chunks, parallel, cancel, work);
  if (status.ok() && chunks > 1) {
    SliceSum sum(p.type, slices.get(), elements, chunks, tensors.grad_query);
    status = pool.run((elements + SliceSum::kBlock - 1) / SliceSum::kBlock, parallel, cancel, sum);
  }
  if (status.ok() && tensors.grad_mask) {
    MaskGradientWork mask(call, tensors);
    status = pool.run(mask.tasks(), parallel, cancel, mask);
  }
  return status;
}

Status backward(const Problem& p, const Inputs& inputs, const BackwardTensors& tensors,
                const CancelToken& cancel) {
  return run_backward<BackwardWork>(p, inputs, tensors, cancel);
}
