// The forward pass on AMX. The algorithm is that of attention_forward.inl with the same orientation
// (S^T = K Q^T and O^T = V^T P^T, queries along the lanes), and every rule but the products comes
// from there and from tile.inl.
//
// While tiles multiply, the vector units turn the previous tile's scores into weights. That needs
// each row's maximum before its scores are known, so a stale one serves: exp(score - maximum) stays
// exact as long as it does not overflow, and a tile whose sum grows beyond kLargestSum moves the
// maximum. Scores are in units of log2(e), so that exp is exp2.
//
// A block of queries that comes out with a NaN is computed again by the vector kernels, which know
// what reaches whom; AMX also takes denormals for 0.

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
constexpr float kLargestSum = 1 << 30;
constexpr int kPairsPerTile = kKeyBlock / 2;

static_assert(kQueryBlock == 2 * kTileSide && kLanes == kTileSide, "one pair of tiles a block");

// --------------------------------------------------------------------------------- the softmax

/// 2^x; -200 and less give 0 where denormals are flushed. The largest relative error over every
/// float in [-126, 127] is 6.8e-8 with three terms, 2.9e-6 with two, 1.1e-4 with one
/// (bench/results/precision.md): in step with the products.
template <int Terms>
inline __attribute__((always_inline)) Floats exponential2(Floats x) {
  const Floats n = round_to_integer(x), r = sub(x, n);
  Floats p;
  if constexpr (Terms == 3) {
    p = multiply_add(broadcast(1.53268033e-4f), r, broadcast(1.33907935e-3f));
    p = multiply_add(p, r, broadcast(9.6185049e-3f));
    p = multiply_add(p, r, broadcast(5.55035993e-2f));
    p = multiply_add(p, r, broadcast(2.40226477e-1f));
    p = multiply_add(p, r, broadcast(6.93147182e-1f));
  } else if constexpr (Terms == 2) {
    p = multiply_add(broadcast(9.58284922e-3f), r, broadcast(5.59064299e-2f));
    p = multiply_add(p, r, broadcast(2.40240991e-1f));
    p = multiply_add(p, r, broadcast(6.93124175e-1f));
  } else {
    p = multiply_add(broadcast(5.50088882e-2f), r, broadcast(2.42210969e-1f));
    p = multiply_add(p, r, broadcast(6.93282962e-1f));
  }
  return _mm512_scalef_ps(multiply_add(p, r, broadcast(1.0f)), n);
}

/// Dropout decisions for 8 keys and the block's queries, made on the way from scores to weights.
///
/// Philox in 64-bit lanes, even and odd queries apart, so that each product is one instruction. The
/// first two rounds mix only what all keys or all queries share, and are done once: per block what
/// depends on the query, per group of keys what does not.
struct WeightDropout {
  Words query_product[kQueryVectors][2];  // [vector][even, odd]: round 2's product of word 0
  Words threshold;                        // in both halves of a word
  Dropout dropout;
  uint32_t batch, head;
  uint32_t first_group;           // of the tile
  Words words[kQueryVectors][4];  // decisions of the current group

  void start_block(const Call& call, const QueryBlock& q) {
    const Problem& p = call.problem;
    dropout = call.dropout;
    const PhiloxWords c =
        dropout_counter(dropout, p.batch_offset + q.b, p.head_offset + q.head, 0, 0);
    batch = c.w[3];
    head = c.w[2];
    threshold = broadcast_words(dropout.threshold * 0x10001u);
    const uint32_t high = uint32_t(uint64_t{kPhiloxMultiplier1} * head >> 32);
    for (int v = 0; v < kQueryVectors; ++v) {
      uint32_t queries[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const uint32_t query = p.query_offset + q.first + uint32_t(v * kLanes + i);
        queries[i] = (dropout.broadcast & kBroadcastQuery ? 0 : query) ^ high ^ dropout.key0;
      }
      const Words factor = broadcast_words(kPhiloxMultiplier0), w = load_words(queries);
      query_product[v][0] = _mm512_mul_epu32(w, factor);
      query_product[v][1] = _mm512_mul_epu32(_mm512_srli_epi64(w, 32), factor);
    }
  }

