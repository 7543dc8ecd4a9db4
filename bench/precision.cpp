// Measures how far from float64 the vector functions and the attention of every instruction set
// are: the native half of bench/precision.mjs. It includes the kernels, since their functions have
// no other door, and prints one JSON object a line.
//
//   precision functions STEP     every STEP-th float of each function's domain
//   precision attention ROWS     at least ROWS random rows, in all
//   precision reference          a small problem with what float64 gives, to be checked elsewhere,
//                                and the compiler
#include "cpu/amx.cpp"
#include "cpu/avx2.cpp"
#include "cpu/avx512.cpp"
#include "cpu/neon.cpp"
#include "cpu/portable.cpp"
//
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "backends.h"

// The functions of an instruction set over arrays, `count` a multiple of the lanes.
using Function = void (*)(const float* x, float* y, size_t count);
#define OVER_ARRAYS(attributes, name, function)                  \
  attributes void name(const float* x, float* y, size_t count) { \
    for (size_t i = 0; i < count; i += kLanes) {                 \
      store(y + i, function(load(x + i)));                       \
    }                                                            \
  }

namespace sdpa::portable {
OVER_ARRAYS(, exponentials, exponential)
OVER_ARRAYS(, tangents, hyperbolic_tangent)
}  // namespace sdpa::portable

