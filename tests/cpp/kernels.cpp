// The C++ kernels without Python or torch: noise, losses, RMU and bfloat16 products against loops in double precision, in every
// instruction set of the processor. tests/arm.py compiles this for Arm and runs it in an emulator.
//
// Prints a line per noise with a digest of its bits, which must be the same on every processor, and a line per instruction set and per
// bfloat16 product with its largest errors; a line for each failure on stderr.
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "bf16_product.h"
#include "instruction_set.h"
#include "noise.h"
#include "vocab_loss.h"

using namespace undo;

namespace {

int failures = 0;

void expect(bool right, const std::string& what) {
  if (right) return;
  ++failures;
  std::fprintf(stderr, "FAILED %s\n", what.c_str());
}

// Fails unless the error is at most `most`, also for NaN.
void expect_error(double error, double most, const std::string& what) {
  char text[99];
  std::snprintf(text, sizeof text, ": error %.3g, wanted at most %.3g", error, most);
  expect(error <= most, what + text);
}

constexpr double UNIT = 0x1p-24;  // of a rounding to float32

std::vector<const char*> instruction_sets() {
  std::vector<const char*> found;
  for (const char* name : {"avx512", "avx2", "neon", "plain"}) {
    if (has_instruction_set(name)) found.push_back(name);
  }
  return found;
}

// The bits of an integer generator and a division are the same on every machine.
struct Random {
  std::mt19937 engine{7};
  double uniform() { return (double(engine()) - 2147483647.5) / 2147483648.0; }  // -1 to 1
};

uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return uint16_t(bits >> 16);
}

