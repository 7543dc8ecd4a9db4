// The backward pass on AMX: tasks, order and memory are those of attention_backward.inl; the five
// products run on tiles, for two blocks of queries at a time, so that the sums of grad_key and
// grad_value are loaded and stored once per 64 queries. While the scores of one block become
// gradients, tiles multiply for the other block, for the next tile of keys and for the one before.
// A task that comes out with a NaN is done again by the vector kernel.

constexpr int kBlocksAtOnce = 2;
constexpr size_t kBothQueries = size_t{kBlocksAtOnce} * kQueryBlock;

/// The keys and values of a chunk as operands A: for each tile, keys by rows (for the scores), keys
/// by columns (for grad_query), values by rows (for the gradient of the weights).
template <int Terms>
struct PackedChunk {
  size_t key_bytes, value_bytes;  // of one tile, for each operand
  uint8_t* data;

  static size_t tile_bytes(const Problem& p) {
    return (2 * steps_of(p.head_dim) + steps_of(p.value_dim)) * 2 * Terms * kPairBytes;
  }
  PackedChunk(const Problem& p, uint8_t* data)
      : key_bytes(2 * steps_of(p.head_dim) * Terms * kPairBytes),
        value_bytes(2 * steps_of(p.value_dim) * Terms * kPairBytes),
        data(data) {}
  uint8_t* key_rows(size_t tile) const { return data + tile * (2 * key_bytes + value_bytes); }
  uint8_t* key_columns(size_t tile) const { return key_rows(tile) + key_bytes; }
  uint8_t* value_rows(size_t tile) const { return key_rows(tile) + 2 * key_bytes; }
};

/// One thread's buffers: those of the vector kernel and the packed operands.
struct AmxBackwardBuffers {
  BackwardBuffers vector;
  uint8_t* chunk;                        // PackedChunk
  uint8_t* queries[kBlocksAtOnce];       // operand B: pairs of channels
  uint8_t* grad_outputs[kBlocksAtOnce];  // operand B: pairs of channels
  uint8_t* query_pairs;                  // operand B: pairs of queries, both blocks
  uint8_t* grad_output_pairs;            // operand B: pairs of queries, both blocks
  uint8_t* weights[2];      // operand A: [2 halves of keys][2 blocks of queries]; tiles take turns
  uint8_t* grad_scores[2];  // operand A: the same
  uint8_t* grad_score_pairs[kBlocksAtOnce];  // operand B: pairs of keys
  float* rows;                               // [kKeyBlock][whole widest], to pack from
  float* score_tile[kBlocksAtOnce];          // [kKeyBlock][kQueryBlock]
  float* grad_tile[kBlocksAtOnce];           // [kKeyBlock][kQueryBlock]
  float* grad_query[kBlocksAtOnce];          // [whole head_dim][kQueryBlock]
  float* grad_key;                           // [chunk][whole head_dim]
  float* grad_value;                         // [chunk][whole value_dim]
  float* lse[kBlocksAtOnce];                 // [kQueryBlock]
  float* delta[kBlocksAtOnce];               // [kQueryBlock]
  TileSums sums;

  uint8_t* operand(size_t floats) { return reinterpret_cast<uint8_t*>(scratch_.take(floats)); }

