// Random calls of the C++ kernels without Python or torch, for sanitizers: every array has exactly the elements that the kernel may touch,
// and ends where its memory ends. What the kernels compute is compared elsewhere; here noise must have the same bits in every instruction
// set, and RMU's loss be that of a loop in double precision.
//
// random_calls FIRST COUNT THREADS: calls of the seeds from FIRST on, COUNT in each of THREADS threads at the same time.
// random_calls planted address|undefined|thread: one fault of that kind, which a sanitizer must report.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "bf16_product.h"
#include "instruction_set.h"
#include "noise.h"
#include "vocab_loss.h"

using namespace undo;

namespace {

struct Random {
  std::mt19937_64 engine;
  int64_t below(int64_t n) { return int64_t(engine() % uint64_t(n)); }
  template <size_t N>
  int64_t of(const int64_t (&values)[N]) {
    return values[below(N)];
  }
  double value() {  // now and then a hard one
    static const double HARD[] = {0.0, -0.0, 1e-40, -1e-310, 1e30, INFINITY, -INFINITY, NAN};
    return below(12) ? (double(engine() >> 11) / double(1ull << 52) - 1) * 3 : HARD[below(8)];
  }
};

// `count` elements that begin `skip` bytes into a block of memory and fill it to its end.
template <class T>
struct Array {
  std::unique_ptr<char[]> memory;
  T* data;
  Array(int64_t count, int64_t skip = 0)
      : memory(new char[count * sizeof(T) + skip]()), data(reinterpret_cast<T*>(memory.get() + skip)) {}
  void set(int64_t i, T x) { std::memcpy(reinterpret_cast<char*>(data) + i * sizeof(T), &x, sizeof x); }
};

int64_t bytes(Type type) { return type == Type::FLOAT64 ? 8 : type == Type::FLOAT32 ? 4 : 2; }

void put(char* at, double x, int64_t size) {
  const float single = float(x);
  if (size == 8) std::memcpy(at, &x, 8);
  if (size == 4) std::memcpy(at, &single, 4);
  if (size == 2) std::memcpy(at, reinterpret_cast<const char*>(&single) + 2, 2);  // as bfloat16; any bits are a float16
}

std::vector<const char*> instruction_sets() {
  std::vector<const char*> found;
  for (const char* name : {"avx512", "avx2", "neon", "plain"}) {
    if (has_instruction_set(name)) found.push_back(name);
  }
  return found;
}

bool noise_call(Random& r, const char* set) {
  std::vector<Segment> segments;
  std::vector<Array<char>> memory;
  for (int64_t parts = 1 + r.below(3); parts; --parts) {
    const Type type = Type(r.below(4));
    const int64_t count = r.of({0, 1, 7, 15, 16, 17, 63, 1023, 1025, 2049, 65536, 65537, 70001}), size = bytes(type);
    const int64_t run = std::max<int64_t>(1, r.below(3) ? count : r.below(100)), skip = r.of({0, 0, 1, size, 3 * size});
    memory.emplace_back(count * size, skip);
    for (int64_t i = 0; i < count; ++i) put(memory.back().data + i * size, r.value(), size);
    const int64_t first = r.of({0, 1, 3, (1ll << 31) - 3, (1ll << 40) + 1, 1ll << 57});
    segments.push_back({memory.back().data, count, type, Law(r.below(3)), r.engine(), 0.7, 0.3, first, run, run + r.below(1000)});
  }
  std::vector<Segment> again = segments;
  std::vector<Array<char>> copies;
  for (Segment& s : again) {
    const int64_t size = s.count * bytes(s.type);
    copies.emplace_back(size);
    std::memcpy(copies.back().data, s.data, size);
    s.data = copies.back().data;
  }
  const uint64_t seed = r.engine();
  const bool stochastic = r.below(2);
  noise(noise_kernels(set), segments, seed, stochastic);
  noise(noise_kernels("plain"), again, seed, stochastic);
  for (size_t i = 0; i < segments.size(); ++i) {
    const int64_t size = bytes(segments[i].type), total = segments[i].count * size;
    const char *a = static_cast<const char*>(segments[i].data), *b = static_cast<const char*>(again[i].data);
    for (int64_t at = 0; at < total; at += size) {
      if (!std::memcmp(a + at, b + at, size)) continue;
      // NaN has many bits; its exponent has none but ones.
      const int high = size == 8 ? 0x7FF0 : size == 4 || segments[i].type == Type::BFLOAT16 ? 0x7F80 : 0x7C00;
      uint16_t top_a, top_b;
      std::memcpy(&top_a, a + at + size - 2, 2), std::memcpy(&top_b, b + at + size - 2, 2);
      if ((top_a & high) != high || (top_b & high) != high) return false;
    }
  }
  return true;
}

bool rmu_call(Random& r, const char* set) {
  const int64_t tokens = r.of({0, 1, 2, 5, 33}), width = r.of({1, 2, 3, 15, 16, 17, 63, 64, 65, 2047, 2049});
  Rmu c;
  c.tokens = tokens, c.width = width, c.hidden_kind = int(r.below(3)), c.target_kind = int(r.below(3));
  const int64_t size_h = c.hidden_kind == FLOAT32 ? 4 : 2, size_t_ = c.target_kind == FLOAT32 ? 4 : 2;
  const bool own = r.below(2), factors = r.below(2), hard = r.below(2);
  c.stride_hidden = r.below(4) ? width + r.below(5) : 0;  // 0: the same hidden states for every token, as expand() has them
  c.stride_target = own ? width + r.below(5) : 0;
  auto extent = [&](int64_t stride) { return tokens ? (tokens - 1) * stride + width : width; };
  Array<char> hidden(extent(c.stride_hidden) * size_h, r.of({0, 0, 1, 6})),
      target(extent(c.stride_target) * size_t_, r.of({0, 0, 1, 6}));
  auto draw = [&] {
    const double x = r.value();
    return hard || std::fabs(x) < 4 ? x : 1.0;
  };
  for (int64_t i = 0; i < extent(c.stride_hidden); ++i) put(hidden.data + i * size_h, draw(), size_h);
  for (int64_t i = 0; i < extent(c.stride_target); ++i) put(target.data + i * size_t_, draw(), size_t_);
  Array<float> factor(tokens);
  for (int64_t i = 0; i < tokens; ++i) factor.data[i] = r.below(3) ? 0.25f : 0.0f;
  Array<char> gradient(tokens * width * (c.hidden_kind == BFLOAT16 ? 2 : 4));
  Array<double> partial(tokens);
  c.hidden = hidden.data, c.target = target.data, c.factor = factors ? factor.data : nullptr, c.partial = partial.data;
  c.gradient = r.below(4) ? gradient.data : nullptr;
  const double loss = loss_kernels(set).rmu(c);
  if (c.hidden_kind != FLOAT32 || c.target_kind != FLOAT32 || hard) return true;
  double wanted = 0;
  for (int64_t i = 0; i < tokens; ++i) {
    for (int64_t j = 0; j < width; ++j) {
      float h, t;
      std::memcpy(&h, hidden.data + (i * c.stride_hidden + j) * 4, 4),
          std::memcpy(&t, target.data + (i * c.stride_target + j) * 4, 4);
      wanted += (factors ? double(factor.data[i]) : 1.0 / double(tokens)) * std::pow(double(h) - double(t), 2) / double(width);
    }
  }
  return std::fabs(loss - wanted) <= 4096 * 0x1p-24 * wanted;  // a float32 sum has at most 2,048 terms
}

bool loss_call(Random& r, const char* set) {
  const LossKernels& kernels = loss_kernels(set);
  const int64_t tokens = r.of({1, 2, 15, 16, 17, 31, 33}), entries = r.of({1, 2, 17, 127, 128, 129, 257, 300});
  const int64_t stride = (tokens + WIDEST - 1) / WIDEST * WIDEST, leading = WIDEST * (stride / WIDEST | 1),
                blocks = (entries + BLOCK - 1) / BLOCK;
  Chunk c;
  c.tokens = tokens, c.stride = stride, c.leading = leading, c.target = int(r.below(4)),
  c.uniform = c.target == FORWARD && !r.below(4);
  const bool dense = c.target != OWN && !c.uniform;
  c.statistics = dense && r.below(2), c.own_term = c.target == OWN || r.below(2), c.beta = 0.3f, c.other = 0.7f;
  Array<float> z_s((entries - 1) * leading + stride), z_t(dense ? (entries - 1) * leading + stride : 0);
  for (Array<float>* z : {&z_s, &z_t}) {
    for (int64_t i = 0; z->data && i < (z == &z_t && !dense ? 0 : (entries - 1) * leading + stride); ++i)
      z->data[i] = float(r.value());
  }
  Array<float> bias(entries, r.of({0, 1, 4}));
  for (int64_t v = 0; v < entries; ++v) bias.set(v, float(r.value()));
  for (Shape* shape : {&c.student, &c.teacher}) {
    shape->scale = r.below(2) ? 1 : -2.5f, shape->cap = r.below(2) ? 0 : 5, shape->temperature = r.below(2) ? 1 : 0.7f;
    shape->bias = r.below(2) ? bias.data : nullptr;
  }
  Array<double> state(FIELDS * stride), partial(blocks * FIELDS * stride);
  for (int64_t i = 0; i < stride; ++i) {
    for (const int field : {int(M_S), int(M_T)}) state.data[field * stride + i] = -INFINITY;
    for (const int field : {int(TOP_S), int(TOP_T)}) state.data[field * stride + i] = -1;
  }
  const float** per_token[] = {&c.base_s, &c.base_t, &c.log_sum_s, &c.log_sum_t,   &c.gap,
                               &c.offset, &c.weight, &c.own,       &c.label_weight};
  std::vector<Array<float>> floats;
  for (const float** one : per_token) {
    floats.emplace_back(stride);
    for (int64_t i = 0; i < tokens; ++i) floats.back().data[i] = float(r.value());
    *one = floats.back().data;
  }
  Array<int64_t> labels(stride), indices(stride * 3);
  for (int64_t i = 0; i < stride; ++i) labels.data[i] = i < tokens ? r.below(entries + 1) - 1 : -1;
  for (int64_t i = 0; i < 3 * stride; ++i)
    indices.data[i] = i < 3 * tokens ? (i % 3 < entries ? (i % 3 + r.below(2) * 3) % std::max<int64_t>(entries, 1) : -1) : -1;
  Array<float> picked(stride * 3);
  if (c.own_term && r.below(2)) c.labels = labels.data;
  if (c.target == OWN && r.below(3) == 0) c.known = 3, c.indices = indices.data, c.picked = picked.data;
  c.state = state.data, c.partial = partial.data;
  float* teacher = dense ? z_t.data : nullptr;
  c.picking = true;
  kernels.stats(c, z_s.data, teacher, 0, entries, false);
  c.picking = false;
  if (r.below(2)) kernels.shape(c, z_s.data, c.student, true, 0, entries);
  kernels.loss(c, z_s.data, teacher, 0, entries, r.below(4) != 0);
  return true;
}

bool product_call(Random& r, const Bf16Product& product) {
  const int64_t rows = r.of({1, 2, 31, 32, 33, 75}), tokens = r.of({16, 32, 48}), width = r.of({32, 64, 96});
  const int64_t stride_w = r.below(4) ? width + r.below(9) : 0, stride_z = tokens + 16 * r.below(2);
  Array<char> weight(((rows - 1) * stride_w + width) * 2, r.of({0, 1, 2}));
  for (int64_t i = 0; i < (rows - 1) * stride_w + width; ++i) put(weight.data + 2 * i, r.value(), 2);
  Array<uint32_t> words(tokens * width / 2);
  for (int64_t i = 0; i < tokens * width / 2; ++i) words.data[i] = uint32_t(r.engine()) & 0xBF80BF80;
  Array<float> z((rows - 1) * stride_z + tokens);
  bf16_project(product, reinterpret_cast<const uint16_t*>(weight.data), stride_w, rows, {words.data, tokens, width}, z.data,
               stride_z);
  return true;
}

int calls(uint64_t first, int64_t count) {
  const std::vector<const char*> sets = instruction_sets();
  int failed = 0;
  for (uint64_t seed = first; seed < first + uint64_t(count); ++seed) {
    Random r{std::mt19937_64(seed)};
    const char* set = sets[r.below(int64_t(sets.size()))];
    const auto& products = bf16_products();
    const int64_t kind = r.below(products.empty() ? 4 : 5);
    const bool right = kind == 0   ? noise_call(r, set)
                       : kind == 1 ? rmu_call(r, set)
                       : kind < 4  ? loss_call(r, set)
                                   : product_call(r, *products[r.below(int64_t(products.size()))]);
    if (!right) std::fprintf(stderr, "FAILED seed %llu, kind %d, %s\n", (unsigned long long)seed, int(kind), set), ++failed;
  }
  return failed;
}

int planted(const std::string& fault) {
  volatile int32_t zero = 0, most = INT32_MAX;  // a comparison would be simplified before it is checked
  if (fault == "address") return Array<char>(3).data[3 + zero];
  if (fault == "undefined") return most + most;
  int64_t sum = 0;
#pragma omp parallel for
  for (int i = 0; i < 1000; ++i) sum += i;  // without a reduction
  return int(sum & 1);
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 3 && std::string(arguments[1]) == "planted") return planted(arguments[2]);
  if (count != 4) return std::fprintf(stderr, "random_calls: got %d arguments, wanted FIRST COUNT THREADS\n", count - 1), 2;
  const long long first = std::atoll(arguments[1]), each = std::atoll(arguments[2]), threads = std::atoll(arguments[3]);
  std::vector<int> failed(threads);
  std::vector<std::thread> running;
  for (long long i = 0; i < threads; ++i) running.emplace_back([&, i] { failed[i] = calls(uint64_t(first + i * each), each); });
  for (std::thread& one : running) one.join();
  int total = 0;
  for (const int one : failed) total += one;
  std::printf("called %lld\n", each * threads);
  return total != 0;
}
