// The forward pass for few queries against many keys (decoding with a key/value cache): a stream
// over keys and values at the speed of memory. Here lanes run along head_dim and along keys.
//
// A task is one chunk of keys of one key/value head, for all queries of its group, so that heads
// that share keys share their loads. Chunks are joined by their lse in order (flash-decoding,
// https://pytorch.org/blog/flash-decoding). Chunks do not depend on the batch or on threads, and so
// neither do the bits.

constexpr uint32_t kDecodeQueries = 4;              // more go to the blocked kernel
constexpr uint32_t kDecodeChunk = 256;              // keys a task
constexpr int kDecodeRows = 4;                      // rows that share the loads of keys and values
constexpr int kDecodeSums = kLanes == 16 ? 16 : 8;  // vectors that they sum in, half the registers
static_assert(kDecodeChunk % kKeyBlock == 0, "whole tiles a chunk");

/// What a chunk contributes to a row: its maximum, its sum, and its sum of weights * value.
struct PartialRow {
  float* data;  // [2 + padded value_dim]
  float& row_max() const { return data[0]; }
  float& row_sum() const { return data[1]; }
  float* context() const { return data + kLanes; }
};

struct DecodeWork final : ParallelWork {
  Call call;
  float* partials;  // [batch * kv_heads][rows][chunks][kLanes + padded value_dim]

  DecodeWork(const Call& call, float* partials) : call(call), partials(partials) {}
  uint32_t group() const { return call.problem.query_heads / call.problem.kv_heads; }
  /// Rows of a task: the queries of all heads of the group.
  uint32_t rows() const { return group() * call.problem.query_length; }
  uint32_t chunks() const { return (call.problem.key_length + kDecodeChunk - 1) / kDecodeChunk; }
  size_t partial_floats() const { return kLanes + padded(call.problem.value_dim); }
  PartialRow partial(size_t head, uint32_t row, uint32_t chunk) const {
    return {partials + ((head * rows() + row) * chunks() + chunk) * partial_floats()};
  }
  void work(TaskCursor& cursor) override;
};

/// One row of queries on its way over a chunk.
struct DecodeRow {
  uint32_t b, head, query;
  KeyRange seen;
  const float* data;  // [padded head_dim], times the scale
  PartialRow partial;

  bool sees(KeyTile tile) const {
    return seen.begin < tile.first + uint32_t(tile.count) && tile.first < seen.end;
  }
};

/// Rows of a tile as floats [count rounded up to kLanes][padded width]: in place where they already
/// are.
inline const float* padded_rows(const Rows& rows, int count, float* copy, size_t& stride) {
  if (rows.type == Type::float32 && rows.width % kLanes == 0 && count % kLanes == 0) {
    stride = rows.stride;
    return static_cast<const float*>(rows.data) + rows.first;
  }
  stride = padded(rows.width);
  std::memset(copy, 0, padded(size_t(count)) * stride * sizeof(float));
  for (int i = 0; i < count; ++i) {
    widen(rows.type, rows.data, rows.first + i * rows.stride, rows.width, copy + i * stride);
  }
  return copy;
}

/// scores[r][k] = queries[r] . keys[k] for Rows rows of queries and `count` keys: each key is
/// loaded once for all rows.
template <int Rows>
inline void decode_scores(const float* const* queries, const float* keys, size_t stride,
                          size_t width, int count, float* scores, RowPrefetch& ahead) {
  constexpr int at_once = kDecodeSums / Rows < 4 ? kDecodeSums / Rows : 4;
  alignas(64) float sums[Rows][kLanes * kLanes], across[kLanes * kLanes];
  for (int k = 0; k < count; k += kLanes) {
    for (int i = 0; i < kLanes; i += at_once) {
      ahead.advance(at_once);
      Floats sum[Rows][at_once];
      for (int r = 0; r < Rows; ++r) {
        for (int j = 0; j < at_once; ++j) sum[r][j] = broadcast(0.0f);
      }
      const float* const key = keys + (k + i) * stride;
      for (size_t d = 0; d < width; d += kLanes) {
        for (int j = 0; j < at_once; ++j) {
          const Floats elements = load(key + j * stride + d);
          for (int r = 0; r < Rows; ++r) {
            sum[r][j] = multiply_add(elements, load(queries[r] + d), sum[r][j]);
          }
        }
      }
      for (int r = 0; r < Rows; ++r) {
        for (int j = 0; j < at_once; ++j) store(sums[r] + (i + j) * kLanes, sum[r][j]);
      }
    }
    for (int r = 0; r < Rows; ++r) {
      transpose_block(sums[r], kLanes, across, kLanes);
      Floats total = load(across);
      for (int i = 1; i < kLanes; ++i) total = add(total, load(across + i * kLanes));
      store(scores + r * kKeyBlock + k, total);
    }
  }
}