  static inline __attribute__((always_inline)) Words mix(Words product, Words word, uint32_t key) {
    constexpr int exclusive_or_all = 0x96;
    return _mm512_ternarylogic_epi64(_mm512_srli_epi64(product, 32), word,
                                     _mm512_set1_epi64(int64_t(uint64_t{key})), exclusive_or_all);
  }

  /// Rounds 3 to 10 for 8 lanes, from what round 2 left.
  inline __attribute__((always_inline)) void last_rounds(Words product, uint32_t c0, uint32_t c1,
                                                         uint32_t c3, Words* c) const {
    const Words m0 = broadcast_words(kPhiloxMultiplier0), m1 = broadcast_words(kPhiloxMultiplier1);
    uint32_t key0 = dropout.key0 + 2 * kPhiloxBump0, key1 = dropout.key1 + 2 * kPhiloxBump1;
    const Words c2 = mix(product, _mm512_setzero_si512(), c3 ^ (key1 - kPhiloxBump1));
    const uint64_t scalar_product = uint64_t{kPhiloxMultiplier0} * c0;
    const Words vector_product = _mm512_mul_epu32(c2, m1);
    c[0] = mix(vector_product, _mm512_setzero_si512(), c1 ^ key0);
    c[1] = vector_product;
    c[2] = exclusive_or(product, broadcast_words(uint32_t(scalar_product >> 32) ^ key1));
    c[3] = broadcast_words(uint32_t(scalar_product));
    for (int round = 3; round < kPhiloxRounds; ++round) {
      key0 += kPhiloxBump0;
      key1 += kPhiloxBump1;
      const Words product0 = _mm512_mul_epu32(c[0], m0), product1 = _mm512_mul_epu32(c[2], m1);
      c[0] = mix(product1, c[1], key0);
      c[1] = product1;
      c[2] = mix(product0, c[3], key1);
      c[3] = product0;
    }
  }

  /// The decisions for group `group` of the tile.
  inline __attribute__((always_inline)) void draw(uint32_t group) {
    // Rounds 1 and 2, of which only word 2 and word 3 after round 2 depend on the query.
    const uint64_t product0 = uint64_t{kPhiloxMultiplier0} * (first_group + group);
    const uint64_t product1 = uint64_t{kPhiloxMultiplier1} * head;
    const uint32_t c2 = uint32_t(product0 >> 32) ^ batch ^ dropout.key1;
    const uint64_t next1 = uint64_t{kPhiloxMultiplier1} * c2;
    const uint32_t c0 = uint32_t(next1 >> 32) ^ uint32_t(product1) ^ (dropout.key0 + kPhiloxBump0);
    const uint32_t c1 = uint32_t(next1), c3 = uint32_t(product0);
    for (int v = 0; v < kQueryVectors; ++v) {
      Words even[4], odd[4];
      last_rounds(query_product[v][0], c0, c1, c3, even);
      last_rounds(query_product[v][1], c0, c1, c3, odd);
      constexpr __mmask16 odd_lanes = 0b1010101010101010;
      for (int i = 0; i < 4; ++i) {
        words[v][i] = _mm512_mask_shuffle_epi32(even[i], odd_lanes, odd[i], _MM_PERM_CCAA);
      }
    }
  }

  /// The decisions for keys `pair` * 2 and the one after, as split_pair takes them: the 16-bit
  /// halves of a word are those of two keys, in their order.
  inline __attribute__((always_inline)) __mmask32 kept(int pair, int v) const {
    return _mm512_cmpge_epu16_mask(words[v][pair % 4], threshold);
  }
};

/// Turns a tile of scores (less the maximum) into packed weights, two keys at a time.
template <int Terms, bool Drops>
struct SoftmaxWork {
  const float* scores;     // [kKeyBlock][kQueryBlock]
  uint8_t* weights;        // operand B
  WeightDropout* dropout;  // draws decisions on the way, where Drops
  const float* keep;       // decisions made before, as the scores, 1 or 0; or null
  uint32_t rate;           // pairs of keys per advance(), in units of 2^-16
  Floats sums[2] = {broadcast(0.0f), broadcast(0.0f)};
  int pair = 0;
  uint32_t due = 0;

