// What forward and backward share: blocks of queries, tiles of keys, and the arithmetic on them.
//
// A tile holds kKeyBlock keys by kQueryBlock queries, and queries run along the lanes of a vector:
// a row maximum, a row sum and a rescale are then vertical operations, and a lane's arithmetic does
// not depend on its neighbours. Written against the vocabulary of vec_<isa>.h.

constexpr int kQueryBlock = kLanes * kQueryVectors;
constexpr int kKeyBlock = 64;
static_assert(kKeyBlockUnit % kKeyBlock == 0, "a tile lies in one block of a cache");
constexpr float kInfinity = std::numeric_limits<float>::infinity();

constexpr size_t padded(size_t width) { return (width + kLanes - 1) / kLanes * kLanes; }

/// One call as every thread sees it.
struct Call {
  Problem problem;
  Inputs inputs;
  Dropout dropout;
};

inline bool worth_sharing(const Problem& p) { return multiply_adds(p) > kWorthSharing; }

// ------------------------------------------------------------------------------------ functions

/// exp(x) for x <= 88; 0 below the normal range, so that no denormal ever arises. Cody-Waite
/// reduction and a minimax polynomial. The largest relative error over every float in [-87, 88] is
/// 8.6e-8 with fused multiply-adds and 8.2e-8 without (bench/results/precision.md).
inline Floats exponential(Floats x) {
  const Floats n = round_to_integer(mul(x, broadcast(1.44269504f)));
  Floats r = multiply_add(n, broadcast(-0.693145752f), x);
  r = multiply_add(n, broadcast(-1.42860677e-6f), r);
  Floats p = multiply_add(broadcast(1.38131389e-3f), r, broadcast(8.36941972e-3f));
  p = multiply_add(p, r, broadcast(4.16684560e-2f));
  p = multiply_add(p, r, broadcast(1.66665152e-1f));
  p = multiply_add(p, r, broadcast(4.99999940e-1f));
  p = add(multiply_add(mul(r, r), p, r), broadcast(1.0f));
  const Floats result = mul(p, power_of_two(n));
  return select(less(x, broadcast(-87.0f)), broadcast(0.0f), result);
}

/// tanh(x): an odd polynomial near 0, elsewhere 1 - 2 / (exp(2|x|) + 1). NaN stays NaN. The largest
/// relative error over every float from 2^-26 to 100 in size is 1.5e-7
/// (bench/results/precision.md).
inline Floats hyperbolic_tangent(Floats x) {
  const Floats one = broadcast(1.0f);
  const Floats size = select(less(x, broadcast(0.0f)), sub(broadcast(0.0f), x), x);
  const Floats bounded = select(less(broadcast(10.0f), size), broadcast(10.0f), size);
  const Floats e = exponential(add(bounded, bounded));
  const Floats elsewhere = sub(one, div(broadcast(2.0f), add(e, one)));
  const Floats z = mul(x, x);
  Floats p = multiply_add(broadcast(-5.51517261e-3f), z, broadcast(2.04694290e-2f));
  p = multiply_add(p, z, broadcast(-5.36880270e-2f));
  p = multiply_add(p, z, broadcast(1.33308306e-1f));
  p = multiply_add(p, z, broadcast(-3.33332598e-1f));
  const Floats around_zero = multiply_add(mul(x, z), p, x);
  const Floats signed_elsewhere =
      select(less(x, broadcast(0.0f)), sub(broadcast(0.0f), elsewhere), elsewhere);
  return select(less(size, broadcast(0.6f)), around_zero, signed_elsewhere);
}

// ------------------------------------------------------------------------------------- products

/// c[row][column] = (start) + sum over i < count of a[row * a_row + i * a_step] * b[i * b_row +
/// column] for `rows` rows and `vectors` vectors of columns.
struct Product {
  const float* a;
  size_t a_row, a_step;
  const float* b;
  size_t b_row;
  float* c;
  size_t c_row;
  int rows, vectors, count;
};

enum class Start { zero, sum };

/// Which operand of a careful product is the weight: an element whose weight is exactly 0 adds
/// nothing, whatever the other operand holds (0 * infinity would be NaN).
enum class Weight { a, b };

