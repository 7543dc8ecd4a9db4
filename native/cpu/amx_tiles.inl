// Matrix products on AMX tiles at float32 accuracy: operands split into bfloat16 terms, packed in
// the order in which tiles load them. Written on AVX-512; see amx.cpp.
//
// A float is the sum of up to three bfloat16 terms (8 + 8 + 8 bits). With three terms, the six
// products that matter (hh, hm, mh, mm, hl, lh) reproduce a float32 product: attention of unit
// normals at head dim 64 is off by 2.2e-7 at length 128 and 5.6e-7 at 4096, relative L2, where
// float32 FMA is by 3.4e-7 and 1.2e-6. Two terms and three products give 2.4e-5, one term 3.5e-3
// (bench/results/precision.md; Henry, Tang and Heinecke, "Leveraging the bfloat16 Artificial
// Intelligence Datatype For Higher-Precision Computations", ARITH 2019).
//
// A step of a product takes 32 values of the inner index; operands are packed as
// [step][term][2 tiles][16 rows][64 bytes]: one tile is 1 KiB without gaps.

constexpr int kTileSide = 16;   // rows of a tile, and floats a row
constexpr int kStepDepth = 32;  // values of the inner index a tile product takes
constexpr size_t kTileBytes = 1024;
constexpr size_t kPairBytes = 2 * kTileBytes;  // two tiles side by side: 32 rows or 32 columns

constexpr size_t steps_of(size_t width) { return (width + kStepDepth - 1) / kStepDepth; }
/// `width` rounded up to whole steps.
constexpr size_t whole(size_t width) { return steps_of(width) * kStepDepth; }

/// Splits floats into bfloat16 terms, each in the upper half of its word. Terms are cut off, which
/// three of them make exact; a last term of fewer is rounded.
template <int Terms>
inline __attribute__((always_inline)) void split(Floats x, Words* terms) {
  const Words top = broadcast_words(0xffff0000);
  for (int t = 0; t < Terms; ++t) {
    terms[t] = _mm512_castps_si512(x);
    if (Terms < 3 && t + 1 == Terms) {
      terms[t] = _mm512_add_epi32(terms[t], broadcast_words(0x8000));
    }
    if (t + 1 < Terms) x = sub(x, _mm512_castsi512_ps(_mm512_and_si512(terms[t], top)));
  }
}

/// The upper halves of 32 words in their order.
inline __attribute__((always_inline)) Words upper_halves(Words first, Words second) {
  const Words odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33,
                                     31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_permutex2var_epi16(first, odd, second);
}

/// The upper halves of two words a lane, side by side.
inline __attribute__((always_inline)) Words pair_halves(Words even, Words odd) {
  constexpr int and_or = 0xEA;  // (a & b) | c
  return _mm512_ternarylogic_epi32(odd, broadcast_words(0xffff0000), _mm512_srli_epi32(even, 16),
                                   and_or);
}

/// Splits 32 consecutive floats of a row of operand A: term t goes to `to + t * stride` bytes.
template <int Terms>
inline __attribute__((always_inline)) void split_row(Floats first, Floats second, uint8_t* to,
                                                     size_t stride) {
  Words a[Terms], b[Terms];
  split<Terms>(first, a);
  split<Terms>(second, b);
  for (int t = 0; t < Terms; ++t) {
    _mm512_store_si512(to + t * stride, upper_halves(a[t], b[t]));
  }
}

/// Splits 16 columns of two consecutive rows of operand B: term t goes to `to + t * kPairBytes`.
/// Elements that are not in `kept` (bit 2 i: column i of `even`, bit 2 i + 1: of `odd`) become 0.
template <int Terms>
inline __attribute__((always_inline)) void split_pair(Floats even, Floats odd, uint8_t* to,
                                                      __mmask32 kept = ~__mmask32{0}) {
  Words a[Terms], b[Terms];
  split<Terms>(even, a);
  split<Terms>(odd, b);
  for (int t = 0; t < Terms; ++t) {
    _mm512_store_si512(to + t * kPairBytes, _mm512_maskz_mov_epi16(kept, pair_halves(a[t], b[t])));
  }
}