  inline __attribute__((always_inline)) void advance() {
    for (due += rate; due >= 1 << 16; due -= 1 << 16) next_pair();
  }
  inline void finish() {
    while (pair < kPairsPerTile) next_pair();
  }
  inline __attribute__((always_inline)) void next_pair() {
    if (pair >= kPairsPerTile) return;
    if (Drops && pair % 4 == 0) dropout->draw(uint32_t(pair) / 4);
    for (int v = 0; v < kQueryVectors; ++v) {
      const size_t at = size_t(2 * pair) * kQueryBlock + v * kLanes;
      Floats even = exponential2<Terms>(load(scores + at));
      Floats odd = exponential2<Terms>(load(scores + at + kQueryBlock));
      sums[v] = add(sums[v], add(even, odd));
      if (!Drops && keep) {
        const Floats zero = broadcast(0.0f);
        even = select(equal(load(keep + at), zero), zero, even);
        odd = select(equal(load(keep + at + kQueryBlock), zero), zero, odd);
      }
      const __mmask32 kept = Drops ? dropout->kept(pair, v) : ~__mmask32{0};
      split_pair<Terms>(even, odd, weights + pair_offset<Terms>(pair, v), kept);
    }
    ++pair;
  }
};

// --------------------------------------------------------------------------------- packed heads

/// Keys and values of consecutive key/value heads, packed as operands A: for each tile of 64 keys,
/// two halves of keys [2][steps of head_dim][terms], then columns of values
/// [steps of value_dim][2][terms].
struct PackedHeads {
  size_t first = 0, count = 0;  // heads, counted over the batch
  size_t tiles, key_bytes, value_bytes;
  uint8_t* data = nullptr;

  PackedHeads(const Problem& p, int terms)
      : tiles((size_t{p.key_length} + kKeyBlock - 1) / kKeyBlock),
        key_bytes(2 * steps_of(p.head_dim) * terms * kPairBytes),
        value_bytes(2 * steps_of(p.value_dim) * terms * kPairBytes) {}
  size_t head_bytes() const { return tiles * (key_bytes + value_bytes); }
  uint8_t* keys(size_t head, size_t tile) const {
    return data + (head - first) * head_bytes() + tile * (key_bytes + value_bytes);
  }
  uint8_t* values(size_t head, size_t tile) const { return keys(head, tile) + key_bytes; }
};

/// `count` rows as floats [full][whole steps], zeros around them; in place if they already are
/// that.
inline const float* whole_steps(const Rows& rows, int count, int full, float* copy,
                                size_t& stride) {
  const size_t width = whole(rows.width);
  if (rows.type == Type::float32 && rows.width == width && count == full) {
    stride = rows.stride;
    return static_cast<const float*>(rows.data) + rows.first;
  }
  stride = width;
  std::memset(copy, 0, full * width * sizeof(float));
  for (int i = 0; i < count; ++i) {
    widen(rows.type, rows.data, rows.first + i * rows.stride, rows.width, copy + i * width);
  }
  return copy;
}

/// A task packs one tile of keys of one head.
template <int Terms>
struct PackWork final : ParallelWork {
  Call call;
  PackedHeads heads;

  PackWork(const Call& call, const PackedHeads& heads) : call(call), heads(heads) {}
  void work(TaskCursor& cursor) override {
    const Problem& p = call.problem;
    const size_t widest = std::max(whole(p.head_dim), whole(p.value_dim));
    Scratch scratch;
    if (!scratch.reserve(kKeyBlock * widest, 1)) return;
    float* const copy = scratch.take(kKeyBlock * widest);
    for (size_t task; cursor.next(task);) {
      const size_t head = heads.first + task / heads.tiles, tile = task % heads.tiles;
      const uint32_t b = uint32_t(head / p.kv_heads), kv_head = uint32_t(head % p.kv_heads);
      const uint32_t first = uint32_t(tile * kKeyBlock);
      const int count = int(std::min<uint32_t>(kKeyBlock, p.key_length - first));
      size_t stride;
      const float* rows =
          whole_steps(key_rows(call, b, kv_head, first), count, kKeyBlock, copy, stride);
      for (int half = 0; half < 2; ++half) {
        pack_rows<Terms>(rows + half * kStepDepth * stride, stride, whole(p.head_dim),
                         heads.keys(head, tile) + half * heads.key_bytes / 2);
      }
      rows = whole_steps(value_rows(call, b, kv_head, first), count, kKeyBlock, copy, stride);
      pack_columns<Terms>(rows, stride, whole(p.value_dim), heads.values(head, tile));
    }
  }
};