template <int Rows, int Vectors>
inline void multiply_registers(const Product& p, int row, int column, Start start) {
  Floats sum[Rows][Vectors];
  float* const c = p.c + row * p.c_row + column;
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) sum[r][v] = broadcast(0.0f);
  }
  const float* a = p.a + row * p.a_row;
  const float* b = p.b + column;
  for (int i = 0; i < p.count; ++i, a += p.a_step, b += p.b_row) {
    Floats operand[Vectors];
    for (int v = 0; v < Vectors; ++v) operand[v] = load(b + v * kLanes);
    for (int r = 0; r < Rows; ++r) {
      const Floats factor = broadcast(a[r * p.a_row]);
      for (int v = 0; v < Vectors; ++v) {
        sum[r][v] = multiply_add(factor, operand[v], sum[r][v]);
      }
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) {
      float* const to = c + r * p.c_row + v * kLanes;
      store(to, start == Start::zero ? sum[r][v] : add(load(to), sum[r][v]));
    }
  }
}

/// The last rows, fewer than kTileRows.
template <int Rows, int Vectors>
inline void multiply_last_rows(const Product& p, int row, int column, Start start) {
  if constexpr (Rows > 0) {
    if (p.rows - row == Rows) return multiply_registers<Rows, Vectors>(p, row, column, start);
    multiply_last_rows<Rows - 1, Vectors>(p, row, column, start);
  }
}

template <int Vectors>
inline void multiply_columns(const Product& p, int column, Start start) {
  int row = 0;
  for (; row + kTileRows <= p.rows; row += kTileRows) {
    multiply_registers<kTileRows, Vectors>(p, row, column, start);
  }
  multiply_last_rows<kTileRows - 1, Vectors>(p, row, column, start);
}

template <int Vectors>
inline void multiply_last_columns(const Product& p, int first_vector, Start start) {
  if constexpr (Vectors > 0) {
    if (p.vectors - first_vector == Vectors) {
      return multiply_columns<Vectors>(p, first_vector * kLanes, start);
    }
    multiply_last_columns<Vectors - 1>(p, first_vector, start);
  }
}

inline void multiply(const Product& p, Start start) {
  int v = 0;
  for (; v + kQueryVectors <= p.vectors; v += kQueryVectors) {
    multiply_columns<kQueryVectors>(p, v * kLanes, start);
  }
  multiply_last_columns<kQueryVectors - 1>(p, v, start);
}

inline void multiply_carefully(const Product& p, Weight weight) {
  for (int row = 0; row < p.rows; ++row) {
    for (int v = 0; v < p.vectors; ++v) {
      float* const c = p.c + row * p.c_row + v * kLanes;
      Floats sum = broadcast(0.0f);
      for (int i = 0; i < p.count; ++i) {
        const Floats a = broadcast(p.a[row * p.a_row + i * p.a_step]);
        const Floats b = load(p.b + i * p.b_row + v * kLanes);
        const Mask idle = equal(weight == Weight::a ? a : b, broadcast(0.0f));
        sum = select(idle, sum, multiply_add(a, b, sum));
      }
      store(c, add(load(c), sum));
    }
  }
}

/// c += a * b, where one operand is a weight.
inline void add_weighted(const Product& p, Weight weight, bool careful) {
  if (careful) {
    multiply_carefully(p, weight);
  } else {
    multiply(p, Start::sum);
  }
}

// ------------------------------------------------------------------------------- rows of tensors

/// Copies `width` elements of any type to floats.
inline void widen(Type type, const void* data, size_t first, size_t width, float* to) {
  size_t i = 0;
  if (type == Type::float32) {
    std::memcpy(to, static_cast<const float*>(data) + first, width * sizeof(float));
    return;
  }
  const uint16_t* const from = static_cast<const uint16_t*>(data) + first;
  for (; i + kLanes <= width; i += kLanes) {
    store(to + i, type == Type::float16 ? load_float16(from + i) : load_bfloat16(from + i));
  }
  for (; i < width; ++i) to[i] = load_element(type, from, i);
}

inline void narrow(Type type, const float* from, size_t width, void* data, size_t first) {
  if (type == Type::float32) {
    std::memcpy(static_cast<float*>(data) + first, from, width * sizeof(float));
  } else {
    for (size_t i = 0; i < width; ++i) store_element(type, data, first + i, from[i]);
  }
}