  bool allocate(const Call& call, size_t chunk_keys, int terms) {
    const Problem& p = call.problem;
    const size_t head = steps_of(p.head_dim), value = steps_of(p.value_dim);
    const size_t pair = terms * kPairBytes / sizeof(float), tiles = chunk_keys / kKeyBlock;
    const size_t widest = std::max(head, value) * kStepDepth, tile = kKeyBlock * kQueryBlock;
    const size_t chunk_floats = tiles * (2 * head + value) * 2 * pair;
    const size_t floats = chunk_floats + 4 * (head + value) * pair + 20 * pair +
                          kKeyBlock * widest + 4 * tile + 2 * whole(p.head_dim) * kQueryBlock +
                          chunk_keys * (whole(p.head_dim) + whole(p.value_dim)) + 4 * kQueryBlock;
    if (!vector.allocate(call, chunk_keys, 0) || !scratch_.reserve(floats, 30)) return false;
    chunk = operand(chunk_floats);
    for (int i = 0; i < kBlocksAtOnce; ++i) {
      queries[i] = operand(head * pair);
      grad_outputs[i] = operand(value * pair);
      grad_query[i] = scratch_.take(whole(p.head_dim) * kQueryBlock);
      lse[i] = scratch_.take(kQueryBlock);
      delta[i] = scratch_.take(kQueryBlock);
      score_tile[i] = scratch_.take(tile);
      grad_tile[i] = scratch_.take(tile);
      grad_score_pairs[i] = operand(2 * pair);
      weights[i] = operand(4 * pair);
      grad_scores[i] = operand(4 * pair);
    }
    query_pairs = operand(2 * head * pair);
    grad_output_pairs = operand(2 * value * pair);
    rows = scratch_.take(kKeyBlock * widest);
    grad_key = scratch_.take(chunk_keys * whole(p.head_dim));
    grad_value = scratch_.take(chunk_keys * whole(p.value_dim));
    return !scratch_.overrun();
  }

 private:
  Scratch scratch_;
};

template <int Terms>
struct AmxBackwardTask {
  const BackwardCall& work;
  const ChunkTask& task;
  AmxBackwardBuffers& f;
  PackedChunk<Terms> packed;

  const Call& call() const { return work.call; }
  const Problem& problem() const { return work.call.problem; }
};

/// A block that fills up a pair: it brings nothing and sees nothing.
inline QueryBlock no_queries(const Problem& p) {
  QueryBlock q{};
  q.any = {p.key_length, 0};
  return q;
}

/// A tile of rows as operand A, half after half.
template <int Terms>
inline void pack_tile_rows(const float* rows, size_t stride, size_t width, uint8_t* to) {
  for (int half = 0; half < 2; ++half) {
    pack_rows<Terms>(rows + half * kStepDepth * stride, stride, width,
                     to + half * (width / kStepDepth) * Terms * kPairBytes);
  }
}

template <int Terms>
inline void pack_chunk(const AmxBackwardTask<Terms>& k) {
  const Problem& p = k.problem();
  for (uint32_t first = k.task.keys.begin; first < k.task.keys.end; first += kKeyBlock) {
    const size_t tile = (first - k.task.keys.begin) / kKeyBlock;
    const int count = int(std::min<uint32_t>(kKeyBlock, p.key_length - first));
    size_t stride;
    const float* rows = whole_steps(key_rows(k.call(), k.task.b, k.task.kv_head, first), count,
                                    kKeyBlock, k.f.rows, stride);
    pack_tile_rows<Terms>(rows, stride, whole(p.head_dim), k.packed.key_rows(tile));
    pack_columns<Terms>(rows, stride, whole(p.head_dim), k.packed.key_columns(tile));
    rows = whole_steps(value_rows(k.call(), k.task.b, k.task.kv_head, first), count, kKeyBlock,
                       k.f.rows, stride);
    pack_tile_rows<Terms>(rows, stride, whole(p.value_dim), k.packed.value_rows(tile));
  }
}

/// Channels of queries, [width][kQueryBlock], times `scale`, with zeros up to whole steps.
inline void scale_channels(const float* channels, float scale, size_t width, float* to) {
  const size_t size = width * kQueryBlock;
  for (size_t i = 0; i < size; i += kLanes) {
    store(to + i, mul(load(channels + i), broadcast(scale)));
  }
  std::memset(to + size, 0, (whole(width) * kQueryBlock - size) * sizeof(float));
}