// -------------------------------------------------------------------------------- one query block

/// One thread's buffers: those of the vector kernel, and the packed operands.
struct AmxBuffers {
  ForwardBuffers vector;
  uint8_t* queries;       // operand B
  uint8_t* weights[2];    // operand B
  float* scores[2];       // [kKeyBlock][kQueryBlock], in units of log2(e)
  float* minus_max;       // [kQueryBlock], in units of log2(e)
  float* sums;            // [kQueryBlock]
  float* query_channels;  // [whole head_dim][kQueryBlock], in units of log2(e)

  bool allocate(const Call& call, int terms) {
    const Problem& p = call.problem;
    const size_t query_floats = steps_of(p.head_dim) * terms * kPairBytes / sizeof(float);
    const size_t weight_floats = 2 * terms * kPairBytes / sizeof(float);
    const size_t tile = size_t{kKeyBlock} * kQueryBlock;
    const size_t context_floats = whole(p.value_dim) * kQueryBlock;
    const size_t rows = whole(p.head_dim) * kQueryBlock;
    if (!vector.allocate(call) || !scratch_.reserve(query_floats + 2 * weight_floats + 2 * tile +
                                                        context_floats + 2 * kQueryBlock + rows,
                                                    9)) {
      return false;
    }
    queries = reinterpret_cast<uint8_t*>(scratch_.take(query_floats));
    for (auto& w : weights) w = reinterpret_cast<uint8_t*>(scratch_.take(weight_floats));
    for (auto& s : scores) s = scratch_.take(tile);
    vector.context = scratch_.take(context_floats);  // in whole steps
    minus_max = scratch_.take(kQueryBlock);
    sums = scratch_.take(kQueryBlock);
    query_channels = scratch_.take(rows);
    return !scratch_.overrun();
  }

 private:
  Scratch scratch_;
};

/// A block of queries on its way over the keys of its head.
template <int Terms>
struct AmxBlock {
  const Call& call;
  const PackedHeads& heads;
  const QueryBlock& q;
  AmxBuffers& f;
  size_t head;              // key/value head, counted over the batch
  KeyRange all;             // keys that every query of the block sees
  Mask unset[2];            // lanes that have seen no key yet: they have no maximum
  bool waiting = false;     // whether a tile's weights wait for their values
  size_t waiting_tile = 0;  // which one
  WeightDropout dropout;    // set up where weights drop
};

/// `Steps`: those of head_dim and value_dim if they are the same and known to the compiler, else 0.
template <int Steps, int Terms, typename Work>
inline __attribute__((always_inline)) void multiply_scores(const AmxBlock<Terms>& k, size_t tile,
                                                           const float* start, float* scores,
                                                           Work& work) {
  const uint8_t* keys = k.heads.keys(k.head, tile);
  const size_t steps = Steps ? Steps : steps_of(k.call.problem.head_dim);
  for (int half = 0; half < 2; ++half, keys += k.heads.key_bytes / 2) {
    multiply_packed<Terms>(keys, k.f.queries, steps, start, 0,
                           scores + half * 2 * kTileSide * kQueryBlock, kQueryBlock, work);
  }
}

template <int Steps, int Terms, typename Work>
inline __attribute__((always_inline)) void multiply_values(const AmxBlock<Terms>& k, size_t tile,
                                                           const uint8_t* weights, Work& work) {
  const uint8_t* values = k.heads.values(k.head, tile);
  float* context = k.f.vector.context;
  for (size_t s = 0; s < (Steps ? Steps : steps_of(k.call.problem.value_dim)); ++s) {
    multiply_packed<Terms>(values, weights, 2, context, kQueryBlock, context, kQueryBlock, work);
    values += 2 * Terms * kPairBytes;
    context += kStepDepth * kQueryBlock;
  }
}