/// from [rows][from_stride] -> to [columns][to_stride]; rows and columns are multiples of kLanes.
inline void transpose(const float* from, size_t from_stride, size_t rows, size_t columns, float* to,
                      size_t to_stride) {
  for (size_t r = 0; r < rows; r += kLanes) {
    for (size_t c = 0; c < columns; c += kLanes) {
      transpose_block(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
    }
  }
}

/// Consecutive rows of one head of a tensor [batch, heads, length, width] in either layout.
struct Rows {
  Type type;
  const void* data;
  size_t first, stride, width;  // in elements

  static Rows of(const Problem& p, const void* data, size_t heads, size_t length, size_t width,
                 uint32_t b, uint32_t head, uint32_t position) {
    return {p.type, data, row_offset(p.layout, heads, length, width, b, head, position),
            row_stride(p.layout, heads, width), width};
  }
};

/// Rows of a tensor that will be used soon, fetched into the cache a few at a time.
struct RowPrefetch {
  const char* row = nullptr;
  size_t stride = 0, bytes = 0;
  uint32_t count = 0;

  RowPrefetch() = default;
  RowPrefetch(const Rows& rows, uint32_t count) : count(count) {
    const size_t size = rows.type == Type::float32 ? sizeof(float) : sizeof(uint16_t);
    row = static_cast<const char*>(rows.data) + rows.first * size;
    stride = rows.stride * size;
    bytes = rows.width * size;
  }
  void advance(uint32_t rows) {
    for (; rows > 0 && count > 0; --rows, --count, row += stride) {
      for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i);
    }
  }
};

/// Copies `count` rows into `to` [kQueryBlock][padded width], with zeros around them.
inline void load_rows(const Rows& rows, uint32_t count, float* to) {
  const size_t stride = padded(rows.width);
  std::memset(to, 0, kQueryBlock * stride * sizeof(float));
  for (uint32_t i = 0; i < count; ++i) {
    widen(rows.type, rows.data, rows.first + i * rows.stride, rows.width, to + i * stride);
  }
}

/// A run of keys, as floats.
struct KeyTile {
  uint32_t first;  // local index of the first key
  int count;
};

/// The tile's rows of key or value: in place if they are floats, else widened into `copy`.
inline const float* tile_rows(const Rows& rows, int count, float* copy, size_t& stride) {
  if (rows.type == Type::float32) {
    stride = rows.stride;
    return static_cast<const float*>(rows.data) + rows.first;
  }
  stride = rows.width;
  for (int i = 0; i < count; ++i) {
    widen(rows.type, rows.data, rows.first + i * rows.stride, rows.width, copy + i * stride);
  }
  return copy;
}

/// The rows of key or value from `first` on; in a cache, those to the end of its block.
inline Rows rows_by_key(const Call& call, const void* data, size_t width, uint32_t b,
                        uint32_t kv_head, uint32_t first) {
  const Problem& p = call.problem;
  const int32_t* const blocks = call.inputs.key_blocks;
  if (!blocks) {
    Rows rows = Rows::of(p, data, p.kv_heads, p.key_length, width, b, kv_head, first);
    rows.type = p.key_type;
    return rows;
  }
  const size_t block = size_t(blocks[first / p.key_block_length]);
  const size_t row =
      (block * p.kv_heads + kv_head) * p.key_block_length + first % p.key_block_length;
  return {p.key_type, data, row * width, width, width};
}

inline Rows key_rows(const Call& call, uint32_t b, uint32_t kv_head, uint32_t first) {
  return rows_by_key(call, call.inputs.key, call.problem.head_dim, b, kv_head, first);
}

inline Rows value_rows(const Call& call, uint32_t b, uint32_t kv_head, uint32_t first) {
  return rows_by_key(call, call.inputs.value, call.problem.value_dim, b, kv_head, first);
}

// ------------------------------------------------------------------------------ blocks of queries

/// Up to kQueryBlock consecutive queries of one head. Lanes from `count` on are padding: they see
/// no key.
struct QueryBlock {
  uint32_t b, head, kv_head, first, count;
  int vectors;
  KeyRange seen[kQueryBlock];  // per query
  KeyRange any, all;           // keys that some query sees; that every lane sees
};