/// Packs one block of queries, given both ways round: by channels [padded width][kQueryBlock] for
/// the products over channels, by rows [kQueryBlock][padded width] for those over queries.
template <int Terms>
inline void pack_both(const float* channels, float scale, const float* rows, size_t width,
                      float* room, uint8_t* by_channels, uint8_t* by_queries) {
  const size_t to_width = whole(width), from_width = padded(width);
  scale_channels(channels, scale, width, room);
  pack_query_columns<Terms>(room, to_width, by_channels);
  std::memset(room, 0, to_width * kQueryBlock * sizeof(float));
  for (int i = 0; i < kQueryBlock; ++i) {
    std::memcpy(room + i * to_width, rows + i * from_width, from_width * sizeof(float));
  }
  pack_row_pairs<Terms>(room, to_width, to_width, kBlocksAtOnce * Terms * kPairBytes, by_queries);
}

/// Packs what one block of queries brings: its queries and G = grad_output (through context
/// dropout), lse and Delta. A block without queries brings zeros.
template <int Terms>
inline void pack_backward_queries(const AmxBackwardTask<Terms>& k, const QueryBlock& q, int block) {
  const Denormals keep(Denormals::kept);  // the scale may make much of them
  const Problem& p = k.problem();
  BackwardBuffers& v = k.f.vector;
  load_backward_queries(k.call(), q, k.work.tensors, v);
  const size_t step = block * Terms * kPairBytes;
  pack_both<Terms>(v.scores.queries, kLog2E, v.query_rows, p.head_dim, k.f.rows, k.f.queries[block],
                   k.f.query_pairs + step);
  pack_both<Terms>(v.grad_output, 1, v.grad_output_rows, p.value_dim, k.f.rows,
                   k.f.grad_outputs[block], k.f.grad_output_pairs + step);
  for (int i = 0; i < kQueryBlock; ++i) {
    // Rows without a key have no lse; their scores are all excluded.
    const bool alive = uint32_t(i) < q.count && v.lse[i] != -kInfinity;
    // A row of scores beyond what units of log2(e) hold is for the vector kernel.
    const bool beyond = std::fabs(v.lse[i]) > 0x1p126f;
    k.f.lse[block][i] = !alive ? 0 : beyond ? std::numeric_limits<float>::quiet_NaN() : v.lse[i];
    k.f.delta[block][i] = uint32_t(i) < q.count ? v.delta[i] : 0;
  }
  std::memset(k.f.grad_query[block], 0, whole(p.head_dim) * kQueryBlock * sizeof(float));
}

/// A score in units of log2(e) less lse. One rounding, and after the products: sums that started at
/// -lse would be rounded at its size, at every step.
inline __attribute__((always_inline)) Floats less_lse(Floats score, Floats lse) {
  return multiply_add(lse, broadcast(-kLog2E), score);
}

/// Turns a tile of scores and of weight gradients into operands, two keys at a time: weights (after
/// dropout) for grad_value, score gradients for grad_key and grad_query.
template <int Terms>
struct DifferentiateWork {
  const float* scores;  // [kKeyBlock][kQueryBlock], in units of log2(e)
  const float* grads;   // of the weights, the same
  const float* keep;    // dropout decisions, the same, or null
  const float* slope;   // the softcap's derivative, the same, or null
  const float* lse;     // to be subtracted from the scores, [kQueryBlock]
  const float* delta;   // [kQueryBlock]
  float keep_scale;
  uint8_t* weights;           // operand A, at this block's step
  uint8_t* grad_scores;       // operand A, at this block's step
  uint8_t* grad_score_pairs;  // operand B
  uint32_t rate;              // pairs of keys per advance(), in units of 2^-16
  int row = 0;
  uint32_t due = 0;