float from_bfloat16(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// ---- noise -------------------------------------------------------------------------------------------------------------------

// Known answers of Philox-4x32-10 (Random123's kat_vectors).
void check_philox(const char* set) {
  const struct {
    uint32_t counter[4], key[2], wanted[4];
  } known[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       {0xa4093822, 0x299f31d0},
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const auto& one : known) {
    const uint64_t block = one.counter[0] | uint64_t(one.counter[1] & 0xFFFFFF) << 32;
    const uint64_t seed = one.key[0] | uint64_t(one.key[1]) << 32, hashed = one.counter[2] | uint64_t(one.counter[3]) << 32;
    uint32_t words[4];
    noise_kernels(set).words(seed, hashed, one.counter[1] >> 24, block, words);
    expect(!std::memcmp(words, one.wanted, sizeof words), std::string("philox ") + set);
  }
}

// The sum of the 16-bit words, each times an odd number that depends on its place.
uint64_t digest(const std::vector<unsigned char>& bytes) {
  uint64_t value = 0;
  for (size_t i = 0; i < bytes.size(); i += 2) value += uint64_t(bytes[i] | bytes[i + 1] << 8) * ((i + 1) * 0x1E3779B97F4A7C15);
  return value;
}

uint64_t noised(const char* set, Law law, Type type, bool stochastic) {
  constexpr int64_t COUNT = 70001;
  const size_t size = type == Type::FLOAT64 ? 8 : type == Type::FLOAT32 ? 4 : 2;
  std::vector<unsigned char> theta(COUNT * size);
  for (int64_t i = 0; i < COUNT; ++i) {
    const double x =
        (double(uint32_t(i * 2654435761u)) - 2147483647.5) / 2147483648.0;  // -1 to 1, as tests/support/noise_answers.py
    const float y = float(x);
    const uint16_t half = type == Type::FLOAT16 ? uint16_t(0x2000 + i % 0x1C00) : to_bfloat16(y);
    const void* from = size == 8 ? static_cast<const void*>(&x) : size == 4 ? static_cast<const void*>(&y) : &half;
    std::memcpy(&theta[i * size], from, size);
  }
  const double scale = law == Law::UNIFORM ? 0.2 / (1 << 24) : 0.3;
  const uint64_t hashed = 0x003f019ce421e750;  // of the name "w"
  noise(noise_kernels(set), {{theta.data(), COUNT, type, law, hashed, 0.7, scale, 5, 1000, 1503}}, 3, stochastic);
  return digest(theta);
}

void check_noise(const char* set) {
  check_philox(set);
  const char* const laws[] = {"uniform", "normal", "constant"};
  const char* const types[] = {"float32", "bfloat16", "float16", "float64"};
  for (int law = 0; law < 3; ++law) {
    for (int type = 0; type < 4; ++type) {
      const bool halves = type == int(Type::BFLOAT16) || type == int(Type::FLOAT16);
      for (int stochastic = 0; stochastic <= halves; ++stochastic) {
        const uint64_t bits = noised(set, Law(law), Type(type), stochastic);
        const std::string what = std::string(laws[law]) + " " + types[type] + (stochastic ? " stochastic" : "");
        expect(bits == noised("plain", Law(law), Type(type), stochastic), "noise " + what + ": bits of " + set);
        if (!std::strcmp(set, "plain")) std::printf("noise %s %016" PRIx64 "\n", what.c_str(), bits);
      }
    }
  }
}

// ---- losses ------------------------------------------------------------------------------------------------------------------

constexpr int64_t TOKENS = 21, STRIDE = 32, LEADING = 48, ENTRIES = 300;

// The largest relative errors of an instruction set's losses.
struct Worst {
  double value = 0, gradient = 0;
};

// The larger error; NaN if either is.
double worse(double a, double b) { return a > b || std::isnan(a) ? a : b; }

// Loss and gradient of one token by the definition; `likely` is the larger of the two probabilities.
double by_definition(Target target, const std::vector<float>& z_s, const std::vector<float>& z_t, double beta, int64_t label,
                     std::vector<double>& g, std::vector<double>& likely) {
  auto log_softmax = [](const std::vector<float>& z) {
    double most = z[0], total = 0;
    for (float x : z) most = std::max(most, double(x));
    for (float x : z) total += std::exp(double(x) - most);
    std::vector<double> log_p;
    for (float x : z) log_p.push_back((double(x) - most) - std::log(total));
    return log_p;
  };
  const std::vector<double> s = log_softmax(z_s), t = log_softmax(z_t);
  std::vector<double> m(ENTRIES);
  double value = 0, kl = 0;
  for (int64_t v = 0; v < ENTRIES; ++v) {
    const double p_s = std::exp(s[v]), p_t = std::exp(t[v]);
    likely[v] = std::max(p_s, p_t);
    m[v] = std::log(beta * p_t + (1 - beta) * p_s);
    if (target == FORWARD) value += p_t * (t[v] - s[v]);
    if (target == REVERSE) value += p_s * (s[v] - t[v]);
    if (target == JSD) value += beta * p_t * (t[v] - m[v]) + (1 - beta) * p_s * (s[v] - m[v]);
    kl += p_s * (s[v] - (target == JSD ? m[v] : t[v]));
  }
  if (target == OWN) value = -s[label];
  for (int64_t v = 0; v < ENTRIES; ++v) {
    const double p_s = std::exp(s[v]), p_t = std::exp(t[v]);
    if (target == OWN) g[v] = p_s - double(v == label);
    if (target == FORWARD) g[v] = p_s - p_t;
    if (target == REVERSE) g[v] = p_s * (s[v] - t[v] - kl);
    if (target == JSD) g[v] = (1 - beta) * p_s * (s[v] - m[v] - kl);
  }
  return value;
}

void check_losses(const char* set, Target target, double spread, Worst& worst) {
  const std::string what = std::string("loss ") + std::to_string(target) + " " + set + " spread " + std::to_string(spread);
  const LossKernels& kernels = loss_kernels(set);
  Random random;
  const float cap = 6, bias = 0.25f, beta = 0.3f;
  std::vector<float> z_s(ENTRIES * LEADING), z_t(ENTRIES * LEADING), biases(ENTRIES, bias);
  std::vector<std::vector<float>> s(TOKENS, std::vector<float>(ENTRIES)), t = s;  // as the kernels shape them
  for (int64_t v = 0; v < ENTRIES; ++v) {
    for (int64_t i = 0; i < TOKENS; ++i) {
      const float raw = float(5 * random.uniform());
      z_s[v * LEADING + i] = raw;
      z_t[v * LEADING + i] = raw + float(spread * random.uniform());
      s[i][v] = float(cap * std::tanh((double(raw) + bias) / cap));
      t[i][v] = float(cap * std::tanh((double(z_t[v * LEADING + i]) + bias) / cap));
    }
  }
  std::vector<double> state(FIELDS * STRIDE), partial(4 * FIELDS * STRIDE);
  for (int64_t i = 0; i < STRIDE; ++i) state[M_S * STRIDE + i] = state[M_T * STRIDE + i] = -INFINITY;
  std::vector<float> base_s(STRIDE, 1e30f), base_t(STRIDE, 1e30f), log_s(STRIDE), log_t(STRIDE), gap(STRIDE), offset(STRIDE);
  std::vector<float> weight(STRIDE, target == OWN ? 0.0f : 1.0f), own(STRIDE, target == OWN ? 1.0f : 0.0f);
  std::vector<int64_t> labels(STRIDE, -1);
  for (int64_t i = 0; i < TOKENS; ++i) labels[i] = 13 * i;
  Chunk c;
  c.tokens = TOKENS, c.stride = STRIDE, c.leading = LEADING, c.target = target;
  c.beta = beta, c.other = 1 - beta;
  c.student.cap = cap, c.student.bias = biases.data(), c.teacher = c.student;
  c.state = state.data(), c.partial = partial.data();
  c.base_s = base_s.data(), c.base_t = base_t.data(), c.log_sum_s = log_s.data(), c.log_sum_t = log_t.data();
  c.gap = gap.data(), c.offset = offset.data(), c.weight = weight.data(), c.own = own.data();
  if (target == OWN) c.labels = labels.data(), c.label_weight = own.data();

  float* teacher = target == OWN ? nullptr : z_t.data();
  kernels.stats(c, z_s.data(), teacher, 0, ENTRIES, false);
  auto field = [&](Field name, int64_t i) -> double& { return state[name * STRIDE + i]; };
  for (int64_t i = 0; i < TOKENS; ++i) {
    base_s[i] = float(field(M_S, i));
    log_s[i] = float(std::log(field(L_S, i)));
    if (target == OWN) continue;
    base_t[i] = float(field(M_T, i));
    log_t[i] = float(std::log(field(L_T, i)));
    const double ratio = field(DIFFERENCE, i) / field(L_T, i);
    const double exact = std::fabs(ratio) < 0.5 ? std::log1p(ratio) : std::log(field(L_S, i)) - std::log(field(L_T, i));
    gap[i] = float(exact);
    if (target == REVERSE) offset[i] = float(field(CROSS, i) / field(L_S, i) - exact);
  }
  if (target == JSD) {
    kernels.loss(c, z_s.data(), teacher, 0, ENTRIES, false);
    for (int64_t i = 0; i < TOKENS; ++i) offset[i] = float(field(MIXED, i)), field(VALUE, i) = field(MIXED, i) = 0;
  }
  kernels.loss(c, z_s.data(), teacher, 0, ENTRIES, true);

  double error = 0, probability = 0, size = 0, value_error = 0, value_size = 0;
  std::vector<double> wanted(ENTRIES), likely(ENTRIES);
  for (int64_t i = 0; i < TOKENS; ++i) {
    const double exact = by_definition(target, s[i], t[i], beta, labels[i], wanted, likely);
    const double value = target == OWN ? double(base_s[i]) + std::log(field(L_S, i)) - field(LABEL, i) : field(VALUE, i);
    value_error += std::fabs(value - exact), value_size += exact;
    for (int64_t v = 0; v < ENTRIES; ++v) {
      const double chain = 1 - std::pow(s[i][v] / double(cap), 2);
      error += std::pow(z_s[v * LEADING + i] - wanted[v] * chain, 2);
      probability += std::pow(likely[v], 2);
      size += std::pow(wanted[v] * chain, 2);
    }
  }
  // The difference of two logits, each of which was rounded, shaped and subtracted from a maximum, errs by at most 8 units of the
  // largest. The gradient is a probability times such differences, the value grows with their square.
  const double differs = 8 * UNIT * 2 * cap;
  expect_error(std::sqrt(error), differs * std::sqrt(probability) + 8 * UNIT * std::sqrt(size), what + ", gradient");
  const double difference = target == OWN ? 1 : std::min(1.0, spread);
  expect_error(value_error, 2 * differs / difference * value_size, what + ", value");
  worst = {worse(worst.value, value_error / value_size), worse(worst.gradient, std::sqrt(error / size))};
}

void check_rmu(const char* set) {
  constexpr int64_t ROWS = 5, WIDTH = 77;
  Random random;
  std::vector<float> hidden(ROWS * WIDTH), target(WIDTH), gradient(ROWS * WIDTH);
  for (float& x : hidden) x = float(random.uniform());
  for (float& x : target) x = float(random.uniform());
  std::vector<double> partial(ROWS);
  Rmu c;
  c.tokens = ROWS, c.width = WIDTH, c.hidden = hidden.data(), c.target = target.data(), c.stride_hidden = WIDTH;
  c.coefficient = 1.5f, c.gradient = gradient.data(), c.partial = partial.data();
  const double loss = loss_kernels(set).rmu(c);
  double wanted = 0, worst = 0;
  for (int64_t i = 0; i < ROWS * WIDTH; ++i) {
    const double x = hidden[i] - 1.5 * target[i % WIDTH];
    wanted += x * x / (ROWS * WIDTH);
    worst = std::max(worst, std::fabs(gradient[i] - 2 * x / (ROWS * WIDTH)));
  }
  expect_error(std::fabs(loss - wanted), 4 * UNIT * wanted, std::string("rmu loss ") + set);
  expect_error(worst, 4 * UNIT * 2 * 2.5 / (ROWS * WIDTH), std::string("rmu gradient ") + set);
}

// ---- bfloat16 products -------------------------------------------------------------------------------------------------------

void check_product(const Bf16Product& product, int64_t rows, int64_t tokens, int64_t width, double& worst) {
  Random random;
  const int64_t stride_w = width + 8, stride_z = tokens + 16;
  std::vector<uint16_t> weight(rows * stride_w), hidden(tokens * width);
  for (uint16_t& x : weight) x = to_bfloat16(float(random.uniform()));
  for (uint16_t& x : hidden) x = to_bfloat16(float(random.uniform()));
  std::vector<uint32_t> words(tokens * width / 2);
  for (int64_t i = 0; i < tokens; ++i) {
    for (int64_t k = 0; k < width / 2; ++k) {
      const int64_t panel = i / PRODUCT_TOKENS, lane = i % PRODUCT_TOKENS;
      words[(panel * width / 2 + k) * PRODUCT_TOKENS + lane] = hidden[i * width + 2 * k] | uint32_t(hidden[i * width + 2 * k + 1])
                                                                                               << 16;
    }
  }
  std::vector<float> z(rows * stride_z, 7.0f);
  bf16_project(product, weight.data(), stride_w, rows, {words.data(), tokens, width}, z.data(), stride_z);
  bool right = true, outside = true;
  double error = 0, size = 0;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < tokens; ++i) {
      double wanted = 0, terms = 0;
      for (int64_t k = 0; k < width; ++k) {
        const double term = double(from_bfloat16(weight[r * stride_w + k])) * from_bfloat16(hidden[i * width + k]);
        wanted += term;
        terms += std::fabs(term);
      }
      error += std::pow(z[r * stride_z + i] - wanted, 2), size += std::pow(wanted, 2);
      // Arm's instruction rounds each sum of two products to odd, others to nearest: at most two units in each addition.
      right = right && std::fabs(z[r * stride_z + i] - wanted) <= 2 * width * UNIT * terms;
    }
    for (int64_t i = tokens; i < stride_z; ++i) outside = outside && z[r * stride_z + i] == 7.0f;
  }
  const std::string what = std::string("product ") + product.name + " " + std::to_string(rows) + " x " + std::to_string(tokens);
  expect(right, what);
  expect(outside, what + ": wrote past the tokens");
  worst = worse(worst, std::sqrt(error / size));
}

}  // namespace

int main() {
  std::string names;
  for (const char* set : instruction_sets()) {
    names += std::string(names.empty() ? "" : ", ") + set;
    check_noise(set);
    Worst worst;
    for (const double spread : {8.0, 0.1, 0.003}) {
      for (const Target target : {OWN, FORWARD, REVERSE, JSD}) check_losses(set, target, spread, worst);
    }
    std::printf("loss %s %.3g gradient %.3g\n", set, worst.value, worst.gradient);
    check_rmu(set);
  }
  for (const Bf16Product* product : bf16_products()) {
    names += std::string(", ") + product->name;
    double worst = 0;
    for (const int64_t rows : {1, 32, 75}) {
      check_product(*product, rows, 16, 96, worst);
      check_product(*product, rows, 48, 32, worst);
    }
    std::printf("product %s %.3g\n", product->name, worst);
  }
  std::printf("checked %s\n", names.c_str());
  return failures != 0;
}
