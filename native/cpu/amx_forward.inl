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

// ----------------------------------------------------------------------------------- denormals

/// While it lives, denormals are flushed to 0, as AMX does: they would be slow, and are too small
/// to count. Or they are kept, for vector kernels that do again what AMX could not.
class Denormals {
 public:
  enum Fate : unsigned { kept = 0, flushed = 0x8040 };

  explicit Denormals(Fate fate) : saved_(_mm_getcsr()) {
    _mm_setcsr((saved_ & ~unsigned{flushed}) | fate);
  }
  ~Denormals() { _mm_setcsr(saved_); }
  Denormals(const Denormals&) = delete;

 private:
  unsigned saved_;
};

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

  /// The decisions for group `group` of the tile. Too long for the many places that call it.
  __attribute__((noinline)) void draw(uint32_t group) {
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

/// Makes a sample's weights of a tile from packed weights, two keys at a time.
template <int Terms>
struct DropWork {
  const uint8_t* weights;  // operand B
  uint8_t* dropped;        // operand B
  WeightDropout* dropout;
  uint32_t rate;  // as in SoftmaxWork
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
    if (pair % 4 == 0) dropout->draw(uint32_t(pair) / 4);
    for (int v = 0; v < kQueryVectors; ++v) {
      const __mmask32 kept = dropout->kept(pair, v);
      for (int t = 0; t < Terms; ++t) {
        const size_t at = pair_offset<Terms>(pair, v) + t * kPairBytes;
        _mm512_store_si512(dropped + at,
                           _mm512_maskz_mov_epi16(kept, _mm512_load_si512(weights + at)));
      }
    }
    ++pair;
  }
};

// ----------------------------------------------------------------------------------- packed keys

/// What a tile of keys and values is packed into, as operands A: two halves of keys
/// [2][steps of head_dim][terms], then columns of values [steps of value_dim][2][terms].
struct PackedTile {
  size_t key_bytes, value_bytes;

  PackedTile(const Problem& p, int terms)
      : key_bytes(2 * steps_of(p.head_dim) * terms * kPairBytes),
        value_bytes(2 * steps_of(p.value_dim) * terms * kPairBytes) {}
  size_t bytes() const { return key_bytes + value_bytes; }
};

/// The same run of tiles of consecutive key/value heads, packed.
struct PackedKeys {
  PackedTile layout;
  size_t first_head = 0, heads = 0;  // counted over the batch
  size_t first_tile = 0, tiles = 0;
  uint8_t* data = nullptr;

  const uint8_t* keys(size_t head, size_t tile) const {
    return data + ((head - first_head) * tiles + tile - first_tile) * layout.bytes();
  }
  const uint8_t* values(size_t head, size_t tile) const {
    return keys(head, tile) + layout.key_bytes;
  }
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

/// Where PackWork pads the rows of a tile.
inline size_t pack_floats(const Problem& p) {
  return kKeyBlock * std::max(whole(p.head_dim), whole(p.value_dim));
}

/// A task packs one tile of keys of one head. The thread that comes first takes `spare`, of
/// pack_floats(), so that the work is done however short memory is.
template <int Terms>
struct PackWork final : ParallelWork {
  Call call;
  PackedKeys packed;
  std::atomic<float*> spare;

  PackWork(const Call& call, const PackedKeys& packed, float* spare)
      : call(call), packed(packed), spare(spare) {}
  void work(TaskCursor& cursor) override {
    const Problem& p = call.problem;
    Scratch scratch;
    float* copy = spare.exchange(nullptr, std::memory_order_relaxed);
    if (!copy) {
      if (!scratch.reserve(pack_floats(p), 1)) return;
      copy = scratch.take(pack_floats(p));
    }
    for (size_t task; cursor.next(task);) {
      const size_t head = packed.first_head + task / packed.tiles;
      const uint32_t b = uint32_t(head / p.kv_heads), kv_head = uint32_t(head % p.kv_heads);
      const uint32_t first = uint32_t((packed.first_tile + task % packed.tiles) * kKeyBlock);
      const int count = int(std::min<uint32_t>(kKeyBlock, p.key_length - first));
      uint8_t* const keys = packed.data + task * packed.layout.bytes();
      const size_t half_bytes = packed.layout.key_bytes / 2;
      size_t stride;
      const float* rows =
          whole_steps(key_rows(call, b, kv_head, first), count, kKeyBlock, copy, stride);
      for (int half = 0; half < 2; ++half) {
        pack_rows<Terms>(rows + half * kStepDepth * stride, stride, whole(p.head_dim),
                         keys + half * half_bytes);
      }
      rows = whole_steps(value_rows(call, b, kv_head, first), count, kKeyBlock, copy, stride);
      pack_columns<Terms>(rows, stride, whole(p.value_dim), keys + packed.layout.key_bytes);
    }
  }
};

// -------------------------------------------------------------------------------- query blocks

/// After so many tiles their sums are added to those of the tiles before: short sums of short sums
/// are rounded less than one long sum.
constexpr size_t kFoldTiles = 16;

/// Whether there are tiles enough for that.
inline bool folds(const Problem& p) { return p.key_length > kFoldTiles * kKeyBlock; }

/// What a block of queries has summed so far.
struct RunningRows {
  float* minus_max;  // [kQueryBlock], in units of log2(e)
  float* sums;       // [kQueryBlock]
  float* context;    // [contexts][whole value_dim][kQueryBlock], of the latest tiles; behind it,
                     // where there are folds, as much again for the tiles before