/// Raises the maximum of the lanes in `lanes` by `rise` and rescales what was summed under the old.
template <int Terms>
inline void raise_maximum(AmxBlock<Terms>& k, int v, Mask lanes, Floats rise) {
  float* const minus_max = k.f.minus_max + v * kLanes;
  float* const sums = k.f.sums + v * kLanes;
  const Floats by = select(lanes, rise, broadcast(0.0f));
  store(minus_max, sub(load(minus_max), by));
  // A lane's first maximum may lie anywhere; there is nothing yet to rescale.
  const Floats zero = broadcast(0.0f), floor = broadcast(-200.0f), down = sub(zero, by);
  const Floats bounded = select(less(down, floor), floor, select(less(zero, down), zero, down));
  const Floats factor = exponential2<Terms>(bounded);
  store(sums, mul(load(sums), factor));
  for (size_t c = 0; c < k.call.problem.value_dim; ++c) {
    float* const context = k.f.vector.context + c * kQueryBlock + v * kLanes;
    store(context, mul(load(context), factor));
  }
}

// ------------------------------------------------------------------------------------- the tiles

/// Applies softcap, mask, exclusions and `scores` dropout to a tile of scores in units of log2(e).
/// Excluded keys get -infinity. Keeps tanh(score / softcap) if `tangent` is given.
inline void apply_rules(const Call& call, const QueryBlock& q, KeyTile tile,
                        const ScoreBuffers& buffers, float* keep, float* scores, float* tangent) {
  const Problem& p = call.problem;
  const Floats excluded = broadcast(-kInfinity);
  if (p.softcap > 0) {
    const Floats inward = broadcast(kLn2 / p.softcap), outward = broadcast(p.softcap * kLog2E);
    for (int i = 0; i < kKeyBlock * kQueryBlock; i += kLanes) {
      const Floats t = hyperbolic_tangent(mul(load(scores + i), inward));
      if (tangent) store(tangent + i, t);
      store(scores + i, mul(outward, t));
    }
  }
  if (p.mask_type != MaskType::none) {
    bias_tile(call, q, tile, buffers.mask_rows, buffers.bias);
    for (int i = 0; i < tile.count * kQueryBlock; i += kLanes) {
      const Floats bias = load(buffers.bias + i);
      const Floats sum = multiply_add(bias, broadcast(kLog2E), load(scores + i));
      store(scores + i, select(equal(bias, excluded), excluded, sum));
    }
  }
  exclude_unseen(q, tile, scores);
  const Dropout& d = call.dropout;
  if (d.on() && d.placement == Placement::scores) drop_scores(call, q, tile, keep, scores);
}

/// Whether a tile needs no rule: every query sees every key, and nothing is added.
inline bool is_plain(const Call& call, KeyRange all, KeyTile tile) {
  const Problem& p = call.problem;
  const bool ruled = p.mask_type != MaskType::none || p.softcap > 0 ||
                     (call.dropout.on() && call.dropout.placement == Placement::scores);
  return !ruled && tile.count == kKeyBlock && tile.first >= all.begin &&
         tile.first + kKeyBlock <= all.end;
}

/// The keys that all queries of a block see, padding lanes aside: those may see anything here,
/// since their results are not used and a block with a NaN is computed again.
inline KeyRange seen_by_all(const QueryBlock& q) {
  KeyRange all = q.seen[0];
  for (uint32_t i = 1; i < q.count; ++i) {
    all = {std::max(all.begin, q.seen[i].begin), std::min(all.end, q.seen[i].end)};
  }
  return all;
}

/// Adds the values of the tile whose weights are waiting.
template <int Terms>
inline void flush_values(AmxBlock<Terms>& k) {
  NoWork none;
  if (k.waiting) multiply_values<0>(k, k.waiting_tile, k.f.weights[k.waiting_tile & 1], none);
  k.waiting = false;
}