/// Where pair `pair` of rows and vector `vector` of columns lies in operand B.
template <int Terms>
constexpr size_t pair_offset(int pair, int vector) {
  return pair / kTileSide * Terms * kPairBytes + vector * kTileBytes +
         pair % kTileSide * sizeof(Words);
}

/// Row-major operand A, [32 rows][width]: for each step and term, two tiles of 16 rows.
/// `width` is a multiple of 32.
template <int Terms>
inline void pack_rows(const float* rows, size_t stride, size_t width, uint8_t* to) {
  for (size_t step = 0; step < width / kStepDepth; ++step, to += Terms * kPairBytes) {
    for (int r = 0; r < 2 * kTileSide; ++r) {
      const float* const row = rows + r * stride + step * kStepDepth;
      split_row<Terms>(load(row), load(row + kLanes), to + r * sizeof(Words), kPairBytes);
    }
  }
}

/// Operand A from its transpose, [2 steps of 32 keys][width]: for each 32 columns, step and term,
/// two tiles whose rows are columns.
template <int Terms>
inline void pack_columns(const float* rows, size_t stride, size_t width, uint8_t* to) {
  alignas(64) float column[2][kTileSide * kTileSide];
  for (size_t c = 0; c < width; c += kTileSide) {
    for (int step = 0; step < kKeyBlock / kStepDepth; ++step) {
      const float* const from = rows + step * kStepDepth * stride + c;
      transpose_block(from, stride, column[0], kTileSide);
      transpose_block(from + kTileSide * stride, stride, column[1], kTileSide);
      uint8_t* const pair = to + (c / kStepDepth * 2 + step) * Terms * kPairBytes +
                            c % kStepDepth / kTileSide * kTileBytes;
      for (int r = 0; r < kTileSide; ++r) {
        split_row<Terms>(load(column[0] + r * kTileSide), load(column[1] + r * kTileSide),
                         pair + r * sizeof(Words), kPairBytes);
      }
    }
  }
}

/// Operand B from its rows, [32][width]: for each 32 columns and term, two tiles of 16 columns
/// whose rows hold pairs of consecutive rows. Groups of 32 columns are `column_stride` bytes apart.
template <int Terms>
inline void pack_row_pairs(const float* rows, size_t stride, size_t width, size_t column_stride,
                           uint8_t* to) {
  for (size_t c = 0; c < width; c += kTileSide) {
    uint8_t* const operand =
        to + c / kStepDepth * column_stride + c % kStepDepth / kTileSide * kTileBytes;
    for (int pair = 0; pair < kTileSide; ++pair) {
      const float* const row = rows + 2 * pair * stride + c;
      split_pair<Terms>(load(row), load(row + stride), operand + pair * sizeof(Words));
    }
  }
}

/// Operand B with queries for columns from [width][kQueryBlock]; `width` is a multiple of 32.
template <int Terms>
inline void pack_query_columns(const float* channels, size_t width, uint8_t* to) {
  for (size_t c = 0; c < width; c += kStepDepth, to += Terms * kPairBytes) {
    pack_row_pairs<Terms>(channels + c * kQueryBlock, kQueryBlock, kQueryBlock, 0, to);
  }
}

// ------------------------------------------------------------------------------------ registers

/// All eight tiles have 16 rows of 64 bytes: 0 to 3 are sums, 4 and 5 operand A, 6 and 7 operand B.
inline void configure_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  _tile_loadconfig(&config);
}

/// Vector work that runs while tiles multiply, a little at a time.
struct NoWork {
  inline void advance() {}
};

/// Which operand the next four products need anew.
enum class Next { none, a, b, both };

/// Four tile products, then some vector work beside them. A register is loaded for the next
/// products as soon as the last of these that reads it is on its way.
template <Next Needed, typename Work>
inline __attribute__((always_inline)) void multiply_pairs(const uint8_t* next_a,
                                                          const uint8_t* next_b, Work& work) {
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (Needed == Next::b) {
    _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(6, next_b, 64);
    _tile_dpbf16ps(1, 4, 7);
  } else {
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (Needed != Next::none) _tile_loadd(4, next_a, 64);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (Needed == Next::both) _tile_loadd(6, next_b, 64);
  }
  _tile_dpbf16ps(3, 5, 7);
  if constexpr (Needed == Next::a || Needed == Next::both) {
    _tile_loadd(5, next_a + kTileBytes, 64);
  }
  if constexpr (Needed == Next::b || Needed == Next::both) {
    _tile_loadd(7, next_b + kTileBytes, 64);
  }
  work.advance();
}