  /// Of the context, for either part.
  static size_t rows(const Problem& p, uint32_t contexts) { return contexts * whole(p.value_dim); }
  static size_t floats(const Problem& p, uint32_t contexts) {
    return (2 + (folds(p) ? 2 : 1) * rows(p, contexts)) * kQueryBlock;
  }
  RunningRows() : minus_max(nullptr), sums(nullptr), context(nullptr) {}
  explicit RunningRows(float* data)
      : minus_max(data), sums(data + kQueryBlock), context(data + 2 * kQueryBlock) {}
};

/// A block of queries on its way over the packed keys of its head.
struct AmxBlock {
  QueryBlock q;
  size_t head;                 // key/value head, counted over the batch
  KeyRange all;                // keys that every query of the block sees
  TileRange tiles{{0, 0}, 0};  // still to come
  bool is_last;                // whether no later run of tiles has a key for it
  Mask unset[2];               // lanes that have seen no key yet: they have no maximum
  uint8_t* queries;            // operand B
  RunningRows sum;
  WeightDropout dropout;  // set up where weights drop
};

/// A tile of a block.
struct BlockTile {
  AmxBlock* block = nullptr;  // null: none
  KeyTile tile{0, 0};
  int side = 0;  // which of the two buffers for scores and weights it uses

  size_t number() const { return tile.first / kKeyBlock; }
};

/// Where the blocks of a pass go: to the outputs of a call, or into samples.
struct AmxResults {
  ForwardOutputs outputs{};
  const SampleResults* samples = nullptr;  // null: an ordinary call
  SampleGroup group{};

  /// How many contexts a block sums: under `weights` dropout, one a sample.
  uint32_t contexts(const Call& call) const {
    return samples && call.dropout.placement == Placement::weights ? group.count : 1;
  }
};

/// One thread's buffers: those of the vector kernel, and the packed operands.
struct AmxBuffers {
  // The tiles at hand may belong to three blocks: one ends, one goes on, one begins.
  static constexpr int kBlocks = 3;

  ForwardBuffers vector;
  uint8_t* queries[kBlocks];  // operand B
  float* sums[kBlocks];       // RunningRows
  uint8_t* weights[2];        // operand B
  float* scores[2];           // [kKeyBlock][kQueryBlock], in units of log2(e)
  float* rows;                // [kQueryBlock][whole head_dim]
  float* pack_rows;           // pack_floats()

  bool allocate(const Call& call, int terms, const AmxResults& results) {
    const Problem& p = call.problem;
    const uint32_t contexts = results.contexts(call);
    if (results.samples && !allocate_samples(call, terms, contexts)) return false;
    const size_t query_floats = steps_of(p.head_dim) * terms * kPairBytes / sizeof(float);
    const size_t weight_floats = 2 * terms * kPairBytes / sizeof(float);
    const size_t tile = size_t{kKeyBlock} * kQueryBlock,
                 sum_floats = RunningRows::floats(p, contexts);
    const size_t row_floats = whole(p.head_dim) * kQueryBlock;
    const size_t floats = kBlocks * (query_floats + sum_floats) + 2 * (weight_floats + tile) +
                          row_floats + pack_floats(p);
    if (!vector.allocate(call) || !scratch_.reserve(floats, 2 * kBlocks + 6)) return false;
    for (auto& q : queries) q = reinterpret_cast<uint8_t*>(scratch_.take(query_floats));
    for (auto& s : sums) s = scratch_.take(sum_floats);
    for (auto& w : weights) w = reinterpret_cast<uint8_t*>(scratch_.take(weight_floats));
    for (auto& s : scores) s = scratch_.take(tile);
    rows = scratch_.take(row_floats);
    pack_rows = scratch_.take(pack_floats(p));
    return !scratch_.overrun();
  }

  SampleBuffers samples;
  uint8_t* undropped;       // operand B: the weights of a tile before their dropout
  WeightDropout* dropouts;  // [samples of a group]

 private:
  /// What samples need besides: `count` of them where they drop weights.
  bool allocate_samples(const Call& call, int terms, uint32_t count) {
    const size_t weight_floats = 2 * terms * kPairBytes / sizeof(float);
    const size_t dropout_floats = count * sizeof(WeightDropout) / sizeof(float);
    if (!samples.allocate(call.problem, 0) ||
        !sample_scratch_.reserve(weight_floats + dropout_floats, 2)) {
      return false;
    }
    undropped = reinterpret_cast<uint8_t*>(sample_scratch_.take(weight_floats));
    dropouts = reinterpret_cast<WeightDropout*>(sample_scratch_.take(dropout_floats));
    return !sample_scratch_.overrun();
  }

  Scratch scratch_, sample_scratch_;
};

/// As PackWork, with `spare`.
template <int Terms>
struct AmxForwardWork final : ParallelWork {
  Call call;
  PackedKeys packed;
  float* sums;  // RunningRows of all blocks, between runs of tiles; null if there is but one run
  AmxResults results;
  uint32_t contexts;
  std::atomic<AmxBuffers*> spare;