/// Gives every lane that sees a key of the tile a maximum that fits its scores, which are relative
/// to the maximum so far.
template <int Terms>
inline void settle_maximum(AmxBlock<Terms>& k, KeyTile tile, float* scores) {
  for (int v = 0; v < kQueryVectors; ++v) {
    float* const column = scores + v * kLanes;
    Floats top = broadcast(-kInfinity);
    for (int r = 0; r < tile.count; ++r)
      top = max_ignoring_nan(load(column + r * kQueryBlock), top);
    const Mask seen = less(broadcast(-kInfinity), top);
    const Mask raised = seen & (k.unset[v] | less(broadcast(20.0f), top));
    k.unset[v] &= Mask(~seen);
    Floats by = broadcast(0.0f);
    if (any(raised)) {
      flush_values(k);  // under the old maximum
      raise_maximum(k, v, raised, top);
      by = select(raised, top, by);
    }
    // 2^-200 is 0 here, and unlike -infinity it passes through exponential2; NaN stays.
    const Floats floor = broadcast(-200.0f);
    for (int r = 0; r < tile.count; ++r) {
      const Floats shifted = sub(load(column + r * kQueryBlock), by);
      store(column + r * kQueryBlock, max_ignoring_nan(floor, shifted));
    }
    for (int r = tile.count; r < kKeyBlock; ++r) store(column + r * kQueryBlock, floor);
  }
}

/// Applies the rules to the scores of a tile, unless it needs none.
template <int Terms>
inline void prepare_scores(AmxBlock<Terms>& k, KeyTile tile, float* scores) {
  if (!any(k.unset[0] | k.unset[1]) && is_plain(k.call, k.all, tile)) return;
  if (k.call.problem.softcap > 0) {  // the cap is on the score itself
    for (int i = 0; i < kKeyBlock * kQueryBlock; i += kLanes) {
      store(scores + i, sub(load(scores + i), load(k.f.minus_max + i % kQueryBlock)));
    }
  }
  apply_rules(k.call, k.q, tile, k.f.vector.scores, k.f.vector.keep, scores, nullptr);
  if (k.call.problem.softcap > 0) {
    for (int i = 0; i < kKeyBlock * kQueryBlock; i += kLanes) {
      store(scores + i, add(load(scores + i), load(k.f.minus_max + i % kQueryBlock)));
    }
  }
  settle_maximum(k, tile, scores);
}

/// Whether decisions of `weights` dropout are drawn on the way from scores to weights.
inline bool draws_on_the_way(const Call& call) {
  const Dropout& d = call.dropout;
  return d.on() && d.placement == Placement::weights && !call.inputs.keep_mask &&
         call.problem.key_offset % kDecisionsPerCall == 0 && d.threshold < 65536;
}

/// Sets up the softmax of a tile.
template <bool Drops, int Terms>
inline SoftmaxWork<Terms, Drops> softmax_work(AmxBlock<Terms>& k, KeyTile tile, uint32_t rate) {
  const Dropout& d = k.call.dropout;
  const size_t side = tile.first / kKeyBlock & 1;
  const float* keep = nullptr;
  if (Drops) {
    k.dropout.first_group = (k.call.problem.key_offset + tile.first) / kDecisionsPerCall;
  } else if (d.on() && d.placement == Placement::weights) {
    keep_tile(k.call, k.q, tile.first, tile.count, k.f.vector.keep);
    keep = k.f.vector.keep;
  }
  return {k.f.scores[side], k.f.weights[side], &k.dropout, keep, rate};
}

/// Moves the maximum of lanes whose sum has grown too large: scores of this tile and of the next
/// are brought to the new maximum.
template <int Terms>
inline void move_maximum(AmxBlock<Terms>& k, const Floats* sums, float* scores,
                         float* next_scores) {
  for (int v = 0; v < kQueryVectors; ++v) {
    const Mask large = Mask(~less(sums[v], broadcast(kLargestSum)));
    if (!any(large)) continue;
    Floats top = broadcast(-kInfinity);
    for (int r = 0; r < kKeyBlock; ++r) {
      top = max_ignoring_nan(load(scores + r * kQueryBlock + v * kLanes), top);
    }
    raise_maximum(k, v, large, top);
    const Floats by = select(large, top, broadcast(0.0f));
    for (int r = 0; r < kKeyBlock; ++r) {
      float* const s = scores + r * kQueryBlock + v * kLanes;
      float* const n = next_scores + r * kQueryBlock + v * kLanes;
      store(s, sub(load(s), by));
      store(n, sub(load(n), by));
    }
  }
}

inline bool too_large(const Floats* sums) {
  const Floats bound = broadcast(kLargestSum);
  return (less(sums[0], bound) & less(sums[1], bound)) != Mask(~0);
}

