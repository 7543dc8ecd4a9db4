// The CUDA kernels, played by the CPU, on random problems over the whole option space: against
// explicit matrices in float64 with a budget for each element (the one of test/reference.ts), masks
// bit for bit against core/dropout.h, and every call twice, for the same bits.
//
//   cuda_kernels [SEED [RUNS [FIRST]]]
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/dropout.h"
#include "core/half.h"
#include "core/keep_mask.h"
#include "core/mask_rules.h"
#include "cuda/kernels.h"

namespace {

using namespace sdpa;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// ------------------------------------------------------------------------------------- the problem

size_t size_of(Type type) { return type == Type::float32 ? 4 : 2; }

/// A tensor as kernels see it, with room on both sides that must stay as it is.
struct Buffer {
  static constexpr size_t kGuard = 64;
  std::vector<unsigned char> bytes;
  Type type = Type::float32;
  size_t count = 0;

  Buffer() = default;
  Buffer(Type type, size_t count)
      : bytes(count * size_of(type) + 2 * kGuard, 0xff), type(type), count(count) {}
  void* data() { return bytes.data() + kGuard; }
  const void* data() const { return bytes.data() + kGuard; }
  double at(size_t i) const { return load_element(type, data(), i); }
  void set(size_t i, double x) { store_element(type, data(), i, float(x)); }
  bool guards_stand() const {
    const auto untouched = [](unsigned char byte) { return byte == 0xff; };
    return std::all_of(bytes.begin(), bytes.begin() + kGuard, untouched) &&
           std::all_of(bytes.end() - kGuard, bytes.end(), untouched);
  }
};

struct Case {
  Problem p{};
  cuda::DeviceLimits limits{};
  Buffer query, key, value, grad_output, mask;
  std::vector<uint8_t> bits, keep;  // a boolean mask; explicit decisions
  std::vector<int32_t> offsets, lengths, blocks;
  bool backward = true;

  /// What a workspace is filled with before a call: NaN, which kernels may repair, large numbers,
  /// 0.
  unsigned char garbage() const {
    const unsigned char bytes[] = {0xff, 0x5a, 0};
    return bytes[(p.query_length + p.key_length) % 3];
  }
  Inputs inputs() const {
    const void* const m = !bits.empty() ? bits.data() : mask.count ? mask.data() : nullptr;
    return {query.data(),
            key.data(),
            value.data(),
            m,
            keep.empty() ? nullptr : keep.data(),
            offsets.empty() ? nullptr : offsets.data(),
            lengths.empty() ? nullptr : lengths.data(),
            blocks.empty() ? nullptr : blocks.data()};
  }
  size_t rows() const { return size_t{p.batch} * p.query_heads * p.query_length; }