  AmxForwardWork(const Call& call, const PackedKeys& packed, float* sums, const AmxResults& results,
                 AmxBuffers* spare)
      : call(call),
        packed(packed),
        sums(sums),
        results(results),
        contexts(results.contexts(call)),
        spare(spare) {}
  /// Rows of context that belong to a maximum.
  size_t context_rows() const {
    const Problem& p = call.problem;
    if (contexts == 1 && !folds(p)) return p.value_dim;
    return (folds(p) ? 2 : 1) * RunningRows::rows(p, contexts);
  }
  void work(TaskCursor& cursor) override;
  void run(TaskCursor& cursor, AmxBuffers& buffers) const;
};

/// `Steps`: those of head_dim and value_dim if they are the same and known to the compiler, else 0.
template <int Steps, int Terms, typename Work>
inline __attribute__((always_inline)) void multiply_scores(const AmxForwardWork<Terms>& w,
                                                           TileSums& sums, const BlockTile& t,
                                                           float* scores, Work& work) {
  const uint8_t* keys = w.packed.keys(t.block->head, t.number());
  const size_t steps = Steps ? Steps : steps_of(w.call.problem.head_dim);
  for (int half = 0; half < 2; ++half, keys += w.packed.layout.key_bytes / 2) {
    multiply_packed<Terms>(sums, keys, t.block->queries, steps, t.block->sum.minus_max, 0,
                           scores + half * 2 * kTileSide * kQueryBlock, kQueryBlock, work);
  }
}

template <int Steps, int Terms, typename Work>
inline __attribute__((always_inline)) void multiply_values(const AmxForwardWork<Terms>& w,
                                                           TileSums& sums, const BlockTile& t,
                                                           const uint8_t* weights, float* context,
                                                           Work& work) {
  const uint8_t* values = w.packed.values(t.block->head, t.number());
  for (size_t s = 0; s < (Steps ? Steps : steps_of(w.call.problem.value_dim)); ++s) {
    multiply_packed<Terms>(sums, values, weights, 2, context, kQueryBlock, context, kQueryBlock,
                           work);
    values += 2 * Terms * kPairBytes;
    context += kStepDepth * kQueryBlock;
  }
}

/// Raises the maximum of the lanes in `lanes` by `rise` and rescales what was summed under the old.
template <int Terms>
inline void raise_maximum(const RunningRows& sum, size_t context_rows, int v, Mask lanes,
                          Floats rise) {
  float* const minus_max = sum.minus_max + v * kLanes;
  float* const sums = sum.sums + v * kLanes;
  const Floats by = select(lanes, rise, broadcast(0.0f));
  store(minus_max, sub(load(minus_max), by));
  // A lane's first maximum may lie anywhere; there is nothing yet to rescale.
  const Floats zero = broadcast(0.0f), floor = broadcast(-200.0f), down = sub(zero, by);
  const Floats bounded = select(less(down, floor), floor, select(less(zero, down), zero, down));
  const Floats factor = exponential2<Terms>(bounded);
  store(sums, mul(load(sums), factor));
  for (size_t c = 0; c < context_rows; ++c) {
    float* const context = sum.context + c * kQueryBlock + v * kLanes;
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
  const Floats lowest = broadcast(std::numeric_limits<float>::lowest());
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
      const Floats bias = load(buffers.bias + i), score = load(scores + i);
      const Floats sum = multiply_add(bias, broadcast(kLog2E), score);
      // The least float, which masks for padding may hold, is beyond it in units of log2(e).
      const Floats finite = select(less(sum, lowest), lowest, sum);
      store(scores + i, select(equal(bias, excluded) | equal(score, excluded), excluded, finite));
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

/// Before a tile is added: ends the short sums of the tiles before, where it is time to.
template <int Terms>
inline void fold_context(const AmxForwardWork<Terms>& w, TileSums& sums, const BlockTile& t) {
  if (t.number() == 0 || t.number() % kFoldTiles != 0) return;
  sums.store();
  const size_t size = RunningRows::rows(w.call.problem, w.contexts) * kQueryBlock;
  float* const latest = t.block->sum.context;
  for (size_t i = 0; i < size; i += kLanes) {
    float* const before = latest + size + i;
    store(before, add(load(before), load(latest + i)));
    store(latest + i, broadcast(0.0f));
  }
}

/// Adds the values of the tile whose weights are waiting.
template <int Terms>
inline void flush_values(const AmxForwardWork<Terms>& w, const AmxBuffers& f, TileSums& sums,
                         BlockTile& waiting) {
  NoWork none;
  if (waiting.block) {
    fold_context(w, sums, waiting);
    multiply_values<0>(w, sums, waiting, f.weights[waiting.side], waiting.block->sum.context, none);
  }
  waiting.block = nullptr;
}

/// Gives every lane that sees a key of the tile a maximum that fits its scores, which are relative
/// to the maximum so far.
template <int Terms>
inline void settle_maximum(const AmxForwardWork<Terms>& w, const AmxBuffers& f, TileSums& sums,
                           const BlockTile& t, BlockTile& waiting) {
  AmxBlock& k = *t.block;
  for (int v = 0; v < kQueryVectors; ++v) {
    float* const column = f.scores[t.side] + v * kLanes;
    Floats top = broadcast(-kInfinity);
    for (int r = 0; r < t.tile.count; ++r)
      top = max_ignoring_nan(load(column + r * kQueryBlock), top);
    const Mask seen = less(broadcast(-kInfinity), top);
    const Mask raised = seen & (k.unset[v] | less(broadcast(20.0f), top));
    k.unset[v] &= Mask(~seen);
    Floats by = broadcast(0.0f);
    if (any(raised)) {
      if (waiting.block == &k) flush_values(w, f, sums, waiting);  // under the old maximum
      sums.store();
      raise_maximum<Terms>(k.sum, w.context_rows(), v, raised, top);
      by = select(raised, top, by);
    }
    // 2^-200 is 0 here, and unlike -infinity it passes through exponential2; NaN stays.
    const Floats floor = broadcast(-200.0f);
    for (int r = 0; r < t.tile.count; ++r) {
      const Floats shifted = sub(load(column + r * kQueryBlock), by);
      store(column + r * kQueryBlock, max_ignoring_nan(floor, shifted));
    }
    for (int r = t.tile.count; r < kKeyBlock; ++r) store(column + r * kQueryBlock, floor);
  }
}

/// Applies the rules to the scores of a tile, unless it needs none.
template <int Terms>
inline void prepare_scores(const AmxForwardWork<Terms>& w, const AmxBuffers& f, TileSums& sums,
                           const BlockTile& t, BlockTile& waiting) {
  const AmxBlock& k = *t.block;
  if (!any(k.unset[0] | k.unset[1]) && is_plain(w.call, k.all, t.tile)) return;
  float* const scores = f.scores[t.side];
  const bool capped = w.call.problem.softcap > 0;  // the cap is on the score itself
  for (int i = 0; capped && i < kKeyBlock * kQueryBlock; i += kLanes) {
    store(scores + i, sub(load(scores + i), load(k.sum.minus_max + i % kQueryBlock)));
  }
  apply_rules(w.call, k.q, t.tile, f.vector.scores, f.vector.keep, scores, nullptr);
  for (int i = 0; capped && i < kKeyBlock * kQueryBlock; i += kLanes) {
    store(scores + i, add(load(scores + i), load(k.sum.minus_max + i % kQueryBlock)));
  }
  settle_maximum(w, f, sums, t, waiting);
}

/// Whether decisions of `weights` dropout are drawn on the way from scores to weights.
inline bool draws_on_the_way(const Call& call) {
  const Dropout& d = call.dropout;
  return d.on() && d.placement == Placement::weights && !call.inputs.keep_mask &&
         call.problem.key_offset % kDecisionsPerCall == 0 && d.threshold < 65536;
}

/// Sets up the softmax of a tile.
template <bool Drops, int Terms>
inline SoftmaxWork<Terms, Drops> softmax_work(const AmxForwardWork<Terms>& w, const AmxBuffers& f,
                                              const BlockTile& t, uint32_t rate) {
  const Dropout& d = w.call.dropout;
  AmxBlock& k = *t.block;
  const float* keep = nullptr;
  if (Drops) {
    k.dropout.first_group = (w.call.problem.key_offset + t.tile.first) / kDecisionsPerCall;
  } else if (d.on() && d.placement == Placement::weights) {
    keep_tile(w.call, k.q, t.tile.first, t.tile.count, f.vector.keep);
    keep = f.vector.keep;
  }
  return {f.scores[t.side], f.weights[t.side], &k.dropout, keep, rate};
}

/// Moves the maximum of lanes whose sum has grown too large: scores of this tile, and of the
/// block's next one if they are there, are brought to the new maximum.
template <int Terms>
inline void move_maximum(const RunningRows& sum, size_t context_rows, const Floats* sums,
                         float* scores, float* next_scores) {
  for (int v = 0; v < kQueryVectors; ++v) {
    const Mask large = Mask(~less(sums[v], broadcast(kLargestSum)));
    if (!any(large)) continue;
    Floats top = broadcast(-kInfinity);
    for (int r = 0; r < kKeyBlock; ++r) {
      top = max_ignoring_nan(load(scores + r * kQueryBlock + v * kLanes), top);
    }
    raise_maximum<Terms>(sum, context_rows, v, large, top);
    const Floats by = select(large, top, broadcast(0.0f));
    for (int r = 0; r < kKeyBlock; ++r) {
      const int i = r * kQueryBlock + v * kLanes;
      store(scores + i, sub(load(scores + i), by));
      if (next_scores) store(next_scores + i, sub(load(next_scores + i), by));
    }
  }
}

inline bool too_large(const Floats* sums) {
  const Floats bound = broadcast(kLargestSum);
  return (less(sums[0], bound) & less(sums[1], bound)) != Mask(~0);
}

// ------------------------------------------------------------------------------------- the pass

/// Packs rows of queries, times the scale and log2(e), as operand B. By two products as in the
/// backward pass: one factor, rounded, would shift all scores, and large ones by much.
template <int Terms>
inline void pack_queries(const Rows& rows, uint32_t count, float scale, float* copy, uint8_t* to) {
  const Denormals keep(Denormals::kept);  // the scale may make much of them
  alignas(64) float channels[kTileSide * kTileSide];
  const Floats by = broadcast(scale), log2e = broadcast(kLog2E);
  size_t stride;
  const float* const from = whole_steps(rows, int(count), kQueryBlock, copy, stride);
  for (size_t c = 0; c < whole(rows.width); c += kTileSide) {
    for (int v = 0; v < kQueryVectors; ++v) {
      transpose_block(from + v * kLanes * stride + c, stride, channels, kTileSide);
      uint8_t* const operand = to + c / kStepDepth * Terms * kPairBytes + v * kTileBytes +
                               c % kStepDepth / 2 * sizeof(Words);
      for (int pair = 0; pair < kTileSide / 2; ++pair) {
        const float* const even = channels + 2 * pair * kTileSide;
        split_pair<Terms>(mul(mul(load(even), by), log2e),
                          mul(mul(load(even + kTileSide), by), log2e),
                          operand + pair * sizeof(Words));
      }
    }
  }
}

/// Rows whose maximum, or lse, is so large that in units of log2(e) it may have overflown.
inline Mask beyond_units(Floats size) {
  const Floats most = broadcast(0x1p126f), zero = broadcast(0.0f);
  return less(most, size) | less(most, sub(zero, size));
}

/// Takes over one of the `contexts` of a block that has seen all its keys, and normalises it. True
/// if a NaN came out, or units of log2(e) were too small: the vector kernels have others.
inline bool take_context(const Call& call, const AmxBlock& k, uint32_t number, uint32_t contexts,
                         ForwardBuffers& v) {
  std::memcpy(v.row_sum, k.sum.sums, kQueryBlock * sizeof(float));
  for (int i = 0; i < kQueryBlock; ++i) v.row_max[i] = -k.sum.minus_max[i] * kLn2;
  const size_t size = whole(call.problem.value_dim) * kQueryBlock;
  v.context = k.sum.context + number * size;
  if (folds(call.problem)) {
    const float* const before = v.context + contexts * size;
    for (size_t i = 0; i < size; i += kLanes) {
      store(v.context + i, add(load(before + i), load(v.context + i)));
    }
  }
  bool again = normalise_context(call, k.q, v);
  for (int lane = 0; lane < kQueryBlock; lane += kLanes) {
    const Floats sums = load(k.sum.sums + lane);  // NaN also where p = 1 drops all that shows it
    again |= any(beyond_units(load(k.sum.minus_max + lane)) | Mask(~equal(sums, sums)));
  }
  return again;
}

inline void compute_again(const Call& call, const QueryBlock& q, ForwardBuffers& v) {
  const Denormals keep(Denormals::kept);
  compute_context(call, q, v);
}

/// Takes the results of a block into samples.
inline void finish_samples(const Call& call, const AmxBlock& k, const AmxResults& results,
                           AmxBuffers& f) {
  ForwardBuffers& v = f.vector;
  const SampleGroup group = results.group;
  if (call.dropout.placement == Placement::context) {
    if (take_context(call, k, 0, 1, v)) compute_again(call, k.q, v);
    const Denormals keep(Denormals::kept);  // the least outputs have moments
    return store_context_samples(call, k.q, group, *results.samples, v, f.samples.dropped);
  }
  for (uint32_t s = 0; s < group.count; ++s) {
    const Call sample = call_of_sample(call, group.first + s);
    if (take_context(sample, k, s, group.count, v)) compute_again(sample, k.q, v);
    store_sample(sample, k.q, *results.samples, group.first + s, v);
  }
}

/// Writes the results of a block that has seen all its keys.
template <int Terms>
inline void finish_block(const AmxForwardWork<Terms>& w, const AmxBlock& k, AmxBuffers& f) {
  if (w.results.samples) return finish_samples(w.call, k, w.results, f);
  ForwardBuffers& v = f.vector;
  const ForwardOutputs& outputs = w.results.outputs;
  if (take_context(w.call, k, 0, 1, v)) {
    const Denormals keep(Denormals::kept);
    return forward_block(w.call, k.q, outputs, v);
  }
  drop_context(w.call, k.q, v);
  store_context(w.call, k.q, outputs, v);
  if (!wants_matrices(outputs)) return;
  const Denormals keep(Denormals::kept);
  load_queries(w.call, k.q, v.rows, v.scores.queries);
  write_matrices(w.call, k.q, outputs, v);
}

/// One thread's blocks of queries, one after the other.
template <int Terms>
class BlockStream {
 public:
  BlockStream(const AmxForwardWork<Terms>& work, TaskCursor& cursor, AmxBuffers& buffers)
      : w_(work), p_(work.call.problem), cursor_(cursor), f_(buffers) {
    pending_ = cursor_.next(task_);
  }

  /// The next tile of the block at hand, or of the next block; none when there is no more.
  BlockTile next_tile() {
    while (!block_ || block_->tiles.done()) {
      if (!pending_) return {};
      start_block();
    }
    const BlockTile t{block_, block_->tiles.tile(), side_};
    block_->tiles.advance();
    side_ ^= 1;
    next_queries_.advance(prefetch_rows_);
    output_.advance(prefetch_rows_);
    return t;
  }

  /// To be called when the values of all tiles of a block have been added.
  void leave(const AmxBlock& k) {
    if (k.is_last) finish_block(w_, k, f_);
  }

 private:
  QueryBlock queries_of(size_t task) const {
    const size_t blocks = blocks_per_head(p_), group = p_.query_heads / p_.kv_heads;
    const size_t head = w_.packed.first_head * group + task / blocks;
    const size_t number = blocks - 1 - task % blocks;  // the longest first under the causal rule
    return query_block(w_.call, uint32_t(head / p_.query_heads), uint32_t(head % p_.query_heads),
                       uint32_t(number * kQueryBlock));
  }

  Rows rows_of(const QueryBlock& q, const void* data, size_t width) const {
    return Rows::of(p_, data, p_.query_heads, p_.query_length, width, q.b, q.head, q.first);
  }

  /// Sets up the block of the pending task, and takes the next task.
  void start_block() {
    const int slot = (slot_ + 1) % AmxBuffers::kBlocks;
    AmxBlock& k = blocks_[slot];
    k.q = queries_of(task_);
    k.head = size_t{k.q.b} * p_.kv_heads + k.q.kv_head;
    k.all = seen_by_all(k.q);
    const uint32_t begin = uint32_t(w_.packed.first_tile * kKeyBlock);
    const uint32_t end = begin + uint32_t(w_.packed.tiles * kKeyBlock);
    k.tiles =
        TileRange({std::max(k.q.any.begin, begin), std::min(k.q.any.end, end)}, p_.key_length);
    k.is_last = k.q.any.end <= end;
    const size_t sum_floats = RunningRows::floats(p_, w_.contexts);
    k.sum = RunningRows(w_.sums ? w_.sums + task_ * sum_floats : f_.sums[slot]);
    if (k.q.any.begin >= begin) {  // it has seen no key yet
      std::memset(k.sum.minus_max, 0, sum_floats * sizeof(float));
    }
    const bool sees_none = k.q.any.begin >= k.q.any.end;
    if (!k.tiles.done()) {
      for (int v = 0; v < kQueryVectors; ++v) {
        k.unset[v] = equal(load(k.sum.sums + v * kLanes), broadcast(0.0f));
      }
      k.queries = f_.queries[slot];
      pack_queries<Terms>(rows_of(k.q, w_.call.inputs.query, p_.head_dim), k.q.count, p_.scale,
                          f_.rows, k.queries);
      if (draws_on_the_way(w_.call) && !w_.results.samples) k.dropout.start_block(w_.call, k.q);
      slot_ = slot;
      block_ = &k;
    } else if (sees_none && begin == 0) {
      leave(k);
    }
    pending_ = cursor_.next(task_);
    const uint32_t tiles = (k.tiles.end - k.tiles.first) / kKeyBlock + 1;
    prefetch_rows_ = (kQueryBlock + tiles - 1) / tiles;
    const void* const output = w_.results.outputs.output;  // null where it is samples
    output_ = k.is_last && output ? RowPrefetch(rows_of(k.q, output, p_.value_dim), k.q.count)
                                  : RowPrefetch();
    next_queries_ = RowPrefetch();
    if (!pending_) return;
    const QueryBlock next = queries_of(task_);
    next_queries_ = RowPrefetch(rows_of(next, w_.call.inputs.query, p_.head_dim), next.count);
  }

  const AmxForwardWork<Terms>& w_;
  const Problem& p_;
  TaskCursor& cursor_;
  AmxBuffers& f_;
  bool pending_;
  size_t task_;
  AmxBlock blocks_[AmxBuffers::kBlocks];
  AmxBlock* block_ = nullptr;
  int slot_ = 0, side_ = 0;
  uint32_t prefetch_rows_ = 0;
  RowPrefetch next_queries_, output_;
};

/// Runs over the tiles of all blocks as a pipeline: while the weights of one tile are made, tiles
/// multiply the scores of the next and the values of the one before.
template <int Steps, bool Drops, int Terms>
inline void forward_blocks(const AmxForwardWork<Terms>& w, TaskCursor& cursor, AmxBuffers& f) {
  const Problem& p = w.call.problem;
  const uint32_t steps = uint32_t(2 * steps_of(p.head_dim) + 2 * steps_of(p.value_dim));
  const uint32_t rate = (kPairsPerTile << 16) / (steps * kAdvancesAStep<Terms>)+1;
  NoWork none;
  BlockStream<Terms> blocks(w, cursor, f);
  BlockTile waiting, now = blocks.next_tile();
  TileSums sums;
  if (now.block) multiply_scores<Steps>(w, sums, now, f.scores[now.side], none);
  sums.store();
  while (now.block) {
    const BlockTile next = blocks.next_tile();
    prepare_scores(w, f, sums, now, waiting);
    SoftmaxWork<Terms, Drops> softmax = softmax_work<Drops>(w, f, now, rate);
    if (next.block) multiply_scores<Steps>(w, sums, next, f.scores[next.side], softmax);
    if (waiting.block) {
      fold_context(w, sums, waiting);
      multiply_values<Steps>(w, sums, waiting, f.weights[waiting.side], waiting.block->sum.context,
                             softmax);
    } else {
      sums.store();  // the scores, which come next
    }
    softmax.finish();
    const RunningRows& sum = now.block->sum;
    if (__builtin_expect(too_large(softmax.sums), false)) {
      sums.store();
      move_maximum<Terms>(sum, w.context_rows(), softmax.sums, f.scores[now.side],
                          next.block == now.block ? f.scores[next.side] : nullptr);
      softmax = softmax_work<Drops>(w, f, now, rate);
      softmax.finish();
    }
    for (int v = 0; v < kQueryVectors; ++v) {
      store(sum.sums + v * kLanes, add(load(sum.sums + v * kLanes), softmax.sums[v]));
    }
    if (waiting.block && waiting.block != now.block) {
      sums.store();
      blocks.leave(*waiting.block);
    }
    waiting = now;
    now = next;
  }
  if (!waiting.block) return;
  const AmxBlock& last = *waiting.block;
  flush_values(w, f, sums, waiting);
  sums.store();
  blocks.leave(last);
}

/// Makes the samples of a tile from its packed weights: while tiles multiply the values of one, the
/// vector units drop weights for the next.
template <int Terms>
inline void add_samples(const AmxForwardWork<Terms>& w, TileSums& sums, const BlockTile& t,
                        AmxBuffers& f) {
  const Problem& p = w.call.problem;
  const uint32_t count = w.results.group.count;
  const uint32_t group = (p.key_offset + t.tile.first) / kDecisionsPerCall;
  const uint32_t rate =
      (kPairsPerTile << 16) / (uint32_t(2 * steps_of(p.value_dim)) * kAdvancesAStep<Terms>)+1;
  const size_t context_floats = whole(p.value_dim) * kQueryBlock;
  NoWork none;
  for (uint32_t s = 0; s <= count; ++s) {
    float* const context = t.block->sum.context + (s - 1) * context_floats;
    const uint8_t* const weights = f.weights[(s + 1) % 2];  // of the sample before
    if (s == count) return multiply_values<0>(w, sums, t, weights, context, none);
    f.dropouts[s].first_group = group;
    DropWork<Terms> drop{f.undropped, f.weights[s % 2], f.dropouts + s, rate};
    if (s > 0) multiply_values<0>(w, sums, t, weights, context, drop);
    drop.finish();
  }
}

/// Runs over the tiles of all blocks for a group of samples of `weights` dropout. Scores, maxima
/// and sums are made in the order of forward_blocks, so that they have its bits.
template <int Terms>
inline void sample_blocks(const AmxForwardWork<Terms>& w, TaskCursor& cursor, AmxBuffers& f) {
  const Problem& p = w.call.problem;
  const SampleGroup group = w.results.group;
  const uint32_t rate =
      (kPairsPerTile << 16) / (uint32_t(2 * steps_of(p.head_dim)) * kAdvancesAStep<Terms>)+1;
  NoWork none;
  BlockStream<Terms> blocks(w, cursor, f);
  BlockTile waiting, now = blocks.next_tile();  // `waiting` stays none: no values are owed
  const AmxBlock* drawn = nullptr;              // the block that the dropouts are set up for
  TileSums sums;
  if (now.block) multiply_scores<0>(w, sums, now, f.scores[now.side], none);
  sums.store();
  while (now.block) {
    const BlockTile next = blocks.next_tile();
    prepare_scores(w, f, sums, now, waiting);
    SoftmaxWork<Terms, false> softmax{f.scores[now.side], f.undropped, nullptr, nullptr, rate};
    if (next.block) multiply_scores<0>(w, sums, next, f.scores[next.side], softmax);
    sums.store();
    softmax.finish();
    const RunningRows& sum = now.block->sum;
    if (__builtin_expect(too_large(softmax.sums), false)) {
      move_maximum<Terms>(sum, w.context_rows(), softmax.sums, f.scores[now.side],
                          next.block == now.block ? f.scores[next.side] : nullptr);
      softmax = {f.scores[now.side], f.undropped, nullptr, nullptr, rate};
      softmax.finish();
    }
    for (int v = 0; v < kQueryVectors; ++v) {
      store(sum.sums + v * kLanes, add(load(sum.sums + v * kLanes), softmax.sums[v]));
    }
    if (drawn != now.block) {
      for (uint32_t s = 0; s < group.count; ++s) {
        f.dropouts[s].start_block(call_of_sample(w.call, group.first + s), now.block->q);
      }
      drawn = now.block;
    }
    fold_context(w, sums, now);
    add_samples(w, sums, now, f);
    sums.store();
    if (next.block != now.block) blocks.leave(*now.block);
    now = next;
  }
}

template <bool Drops, int Terms>
inline void forward_blocks_by_steps(const AmxForwardWork<Terms>& w, TaskCursor& cursor,
                                    AmxBuffers& f) {
  if constexpr (Terms == 3) {  // the others are not worth their size
    const size_t steps = steps_of(w.call.problem.head_dim);
    const bool same = steps == steps_of(w.call.problem.value_dim);
    if (same && steps == 2) return forward_blocks<2, Drops>(w, cursor, f);
    if (same && steps == 4) return forward_blocks<4, Drops>(w, cursor, f);
  }
  forward_blocks<0, Drops>(w, cursor, f);
}

template <int Terms>
void AmxForwardWork<Terms>::run(TaskCursor& cursor, AmxBuffers& buffers) const {
  const bool drops = draws_on_the_way(call);
  if (results.samples && drops) {
    sample_blocks(*this, cursor, buffers);
  } else if (drops) {
    forward_blocks_by_steps<true>(*this, cursor, buffers);
  } else {
    forward_blocks_by_steps<false>(*this, cursor, buffers);
  }
}

template <int Terms>
void AmxForwardWork<Terms>::work(TaskCursor& cursor) {
  AmxBuffers own;
  AmxBuffers* buffers = spare.exchange(nullptr, std::memory_order_relaxed);
  if (!buffers) {
    if (!own.allocate(call, Terms, results)) return;
    buffers = &own;
  }
  const Denormals flush(Denormals::flushed);
  configure_tiles();
  run(cursor, *buffers);
  _tile_release();
}

/// What is packed at a time: about what a core's cache holds beside the rest, so that what one pass
/// packs the next one finds there.
constexpr size_t kPackedBytes = size_t{1} << 20;

/// How a call is cut: into waves of heads, and each wave into runs of tiles, which are packed and
/// then met by all queries of the heads. Long heads take several runs, and their sums wait in
/// memory from one to the next. How a head is cut depends on its own sizes only, and so do the
/// bits.
struct AmxPlan {
  PackedTile layout;
  size_t heads;  // key/value heads, counted over the batch
  size_t tiles, run_tiles, blocks_a_head;
  size_t heads_a_wave = 1;
  size_t packed_floats, sum_floats = 0;

  AmxPlan(const Problem& p, int terms, size_t threads, uint32_t contexts)
      : layout(p, terms),
        heads(size_t{p.batch} * p.kv_heads),
        tiles((size_t{p.key_length} + kKeyBlock - 1) / kKeyBlock),
        blocks_a_head(p.query_heads / p.kv_heads * blocks_per_head(p)) {
    const size_t runs = (tiles * layout.bytes() + kPackedBytes - 1) / kPackedBytes;
    run_tiles = (tiles + runs - 1) / runs;
    const size_t run_bytes = run_tiles * layout.bytes();
    const size_t share = std::max<size_t>(heads / threads, 1);
    heads_a_wave = std::clamp<size_t>(kPackedBytes / run_bytes, 1, share);
    packed_floats = heads_a_wave * run_bytes / sizeof(float);
    if (runs > 1) sum_floats = heads_a_wave * blocks_a_head * RunningRows::floats(p, contexts);
  }
  size_t waves() const { return (heads + heads_a_wave - 1) / heads_a_wave; }
};

/// The memory of a wave on its way.
struct AmxWave {
  PackedKeys packed;
  float* sums = nullptr;  // RunningRows of all blocks; null if all tiles are one run

  bool allocate(const AmxPlan& plan) {
    if (!scratch_.reserve(plan.packed_floats + plan.sum_floats, 2)) return false;
    packed.data = reinterpret_cast<uint8_t*>(scratch_.take(plan.packed_floats));
    if (plan.sum_floats > 0) sums = scratch_.take(plan.sum_floats);
    return true;
  }
  explicit AmxWave(const AmxPlan& plan) : packed{plan.layout} {}

 private:
  Scratch scratch_;
};

/// Runs one wave; `threads` says who works on it. It needs no memory: what has begun to write the
/// output comes to its end.
template <int Terms, typename Threads>
Status run_wave(const Call& call, const AmxPlan& plan, const AmxResults& results, size_t number,
                AmxWave& wave, const Threads& threads) {
  PackedKeys& packed = wave.packed;
  packed.first_head = number * plan.heads_a_wave;
  packed.heads = std::min(plan.heads_a_wave, plan.heads - packed.first_head);
  for (packed.first_tile = 0; packed.first_tile < plan.tiles; packed.first_tile += plan.run_tiles) {
    packed.tiles = std::min(plan.run_tiles, plan.tiles - packed.first_tile);
    PackWork<Terms> pack(call, packed, threads.buffers.pack_rows);
    Status status = threads.pack(packed.heads * packed.tiles, pack);
    if (!status.ok()) return status;
    AmxForwardWork<Terms> work(call, packed, wave.sums, results, &threads.buffers);
    status = threads.multiply(packed.heads * plan.blocks_a_head, work);
    if (!status.ok()) return status;
  }
  return {};
}

/// All threads together.
struct Together {
  const CancelToken& cancel;
  AmxBuffers& buffers;  // of the first to come

  Status pack(size_t count, ParallelWork& work) const {
    return ThreadPool::shared().run(count, true, cancel, work);
  }
  Status multiply(size_t count, ParallelWork& work) const { return pack(count, work); }
};

/// One thread alone, with its own buffers.
struct Alone {
  const CancelToken& cancel;
  AmxBuffers& buffers;

  Status pack(size_t count, ParallelWork& work) const {
    TaskCursor cursor(count, cancel);
    work.work(cursor);
    return {};
  }
  template <typename Work>
  Status multiply(size_t count, const Work& work) const {
    TaskCursor cursor(count, cancel);
    work.run(cursor, buffers);
    return {};
  }
};

/// A task is one wave, by one thread: what it packs stays in its core's cache.
template <int Terms>
struct WaveWork final : ParallelWork {
  Call call;
  const AmxPlan& plan;
  AmxResults results;
  const CancelToken& cancel;

  WaveWork(const Call& call, const AmxPlan& plan, const AmxResults& results,
           const CancelToken& cancel)
      : call(call), plan(plan), results(results), cancel(cancel) {}
  void work(TaskCursor& cursor) override {
    AmxBuffers buffers;
    AmxWave wave(plan);
    if (!buffers.allocate(call, Terms, results) || !wave.allocate(plan)) return;
    const Denormals flush(Denormals::flushed);
    configure_tiles();
    const Alone alone{cancel, buffers};
    for (size_t task; cursor.next(task);) run_wave<Terms>(call, plan, results, task, wave, alone);
    _tile_release();
  }
};

template <int Terms>
Status amx_forward_terms(const Call& call, const AmxResults& results, const CancelToken& cancel) {
  const Problem& p = call.problem;
  ThreadPool& pool = ThreadPool::shared();
  const bool parallel = worth_sharing(results.samples ? results.samples->problem : p);
  const size_t threads = parallel ? std::max(pool.threads(), 1) : 1;
  const AmxPlan plan(p, Terms, threads, results.contexts(call));
  // Whole rounds of waves keep all threads busy, or many of them nearly so.
  if (plan.waves() % threads == 0 || plan.waves() >= 4 * threads) {
    WaveWork<Terms> work(call, plan, results, cancel);
    const Status status = pool.run(plan.waves(), parallel, cancel, work);
    if (!status.ok()) return status;
    if (cancel.cancelled()) return {StatusCode::aborted, "the call was aborted"};
    return status;
  }
  AmxWave wave(plan);
  AmxBuffers buffers;
  if (!wave.allocate(plan) || !buffers.allocate(call, Terms, results)) {
    return {StatusCode::out_of_memory, "no memory for the working buffers"};
  }
  const Together together{cancel, buffers};
  for (size_t number = 0; number < plan.waves(); ++number) {
    const Status status = run_wave<Terms>(call, plan, results, number, wave, together);
    if (!status.ok()) return status;
  }
  return {};
}

/// Too few queries do not repay the packing of the keys.
constexpr uint32_t kFewestQueries = 16;

inline Status amx_forward_call(const Call& call, const AmxResults& results,
                               const CancelToken& cancel) {
  switch (call.problem.precision) {
    case Precision::highest:
      return amx_forward_terms<3>(call, results, cancel);
    case Precision::high:
      return amx_forward_terms<2>(call, results, cancel);
    default:
      return amx_forward_terms<1>(call, results, cancel);
  }
}

Status amx_forward(const Problem& p, const Inputs& inputs, const ForwardOutputs& outputs,
                   const CancelToken& cancel);

/// What the contexts of a group may take while they wait for the next run of tiles.
constexpr size_t kWaitingBytes = size_t{1} << 26;

/// Samples that share scores and softmax.
inline Status amx_samples(const Call& call, const SampleResults& results,
                          const CancelToken& cancel) {
  const Problem& p = call.problem;
  const uint32_t samples = results.problem.samples;
  const bool drops_weights = call.dropout.placement == Placement::weights;
  if (drops_weights && !draws_on_the_way(call)) {  // rare: keys from an odd place on, or p = 1
    return samples_one_by_one(call.inputs, results, cancel, true, amx_forward);
  }
  const size_t bytes = whole(p.value_dim) * kQueryBlock * sizeof(float);
  const size_t blocks = p.query_heads / p.kv_heads * blocks_per_head(p);
  const uint32_t size = !drops_weights
                            ? samples
                            : std::min(group_size(samples, bytes, kGroupBytes),
                                       group_size(samples, 2 * bytes * blocks, kWaitingBytes));
  for (uint32_t first = 0; first < samples; first += size) {
    const AmxResults group{{}, &results, {first, std::min(size, samples - first)}};
    const Status status = amx_forward_call(call, group, cancel);
    if (!status.ok()) return status;
  }
  return {};
}

Status amx_forward(const Problem& p, const Inputs& inputs, const ForwardOutputs& outputs,
                   const CancelToken& cancel) {
  if (p.query_length < kFewestQueries) return forward(p, inputs, outputs, cancel);
  if (p.samples > 0) return run_samples(p, inputs, outputs, cancel, amx_forward, amx_samples);
  const Call call{p, inputs, resolve_dropout(p, inputs.keep_mask != nullptr)};
  return amx_forward_call(call, {outputs}, cancel);
}