inline QueryBlock query_block(const Call& call, uint32_t b, uint32_t head, uint32_t first) {
  const Problem& p = call.problem;
  QueryBlock q;
  q.b = b;
  q.head = head;
  q.kv_head = head / (p.query_heads / p.kv_heads);
  q.first = first;
  q.count = std::min<uint32_t>(kQueryBlock, p.query_length - first);
  q.vectors = int((q.count + kLanes - 1) / kLanes);
  q.any = {p.key_length, 0};
  q.all = {0, p.key_length};
  const Visibility visibility = visibility_of(p, call.inputs, b);
  for (uint32_t i = 0; i < kQueryBlock; ++i) {
    q.seen[i] = i < q.count ? visible_keys(visibility, first + i) : KeyRange{0, 0};
    if (i >= uint32_t(q.vectors * kLanes)) continue;
    q.all = {std::max(q.all.begin, q.seen[i].begin), std::min(q.all.end, q.seen[i].end)};
    if (q.seen[i].begin == q.seen[i].end) continue;
    q.any = {std::min(q.any.begin, q.seen[i].begin), std::max(q.any.end, q.seen[i].end)};
  }
  return q;
}

/// The tiles of keys that a range touches, in order. Tiles start at multiples of kKeyBlock.
struct TileRange {
  uint32_t first, end, limit;

  TileRange(KeyRange range, uint32_t key_length)
      : first(range.begin / kKeyBlock * kKeyBlock), end(range.end), limit(key_length) {}
  bool done() const { return first >= end; }
  void advance() { first += kKeyBlock; }
  KeyTile tile() const { return {first, int(std::min<uint32_t>(kKeyBlock, limit - first))}; }
};

/// The block's queries times the scale, transposed: [padded head_dim][kQueryBlock].
inline void load_queries(const Call& call, const QueryBlock& q, float* rows, float* transposed) {
  const Problem& p = call.problem;
  const size_t width = padded(p.head_dim);
  load_rows(Rows::of(p, call.inputs.query, p.query_heads, p.query_length, p.head_dim, q.b, q.head,
                     q.first),
            q.count, rows);
  const Floats scale = broadcast(p.scale);
  for (size_t i = 0; i < kQueryBlock * width; i += kLanes)
    store(rows + i, mul(load(rows + i), scale));
  transpose(rows, width, kQueryBlock, width, transposed, kQueryBlock);
}

// ---------------------------------------------------------------------------------- dropout, mask

/// Ten rounds for one counter a lane.
inline void philox_lanes(Words c[4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    Words high0, low0, high1, low1;
    multiply_wide(c[0], kPhiloxMultiplier0, high0, low0);
    multiply_wide(c[2], kPhiloxMultiplier1, high1, low1);
    c[0] = exclusive_or(exclusive_or(high1, c[1]), broadcast_words(key0));
    c[1] = low1;
    c[2] = exclusive_or(exclusive_or(high0, c[3]), broadcast_words(key1));
    c[3] = low0;
    key0 += kPhiloxBump0;
    key1 += kPhiloxBump1;
  }
}

inline Floats one_or_zero(Mask m) { return select(m, broadcast(1.0f), broadcast(0.0f)); }

/// Takes decisions as 1 (keep) or 0.
struct KeepRows {
  float* keep;  // [rows][kQueryBlock]
  inline void take(int at, Mask kept) const { store(keep + at, one_or_zero(kept)); }
};

/// Takes decisions by copying elements, dropped ones as 0.
struct DropRows {
  const float* from;  // [rows][kQueryBlock]
  float* to;
  inline void take(int at, Mask kept) const {
    store(to + at, select(kept, load(from + at), broadcast(0.0f)));
  }
};

/// Draws the decisions for the 8 columns of a group, one query a lane; those of rows that lie in
/// [0, rows) are taken, for the lanes from `lane` on.
template <typename Taker>
inline void draw_group(const Dropout& d, const PhiloxWords& counter, const uint32_t* queries,
                       int row, int rows, int lane, const Taker& taker) {
  const Words query = d.broadcast & kBroadcastQuery ? broadcast_words(0) : load_words(queries);
  Words w[4] = {broadcast_words(counter.w[0]), query, broadcast_words(counter.w[2]),
                broadcast_words(counter.w[3])};
  philox_lanes(w, d.key0, d.key1);
  const Words threshold = broadcast_words(d.threshold);
  for (int i = 0; i < 4; ++i, row += 2) {
    if (row >= 0 && row < rows) {
      taker.take(row * kQueryBlock + lane, half_at_least<0>(w[i], threshold));
    }
    if (row + 1 >= 0 && row + 1 < rows) {
      taker.take((row + 1) * kQueryBlock + lane, half_at_least<1>(w[i], threshold));
    }
  }
}