/// Runs over the tiles that the block sees as a pipeline: while the weights of tile t are made,
/// tiles multiply the scores of t + 1 and the values of t - 1.
template <int Steps, bool Drops, int Terms>
inline void accumulate_context_amx(AmxBlock<Terms>& k) {
  const Problem& p = k.call.problem;
  AmxBuffers& f = k.f;
  std::memset(f.vector.context, 0, whole(p.value_dim) * kQueryBlock * sizeof(float));
  std::memset(f.minus_max, 0, kQueryBlock * sizeof(float));
  std::memset(f.sums, 0, kQueryBlock * sizeof(float));
  TileRange range(k.q.any, p.key_length);
  if (range.done()) return;
  const uint32_t steps = uint32_t(2 * steps_of(p.head_dim) + 2 * steps_of(p.value_dim));
  const uint32_t rate = (kPairsPerTile << 16) / (steps * kAdvancesAStep<Terms>)+1;
  NoWork none;
  multiply_scores<Steps>(k, range.first / kKeyBlock, f.minus_max,
                         f.scores[range.first / kKeyBlock & 1], none);
  while (!range.done()) {
    const KeyTile tile = range.tile();
    const size_t t = tile.first / kKeyBlock;
    float* const scores = f.scores[t & 1];
    float* const next_scores = f.scores[(t + 1) & 1];
    range.advance();
    prepare_scores(k, tile, scores);
    SoftmaxWork<Terms, Drops> softmax = softmax_work<Drops>(k, tile, rate);
    if (!range.done()) multiply_scores<Steps>(k, t + 1, f.minus_max, next_scores, softmax);
    if (k.waiting) multiply_values<Steps>(k, t - 1, f.weights[(t - 1) & 1], softmax);
    softmax.finish();
    if (__builtin_expect(too_large(softmax.sums), false)) {
      move_maximum(k, softmax.sums, scores, next_scores);
      softmax = softmax_work<Drops>(k, tile, rate);
      softmax.finish();
    }
    for (int v = 0; v < kQueryVectors; ++v) {
      store(f.sums + v * kLanes, add(load(f.sums + v * kLanes), softmax.sums[v]));
    }
    k.waiting = true;
    k.waiting_tile = t;
  }
  flush_values(k);
}

template <bool Drops, int Terms>
inline void accumulate_context_by_steps(AmxBlock<Terms>& k) {
  const size_t steps = steps_of(k.call.problem.head_dim);
  const bool same = steps == steps_of(k.call.problem.value_dim);
  if (same && steps == 2) return accumulate_context_amx<2, Drops>(k);
  if (same && steps == 4) return accumulate_context_amx<4, Drops>(k);
  accumulate_context_amx<0, Drops>(k);
}

// ------------------------------------------------------------------------------------- the pass

template <int Terms>
struct AmxForwardWork final : ParallelWork {
  Call call;
  PackedHeads heads;
  ForwardOutputs outputs;

  AmxForwardWork(const Call& call, const PackedHeads& heads, const ForwardOutputs& outputs)
      : call(call), heads(heads), outputs(outputs) {}
  void work(TaskCursor& cursor) override;
};

/// Channels of queries, [width][kQueryBlock], times `scale`, with zeros up to whole steps.
inline void scale_channels(const float* channels, float scale, size_t width, float* to) {
  const size_t size = width * kQueryBlock;
  for (size_t i = 0; i < size; i += kLanes) {
    store(to + i, mul(load(channels + i), broadcast(scale)));
  }
  std::memset(to + size, 0, (whole(width) * kQueryBlock - size) * sizeof(float));
}