/// The row's dropout decisions for a tile of keys: 1 or 0.
inline void decode_keep(const Call& call, const DecodeRow& row, KeyTile tile, float* keep) {
  const Problem& p = call.problem;
  const Dropout& d = call.dropout;
  if (const uint8_t* const given = call.inputs.keep_mask) {
    const size_t at = (size_t{row.b} * p.query_heads + row.head) * p.query_length + row.query;
    for (int k = 0; k < tile.count; ++k) {
      keep[k] = given[at * p.key_length + tile.first + k] ? 1.0f : 0.0f;
    }
    return;
  }
  PhiloxWords words{};
  for (int k = 0; k < tile.count; ++k) {
    const uint32_t column = p.key_offset + tile.first + k;
    if (k == 0 || column % kDecisionsPerCall == 0) {
      words = philox4x32(dropout_counter(d, p.batch_offset + row.b, p.head_offset + row.head,
                                         p.query_offset + row.query, column / kDecisionsPerCall),
                         d.key0, d.key1);
    }
    keep[k] = dropout_keeps(d, words, column % kDecisionsPerCall) ? 1.0f : 0.0f;
  }
}

/// Softcap, mask, exclusions and `scores` dropout for a row of scores, in this order.
inline void decode_rules(const Call& call, const DecodeRow& row, KeyTile tile, float* bias,
                         float* keep, float* scores) {
  const Problem& p = call.problem;
  if (p.softcap > 0) {
    const Floats cap = broadcast(p.softcap), inverse = broadcast(1.0f / p.softcap);
    for (int k = 0; k < tile.count; k += kLanes) {
      store(scores + k, mul(cap, hyperbolic_tangent(mul(load(scores + k), inverse))));
    }
  }
  if (p.mask_type != MaskType::none) {
    mask_row(call, row.b, row.head, row.query, tile, bias);
    for (int k = 0; k < tile.count; ++k) {
      scores[k] = bias[k] == -kInfinity ? -kInfinity : scores[k] + bias[k];
    }
  }
  const bool sees_all =
      row.seen.begin <= tile.first && tile.first + uint32_t(tile.count) <= row.seen.end;
  for (int k = 0; !sees_all && k < tile.count; ++k) {
    const uint32_t key = tile.first + k;
    if (key < row.seen.begin || key >= row.seen.end) scores[k] = -kInfinity;
  }
  const Dropout& d = call.dropout;
  if (d.on() && d.placement == Placement::scores) {
    decode_keep(call, row, tile, keep);
    for (int k = 0; k < tile.count; ++k) scores[k] = keep[k] == 0 ? -kInfinity : scores[k];
  }
  for (int k = tile.count; k < kKeyBlock; ++k) scores[k] = -kInfinity;
}

/// Online softmax of a row: scores become weights, and the partial row moves to the new maximum.
inline void decode_softmax(PartialRow row, size_t value_width, float* scores) {
  alignas(64) float lanes[kLanes];
  Floats tops = broadcast(row.row_max());
  for (int k = 0; k < kKeyBlock; k += kLanes) tops = max_ignoring_nan(load(scores + k), tops);
  store(lanes, tops);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] = std::max(lanes[i], lanes[i + half]);
  }
  const float top = lanes[0], shift = top == -kInfinity ? 0 : top;
  Floats sum = broadcast(0.0f);
  for (int k = 0; k < kKeyBlock; k += kLanes) {
    const Floats weight = exponential(sub(load(scores + k), broadcast(shift)));
    store(scores + k, weight);
    sum = add(sum, weight);
  }
  store(lanes, sum);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  const float total = lanes[0];
  if (top != row.row_max()) {
    store(lanes, exponential(broadcast(row.row_max() - shift)));
    const float correction = lanes[0];
    row.row_sum() *= correction;
    for (size_t c = 0; c < value_width; c += kLanes) {
      store(row.context() + c, mul(load(row.context() + c), broadcast(correction)));
    }
    row.row_max() = top;
  }
  row.row_sum() += total;
}