  inline __attribute__((always_inline)) void advance() {
    for (due += rate; due >= 1 << 16; due -= 1 << 16) next_pair();
  }
  inline void finish() {
    while (row < kKeyBlock) next_pair();
  }
  inline __attribute__((always_inline)) void next_pair() {
    if (row >= kKeyBlock) return;
    Floats weight[2][kQueryVectors], grad[2][kQueryVectors];
    for (int r = 0; r < 2; ++r) {
      for (int v = 0; v < kQueryVectors; ++v) differentiate(row + r, v, weight[r][v], grad[r][v]);
    }
    // Row `row` of operand A lies in half row / 32 of the keys and in tile row / 16 % 2.
    const size_t at = row / kStepDepth * kBlocksAtOnce * Terms * kPairBytes +
                      row / kTileSide % 2 * kTileBytes + row % kTileSide * sizeof(Words);
    for (int r = 0; r < 2; ++r) {
      split_row<Terms>(weight[r][0], weight[r][1], weights + at + r * sizeof(Words), kPairBytes);
      split_row<Terms>(grad[r][0], grad[r][1], grad_scores + at + r * sizeof(Words), kPairBytes);
    }
    for (int v = 0; v < kQueryVectors; ++v) {
      split_pair<Terms>(grad[0][v], grad[1][v], grad_score_pairs + pair_offset<Terms>(row / 2, v));
    }
    row += 2;
  }
  inline __attribute__((always_inline)) void differentiate(int key, int v, Floats& weight,
                                                           Floats& grad) const {
    const int i = key * kQueryBlock + v * kLanes;
    const Floats zero = broadcast(0.0f);
    const Floats power = at_most_zero(less_lse(load(scores + i), load(lse + v * kLanes)));
    const Floats w = exponential2<Terms>(power);
    Floats g = load(grads + i);
    weight = w;
    if (keep) {
      const Mask dropped = equal(load(keep + i), zero);
      weight = select(dropped, zero, mul(w, broadcast(keep_scale)));
      g = select(dropped, zero, mul(g, broadcast(keep_scale)));
    }
    grad = mul(w, sub(g, load(delta + v * kLanes)));
    if (slope) grad = mul(grad, load(slope + i));
  }
};

template <int Terms>
inline size_t tile_number(const AmxBackwardTask<Terms>& k, KeyTile tile) {
  return (tile.first - k.task.keys.begin) / kKeyBlock;
}

inline bool is_plain(const Call& call, const QueryBlock& q, KeyTile tile) {
  return q.vectors == kQueryVectors && is_plain(call, q.all, tile);
}

/// Scores of a tile and the gradients of its weights.
template <int Terms, typename Work>
inline void multiply_tile(const AmxBackwardTask<Terms>& k, int block, KeyTile tile, Work& work) {
  alignas(64) static constexpr float zeros[kQueryBlock] = {};
  const Problem& p = k.problem();
  const uint8_t* keys = k.packed.key_rows(tile_number(k, tile));
  const uint8_t* values = k.packed.value_rows(tile_number(k, tile));
  for (int half = 0; half < 2; ++half) {
    const size_t at = half * kStepDepth * kQueryBlock;
    multiply_packed<Terms>(k.f.sums, keys + half * k.packed.key_bytes / 2, k.f.queries[block],
                           steps_of(p.head_dim), zeros, 0, k.f.score_tile[block] + at, kQueryBlock,
                           work);
    multiply_packed<Terms>(k.f.sums, values + half * k.packed.value_bytes / 2,
                           k.f.grad_outputs[block], steps_of(p.value_dim), zeros, 0,
                           k.f.grad_tile[block] + at, kQueryBlock, work);
  }
}