template <int Terms>
inline void amx_forward_block(const AmxForwardWork<Terms>& w, const QueryBlock& q, AmxBuffers& f) {
  const Problem& p = w.call.problem;
  const size_t head = size_t{q.b} * p.kv_heads + q.kv_head;
  ForwardBuffers& v = f.vector;
  load_queries(w.call, q, v.rows, v.scores.queries);
  scale_channels(v.scores.queries, kLog2E, p.head_dim, f.query_channels);
  pack_query_columns<Terms>(f.query_channels, whole(p.head_dim), f.queries);

  AmxBlock<Terms> block{w.call, w.heads, q, f, head, seen_by_all(q), {Mask(~0), Mask(~0)},
                        false,  0,       {}};
  if (draws_on_the_way(w.call)) {
    block.dropout.start_block(w.call, q);
    accumulate_context_by_steps<true>(block);
  } else {
    accumulate_context_by_steps<false>(block);
  }

  std::memcpy(v.row_sum, f.sums, kQueryBlock * sizeof(float));
  for (int i = 0; i < kQueryBlock; ++i) v.row_max[i] = -f.minus_max[i] * kLn2;
  const bool nan = finish_context(w.call, q, v);
  if (nan) {
    forward_block(w.call, q, w.outputs, v);
  } else {
    store_context(w.call, q, w.outputs, v);
    if (wants_matrices(w.outputs)) write_matrices(w.call, q, w.outputs, v);
  }
}

/// Flushes denormals to 0 while it lives, as AMX does: they would be slow, and are too small to
/// count.
class FlushDenormals {
 public:
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }
  FlushDenormals(const FlushDenormals&) = delete;

 private:
  unsigned saved_;
};

template <int Terms>
void AmxForwardWork<Terms>::work(TaskCursor& cursor) {
  const Problem& p = call.problem;
  AmxBuffers buffers;
  if (!buffers.allocate(call, Terms)) return;
  const FlushDenormals flush;
  configure_tiles();
  const size_t blocks = blocks_per_head(p), group = p.query_heads / p.kv_heads;
  for (size_t task; cursor.next(task);) {
    const size_t query_head = heads.first * group + task / blocks;
    const size_t block = blocks - 1 - task % blocks;  // the longest first under the causal rule
    amx_forward_block(
        *this,
        query_block(call, uint32_t(query_head / p.query_heads),
                    uint32_t(query_head % p.query_heads), uint32_t(block * kQueryBlock)),
        buffers);
  }
  _tile_release();
}

/// Packed heads at a time, or one head: about what the cache of a core holds, so that what one pass
/// packs the next one finds there.
constexpr size_t kPackedBytes = size_t{2} << 20;

template <int Terms>
Status amx_forward_terms(const Call& call, const ForwardOutputs& outputs,
                         const CancelToken& cancel) {
  const Problem& p = call.problem;
  ThreadPool& pool = ThreadPool::shared();
  const bool parallel = worth_sharing(p);
  PackedHeads heads(p, Terms);
  const size_t all = size_t{p.batch} * p.kv_heads;
  const size_t wave = std::clamp<size_t>(kPackedBytes / heads.head_bytes(), 1, all);
  Scratch memory;
  if (!memory.reserve(wave * heads.head_bytes() / sizeof(float), 1)) {
    return {StatusCode::out_of_memory, "no memory for packed keys and values"};
  }
  heads.data = reinterpret_cast<uint8_t*>(memory.take(wave * heads.head_bytes() / sizeof(float)));
  for (; heads.first < all; heads.first += wave) {
    heads.count = std::min(wave, all - heads.first);
    PackWork<Terms> pack(call, heads);
    Status status = pool.run(heads.count * heads.tiles, parallel, cancel, pack);
    if (!status.ok()) return status;
    AmxForwardWork<Terms> work(call, heads, outputs);
    const size_t query_heads = heads.count * (p.query_heads / p.kv_heads);
    status = pool.run(query_heads * blocks_per_head(p), parallel, cancel, work);
    if (!status.ok()) return status;
  }
  return {};
}

/// Too few queries do not repay the packing of the keys.
constexpr uint32_t kFewestQueries = 16;

Status amx_forward(const Problem& p, const Inputs& inputs, const ForwardOutputs& outputs,
                   const CancelToken& cancel) {
  if (p.query_length < kFewestQueries) return forward(p, inputs, outputs, cancel);
  const Call call{p, inputs, resolve_dropout(p, inputs.keep_mask != nullptr)};
  switch (p.precision) {
    case Precision::highest:
      return amx_forward_terms<3>(call, outputs, cancel);
    case Precision::high:
      return amx_forward_terms<2>(call, outputs, cancel);
    default:
      return amx_forward_terms<1>(call, outputs, cancel);
  }
}