/// How often a step calls advance(): once for each product of terms.
template <int Terms>
constexpr uint32_t kAdvancesAStep = Terms == 3   ? 6
                                    : Terms == 2 ? 3
                                                 : 1;

/// The products of one step, in an order that loads each operand seldom and adds the largest last:
/// with three terms low*high, middle*high, middle*middle, high*middle, high*low, high*high. What is
/// small is so summed up before it meets rounding at full size. The first operands are in their
/// registers, and those of the next step follow if there is one.
template <int Terms, typename Work>
inline __attribute__((always_inline)) void multiply_step(const uint8_t* a, const uint8_t* b,
                                                         bool more, Work& work) {
  const size_t high = 0, middle = kPairBytes, low = 2 * kPairBytes;
  if constexpr (Terms == 3) {
    multiply_pairs<Next::a>(a + middle, b, work);
    multiply_pairs<Next::b>(a, b + middle, work);
    multiply_pairs<Next::a>(a + high, b, work);
    multiply_pairs<Next::b>(a, b + low, work);
    multiply_pairs<Next::b>(a, b + high, work);
  } else if constexpr (Terms == 2) {
    multiply_pairs<Next::a>(a + high, b, work);
    multiply_pairs<Next::b>(a, b + middle, work);
  }
  if (more) {
    multiply_pairs<Next::both>(a + (2 * Terms - 1) * kPairBytes, b + Terms * kPairBytes, work);
  } else {
    multiply_pairs<Next::none>(a, b, work);
  }
}

/// Sums of a product that are still in tiles 0 to 3. They are stored when the next product takes
/// the tiles, each tile just before it is loaded anew, so that the multiplier waits for neither; or
/// by store(), which whoever reads them calls first.
struct TileSums {
  float* to = nullptr;  // [32][stride]; null: nothing waits
  size_t stride = 0;

  inline __attribute__((always_inline)) float* at(int tile) const {
    return to + tile / 2 * kTileSide * stride + tile % 2 * kTileSide;
  }
  inline void store() {
    if (!to) return;
    const size_t bytes = stride * sizeof(float);
    _tile_stored(0, at(0), bytes);
    _tile_stored(1, at(1), bytes);
    _tile_stored(2, at(2), bytes);
    _tile_stored(3, at(3), bytes);
    to = nullptr;
  }
};

/// sums = start + a * b over `steps` steps, for c [32][c_stride]. `start_stride` 0 gives all rows
/// one start.
template <int Terms, typename Work>
inline __attribute__((always_inline)) void multiply_packed(TileSums& sums, const uint8_t* a,
                                                           const uint8_t* b, size_t steps,
                                                           const float* start, size_t start_stride,
                                                           float* c, size_t c_stride, Work& work) {
  const uint8_t* const last_term = a + (Terms - 1) * kPairBytes;
  _tile_loadd(4, last_term, 64);
  _tile_loadd(6, b, 64);
  _tile_loadd(5, last_term + kTileBytes, 64);
  _tile_loadd(7, b + kTileBytes, 64);
  const TileSums from{const_cast<float*>(start), start_stride};
  const size_t from_bytes = start_stride * sizeof(float), bytes = sums.stride * sizeof(float);
  if (sums.to) _tile_stored(0, sums.at(0), bytes);
  _tile_loadd(0, from.at(0), from_bytes);
  if (sums.to) _tile_stored(1, sums.at(1), bytes);
  _tile_loadd(1, from.at(1), from_bytes);
  if (sums.to) _tile_stored(2, sums.at(2), bytes);
  _tile_loadd(2, from.at(2), from_bytes);
  if (sums.to) _tile_stored(3, sums.at(3), bytes);
  _tile_loadd(3, from.at(3), from_bytes);
  for (size_t step = 0; step < steps; ++step) {
    multiply_step<Terms>(a + step * Terms * kPairBytes, b + step * Terms * kPairBytes,
                         step + 1 < steps, work);
  }
  sums = {c, c_stride};
}