/// Applies the rules to a tile of scores and subtracts lse; excluded keys end far below. Returns
/// the softcap's derivative where there is a softcap.
template <int Terms>
inline const float* apply_backward_rules(const AmxBackwardTask<Terms>& k, const QueryBlock& q,
                                         int block, KeyTile tile) {
  if (is_plain(k.call(), q, tile)) return nullptr;
  float* const scores = k.f.score_tile[block];
  float* const tangent = k.f.vector.tangent;
  apply_rules(k.call(), q, tile, k.f.vector.scores, k.f.vector.keep, scores, tangent);
  const Floats floor = broadcast(-200.0f), one = broadcast(1.0f);
  for (int v = 0; v < kQueryVectors; ++v) {
    const Floats lse = load(k.f.lse[block] + v * kLanes);
    for (int r = 0; r < kKeyBlock; ++r) {
      float* const s = scores + r * kQueryBlock + v * kLanes;
      const bool inside = r < tile.count && v < q.vectors;
      store(s, inside ? max_ignoring_nan(floor, less_lse(load(s), lse)) : floor);
    }
  }
  if (k.problem().softcap <= 0) return nullptr;
  for (int i = 0; i < kKeyBlock * kQueryBlock; i += kLanes) {
    const Floats t = load(tangent + i);
    store(tangent + i, sub(one, mul(t, t)));
  }
  return tangent;
}

/// Sets up what follows the products of a tile, to be done in `steps` steps of other products.
template <int Terms>
inline DifferentiateWork<Terms> differentiate_work(const AmxBackwardTask<Terms>& k,
                                                   const QueryBlock& q, int block, KeyTile tile,
                                                   size_t steps) {
  const Dropout& d = k.call().dropout;
  const float* const slope = apply_backward_rules(k, q, block, tile);
  const float* keep = nullptr;
  if (d.on() && d.placement == Placement::weights) {
    keep_tile(k.call(), q, tile.first, tile.count, k.f.vector.keep);
    keep = k.f.vector.keep;
  }
  const size_t step = block * Terms * kPairBytes, side = tile_number(k, tile) & 1;
  const uint32_t advances = uint32_t(steps) * kAdvancesAStep<Terms>;
  alignas(64) static constexpr float zeros[kQueryBlock] = {};
  return {k.f.score_tile[block],
          k.f.grad_tile[block],
          keep,
          slope,
          is_plain(k.call(), q, tile) ? k.f.lse[block] : zeros,
          k.f.delta[block],
          d.keep_scale,
          k.f.weights[side] + step,
          k.f.grad_scores[side] + step,
          k.f.grad_score_pairs[block],
          (kPairsPerTile << 16) / advances + 1};
}

template <int Terms, typename Work>
inline void add_query_gradient(const AmxBackwardTask<Terms>& k, int block, KeyTile tile,
                               Work& work) {
  const uint8_t* keys = k.packed.key_columns(tile_number(k, tile));
  for (size_t s = 0; s < steps_of(k.problem().head_dim); ++s, keys += 2 * Terms * kPairBytes) {
    float* const to = k.f.grad_query[block] + s * kStepDepth * kQueryBlock;
    multiply_packed<Terms>(k.f.sums, keys, k.f.grad_score_pairs[block], 2, to, kQueryBlock, to,
                           kQueryBlock, work);
  }
}

/// sum [kKeyBlock][width] += operand * pairs, over both blocks of queries.
template <int Terms, typename Work>
inline void add_over_queries(const AmxBackwardTask<Terms>& k, const uint8_t* operand,
                             const uint8_t* pairs, size_t width, float* sum, Work& work) {
  for (int half = 0; half < 2; ++half) {
    for (size_t s = 0; s < width / kStepDepth; ++s) {
      float* const to = sum + half * kStepDepth * width + s * kStepDepth;
      multiply_packed<Terms>(k.f.sums, operand + half * kBlocksAtOnce * Terms * kPairBytes,
                             pairs + s * kBlocksAtOnce * Terms * kPairBytes, kBlocksAtOnce, to,
                             width, to, width, work);
    }
  }
}

template <int Terms, typename Work>
inline void add_value_gradient(const AmxBackwardTask<Terms>& k, KeyTile tile, Work& work) {
  const size_t width = whole(k.problem().value_dim);
  add_over_queries(k, k.f.weights[tile_number(k, tile) & 1], k.f.grad_output_pairs, width,
                   k.f.grad_value + (tile.first - k.task.keys.begin) * width, work);
}