/// Draws the decisions that keep_tile tells of.
template <typename Taker>
inline void draw_tile(const Call& call, const QueryBlock& q, uint32_t first, int rows,
                      const Taker& taker) {
  const Problem& p = call.problem;
  const Dropout& d = call.dropout;
  const uint32_t column = d.placement == Placement::context ? first : p.key_offset + first;
  uint32_t queries[kQueryBlock];
  for (uint32_t i = 0; i < kQueryBlock; ++i) queries[i] = p.query_offset + q.first + i;
  const int lead = int(column % kDecisionsPerCall);  // columns of the first group before `first`
  for (int row = -lead; row < rows; row += int(kDecisionsPerCall)) {
    const PhiloxWords counter =
        dropout_counter(d, p.batch_offset + q.b, p.head_offset + q.head, 0,
                        (column - uint32_t(lead)) / kDecisionsPerCall + uint32_t(row + lead) / 8);
    for (int v = 0; v < q.vectors; ++v) {
      draw_group(d, counter, queries + v * kLanes, row, rows, v * kLanes, taker);
    }
  }
}

/// The decisions for `rows` columns of the score matrix (or channels of the context) from local
/// index `first` on: keep [rows][kQueryBlock], 1 or 0.
inline void keep_tile(const Call& call, const QueryBlock& q, uint32_t first, int rows,
                      float* keep) {
  if (const uint8_t* const given = call.inputs.keep_mask) {
    const Problem& p = call.problem;
    const bool context = call.dropout.placement == Placement::context;
    const size_t width = context ? p.value_dim : p.key_length;
    const size_t row = (size_t{q.b} * p.query_heads + q.head) * p.query_length + q.first;
    for (int k = 0; k < rows; ++k) {
      for (uint32_t i = 0; i < kQueryBlock; ++i) {
        keep[k * kQueryBlock + i] =
            i < q.count && given[(row + i) * width + first + k] ? 1.0f : 0.0f;
      }
    }
    return;
  }
  draw_tile(call, q, first, rows, KeepRows{keep});
}

/// One query's attention mask under a tile as a bias [keys]: booleans become 0 or -infinity.
inline void mask_row(const Call& call, uint32_t b, uint32_t head, uint32_t query, KeyTile tile,
                     float* bias) {
  const Problem& p = call.problem;
  const size_t plane =
      (p.mask_batch > 1 ? size_t{b} : 0) * p.mask_heads + (p.mask_heads > 1 ? head : 0);
  const size_t row = plane * p.mask_queries + (p.mask_queries > 1 ? query : 0);
  const size_t first = row * p.mask_keys + (p.mask_keys > 1 ? tile.first : 0);
  const int keys = p.mask_keys > 1 ? tile.count : 1;
  if (p.mask_type == MaskType::boolean) {
    const uint8_t* const allowed = static_cast<const uint8_t*>(call.inputs.mask) + first;
    for (int k = 0; k < keys; ++k) bias[k] = allowed[k] ? 0.0f : -kInfinity;
  } else {
    const Type type = Type(uint32_t(p.mask_type) - uint32_t(MaskType::float32));
    widen(type, call.inputs.mask, first, size_t(keys), bias);
  }
  for (int k = keys; k < tile.count; ++k) bias[k] = bias[0];
}

/// The same for a block of queries, [key][kQueryBlock]. `rows` is room for
/// [kQueryBlock][kKeyBlock].
inline void bias_tile(const Call& call, const QueryBlock& q, KeyTile tile, float* rows,
                      float* bias) {
  std::memset(rows, 0, kQueryBlock * kKeyBlock * sizeof(float));
  for (uint32_t i = 0; i < q.count; ++i) {
    mask_row(call, q.b, q.head, q.first + i, tile, rows + i * kKeyBlock);
  }
  transpose(rows, kKeyBlock, kQueryBlock, kKeyBlock, bias, kQueryBlock);
}

/// Puts -infinity where a query does not see a key.
inline void exclude_unseen(const QueryBlock& q, KeyTile tile, float* scores) {
  if (tile.first >= q.all.begin && tile.first + uint32_t(tile.count) <= q.all.end) return;
  float begin[kQueryBlock], end[kQueryBlock];  // of the seen keys, counted from the tile's first
  for (int i = 0; i < kQueryBlock; ++i) {
    begin[i] =
        float(std::clamp(int64_t{q.seen[i].begin} - tile.first, int64_t{0}, int64_t{kKeyBlock}));
    end[i] = float(std::clamp(int64_t{q.seen[i].end} - tile.first, int64_t{0}, int64_t{kKeyBlock}));
  }
  for (int k = 0; k < tile.count; ++k) {
    const Floats key = broadcast(float(k));
    for (int v = 0; v < q.vectors; ++v) {
      float* const s = scores + k * kQueryBlock + v * kLanes;
      const Mask before = less(key, load(begin + v * kLanes));
      const Mask seen = less(key, load(end + v * kLanes));
      store(s, select(before, broadcast(-kInfinity), select(seen, load(s), broadcast(-kInfinity))));
    }
  }
}