/// contexts[r] += weights[r] * values, for Rows rows and Vectors vectors of columns from `column`
/// on. Keys of weight 0 add nothing.
template <int Rows, int Vectors>
inline void decode_columns(const float* weights, int count, const float* values, size_t stride,
                           size_t column, float* const* contexts, RowPrefetch& ahead) {
  Floats sum[Rows][Vectors];
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) sum[r][v] = load(contexts[r] + column + v * kLanes);
  }
  values += column;
  for (int k = 0; k < count; ++k, values += stride) {
    ahead.advance(1);
    Floats elements[Vectors];
    for (int v = 0; v < Vectors; ++v) elements[v] = load(values + v * kLanes);
    for (int r = 0; r < Rows; ++r) {
      const float weight = weights[r * kKeyBlock + k];
      if (weight == 0) continue;
      const Floats factor = broadcast(weight);
      for (int v = 0; v < Vectors; ++v) sum[r][v] = multiply_add(factor, elements[v], sum[r][v]);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) store(contexts[r] + column + v * kLanes, sum[r][v]);
  }
}

template <int Rows>
inline void decode_values(const float* weights, int count, const float* values, size_t stride,
                          size_t width, float* const* contexts, RowPrefetch& ahead) {
  constexpr int vectors = Rows < 4 ? 8 / Rows : 2 * kDecodeSums / 8;
  size_t c = 0;
  for (; c + vectors * kLanes <= width; c += vectors * kLanes) {
    decode_columns<Rows, vectors>(weights, count, values, stride, c, contexts, ahead);
  }
  for (; c < width; c += kLanes) {
    decode_columns<Rows, 1>(weights, count, values, stride, c, contexts, ahead);
  }
}

/// One thread's buffers.
struct DecodeBuffers {
  float* queries;     // [rows][padded head_dim]
  float* key_copy;    // [kKeyBlock][padded head_dim]
  float* value_copy;  // [kKeyBlock][padded value_dim]
  float* scores;      // [kDecodeRows][kKeyBlock]
  float* bias;        // [kKeyBlock]
  float* keep;        // [kKeyBlock]

  bool allocate(const Call& call, uint32_t rows) {
    const Problem& p = call.problem;
    const size_t head = padded(p.head_dim), value = padded(p.value_dim);
    const size_t floats = rows * head + kKeyBlock * (head + value + 2 + kDecodeRows);
    if (!scratch_.reserve(floats, 6)) return false;
    queries = scratch_.take(rows * head);
    key_copy = scratch_.take(kKeyBlock * head);
    value_copy = scratch_.take(kKeyBlock * value);
    scores = scratch_.take(kDecodeRows * kKeyBlock);
    bias = scratch_.take(kKeyBlock);
    keep = scratch_.take(kKeyBlock);
    return !scratch_.overrun();
  }

 private:
  Scratch scratch_;
};

/// A tile of keys and values as floats, and what comes after it in memory.
struct DecodeTile {
  KeyTile tile;
  const float *keys, *values;
  size_t key_stride, value_stride;
  RowPrefetch values_ahead, keys_ahead;
};

/// One tile of keys for Rows rows.
template <int Rows>
inline void decode_rows(const Call& call, const DecodeRow* rows, DecodeTile& t, DecodeBuffers& f) {
  const Problem& p = call.problem;
  const Dropout& d = call.dropout;
  const size_t value_width = padded(p.value_dim);
  const float* queries[Rows];
  float* contexts[Rows];
  for (int r = 0; r < Rows; ++r) {
    queries[r] = rows[r].data;
    contexts[r] = rows[r].partial.context();
  }
  decode_scores<Rows>(queries, t.keys, t.key_stride, padded(p.head_dim), t.tile.count, f.scores,
                      t.values_ahead);
  for (int r = 0; r < Rows; ++r) {
    float* const scores = f.scores + r * kKeyBlock;
    decode_rules(call, rows[r], t.tile, f.bias, f.keep, scores);
    decode_softmax(rows[r].partial, value_width, scores);
    if (d.on() && d.placement == Placement::weights) {
      decode_keep(call, rows[r], t.tile, f.keep);
      for (int k = 0; k < t.tile.count; ++k) scores[k] = f.keep[k] == 0 ? 0 : scores[k];
    }
  }
  decode_values<Rows>(f.scores, t.tile.count, t.values, t.value_stride, value_width, contexts,
                      t.keys_ahead);
}

