// Drives the kernels without Node, every tensor in memory of its own of exactly its size, for tools
// that watch memory: AddressSanitizer, UndefinedBehaviorSanitizer and LeakSanitizer, and valgrind's
// memcheck. tools/test-memory.mjs runs it once for each scenario; the planted faults have to be
// reported, which shows that each tool would see a fault of the kernels.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "backends.h"
#include "cpu/thread_pool.h"

namespace sdpa {
namespace {

[[noreturn]] void die(const char* what) {
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

/// A tensor on the heap, which tools watch; a vector's memory may be larger than its size.
class Tensor {
 public:
  Tensor(Type type, size_t count) : data_(std::malloc(bytes(type, count)), std::free) {
    for (size_t i = 0; i < count; ++i) {
      const float value = float(std::sin(double(i) * 12.9898 + double(count)));
      if (type == Type::float32) {
        static_cast<float*>(data_.get())[i] = value;
      } else {  // some numbers of the type, 0.5 to 2 in size
        static_cast<uint16_t*>(data_.get())[i] = uint16_t(0x3800 + (i * 37) % 0x800);
      }
    }
  }
  void* data() const { return data_.get(); }
  float* floats() const { return static_cast<float*>(data_.get()); }

 private:
  static size_t bytes(Type type, size_t count) {
    return count * (type == Type::float32 ? sizeof(float) : sizeof(uint16_t));
  }
  std::unique_ptr<void, void (*)(void*)> data_;
};

/// A call with all its tensors.
struct Call {
  Problem p{};

  Call(uint32_t queries, uint32_t keys, uint32_t head_dim, uint32_t value_dim) {
    p.batch = 2;
    p.query_heads = 2;
    p.kv_heads = 1;
    p.query_length = queries;
    p.key_length = keys;
    p.head_dim = head_dim;
    p.value_dim = value_dim;
    p.mask_batch = p.mask_heads = p.mask_queries = p.mask_keys = 1;
    p.window_left = p.window_right = -1;
    p.scale = 0.2f;
  }

  size_t rows() const { return size_t{p.batch} * p.query_heads * p.query_length; }
  size_t key_rows() const { return size_t{p.batch} * p.kv_heads * p.key_length; }

  /// `missing` elements less than there have to be of key; `query` in place of one with numbers.
  Status run(const Backend& backend, bool matrices, size_t missing = 0,
             const void* own_query = nullptr, float* first = nullptr) const {
    const Tensor query(p.type, rows() * p.head_dim), key(p.type, key_rows() * p.head_dim - missing),
        value(p.type, key_rows() * p.value_dim), mask(Type::float32, rows() * p.key_length);
    const Inputs inputs{own_query ? own_query : query.data(),
                        key.data(),
                        value.data(),
                        p.mask_type == MaskType::none ? nullptr : mask.data(),
                        nullptr,
                        nullptr,
                        nullptr,
                        nullptr};
    const Tensor output(p.type, rows() * p.value_dim), lse(Type::float32, rows()),
        scores(Type::float32, rows() * p.key_length);
    ForwardOutputs outputs{};
    outputs.output = output.data();
    outputs.lse = lse.floats();
    if (matrices) outputs.scores = scores.floats();
    const Status status = backend.forward(p, inputs, outputs, CancelToken());
    if (first) *first = output.floats()[0];
    if (!status.ok() || missing > 0 || own_query) return status;
    const Tensor upstream(p.type, rows() * p.value_dim), grad_query(p.type, rows() * p.head_dim),
        grad_key(p.type, key_rows() * p.head_dim), grad_value(p.type, key_rows() * p.value_dim),
        grad_mask(Type::float32, rows() * p.key_length);
    return backend.backward(
        p, inputs,
        {output.data(), lse.floats(), upstream.data(), grad_query.data(), grad_key.data(),
         grad_value.data(), inputs.mask ? grad_mask.data() : nullptr},
        CancelToken());
  }
};

std::vector<const Backend*> available() {
  std::vector<const Backend*> found;
  for (size_t i = 0; i < kBackendCount; ++i) {
    if (!kBackends[i]->unavailable_reason()) found.push_back(kBackends[i]);
  }
  return found;
}

const Backend& named(const std::string& name) {
  for (const Backend* const backend : available()) {
    if (backend->name == name) return *backend;
  }
  die("a backend that runs here");
}

/// Edges of vectors and tiles, every type, and each way through the kernels.
void calls(const Backend& backend) {
  ThreadPool::shared().set_threads(2);
  constexpr uint32_t shapes[][4] = {{1, 1, 1, 1},     {1, 130, 17, 9},  {3, 65, 8, 33},
                                    {17, 63, 33, 16}, {33, 65, 64, 64}, {70, 130, 24, 40}};
  int count = 0;
  for (const auto& s : shapes) {
    for (const Type type : {Type::float32, Type::float16, Type::bfloat16}) {
      for (int way = 0; way < 5; ++way) {
        Call call(s[0], s[1], s[2], s[3]);
        call.p.type = call.p.key_type = type;
        call.p.layout = way % 2 ? Layout::bshd : Layout::bhsd;
        if (way == 1) call.p.is_causal = 1;
        if (way >= 2) {
          call.p.dropout_p = 0.3;
          call.p.dropout_placement = Placement(way - 2);
        }
        if (way == 3) call.p.softcap = 3;
        if (way == 4) {
          call.p.mask_type = MaskType::float32;
          call.p.mask_batch = call.p.batch;
          call.p.mask_heads = call.p.query_heads;
          call.p.mask_queries = s[0];
          call.p.mask_keys = s[1];
        }
        if (!call.run(backend, way == 1 || way == 3).ok()) die("a call");
        ++count;
      }
    }
  }
  std::printf("%d calls, forward and backward, on %s\n", count, backend.name);
}

/// A tensor of keys that ends too early: the kernel reads beyond it.
void planted_short_tensor(const Backend& backend) { Call(33, 65, 64, 64).run(backend, false, 1); }

/// A query that nobody has written to decides what is printed.
void planted_uninitialised(const Backend& backend) {
  const Call call(3, 5, 8, 8);
  const std::unique_ptr<void, void (*)(void*)> query(
      std::malloc(call.rows() * call.p.head_dim * sizeof(float)), std::free);
  float first = 0;
  call.run(backend, false, 0, query.get(), &first);
  std::puts(first > 0.25f ? "more" : "less");
}

void planted_leak() {
  static float* volatile kept;
  kept = new float[1000];
  kept = nullptr;
}

void planted_overflow(int one) { std::printf("%d\n", std::numeric_limits<int>::max() + one); }

int run(const std::string& scenario, const char* backend) {
  if (scenario == "list") {
    for (const Backend* const b : available()) std::printf("%s\n", b->name);
  } else if (scenario == "calls") {
    calls(named(backend));
  } else if (scenario == "planted-short-tensor") {
    planted_short_tensor(named(backend));
  } else if (scenario == "planted-uninitialised") {
    planted_uninitialised(named(backend));
  } else if (scenario == "planted-leak") {
    planted_leak();
  } else if (scenario == "planted-overflow") {
    planted_overflow(int(scenario.size()) - 15);
  } else {
    die("no such scenario");
  }
  return 0;
}

}  // namespace
}  // namespace sdpa

int main(int count, char** arguments) {
  if (count < 2) return 2;
  return sdpa::run(arguments[1], count > 2 ? arguments[2] : "");
}