template <int Terms, typename Work>
inline void add_key_gradient(const AmxBackwardTask<Terms>& k, KeyTile tile, Work& work) {
  const size_t width = whole(k.problem().head_dim);
  add_over_queries(k, k.f.grad_scores[tile_number(k, tile) & 1], k.f.query_pairs, width,
                   k.f.grad_key + (tile.first - k.task.keys.begin) * width, work);
}

/// Two blocks of queries against the tiles of a range, as a pipeline. Each block's turn has four of
/// the eight products beside it.
template <int Terms>
inline void backward_tiles_amx(const AmxBackwardTask<Terms>& k, const QueryBlock* blocks,
                               TileRange range) {
  if (range.done()) return;
  const size_t head = steps_of(k.problem().head_dim), value = steps_of(k.problem().value_dim);
  NoWork none;
  KeyTile before{0, 0};
  multiply_tile(k, 0, range.tile(), none);
  while (!range.done()) {
    const KeyTile tile = range.tile();
    const bool is_first = before.count == 0;
    range.advance();
    if (is_first) k.f.sums.store();
    DifferentiateWork<Terms> first = differentiate_work(
        k, blocks[0], 0, tile, 2 * (head + value) + (is_first ? 0 : 2 * head + 4 * value));
    multiply_tile(k, 1, tile, first);
    if (!is_first) {
      add_query_gradient(k, 1, before, first);
      add_value_gradient(k, before, first);
    }
    first.finish();
    if (is_first) k.f.sums.store();
    DifferentiateWork<Terms> second = differentiate_work(
        k, blocks[1], 1, tile,
        2 * head + (range.done() ? 0 : 2 * (head + value)) + (is_first ? 0 : 4 * head));
    if (!range.done()) multiply_tile(k, 0, range.tile(), second);
    add_query_gradient(k, 0, tile, second);
    if (!is_first) add_key_gradient(k, before, second);
    second.finish();
    before = tile;
  }
  add_query_gradient(k, 1, before, none);
  add_value_gradient(k, before, none);
  add_key_gradient(k, before, none);
  k.f.sums.store();
}

/// Two blocks of queries against the chunk. True if a NaN came out in grad_query.
template <int Terms>
inline bool backward_blocks(const AmxBackwardTask<Terms>& k, const QueryBlock* blocks) {
  const Problem& p = k.problem();
  KeyRange seen{p.key_length, 0};
  for (int i = 0; i < kBlocksAtOnce; ++i) {
    pack_backward_queries(k, blocks[i], i);
    seen = {std::min(seen.begin, blocks[i].any.begin), std::max(seen.end, blocks[i].any.end)};
  }
  seen = {std::max(seen.begin, k.task.keys.begin), std::min(seen.end, k.task.keys.end)};
  backward_tiles_amx(k, blocks, TileRange(seen, p.key_length));
  bool nan = false;
  for (int i = 0; i < kBlocksAtOnce; ++i) {
    if (blocks[i].count == 0) continue;
    std::memcpy(k.f.vector.grad_query, k.f.grad_query[i],
                padded(p.head_dim) * kQueryBlock * sizeof(float));
    nan |= store_grad_query(k.work, blocks[i], k.task.chunk, k.f.vector);
  }
  return nan;
}

/// After so many pairs of query blocks their sums are added to those of the pairs before, as
/// kFoldTiles in the forward pass.
constexpr uint32_t kFoldPasses = 16;

/// Moves the sums of the latest pairs, rows of whole steps, to those of all, rows of whole vectors.
inline void fold_rows(float* latest, size_t rows, size_t width, float* all) {
  for (size_t r = 0; r < rows; ++r) {
    for (size_t i = 0; i < padded(width); i += kLanes) {
      float* const from = latest + r * whole(width) + i;
      float* const to = all + r * padded(width) + i;
      store(to, add(load(to), load(from)));
      store(from, broadcast(0.0f));
    }
  }
}