  size_t query_at(uint32_t b, uint32_t h, uint32_t i, uint32_t width) const {
    return row_offset(p.layout, p.query_heads, p.query_length, width, b, h, i);
  }
  size_t key_at(uint32_t b, uint32_t h, uint32_t j, uint32_t width) const {
    if (blocks.empty()) return row_offset(p.layout, p.kv_heads, p.key_length, width, b, h, j);
    const size_t block = size_t(blocks[j / p.key_block_length]);
    return ((block * p.kv_heads + h) * p.key_block_length + j % p.key_block_length) * width;
  }
  size_t mask_at(uint32_t b, uint32_t h, uint32_t i, uint32_t j) const {
    const auto index = [](uint32_t size, uint32_t i) { return size > 1 ? i : 0; };
    const size_t plane = size_t{index(p.mask_batch, b)} * p.mask_heads + index(p.mask_heads, h);
    return (plane * p.mask_queries + index(p.mask_queries, i)) * p.mask_keys +
           index(p.mask_keys, j);
  }
};

struct Random {
  std::mt19937_64 engine;
  explicit Random(uint64_t seed) : engine(seed) {}
  uint32_t below(uint32_t n) { return uint32_t(engine() % n); }
  bool one_in(uint32_t n) { return below(n) == 0; }
  template <typename T, size_t n>
  T of(const T (&list)[n]) {
    return list[below(n)];
  }
  double normal() { return std::normal_distribution<double>()(engine); }
  void fill(Buffer& b, double spread) {
    for (size_t i = 0; i < b.count; ++i) b.set(i, spread * normal());
  }
};

void choose_mask(Case& c, Random& r) {
  Problem& p = c.p;
  p.mask_batch = r.one_in(2) ? p.batch : 1;
  p.mask_heads = r.one_in(2) ? p.query_heads : 1;
  p.mask_queries = r.one_in(2) ? p.query_length : 1;
  p.mask_keys = r.one_in(3) ? 1 : p.key_length;
  const size_t count = size_t{p.mask_batch} * p.mask_heads * p.mask_queries * p.mask_keys;
  if (r.one_in(3)) {
    p.mask_type = MaskType::boolean;
    for (size_t i = 0; i < count; ++i) c.bits.push_back(!r.one_in(4));
    return;
  }
  const Type types[] = {Type::float32, Type::float16, Type::bfloat16};
  const Type type = r.of(types);
  p.mask_type = MaskType(uint32_t(type) + uint32_t(MaskType::float32));
  c.mask = Buffer(type, count);
  for (size_t i = 0; i < count; ++i) c.mask.set(i, r.one_in(8) ? -kInfinity : r.normal());
}

void choose_dropout(Case& c, Random& r) {
  Problem& p = c.p;
  const double ps[] = {0.1, 0.25, 0.5, 0.9, 1.0 / 65536, 1};
  p.dropout_p = r.of(ps);
  p.dropout_placement = Placement(r.below(3));
  p.dropout_broadcast = r.below(8);
  p.seed_lo = uint32_t(r.engine());
  p.seed_hi = uint32_t(r.engine());
  p.offset_lo = uint32_t(r.engine());
  p.offset_hi = uint32_t(r.engine());
  if (!r.one_in(4)) return;
  const bool context = p.dropout_placement == Placement::context;
  const size_t count = c.rows() * (context ? p.value_dim : p.key_length);
  for (size_t i = 0; i < count; ++i) c.keep.push_back(r.below(1000) >= 1000 * p.dropout_p);
}

void choose_rules(Case& c, Random& r) {
  Problem& p = c.p;
  p.is_causal = r.one_in(2);
  // Some diagonals along the edges of tiles, or one beside them.
  if (r.one_in(2)) p.causal_offset = int32_t(r.below(180)) - 40;
  if (r.one_in(3)) p.causal_offset = 16 * int32_t(r.below(6)) + int32_t(r.below(4)) - 2;
  if (r.one_in(4)) {
    for (uint32_t b = 0; b < p.batch; ++b) {
      c.offsets.push_back(int32_t(r.below(p.key_length + p.query_length)) -
                          int32_t(p.query_length));
    }
  }
  p.window_left = r.one_in(4) ? int32_t(r.below(40)) : -1;
  p.window_right = r.one_in(4) ? int32_t(r.below(40)) : -1;
  if (r.one_in(3)) {
    for (uint32_t b = 0; b < p.batch; ++b) c.lengths.push_back(int32_t(r.below(p.key_length + 1)));
  }
  const float scales[] = {0.05f, 0.3f, 1.0f, -0.5f, 0.0f};
  p.scale = r.one_in(2) ? r.of(scales) : float(1 / std::sqrt(double(p.head_dim)));
  const float caps[] = {0.5f, 2.0f, 30.0f};
  p.softcap = r.one_in(4) ? r.of(caps) : 0.0f;
  if (r.one_in(3)) {
    p.batch_offset = r.below(150);
    p.head_offset = r.below(150);
    p.query_offset = r.below(150);
    p.key_offset = r.below(150);
  }
}

/// Keys in the blocks of a cache, in random order.
void choose_blocks(Case& c, Random& r) {
  Problem& p = c.p;
  p.batch = 1;
  p.key_block_length = r.one_in(2) ? 64 : 128;
  const uint32_t count = (p.key_length + p.key_block_length - 1) / p.key_block_length;
  for (uint32_t i = 0; i < count + 2; ++i) c.blocks.push_back(int32_t(i));
  std::shuffle(c.blocks.begin(), c.blocks.end(), r.engine);
}

const uint32_t kLengths[] = {1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 23, 31, 32, 33, 47, 63, 64, 65, 100};
const uint32_t kLong[] = {127, 128, 129, 200, 257, 300, 513, 700};
const uint32_t kDims[] = {1, 2, 3, 5, 8, 9, 16, 17, 24, 32, 33, 40, 64, 64, 65, 80, 128, 128};
const uint32_t kWideDims[] = {127, 160, 255, 256, 300, 511, 512};

/// Multiply-adds of a case, at most: the emulation does some millions a second.
constexpr double kLargest = 3e6;

void choose_shape(Case& c, Random& r) {
  Problem& p = c.p;
  do {
    p.batch = 1 + r.below(3);
    p.kv_heads = 1 + r.below(3);
    p.query_heads = p.kv_heads * (1 + r.below(3));
    p.query_length = r.one_in(6) ? r.of(kLong) : r.of(kLengths);
    p.key_length = r.one_in(4) ? r.of(kLong) : r.of(kLengths);
    p.head_dim = r.one_in(8) ? r.of(kWideDims) : r.of(kDims);
    p.value_dim = r.one_in(2) ? p.head_dim : r.one_in(8) ? r.of(kWideDims) : r.of(kDims);
  } while (multiply_adds(p) > kLargest);
}

/// Makes it a call that the kernels for Hopper take.
void choose_hopper(Case& c, Random& r) {
  Problem& p = c.p;
  const uint32_t lengths[] = {17, 31, 64, 65, 100, 128, 129, 200, 257, 300, 640, 700};
  const uint32_t dims[] = {8, 16, 40, 64, 64, 72, 80, 96, 128, 128, 128, 136, 256};
  const uint32_t any_dims[] = {1, 7, 33, 64, 64, 100, 128, 128, 200};
  const auto dim = [&] { return p.type == Type::float32 ? r.of(any_dims) : r.of(dims); };
  const bool few_heads = r.one_in(2);  // leaves room for tiles enough to fill each stage again
  do {
    if (few_heads) {
      p.batch = p.kv_heads = 1;
      p.query_heads = 1 + r.below(3);
    }
    p.query_length = r.of(lengths);
    p.key_length = r.of(lengths);
    p.head_dim = dim();
    p.value_dim = r.one_in(2) ? p.head_dim : dim();
  } while (multiply_adds(p) > 2 * kLargest || (few_heads && multiply_adds(p) < kLargest));
  p.key_type = p.type;
  if (r.one_in(2)) p.precision = r.one_in(2) ? Precision::high : Precision::medium;
  c.limits = {90, 8, 227 * 1024, size_t{1} << 22, true};
}

/// Keys past the end of their sequence are NaN.
void poison_ends(Case& c) {
  const Problem& p = c.p;
  for (uint32_t b = 0; b < p.batch; ++b) {
    for (uint32_t head = 0; head < p.kv_heads; ++head) {
      for (uint32_t key = uint32_t(c.lengths[b]); key < p.key_length; ++key) {
        const size_t at_key = c.key_at(b, head, key, p.head_dim);
        const size_t at_value = c.key_at(b, head, key, p.value_dim);
        for (uint32_t d = 0; d < p.head_dim; ++d) c.key.set(at_key + d, std::nan(""));
        for (uint32_t d = 0; d < p.value_dim; ++d) c.value.set(at_value + d, std::nan(""));
      }
    }
  }
}

/// One row of a tensor is larger than the others, or smaller, by far.
void choose_outlier(Case& c, Random& r) {
  Buffer* const tensors[] = {&c.query, &c.key, &c.value};
  const uint32_t number = r.below(3), width = number < 2 ? c.p.head_dim : c.p.value_dim;
  Buffer& tensor = *tensors[number];
  const size_t row = r.below(uint32_t(tensor.count / width));
  const double factors[] = {0x1p-40, 0x1p-18, 0x1p-10, 0x1p18, 0x1p40};
  const double factor = r.of(factors);
  for (uint32_t d = 0; d < width; ++d) {
    tensor.set(row * width + d, tensor.at(row * width + d) * factor);
  }
}

Case choose(uint64_t seed) {
  Random r(seed);
  Case c;
  Problem& p = c.p;
  choose_shape(c, r);
  const bool hopper = r.one_in(3);
  p.layout = r.one_in(2) ? Layout::bshd : Layout::bhsd;
  const Type types[] = {Type::float32, Type::float16, Type::bfloat16};
  p.type = r.of(types);
  p.key_type = r.one_in(6) ? r.of(types) : p.type;
  const Precision precisions[] = {Precision::highest, Precision::highest, Precision::high,
                                  Precision::medium};
  p.precision = r.of(precisions);
  if (!hopper && r.one_in(8)) choose_blocks(c, r);
  const int sms[] = {75, 80, 86, 90, 120};
  const int sm = r.of(sms);
  const size_t shared[] = {64, 163, 99, 227, 99};
  for (int i = 0; i < 5; ++i) {
    if (sms[i] == sm) c.limits = {sm, 8, shared[i] * 1024, size_t{1} << 22, false};
  }
  if (hopper) choose_hopper(c, r);
  choose_rules(c, r);
  if (!hopper && r.one_in(3)) choose_mask(c, r);
  if (r.one_in(2)) choose_dropout(c, r);
  if (hopper) {
    if (r.one_in(2)) {  // every tile is seen
      p.is_causal = 0;
      p.window_left = p.window_right = -1;
      c.lengths.clear();
    }
    p.softcap = 0;
    p.scale = std::fabs(p.scale);
    p.key_offset = p.key_offset / kDecisionsPerCall * kDecisionsPerCall;
  }
  c.backward = p.type == p.key_type && c.blocks.empty() && p.head_dim <= 256 && p.value_dim <= 256;
  const size_t key_rows = c.blocks.empty() ? size_t{p.batch} * p.kv_heads * p.key_length
                                           : c.blocks.size() * p.kv_heads * p.key_block_length;
  const double spreads[] = {1, 1, 1, 4, 30};
  c.query = Buffer(p.type, c.rows() * p.head_dim);
  c.key = Buffer(p.key_type, key_rows * p.head_dim);
  c.value = Buffer(p.key_type, key_rows * p.value_dim);
  c.grad_output = Buffer(p.type, c.rows() * p.value_dim);
  r.fill(c.query, r.of(spreads));
  r.fill(c.key, 1);
  r.fill(c.value, 1);
  r.fill(c.grad_output, 1);
  if (c.blocks.empty() && !c.lengths.empty() && r.one_in(2)) poison_ends(c);
  if (hopper && p.type == Type::float32 && r.one_in(3)) choose_outlier(c, r);
  return c;
}

std::string describe(const Case& c) {
  std::string text;
  char field[96];
#define SDPA_PRINT_FIELD(type, name)                                       \
  std::snprintf(field, sizeof field, "%s=%.7g ", #name, double(c.p.name)); \
  text += field;
  SDPA_PROBLEM_FIELDS(SDPA_PRINT_FIELD)
#undef SDPA_PRINT_FIELD
  std::snprintf(field, sizeof field, "keep_mask=%d offsets=%d lengths=%d blocks=%zu sm=%d",
                !c.keep.empty(), !c.offsets.empty(), !c.lengths.empty(), c.blocks.size(),
                c.limits.sm);
  return text + field;
}

// ----------------------------------------------------------------------------------- the reference

constexpr double kU = 0x1p-24;
constexpr double kSlack = 1.1, kFloor = 1e-30;
constexpr double kExp = 8 * kU, kArgument = 4 * kU, kTanh = 8 * kU;
double sum_roundings(double n) { return (2 * n + 16) * kU; }

struct Bounded {
  double value = 0, error = 0;
};

/// The budget after a result is rounded once to its storage type.
double stored(double value, double error, Type type) {
  const double unit = type == Type::float32 ? kU : type == Type::float16 ? 0x1p-11 : 0x1p-8;
  const double step = type == Type::float32 ? 0x1p-150 : type == Type::float16 ? 0x1p-25 : 0x1p-134;
  return kSlack * error + unit * (std::fabs(value) + error) + step + kFloor;
}

/// What a product may be off, beyond float32's roundings, because operands were cut to fewer bits:
/// of query and key (or grad_output and value), and of a computed factor with a tensor.
struct Cuts {
  double inputs, computed;
};

Cuts cuts_of(const Case& c) {
  const Problem& p = c.p;
  if (p.precision == Precision::highest) return {0, 0};
  const bool high = p.precision == Precision::high;
  const bool wide = p.head_dim > 256 || p.value_dim > 256;
  if (p.type == p.key_type && p.type != Type::float32 && !wide) {
    return {0, p.type == Type::float16 ? 0x1p-11 : 0x1p-8};
  }
  const bool one = !high && p.type == Type::float32 && p.key_type == Type::float32;
  if (one) return {0x1p-7, 0x1p-7};
  const bool hopper = c.limits.hopper && p.type == Type::float32;
  return hopper ? Cuts{0x1p-10, 0x1p-10} : Cuts{0x1p-14, 0x1p-14};
}

struct Reference {
  const Case& c;
  const Problem& p;
  Cuts cuts;
  Dropout dropout;
  std::vector<uint8_t> keep;
  std::vector<Bounded> scores, slopes, weights, dropped, lse, output;

  explicit Reference(const Case& c)
      : c(c), p(c.p), cuts(cuts_of(c)), dropout(resolve_dropout(c.p, !c.keep.empty())) {
    const bool context = p.dropout_placement == Placement::context;
    keep = c.keep;
    if (keep.empty()) {
      keep.resize(c.rows() * (context ? p.value_dim : p.key_length));
      fill_keep_mask(p, keep.data());
    }
    const size_t elements = c.rows() * p.key_length;
    scores.resize(elements);
    slopes.resize(elements);
    weights.resize(elements);
    dropped.resize(elements);
    lse.resize(c.rows());
    output.resize(c.rows() * p.value_dim);
    size_t row = 0;
    for (uint32_t b = 0; b < p.batch; ++b) {
      for (uint32_t h = 0; h < p.query_heads; ++h) {
        for (uint32_t i = 0; i < p.query_length; ++i, ++row) {
          score_row(b, h, i, row);
          softmax_row(row);
          output_row(b, h, row);
        }
      }
    }
  }

  bool drops(Placement placement) const { return dropout.on() && dropout.placement == placement; }
  uint32_t kv_head(uint32_t h) const { return h / (p.query_heads / p.kv_heads); }

  void score_row(uint32_t b, uint32_t h, uint32_t i, size_t row) {
    const KeyRange seen = visible_keys(visibility_of(p, c.inputs(), b), i);
    const size_t query = c.query_at(b, h, i, p.head_dim);
    for (uint32_t j = 0; j < p.key_length; ++j) {
      Bounded& s = scores[row * p.key_length + j];
      Bounded& slope = slopes[row * p.key_length + j];
      slope.value = 1;
      double bias = 0;
      if (p.mask_type == MaskType::boolean) bias = c.bits[c.mask_at(b, h, i, j)] ? 0 : -kInfinity;
      if (c.mask.count) bias = c.mask.at(c.mask_at(b, h, i, j));
      if (j < seen.begin || j >= seen.end || bias == -kInfinity) {
        s.value = -kInfinity;
        continue;
      }
      const size_t key = c.key_at(b, kv_head(h), j, p.head_dim);
      double dot = 0, size = 0;
      for (uint32_t d = 0; d < p.head_dim; ++d) {
        const double product = c.query.at(query + d) * c.key.at(key + d);
        dot += product;
        size += std::fabs(product);
      }
      double score = p.scale * dot;
      double error = std::fabs(p.scale) * size * ((p.head_dim + 4) * kU + cuts.inputs);
      if (p.softcap > 0) {
        const double t = std::tanh(score / p.softcap);
        const double tanh_error = std::min(error / p.softcap, 1.0) + kTanh;
        slope.value = 1 - t * t;
        slope.error = 2 * std::fabs(t) * tanh_error + tanh_error * tanh_error + 4 * kU;
        score = p.softcap * t;
        error += p.softcap * kTanh;
      }
      s.value = score + bias;
      s.error = error + kU * (std::fabs(score) + std::fabs(bias)) + kFloor;
    }
  }

  void softmax_row(size_t row) {
    const size_t first = row * p.key_length;
    std::vector<double> used(p.key_length), powers(p.key_length), relative(p.key_length);
    double top = -kInfinity;
    for (uint32_t j = 0; j < p.key_length; ++j) {
      const bool out = drops(Placement::scores) && !keep[first + j];
      used[j] = out ? -kInfinity : scores[first + j].value;
      top = std::max(top, used[j]);
    }
    lse[row].value = -kInfinity;
    if (top == -kInfinity) return;
    double sum = 0, mean = 0;
    for (uint32_t j = 0; j < p.key_length; ++j) {
      powers[j] = std::exp(used[j] - top);
      sum += powers[j];
      relative[j] =
          used[j] == -kInfinity
              ? 0
              : scores[first + j].error + kArgument * (std::fabs(used[j]) + std::fabs(top)) + kExp;
    }
    for (uint32_t j = 0; j < p.key_length; ++j) mean += powers[j] / sum * relative[j];
    const double l = top + std::log(sum);
    const double lse_error =
        mean + sum_roundings(p.key_length) + kArgument * (std::fabs(top) + std::fabs(l) + 1);
    lse[row] = {l, stored(l, lse_error, Type::float32)};
    for (uint32_t j = 0; j < p.key_length; ++j) {
      const double weight = used[j] == -kInfinity ? 0 : powers[j] / sum;
      const double multiplier =
          drops(Placement::weights) ? double(dropout.keep_scale) * keep[first + j] : 1;
      const double error = weight * (relative[j] + lse_error) * kSlack;
      weights[first + j] = {weight, stored(weight, error, Type::float32)};
      dropped[first + j] = {weight * multiplier, multiplier * (error + kFloor + 3 * kU * weight)};
    }
  }

  double channel(size_t at) const {
    return drops(Placement::context) ? double(dropout.keep_scale) * keep[at] : 1;
  }

  void output_row(uint32_t b, uint32_t h, size_t row) {
    for (uint32_t d = 0; d < p.value_dim; ++d) {
      double sum = 0, error = 0;
      for (uint32_t j = 0; j < p.key_length; ++j) {
        const Bounded& w = dropped[row * p.key_length + j];
        if (w.value == 0) continue;
        const double v = c.value.at(c.key_at(b, kv_head(h), j, p.value_dim) + d);
        sum += w.value * v;
        error += std::fabs(v) * (w.error + w.value * (sum_roundings(p.key_length) + cuts.computed));
      }
      const double m = channel(row * p.value_dim + d);
      output[row * p.value_dim + d] = {
          m * sum, stored(m * sum, (error + 2 * kU * std::fabs(sum)) * m, p.type)};
    }
  }
};

/// A sum of products with its budget, as of test/reference.ts.
struct Sum {
  double value = 0, size = 0, error = 0;
  void add(double factor, double factor_error, double x) {
    value += factor * x;
    size += std::fabs(factor * x);
    error += factor_error * std::fabs(x);
  }
};

struct Gradients {
  std::vector<Sum> query, key, value, mask;

  /// Gradients of a call whose factors were cut to fewer bits.
  explicit Gradients(const Reference& r)
      : query(r.c.query.count), key(r.c.key.count), value(r.c.value.count), mask(r.c.mask.count) {
    const Problem& p = r.p;
    size_t row = 0;
    for (uint32_t b = 0; b < p.batch; ++b) {
      for (uint32_t h = 0; h < p.query_heads; ++h) {
        for (uint32_t i = 0; i < p.query_length; ++i, ++row) {
          if (r.lse[row].value != -kInfinity) add_row(r, b, h, i, row);
        }
      }
    }
  }

  void add_row(const Reference& r, uint32_t b, uint32_t h, uint32_t i, size_t row) {
    const Case& c = r.c;
    const Problem& p = r.p;
    const size_t first = row * p.key_length, at_grad = c.query_at(b, h, i, p.value_dim);
    const size_t at_query = c.query_at(b, h, i, p.head_dim);
    std::vector<double> grad(p.key_length), grad_error(p.key_length);
    double delta = 0, delta_error = 0;
    for (uint32_t j = 0; j < p.key_length; ++j) {
      const Bounded& dropped = r.dropped[first + j];
      const size_t at_value = c.key_at(b, r.kv_head(h), j, p.value_dim);
      if (dropped.value != 0) {
        const double multiplier = r.drops(Placement::weights) ? r.dropout.keep_scale : 1;
        double size = 0;
        for (uint32_t d = 0; d < p.value_dim; ++d) {
          const double channel = r.channel(row * p.value_dim + d);
          if (channel == 0) continue;
          const double upstream = channel * c.grad_output.at(at_grad + d);
          const double product = multiplier * upstream * c.value.at(at_value + d);
          grad[j] += product;
          size += std::fabs(product);
          value[at_value + d].add(dropped.value, dropped.error + dropped.value * r.cuts.computed,
                                  upstream);
        }
        grad_error[j] = ((p.value_dim + 6) * kU + r.cuts.inputs) * size;
      }
      if (r.weights[first + j].value != 0) delta += r.weights[first + j].value * grad[j];
    }
    for (uint32_t d = 0; d < p.value_dim; ++d) {
      const Bounded& output = r.output[row * p.value_dim + d];
      delta_error += std::fabs(c.grad_output.at(at_grad + d)) *
                     (output.error + sum_roundings(p.value_dim) * std::fabs(output.value));
    }
    for (uint32_t j = 0; j < p.key_length; ++j) {
      const Bounded& weight = r.weights[first + j];
      if (weight.value == 0) continue;
      const double difference = grad[j] - delta;
      const double difference_error =
          grad_error[j] + delta_error + kArgument * (std::fabs(grad[j]) + std::fabs(delta));
      const double d_score = weight.value * difference;
      const double d_score_error =
          weight.error * std::fabs(difference) + weight.value * difference_error * kSlack;
      if (!mask.empty()) mask[c.mask_at(b, h, i, j)].add(d_score, d_score_error, 1);
      const Bounded& slope = r.slopes[first + j];
      const double d_raw = d_score * slope.value;
      const double d_raw_error = d_score_error * slope.value +
                                 std::fabs(d_score) * slope.error * kSlack +
                                 std::fabs(d_raw) * r.cuts.computed + cut_step(r);
      const size_t at_key = c.key_at(b, r.kv_head(h), j, p.head_dim);
      for (uint32_t d = 0; d < p.head_dim; ++d) {
        query[at_query + d].add(d_raw, d_raw_error, c.key.at(at_key + d));
        key[at_key + d].add(d_raw, d_raw_error, c.query.at(at_query + d));
      }
    }
  }

  /// What float16 cannot hold of a small score gradient.
  static double cut_step(const Reference& r) {
    return r.p.type == Type::float16 && r.cuts.computed > 0 ? 0x1p-25 : 0;
  }
};

// ------------------------------------------------------------------------------------- comparisons

int failures = 0;

void fail(const Case& c, const std::string& what) {
  if (++failures <= 10) std::printf("FAILED %s\n  %s\n", what.c_str(), describe(c).c_str());
}

/// The largest share of its budget that any element used.
double worst_share = 0;

bool within(double actual, const Bounded& want) {
  if (actual == want.value) return true;
  const double distance = std::fabs(actual - want.value);
  if (!(distance <= want.error)) return false;
  worst_share = std::max(worst_share, distance / want.error);
  return true;
}

template <typename Actual>
void compare(const Case& c, const char* name, const std::vector<Bounded>& want, Actual actual) {
  for (size_t i = 0; i < want.size(); ++i) {
    if (within(actual(i), want[i])) continue;
    char text[160];
    std::snprintf(text, sizeof text, "%s[%zu] = %.9g, expected %.9g within %.3g", name, i,
                  actual(i), want[i].value, want[i].error);
    return fail(c, text);
  }
}

struct Forward {
  Buffer output, lse, scores, weights, dropped;
  std::vector<unsigned char> workspace;

  void run(const Case& c, bool matrices) {
    const Problem& p = c.p;
    output = Buffer(p.type, c.rows() * p.value_dim);
    lse = Buffer(Type::float32, c.rows());
    ForwardOutputs outputs{output.data(), static_cast<float*>(lse.data()), nullptr, nullptr,
                           nullptr};
    if (matrices) {
      const size_t elements = c.rows() * p.key_length;
      scores = Buffer(Type::float32, elements);
      weights = Buffer(Type::float32, elements);
      dropped = Buffer(Type::float32, elements);
      outputs.scores = static_cast<float*>(scores.data());
      outputs.weights = static_cast<float*>(weights.data());
      outputs.dropped_weights = static_cast<float*>(dropped.data());
    }
    workspace.assign(cuda::forward_workspace(p, outputs, c.limits), c.garbage());
    const int error =
        cuda::launch_forward(p, c.inputs(), outputs, workspace.data(), c.limits, nullptr);
    if (error != 0) fail(c, "launch_forward: error " + std::to_string(error));
    for (const Buffer* b : {&output, &lse, &scores, &weights, &dropped}) {
      if (b->count && !b->guards_stand()) fail(c, "a write outside of a forward result");
    }
  }
};

void check_forward(const Case& c, const Reference& r) {
  const Problem& p = c.p;
  Forward run;
  run.run(c, true);
  size_t row = 0;
  for (uint32_t b = 0; b < p.batch; ++b) {
    for (uint32_t h = 0; h < p.query_heads; ++h) {
      for (uint32_t i = 0; i < p.query_length; ++i, ++row) {
        const size_t at = c.query_at(b, h, i, p.value_dim);
        const auto first = r.output.begin() + ptrdiff_t(row * p.value_dim);
        const std::vector<Bounded> want(first, first + p.value_dim);
        compare(c, "output", want, [&](size_t d) { return run.output.at(at + d); });
      }
    }
  }
  compare(c, "lse", r.lse, [&](size_t i) { return run.lse.at(i); });
  if (p.precision == Precision::highest) {
    compare(c, "scores", r.scores, [&](size_t i) { return run.scores.at(i); });
    compare(c, "weights", r.weights, [&](size_t i) { return run.weights.at(i); });
    compare(c, "dropped_weights", r.dropped, [&](size_t i) { return run.dropped.at(i); });
  }
  Forward again;
  again.run(c, false);
  if (again.output.bytes != run.output.bytes) fail(c, "another output the second time");
}

void compare_sums(const Case& c, const char* name, const std::vector<Sum>& want, double terms,
                  double factor, const Buffer& actual) {
  std::vector<Bounded> bounded;
  for (const Sum& sum : want) {
    const double value = factor * sum.value;
    const double raw = sum.error + sum_roundings(terms) * sum.size;
    bounded.push_back({value, stored(value, std::fabs(factor) * raw, actual.type)});
  }
  compare(c, name, bounded, [&](size_t i) { return actual.at(i); });
}

struct Backward {
  Buffer query, key, value, mask;

  void run(const Case& c, const Forward& forward) {
    const Problem& p = c.p;
    query = Buffer(p.type, c.query.count);
    key = Buffer(p.type, c.key.count);
    value = Buffer(p.type, c.value.count);
    mask = Buffer(c.mask.type, c.mask.count);
    const BackwardTensors tensors{forward.output.data(),
                                  static_cast<const float*>(forward.lse.data()),
                                  c.grad_output.data(),
                                  query.data(),
                                  key.data(),
                                  value.data(),
                                  c.mask.count ? mask.data() : nullptr};
    std::vector<unsigned char> workspace(cuda::backward_workspace(p, c.mask.count > 0, c.limits),
                                         c.garbage());
    const int error =
        cuda::launch_backward(p, c.inputs(), tensors, workspace.data(), c.limits, nullptr);
    if (error != 0) fail(c, "launch_backward: error " + std::to_string(error));
    for (const Buffer* b : {&query, &key, &value, &mask}) {
      if (!b->guards_stand()) fail(c, "a write outside of a gradient");
    }
  }
};

void check_backward(const Case& c, const Reference& r) {
  const Problem& p = c.p;
  Forward forward;
  forward.run(c, false);
  Backward run;
  run.run(c, forward);
  const Gradients want(r);
  const double readers = double(p.query_heads / p.kv_heads) * p.query_length;
  compare_sums(c, "grad_query", want.query, p.key_length, p.scale, run.query);
  compare_sums(c, "grad_key", want.key, readers, p.scale, run.key);
  compare_sums(c, "grad_value", want.value, readers, 1, run.value);
  if (c.mask.count) {
    const double summed = double(c.rows()) * p.key_length / double(c.mask.count);
    compare_sums(c, "grad_mask", want.mask, summed, 1, run.mask);
  }
  Backward again;
  again.run(c, forward);
  if (again.query.bytes != run.query.bytes || again.key.bytes != run.key.bytes ||
      again.value.bytes != run.value.bytes || again.mask.bytes != run.mask.bytes) {
    fail(c, "other gradients the second time");
  }
}

void check_mask(const Case& c) {
  const Problem& p = c.p;
  const bool context = p.dropout_placement == Placement::context;
  std::vector<uint8_t> want(c.rows() * (context ? p.value_dim : p.key_length)), got(want.size(), 2);
  fill_keep_mask(p, want.data());
  if (cuda::launch_dropout_mask(p, got.data(), nullptr) != 0) fail(c, "launch_dropout_mask");
  if (got != want) fail(c, "another dropout mask than core/keep_mask.h");
}

// ---------------------------------------------------------------------------------- special values

bool same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

/// NaN and infinity in keys and values that no row sees, and in keys that some rows see: the rows
/// that do not see them keep their bits, the others get a NaN or infinity in every column.
void check_special(Type type, Precision precision, uint32_t width, double poison, bool decode,
                   bool hopper = false) {
  Case c;
  Problem& p = c.p;
  p.batch = p.kv_heads = 1;
  p.query_heads = 2;
  p.query_length = decode ? 3 : 40;
  p.key_length = decode ? 600 : hopper ? 200 : 70;
  p.head_dim = width;
  p.value_dim = std::min(width, 256u);
  p.type = p.key_type = type;
  p.precision = precision;
  p.scale = float(1 / std::sqrt(double(width)));
  p.is_causal = 1;
  p.causal_offset = decode ? 520 : hopper ? 145 : 5;  // past tiles of 64 and 128 keys
  p.window_left = p.window_right = -1;
  c.limits = {90, 8, 227 * 1024, size_t{1} << 22, hopper};
  Random r(17);
  c.query = Buffer(type, c.rows() * p.head_dim);
  c.key = Buffer(type, size_t{p.key_length} * p.head_dim);
  c.value = Buffer(type, size_t{p.key_length} * p.value_dim);
  c.grad_output = Buffer(type, c.rows() * p.value_dim);
  for (Buffer* b : {&c.query, &c.key, &c.value, &c.grad_output}) r.fill(*b, 1);
  Forward clean;
  clean.run(c, false);
  // The gradients of Hopper's kernels are computed again, where they are NaN, by others.
  const bool fine = type == Type::float32 && precision == Precision::highest;
  const double tolerance = !hopper ? 0 : fine ? 0x1p-18 : 0x1p-6;
  const auto agree = [=](double a, double b) {
    return same(a, b) || std::fabs(a - b) <= tolerance;
  };
  Backward clean_grads;
  const bool gradients = width <= 256 && !decode;
  if (gradients) clean_grads.run(c, clean);
  const uint32_t hit = uint32_t(p.causal_offset) + 1;  // seen by the queries from 1 on
  for (uint32_t d = 0; d < p.value_dim; ++d) c.value.set(hit * p.value_dim + d, poison);
  Forward run;
  run.run(c, false);
  Backward grads;
  if (gradients) grads.run(c, run);
  for (size_t row = 0; row < c.rows(); ++row) {
    const bool sees = row % p.query_length >= 1;
    if (!same(run.lse.at(row), clean.lse.at(row))) return fail(c, "a value changed an lse");
    for (uint32_t d = 0; d < p.value_dim; ++d) {
      const size_t at = row * p.value_dim + d;
      if (sees ? std::isfinite(run.output.at(at)) : !same(run.output.at(at), clean.output.at(at))) {
        return fail(c, "a poisoned value: output of row " + std::to_string(row));
      }
    }
    for (uint32_t d = 0; gradients && d < p.head_dim; ++d) {
      const size_t at = row * p.head_dim + d;
      if (sees ? std::isfinite(grads.query.at(at))
               : !agree(grads.query.at(at), clean_grads.query.at(at))) {
        return fail(c, "a poisoned value: grad_query of row " + std::to_string(row));
      }
    }
  }
  if (!gradients) return;
  // A query's gradient that is not finite stays with the keys that it sees.
  r = Random(17);
  for (Buffer* b : {&c.query, &c.key, &c.value, &c.grad_output}) r.fill(*b, 1);
  for (uint32_t d = 0; d < p.value_dim; ++d) c.grad_output.set(3 * p.value_dim + d, poison);
  grads.run(c, clean);
  for (uint32_t key = 0; key < p.key_length; ++key) {
    const bool sees = key <= uint32_t(p.causal_offset) + 3;
    for (uint32_t d = 0; d < p.head_dim; ++d) {
      const size_t at = key * p.head_dim + d;
      if (sees ? std::isfinite(grads.key.at(at))
               : !agree(grads.key.at(at), clean_grads.key.at(at))) {
        return fail(c, "a poisoned gradient: grad_key of key " + std::to_string(key));
      }
    }
    for (uint32_t d = 0; d < p.value_dim; ++d) {
      const size_t at = key * p.value_dim + d;
      if (sees ? std::isfinite(grads.value.at(at))
               : !agree(grads.value.at(at), clean_grads.value.at(at))) {
        return fail(c, "a poisoned gradient: grad_value of key " + std::to_string(key));
      }
    }
  }
}

/// An infinite gradient of the output stays with the values whose weights are kept: those of
/// dropped weights are as without it. Gradients of keys may be infinite there, without a NaN.
void check_dropped_infinity(uint32_t width) {
  Case c;
  Problem& p = c.p;
  p.batch = p.query_heads = p.kv_heads = 1;
  p.query_length = 40;
  p.key_length = 200;
  p.head_dim = p.value_dim = width;
  p.type = p.key_type = Type::bfloat16;
  p.precision = Precision::high;
  p.scale = float(1 / std::sqrt(double(width)));
  p.window_left = p.window_right = -1;
  p.dropout_p = 0.5f;
  p.dropout_placement = Placement::weights;
  c.limits = {90, 8, 227 * 1024, size_t{1} << 22, true};
  Random r(20);
  c.query = Buffer(p.type, size_t{40} * width);
  c.key = Buffer(p.type, size_t{200} * width);
  c.value = Buffer(p.type, size_t{200} * width);
  c.grad_output = Buffer(p.type, size_t{40} * width);
  for (Buffer* b : {&c.query, &c.key, &c.value, &c.grad_output}) r.fill(*b, 1);
  Forward forward;
  forward.run(c, false);
  Backward clean, grads;
  clean.run(c, forward);
  c.grad_output.set(3 * width, kInfinity);
  std::vector<uint8_t> kept(40 * 200);
  if (cuda::launch_dropout_mask(p, kept.data(), nullptr) != 0) fail(c, "launch_dropout_mask");
  grads.run(c, forward);
  for (uint32_t key = 0; key < p.key_length; ++key) {
    const double actual = grads.value.at(key * width), expected = clean.value.at(key * width);
    if (kept[3 * 200 + key] ? std::isfinite(actual) : !(std::fabs(actual - expected) <= 0x1p-6)) {
      return fail(c, "an infinite gradient: grad_value of key " + std::to_string(key));
    }
  }
}

/// The last row of a tensor (0 query, 1 key, 2 value, 3 grad_output) is the others' times a factor,
/// that of the second head where there are two: those that do not see it are as exact as ever.
void check_outlier(uint32_t number, double factor) {
  Case c;
  Problem& p = c.p;
  p.batch = p.kv_heads = 1;
  p.query_heads = 2;
  p.query_length = p.key_length = 70;
  p.head_dim = p.value_dim = 64;
  p.mask_batch = p.mask_heads = p.mask_queries = p.mask_keys = 1;
  p.scale = 0.125f;
  p.is_causal = 1;
  p.window_left = p.window_right = -1;
  c.limits = {90, 8, 227 * 1024, size_t{1} << 22, true};
  Random r(18);
  Buffer* const tensors[4] = {&c.query, &c.key, &c.value, &c.grad_output};
  for (Buffer* b : tensors) {
    *b = Buffer(Type::float32, (b == &c.key || b == &c.value ? 1 : 2) * 70 * 64);
    r.fill(*b, 1);
  }
  Buffer& tensor = *tensors[number];
  for (size_t i = tensor.count - 64; i < tensor.count; ++i) tensor.set(i, tensor.at(i) * factor);
  const Reference reference(c);
  check_forward(c, reference);
  check_backward(c, reference);
}

/// A call for Hopper's kernels: `change` changes the call, `changes_data` its tensors.
template <typename Change, typename ChangeData>
void check_hopper(uint32_t queries, uint32_t keys, const Change& change,
                  const ChangeData& change_data) {
  Case c;
  Problem& p = c.p;
  p.batch = p.query_heads = p.kv_heads = 1;
  p.query_length = queries;
  p.key_length = keys;
  p.head_dim = p.value_dim = 64;
  p.type = p.key_type = Type::bfloat16;
  p.precision = Precision::high;
  p.scale = 0.125f;
  p.window_left = p.window_right = -1;
  c.limits = {90, 8, 227 * 1024, size_t{1} << 22, true};
  change(c);
  c.query = Buffer(p.type, size_t{p.query_heads} * queries * p.head_dim);
  c.key = Buffer(p.type, size_t{p.kv_heads} * keys * p.head_dim);
  c.value = Buffer(p.type, size_t{p.kv_heads} * keys * p.value_dim);
  c.grad_output = Buffer(p.type, size_t{p.query_heads} * queries * p.value_dim);
  Random r(19);
  for (Buffer* b : {&c.query, &c.key, &c.value, &c.grad_output}) r.fill(*b, 1);
  change_data(c);
  const Reference reference(c);
  check_forward(c, reference);
  check_backward(c, reference);
}
template <typename Change>
void check_hopper(uint32_t queries, uint32_t keys, const Change& change) {
  check_hopper(queries, keys, change, [](Case&) {});
}

/// Multiplies element i by factor(i).
template <typename Factor>
void multiply(Buffer& tensor, const Factor& factor) {
  for (size_t i = 0; i < tensor.count; ++i) tensor.set(i, tensor.at(i) * factor(i));
}

/// Float32 gradients whose tensors, heads or rows are of very different sizes, or 0.
void check_sizes() {
  const auto check = [](const auto& change_data) {
    const auto change = [](Case& c) {
      c.p.type = c.p.key_type = Type::float32;
      c.p.precision = Precision::highest;
      c.p.query_heads = 4;
      c.p.kv_heads = 2;
    };
    check_hopper(100, 150, change, change_data);
  };
  constexpr size_t kRow = 64, kHead = 100 * kRow, kKeyHead = 150 * kRow;
  for (const double size : {0x1p-40, 0x1p40}) {
    check([=](Case& c) { multiply(c.grad_output, [=](size_t) { return size; }); });
    check([=](Case& c) { multiply(c.value, [=](size_t) { return size; }); });
    check([=](Case& c) {
      multiply(c.grad_output, [=](size_t) { return size; });
      multiply(c.value, [=](size_t) { return size; });
    });
    check([=](Case& c) {
      multiply(c.query, [=](size_t) { return size; });
      multiply(c.key, [=](size_t) { return 1 / size; });
      multiply(c.grad_output, [=](size_t i) { return i < kHead ? size : 1.0; });
    });
  }
  check([](Case& c) {
    multiply(c.key, [](size_t i) { return i < kKeyHead ? 1.0 : 0x1p3; });
    multiply(c.value, [](size_t i) { return i < kKeyHead ? 0x1p20 : 1.0; });
  });
  // Too small for terms, but not for a gradient.
  check([](Case& c) {
    for (Buffer* b : {&c.value, &c.grad_output}) multiply(*b, [](size_t) { return 0x1p-52; });
    multiply(c.query, [](size_t) { return 0x1p10; });
    multiply(c.key, [](size_t) { return 0x1p-10; });
  });
  check([](Case& c) { multiply(c.grad_output, [](size_t i) { return i < kHead ? 0.0 : 1.0; }); });
  check([](Case& c) {
    multiply(c.grad_output, [](size_t i) { return std::ldexp(1.0, -int(i / kRow % 15)); });
    multiply(c.value, [](size_t i) { return std::ldexp(1.0, -int(i / kRow % 13)); });
  });
  // Weights from 1 to far below what float16 holds.
  check([](Case& c) {
    multiply(c.query, [](size_t) { return 8.0; });
    multiply(c.key, [](size_t i) { return std::ldexp(1.0, -int(i / kRow % 11)); });
  });
}

/// One key takes the whole weight of every row, by scores whose rounding alone is worth powers of
/// e, or whose lse does not fit into units of log2. No weight is more than 1.
void check_huge_scores(Precision precision, double size, bool exact) {
  Case c;
  Problem& p = c.p;
  p.batch = p.query_heads = p.kv_heads = 1;
  p.query_length = p.key_length = 40;
  p.head_dim = p.value_dim = 64;
  p.type = p.key_type = Type::bfloat16;
  p.precision = precision;
  p.scale = 1;
  p.window_left = p.window_right = -1;
  c.limits = {90, 8, 227 * 1024, size_t{1} << 22, true};
  Random r(17);
  for (Buffer* b : {&c.query, &c.key, &c.value, &c.grad_output}) {
    *b = Buffer(p.type, size_t{p.query_length} * p.head_dim);
    r.fill(*b, 1);
  }
  for (uint32_t i = 0; i < p.query_length; ++i) {
    c.query.set(i * p.head_dim, size * (1 + r.below(40) / 128.0));
    c.key.set(i * p.head_dim, i == 0 ? 1.5 * 0x1p63 : 0);
  }
  Forward forward;
  forward.run(c, false);
  Backward grads;
  grads.run(c, forward);
  for (uint32_t d = 0; d < p.value_dim; ++d) {
    double sum = 0, most = 0;
    for (uint32_t i = 0; i < p.query_length; ++i) {
      sum += c.grad_output.at(i * p.value_dim + d);
      most += std::fabs(c.grad_output.at(i * p.value_dim + d));
    }
    const double got = grads.value.at(d), slack = 0x1p-8 * most;
    if (exact ? std::fabs(got - sum) <= slack : std::fabs(got) <= most + slack) continue;
    return fail(c, "a huge score: grad_value " + std::to_string(got));
  }
}

void check_all_special() {
  // Keys past their sequence's end, in a block of keys that every query sees otherwise.
  check_hopper(130, 200, [](Case& c) { c.lengths = {150}; });
  // A tile of queries that see no key, in a workspace full of large numbers, and tiles whose first
  // keys are not those of the first block.
  check_hopper(400, 402, [](Case& c) {
    c.p.is_causal = 1;
    c.p.causal_offset = -80;
    c.p.window_left = 60;
  });
  // Where each gradient has a kernel.
  const struct {
    Type type;
    Precision precision;
    uint32_t head_dim, value_dim;
  } singles[] = {
      {Type::float16, Precision::high, 256, 136},     {Type::bfloat16, Precision::medium, 200, 256},
      {Type::bfloat16, Precision::highest, 128, 72},  {Type::bfloat16, Precision::highest, 64, 40},
      {Type::bfloat16, Precision::highest, 256, 136}, {Type::float16, Precision::highest, 144, 256},
      {Type::float32, Precision::high, 250, 256},     {Type::float16, Precision::highest, 128, 80},
      {Type::float16, Precision::highest, 48, 64},    {Type::float32, Precision::highest, 67, 128},
      {Type::float32, Precision::highest, 64, 33},    {Type::float32, Precision::high, 128, 100},
      {Type::float32, Precision::medium, 24, 61}};
  for (const auto& one : singles) {
    for (const Placement placement : {Placement::weights, Placement::scores, Placement::context}) {
      check_hopper(100, 150, [&](Case& c) {
        c.p.type = c.p.key_type = one.type;
        c.p.precision = one.precision;
        c.p.head_dim = one.head_dim;
        c.p.value_dim = one.value_dim;
        c.p.is_causal = placement == Placement::scores;
        c.p.causal_offset = 50;
        c.p.dropout_p = 0.25f;
        c.p.dropout_placement = placement;
      });
    }
  }
  for (const Precision precision : {Precision::highest, Precision::high}) {
    check_huge_scores(precision, 0x1p-34, false);
    check_huge_scores(precision, 0x1p64, true);
  }
  check_dropped_infinity(64);
  check_dropped_infinity(256);
  for (uint32_t number = 0; number < 4; ++number) {
    check_outlier(number, 0x1p10);
    check_outlier(number, 0x1p40);
  }
  check_sizes();

  const double nan = std::nan("");
  for (const Type type : {Type::float32, Type::float16, Type::bfloat16}) {
    check_special(type, Precision::highest, 24, nan, true);
    check_special(type, Precision::highest, 128, -kInfinity, false);
    check_special(type, Precision::medium, 24, nan, false);
    check_special(type, Precision::highest, 128, -kInfinity, false, true);
    check_special(type, Precision::medium, 24, nan, false, true);
    check_special(type, Precision::high, 128, kInfinity, false, true);
    check_special(type, Precision::high, 256, nan, false, true);
  }
  check_special(Type::float32, Precision::highest, 300, kInfinity, false);
  check_special(Type::bfloat16, Precision::highest, 160, nan, false);
}

void check_case(uint64_t seed) {
  const Case c = choose(seed);
  if (cuda::forward_unsupported(c.p, c.limits)) return fail(c, "unsupported");
  const Reference reference(c);
  const int before = failures;
  check_forward(c, reference);
  if (c.backward) check_backward(c, reference);
  if (c.p.dropout_p > 0) check_mask(c);
  if (failures > before) std::printf("  seed %llu\n", static_cast<unsigned long long>(seed));
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 20260801;
  const int runs = argc > 2 ? std::atoi(argv[2]) : 300;
  const int first = argc > 3 ? std::atoi(argv[3]) : 0;
  const auto start = std::chrono::steady_clock::now();
  std::printf("cuda kernels, emulated: seed %llu, %d runs\n", static_cast<unsigned long long>(seed),
              runs);
  if (first == 0) check_all_special();
  for (int i = first; i < first + runs; ++i) check_case(seed + uint64_t(i));
  const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
  std::printf("%d failures; at most %.0f %% of an error budget; %.1f s\n", failures,
              100 * worst_share, time.count());
  return failures > 0;
}