// ----------------------------------------------------------------------------------------- scores

/// Buffers of one thread that a tile's scores need.
struct ScoreBuffers {
  float* queries;    // [padded head_dim][kQueryBlock]
  float* key_copy;   // [kKeyBlock][head_dim]; unused for float32
  float* mask_rows;  // [kQueryBlock][kKeyBlock]; unused without a mask
  float* bias;       // [kKeyBlock][kQueryBlock]; unused without a mask
};

/// Caps scores at +-softcap; keeps tanh(score / softcap) if `tangent` is given.
inline void cap_scores(const Problem& p, KeyTile tile, float* scores, float* tangent) {
  const Floats cap = broadcast(p.softcap), inverse = broadcast(1.0f / p.softcap);
  for (int i = 0; i < tile.count * kQueryBlock; i += kLanes) {
    const Floats t = hyperbolic_tangent(mul(load(scores + i), inverse));
    if (tangent) store(tangent + i, t);
    store(scores + i, mul(cap, t));
  }
}

/// The scores of a tile before dropout, [key][kQueryBlock]: scale * q.k, softcap, mask, exclusions
/// by position, in this order. An excluded key has the score -infinity.
inline void score_tile(const Call& call, const QueryBlock& q, KeyTile tile, const float* keys,
                       size_t key_stride, const ScoreBuffers& buffers, float* scores,
                       float* tangent) {
  const Problem& p = call.problem;
  multiply({keys, key_stride, 1, buffers.queries, kQueryBlock, scores, kQueryBlock, tile.count,
            q.vectors, int(p.head_dim)},
           Start::zero);
  if (p.softcap > 0) cap_scores(p, tile, scores, tangent);
  if (p.mask_type != MaskType::none) {
    bias_tile(call, q, tile, buffers.mask_rows, buffers.bias);
    const Floats excluded = broadcast(-kInfinity);
    for (int i = 0; i < tile.count * kQueryBlock; i += kLanes) {
      const Floats bias = load(buffers.bias + i);
      store(scores + i, select(equal(bias, excluded), excluded, add(load(scores + i), bias)));
    }
  }
  exclude_unseen(q, tile, scores);
}

/// Under `scores` dropout, gives dropped scores the value -infinity.
inline void drop_scores(const Call& call, const QueryBlock& q, KeyTile tile, float* keep,
                        float* scores) {
  keep_tile(call, q, tile.first, tile.count, keep);
  for (int k = 0; k < tile.count; ++k) {
    for (int v = 0; v < q.vectors; ++v) {
      const int i = k * kQueryBlock + v * kLanes;
      const Mask dropped = equal(load(keep + i), broadcast(0.0f));
      store(scores + i, select(dropped, broadcast(-kInfinity), load(scores + i)));
    }
  }
}

/// A score less its row's lse. Only rounding takes it above 0, but that of scores of 1e9 by far:
/// no weight may come out as more than 1. NaN stays.
inline Floats at_most_zero(Floats x) {
  const Floats zero = broadcast(0.0f);
  return select(less(zero, x), zero, x);
}

/// exp(score - lse) for a tile: the softmax weights. An excluded key has weight 0, also in a row
/// whose lse is -infinity or NaN.
inline void weights_from_lse(const QueryBlock& q, KeyTile tile, const float* lse,
                             const float* scores, float* weights) {
  for (int v = 0; v < q.vectors; ++v) {
    const Floats excluded = broadcast(-kInfinity), l = load(lse + v * kLanes);
    const Floats shift = select(equal(l, excluded), broadcast(0.0f), l);
    for (int k = 0; k < tile.count; ++k) {
      const int i = k * kQueryBlock + v * kLanes;
      const Floats score = load(scores + i), weight = exponential(at_most_zero(sub(score, shift)));
      store(weights + i, select(equal(score, excluded), broadcast(0.0f), weight));
    }
  }
}