/// The AMX counterpart of backward_chunk; leaves grad_key and grad_value in the vector buffers.
template <int Terms>
inline bool backward_chunk_amx(const BackwardCall& w, const ChunkTask& task,
                               AmxBackwardBuffers& f) {
  const Problem& p = w.call.problem;
  const AmxBackwardTask<Terms> k{w, task, f, PackedChunk<Terms>(p, f.chunk)};
  const size_t keys = task.keys.end - task.keys.begin;
  const size_t rows = (keys + kKeyBlock - 1) / kKeyBlock * kKeyBlock;
  const size_t head = whole(p.head_dim), value = whole(p.value_dim);
  const uint32_t group = p.query_heads / p.kv_heads;
  pack_chunk(k);
  std::memset(f.grad_key, 0, rows * head * sizeof(float));
  std::memset(f.grad_value, 0, rows * value * sizeof(float));
  BackwardBuffers& v = f.vector;
  std::memset(v.grad_key, 0, keys * padded(p.head_dim) * sizeof(float));
  std::memset(v.grad_value, 0, keys * padded(p.value_dim) * sizeof(float));
  bool nan = false;
  uint32_t passes = 0;
  for (uint32_t member = 0; member < group; ++member) {
    const uint32_t query_head = task.kv_head * group + member;
    for (size_t first = 0; first < p.query_length; first += kBothQueries) {
      if (passes++ % kFoldPasses == 0) {
        fold_rows(f.grad_key, keys, p.head_dim, v.grad_key);
        fold_rows(f.grad_value, keys, p.value_dim, v.grad_value);
      }
      QueryBlock blocks[kBlocksAtOnce];
      for (int i = 0; i < kBlocksAtOnce; ++i) {
        const size_t at = first + i * kQueryBlock;
        blocks[i] = at < p.query_length ? query_block(w.call, task.b, query_head, uint32_t(at))
                                        : no_queries(p);
      }
      nan |= backward_blocks(k, blocks);
    }
  }
  fold_rows(f.grad_key, keys, p.head_dim, v.grad_key);
  fold_rows(f.grad_value, keys, p.value_dim, v.grad_value);
  return nan || holds_nan(v.grad_key, keys * padded(p.head_dim)) ||
         holds_nan(v.grad_value, keys * padded(p.value_dim));
}

template <int Terms>
struct AmxBackwardWork final : ParallelWork, BackwardCall {
  explicit AmxBackwardWork(const BackwardCall& shared) : BackwardCall(shared) {}
  void work(TaskCursor& cursor) override {
    const Problem& p = call.problem;
    const size_t keys = (most_chunk_keys(p) + kKeyBlock - 1) / kKeyBlock * kKeyBlock;
    AmxBackwardBuffers f;
    if (!f.allocate(call, keys, Terms)) return;
    const Denormals flush(Denormals::flushed);
    configure_tiles();
    for (size_t number; cursor.next(number);) {
      const ChunkTask task = chunk_task(p, number);
      if (backward_chunk_amx<Terms>(*this, task, f)) {
        const Denormals keep(Denormals::kept);
        backward_task(*this, task, f.vector);
      } else {
        store_key_gradients(*this, task, f.vector);
      }
    }
    _tile_release();
  }
};

Status amx_backward(const Problem& p, const Inputs& inputs, const BackwardTensors& tensors,
                    const CancelToken& cancel) {
  if (p.query_length < kFewestQueries) return backward(p, inputs, tensors, cancel);
  switch (p.precision) {
    case Precision::highest:
      return run_backward<AmxBackwardWork<3>>(p, inputs, tensors, cancel);
    case Precision::high:
      return run_backward<AmxBackwardWork<2>>(p, inputs, tensors, cancel);
    default:
      return run_backward<AmxBackwardWork<1>>(p, inputs, tensors, cancel);
  }
}