/// Loads a tile; `end` is that of the chunk.
inline void load_decode_tile(const Call& call, uint32_t b, uint32_t kv_head, DecodeTile& t,
                             uint32_t end, DecodeBuffers& f) {
  const Rows values = value_rows(call, b, kv_head, t.tile.first);
  t.keys =
      padded_rows(key_rows(call, b, kv_head, t.tile.first), t.tile.count, f.key_copy, t.key_stride);
  t.values = padded_rows(values, t.tile.count, f.value_copy, t.value_stride);
  t.values_ahead = RowPrefetch(values, uint32_t(t.tile.count));
  const uint32_t next = t.tile.first + kKeyBlock;
  if (next >= end) return;
  t.keys_ahead =
      RowPrefetch(key_rows(call, b, kv_head, next), std::min<uint32_t>(kKeyBlock, end - next));
}

/// All rows of a key/value head over one chunk of keys.
inline void decode_chunk(const DecodeWork& w, size_t head, uint32_t chunk, DecodeBuffers& f) {
  const Call& call = w.call;
  const Problem& p = call.problem;
  const uint32_t b = uint32_t(head / p.kv_heads), kv_head = uint32_t(head % p.kv_heads);
  const size_t width = padded(p.head_dim);
  const Visibility visibility = visibility_of(p, call.inputs, b);
  std::memset(f.queries, 0, w.rows() * width * sizeof(float));
  for (uint32_t r = 0; r < w.rows(); ++r) {
    const uint32_t query_head = kv_head * w.group() + r / p.query_length;
    float* const row = f.queries + r * width;
    widen(p.type, call.inputs.query,
          row_offset(p.layout, p.query_heads, p.query_length, p.head_dim, b, query_head,
                     r % p.query_length),
          p.head_dim, row);
    for (size_t d = 0; d < p.head_dim; ++d) row[d] *= p.scale;
    const PartialRow partial = w.partial(head, r, chunk);
    std::memset(partial.data, 0, w.partial_floats() * sizeof(float));
    partial.row_max() = -kInfinity;
  }
  const uint32_t begin = chunk * kDecodeChunk;
  const uint32_t end = begin + std::min(kDecodeChunk, p.key_length - begin);
  for (uint32_t first = begin; first < end; first += kKeyBlock) {
    DecodeTile t;
    t.tile = {first, int(std::min<uint32_t>(kKeyBlock, end - first))};
    t.keys = nullptr;
    for (uint32_t next = 0; next < w.rows();) {
      DecodeRow rows[kDecodeRows];
      int count = 0;
      for (; next < w.rows() && count < kDecodeRows; ++next) {
        const uint32_t query = next % p.query_length;
        rows[count] = {b,
                       kv_head * w.group() + next / p.query_length,
                       query,
                       visible_keys(visibility, query),
                       f.queries + next * width,
                       w.partial(head, next, chunk)};
        if (rows[count].sees(t.tile)) ++count;
      }
      if (count > 0 && !t.keys) load_decode_tile(call, b, kv_head, t, end, f);
      if (count == 4) {
        decode_rows<4>(call, rows, t, f);
        continue;
      }
      if (count >= 2) decode_rows<2>(call, rows, t, f);
      if (count % 2 == 1) decode_rows<1>(call, rows + count - 1, t, f);
    }
  }
}

void DecodeWork::work(TaskCursor& cursor) {
  DecodeBuffers buffers;
  if (!buffers.allocate(call, rows())) return;
  for (size_t task; cursor.next(task);) {
    decode_chunk(*this, task / chunks(), uint32_t(task % chunks()), buffers);
  }
}