#if defined(__x86_64__)
#define FOR_AVX2 __attribute__((target("avx2,fma,f16c")))
#define FOR_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define FOR_AMX                                                                 \
  __attribute__((                                                               \
      target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16," \
             "avx2,fma,f16c")))
namespace sdpa::avx2 {
OVER_ARRAYS(FOR_AVX2, exponentials, exponential)
OVER_ARRAYS(FOR_AVX2, tangents, hyperbolic_tangent)
}  // namespace sdpa::avx2
namespace sdpa::avx512 {
OVER_ARRAYS(FOR_AVX512, exponentials, exponential)
OVER_ARRAYS(FOR_AVX512, tangents, hyperbolic_tangent)
}  // namespace sdpa::avx512
namespace sdpa::amx {
OVER_ARRAYS(FOR_AMX, powers3, exponential2<3>)
OVER_ARRAYS(FOR_AMX, powers2, exponential2<2>)
OVER_ARRAYS(FOR_AMX, powers1, exponential2<1>)
}  // namespace sdpa::amx
#elif defined(__aarch64__)
namespace sdpa::neon {
OVER_ARRAYS(, exponentials, exponential)
OVER_ARRAYS(, tangents, hyperbolic_tangent)
}  // namespace sdpa::neon
#endif

// The exact side in the widest vectors that there are; the same numbers in any.
#if defined(__x86_64__) && defined(__linux__)
#define WIDE __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define WIDE
#endif

namespace sdpa {
namespace {

// ----------------------------------------------------------------------------- vector functions

struct Measured {
  const char* function;
  const char* backend;
  Function apply;
  double (*exact)(double);
  float from, to;  // from < 0 < to
};

double exact_exp(double x) { return std::exp(x); }
double exact_exp2(double x) { return std::exp2(x); }
double exact_tanh(double x) { return std::tanh(x); }

bool runs_here(const char* name) {
  for (size_t i = 0; i < kBackendCount; ++i) {
    if (std::strcmp(kBackends[i]->name, name) == 0) return !kBackends[i]->unavailable_reason();
  }
  return false;
}

/// The functions that run here with their domains: exp and exp2 where they are normal floats.
std::vector<Measured> functions() {
  std::vector<Measured> found;
  const auto add = [&](const Measured& m) {
    if (runs_here(m.backend)) found.push_back(m);
  };
  const auto add_common = [&](const char* backend, Function exponentials, Function tangents) {
    add({"exp", backend, exponentials, exact_exp, -87, 88});
    add({"tanh", backend, tangents, exact_tanh, -100, 100});
  };
  add_common("cpu:portable", portable::exponentials, portable::tangents);
#if defined(__x86_64__)
  add_common("cpu:avx2", avx2::exponentials, avx2::tangents);
  add_common("cpu:avx512", avx512::exponentials, avx512::tangents);
  add({"exp2, 3 terms", "cpu:amx", amx::powers3, exact_exp2, -126, 127});
  add({"exp2, 2 terms", "cpu:amx", amx::powers2, exact_exp2, -126, 127});
  add({"exp2, 1 term", "cpu:amx", amx::powers1, exact_exp2, -126, 127});
#elif defined(__aarch64__)
  add_common("cpu:neon", neon::exponentials, neon::tangents);
#endif
  return found;
}

/// The relative errors of one function over every `step`-th float of its domain; sizes below 2^-26
/// are left out, where exp and exp2 are 1 and tanh(x) is x, to half a unit in the last place.
void measure_function(const Measured& m, uint32_t step) {
  constexpr size_t kBlock = 1 << 12;
  std::vector<float> x, y(kBlock);
  double worst = 0, worst_x = 0, squares = 0;
  size_t count = 0;
  const auto flush = [&] {
    if (x.empty()) return;
    const size_t size = x.size();
    x.resize((size + 63) / 64 * 64, x[0]);
    m.apply(x.data(), y.data(), x.size());
    for (size_t i = 0; i < size; ++i) {
      const double exact = m.exact(x[i]), error = std::fabs(y[i] / exact - 1);
      squares += error * error;
      if (error <= worst) continue;
      worst = error;
      worst_x = x[i];
    }
    count += size;
    x.clear();
  };
  for (const float sign : {-1.0f, 1.0f}) {
    const uint32_t last = bits_of_float(sign < 0 ? -m.from : m.to);
    for (uint32_t bits = bits_of_float(0x1p-26f); bits <= last; bits += step) {
      x.push_back(sign * float_from_bits(bits));
      if (x.size() == kBlock) flush();
    }
  }
  flush();
  std::printf(
      "{\"function\": \"%s\", \"backend\": \"%s\", \"from\": %g, \"to\": %g, \"count\": %zu, "
      "\"worst\": %.4e, \"at\": %.9g, \"rms\": %.4e}\n",
      m.function, m.backend, m.from, m.to, count, worst, worst_x, std::sqrt(squares / count));
  std::fflush(stdout);
}

// ------------------------------------------------------------------------------------ attention

using Doubles = std::vector<double>;

constexpr size_t kWidth = 64;  // head dim and value dim

/// Tensors of one head in float64: [queries][kWidth], or [length][kWidth] for keys and values.
struct Head {
  size_t queries, length;
  Doubles query, key, value, grad_output;
  Doubles output, grad_query, grad_key, grad_value;  // what attention gives
};

WIDE void add_rows(size_t count, double factor, const double* from, double* to) {
  for (size_t i = 0; i < count; ++i) to[i] += factor * from[i];
}

Doubles transposed(const Doubles& rows, size_t length) {
  Doubles columns(rows.size());
  for (size_t i = 0; i < length; ++i) {
    for (size_t d = 0; d < kWidth; ++d) columns[d * length + i] = rows[i * kWidth + d];
  }
  return columns;
}

/// Attention of one head and its gradients by their definitions, query by query.
void attend(Head& h) {
  const size_t length = h.length;
  const double scale = 1 / std::sqrt(double(kWidth));
  const Doubles keys = transposed(h.key, length), values = transposed(h.value, length);
  for (Doubles* result : {&h.output, &h.grad_query}) result->assign(h.queries * kWidth, 0);
  for (Doubles* result : {&h.grad_key, &h.grad_value}) result->assign(length * kWidth, 0);
  Doubles weights(length), grads(length);
  for (size_t i = 0; i < h.queries; ++i) {
    const double* const query = &h.query[i * kWidth];
    const double* const upstream = &h.grad_output[i * kWidth];
    std::fill(weights.begin(), weights.end(), 0);
    std::fill(grads.begin(), grads.end(), 0);
    for (size_t d = 0; d < kWidth; ++d) {
      add_rows(length, scale * query[d], &keys[d * length], weights.data());
      add_rows(length, upstream[d], &values[d * length], grads.data());
    }
    const double max = *std::max_element(weights.begin(), weights.end());
    double sum = 0, mean = 0;
    for (double& weight : weights) sum += weight = std::exp(weight - max);
    for (size_t j = 0; j < length; ++j) mean += (weights[j] /= sum) * grads[j];
    for (size_t j = 0; j < length; ++j) {
      const double grad_score = scale * weights[j] * (grads[j] - mean);
      add_rows(kWidth, weights[j], &h.value[j * kWidth], &h.output[i * kWidth]);
      add_rows(kWidth, weights[j], upstream, &h.grad_value[j * kWidth]);
      add_rows(kWidth, grad_score, &h.key[j * kWidth], &h.grad_query[i * kWidth]);
      add_rows(kWidth, grad_score, query, &h.grad_key[j * kWidth]);
    }
  }
}

/// A tensor of one head as kernels read or write it.
struct Stored {
  Type type;
  std::vector<float> floats;
  std::vector<uint16_t> halves;

  Stored(Type type, size_t count) : type(type), floats(count), halves(count) {}
  void* data() { return type == Type::float32 ? static_cast<void*>(floats.data()) : halves.data(); }
};

/// Unit normals times `spread`, rounded to the type; `exact` gets what it then holds.
Stored random_tensor(Type type, size_t length, double spread, std::mt19937_64& generator,
                     Doubles& exact) {
  std::normal_distribution<double> normal(0, spread);
  Stored tensor(type, length * kWidth);
  exact.resize(length * kWidth);
  for (size_t i = 0; i < exact.size(); ++i) {
    store_element(type, tensor.data(), i, float(normal(generator)));
    exact[i] = load_element(type, tensor.data(), i);
  }
  return tensor;
}

/// The errors of one tensor over many heads.
struct Errors {
  double squares = 0, exact_squares = 0, largest = 0;
  size_t count = 0;

  void add(Stored& found, const Doubles& exact) {
    for (size_t i = 0; i < exact.size(); ++i) {
      const double error = load_element(found.type, found.data(), i) - exact[i];
      squares += error * error;
      exact_squares += exact[i] * exact[i];
      largest = std::max(largest, std::fabs(error));
    }
    count += exact.size();
  }
  double relative() const { return std::sqrt(squares / exact_squares); }
  /// In units of the tensor's root mean square.
  double most() const { return largest / std::sqrt(exact_squares / count); }
};

/// A backend at a precision, and its errors: output, then the gradients of query, key and value.
struct Subject {
  const Backend* backend;
  Precision precision;
  Errors errors[4];
};

std::vector<Subject> subjects() {
  std::vector<Subject> all;
  for (size_t i = 0; i < kBackendCount; ++i) {
    if (kBackends[i]->unavailable_reason()) continue;
    all.push_back({kBackends[i], Precision::highest, {}});
    if (std::strcmp(kBackends[i]->name, "cpu:amx") != 0) continue;  // others make no difference
    all.push_back({kBackends[i], Precision::high, {}});
    all.push_back({kBackends[i], Precision::medium, {}});
  }
  return all;
}

Problem problem_of(const Head& head, Type type, Precision precision) {
  Problem p{};
  p.batch = p.query_heads = p.kv_heads = 1;
  p.query_length = uint32_t(head.queries);
  p.key_length = uint32_t(head.length);
  p.head_dim = p.value_dim = uint32_t(kWidth);
  p.type = p.key_type = type;
  p.mask_batch = p.mask_heads = p.mask_queries = p.mask_keys = 1;
  p.window_left = p.window_right = -1;
  p.scale = 1 / std::sqrt(float(kWidth));
  p.precision = precision;
  return p;
}

/// One random head through the reference and every subject.
void measure_head(size_t queries, size_t length, Type type, double spread,
                  std::mt19937_64& generator, std::vector<Subject>& all) {
  Head head{queries, length, {}, {}, {}, {}, {}, {}, {}, {}};
  Stored query = random_tensor(type, queries, spread, generator, head.query);
  Stored key = random_tensor(type, length, 1, generator, head.key);
  Stored value = random_tensor(type, length, 1, generator, head.value);
  Stored grad_output = random_tensor(type, queries, 1, generator, head.grad_output);
  attend(head);
  const size_t by_query = queries * kWidth, by_key = length * kWidth;
  for (Subject& subject : all) {
    Stored output(type, by_query), grad_query(type, by_query);
    Stored grad_key(type, by_key), grad_value(type, by_key);
    std::vector<float> lse(queries);
    const Problem p = problem_of(head, type, subject.precision);
    const Inputs inputs{query.data(), key.data(), value.data(), nullptr,
                        nullptr,      nullptr,    nullptr,      nullptr};
    const CancelToken cancel;
    Status status = subject.backend->forward(
        p, inputs, {output.data(), lse.data(), nullptr, nullptr, nullptr, nullptr, nullptr},
        cancel);
    if (status.ok()) {
      status = subject.backend->backward(
          p, inputs,
          {output.data(), lse.data(), grad_output.data(), grad_query.data(), grad_key.data(),
           grad_value.data(), nullptr},
          cancel);
    }
    if (!status.ok()) {
      std::fprintf(stderr, "%s: %s\n", subject.backend->name, status.message);
      std::exit(1);
    }
    subject.errors[0].add(output, head.output);
    subject.errors[1].add(grad_query, head.grad_query);
    subject.errors[2].add(grad_key, head.grad_key);
    subject.errors[3].add(grad_value, head.grad_value);
  }
}

const char* const kTypeNames[] = {"float32", "float16", "bfloat16"};
const char* const kPrecisionNames[] = {"highest", "high", "medium"};

/// Lengths of keys, with the share of all rows that each gets: long rows take longer, and the
/// longest ones come without as many queries.
constexpr struct {
  size_t length, queries;
  double share;
} kLengths[] = {{16, 16, 0.2},      {128, 128, 0.4},    {512, 512, 0.2},     {1024, 1024, 0.1},
                {2048, 2048, 0.06}, {4096, 4096, 0.04}, {16384, 256, 0.002}, {65536, 256, 0.001}};

void measure_attention(double rows) {
  std::mt19937_64 generator(20240229);
  for (const Type type : {Type::float32, Type::float16, Type::bfloat16}) {
    for (const double spread : {1.0, 4.0}) {
      for (const auto& [length, queries, share] : kLengths) {
        // Half of the rows for float32, a quarter for each 16-bit type; half for each spread.
        const double wanted = rows * share * (type == Type::float32 ? 0.25 : 0.125);
        const size_t heads = size_t(std::ceil(wanted / double(queries)));
        std::vector<Subject> all = subjects();
        for (size_t i = 0; i < heads; ++i) {
          measure_head(queries, length, type, spread, generator, all);
        }
        for (const Subject& s : all) {
          const Errors* const e = s.errors;
          std::printf(
              "{\"type\": \"%s\", \"spread\": %g, \"length\": %zu, \"rows\": %zu, "
              "\"backend\": \"%s\", \"precision\": \"%s\", "
              "\"output\": {\"relative\": %.4e, \"most\": %.4e}, "
              "\"gradients\": {\"relative\": %.4e, \"most\": %.4e}}\n",
              kTypeNames[int(type)], spread, length, heads * queries, s.backend->name,
              kPrecisionNames[int(s.precision)], e[0].relative(), e[0].most(),
              std::max({e[1].relative(), e[2].relative(), e[3].relative()}),
              std::max({e[1].most(), e[2].most(), e[3].most()}));
        }
        std::fflush(stdout);
      }
    }
  }
}

// ------------------------------------------------------------------------------- the reference

void print_array(const char* name, const Doubles& values, const char* end) {
  std::printf("\"%s\": [", name);
  for (size_t i = 0; i < values.size(); ++i) std::printf("%s%.17g", i ? ", " : "", values[i]);
  std::printf("]%s", end);
}

void print_reference() {
  std::mt19937_64 generator(7);
  Head h{40, 40, {}, {}, {}, {}, {}, {}, {}, {}};
  for (Doubles* exact : {&h.query, &h.key, &h.value, &h.grad_output}) {
    random_tensor(Type::float32, h.length, 2, generator, *exact);
  }
  attend(h);
  std::printf("{\"compiler\": \"%s\", \"length\": %zu, \"headDim\": %zu, ", __VERSION__, h.length,
              kWidth);
  print_array("query", h.query, ", ");
  print_array("key", h.key, ", ");
  print_array("value", h.value, ", ");
  print_array("gradOutput", h.grad_output, ", ");
  print_array("output", h.output, ", ");
  print_array("gradQuery", h.grad_query, ", ");
  print_array("gradKey", h.grad_key, ", ");
  print_array("gradValue", h.grad_value, "}\n");
}

}  // namespace
}  // namespace sdpa

int main(int count, char** arguments) {
  const std::string what = count > 1 ? arguments[1] : "";
  const double number = count > 2 ? std::atof(arguments[2]) : 0;
  if (what == "functions" && number >= 1) {
    for (const auto& m : sdpa::functions()) sdpa::measure_function(m, uint32_t(number));
  } else if (what == "attention" && number >= 1) {
    sdpa::measure_attention(number);
  } else if (what == "reference") {
    sdpa::print_reference();
  } else {
    return 2;
  }
}