/// Joins the chunks of a row in order; the first one gets the whole.
inline PartialRow join_chunks(const DecodeWork& w, size_t head, uint32_t r) {
  const size_t width = padded(w.call.problem.value_dim);
  const PartialRow whole = w.partial(head, r, 0);
  float top = -kInfinity, sum = 0;
  for (uint32_t c = 0; c < w.chunks(); ++c) top = std::max(top, w.partial(head, r, c).row_max());
  for (uint32_t c = 0; c < w.chunks(); ++c) {
    const PartialRow part = w.partial(head, r, c);
    const float factor = top == -kInfinity ? 0 : std::exp(part.row_max() - top);
    // As everywhere, a weight of 0 adds nothing; but a chunk that saw a NaN makes the row NaN.
    const bool idle = factor == 0 && part.row_sum() == part.row_sum();
    if (!idle) sum += factor * part.row_sum();
    for (size_t i = 0; i < width; ++i) {
      const float share = idle ? 0 : factor * part.context()[i];
      whole.context()[i] = c == 0 ? share : whole.context()[i] + share;
    }
  }
  whole.row_max() = top;
  whole.row_sum() = sum;
  return whole;
}

/// Drops channels of a row of context.
inline void drop_channels(const Call& call, uint32_t b, uint32_t query_head, uint32_t query,
                          float* context) {
  QueryBlock q{};
  q.b = b;
  q.head = query_head;
  q.first = query;
  q.count = q.vectors = 1;
  float keep[kKeyBlock * kQueryBlock];
  for (uint32_t first = 0; first < call.problem.value_dim; first += kKeyBlock) {
    const int count = int(std::min<uint32_t>(kKeyBlock, call.problem.value_dim - first));
    keep_tile(call, q, first, count, keep);
    for (int i = 0; i < count; ++i) {
      if (keep[i * kQueryBlock] == 0) context[first + i] = 0;
    }
  }
}

/// Divides by the sum, applies dropout's scale and context dropout, writes the output and lse.
inline void finish_row(const DecodeWork& w, const ForwardOutputs& out, size_t head, uint32_t r) {
  const Problem& p = w.call.problem;
  const Dropout& d = w.call.dropout;
  const uint32_t b = uint32_t(head / p.kv_heads), query = r % p.query_length;
  const uint32_t query_head = uint32_t(head % p.kv_heads) * w.group() + r / p.query_length;
  const PartialRow row = join_chunks(w, head, r);
  const float sum = row.row_sum();
  const float numerator = d.on() && d.placement != Placement::scores ? d.keep_scale : 1.0f;
  const float scale = sum == 0 || numerator == 0 ? 0 : numerator / sum;
  for (size_t i = 0; i < p.value_dim; ++i) row.context()[i] *= scale;
  if (d.on() && d.placement == Placement::context) {
    drop_channels(w.call, b, query_head, query, row.context());
  }
  narrow(p.type, row.context(), p.value_dim, out.output,
         row_offset(p.layout, p.query_heads, p.query_length, p.value_dim, b, query_head, query));
  if (out.lse) {
    out.lse[(size_t{b} * p.query_heads + query_head) * p.query_length + query] =
        sum == 0 ? -kInfinity : row.row_max() + std::log(sum);
  }
}

/// Whether a call is one for this kernel.
inline bool is_decode(const Problem& p, const ForwardOutputs& out) {
  return p.query_length <= kDecodeQueries && !out.scores && !out.weights && !out.dropped_weights;
}

inline Status decode(const Call& call, const ForwardOutputs& out, const CancelToken& cancel) {
  const Problem& p = call.problem;
  DecodeWork work(call, nullptr);
  const size_t heads = size_t{p.batch} * p.kv_heads;
  Block<float> partials;
  if (!partials.allocate(heads * work.rows() * work.chunks() * work.partial_floats())) {
    return {StatusCode::out_of_memory, "no memory for the chunks of the keys"};
  }
  work.partials = partials.get();
  const Status status =
      ThreadPool::shared().run(heads * work.chunks(), worth_sharing(p), cancel, work);
  if (!status.ok()) return status;
  for (size_t head = 0; head < heads; ++head) {
    for (uint32_t r = 0; r < work.rows(); ++r) finish_row(work, out, head, r);
  }
  return {};
}
