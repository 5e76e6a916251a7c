// Kernels of the vocabulary losses, between two matrix products, on tiles z[v][token] of float32 logits.
//
// Vector lanes are tokens, so that no step needs a sum across lanes; a tile is read while the product's output is still in the
// cache. Every sum has a fixed order, so results do not depend on the number of threads.
#pragma once
#include <cstdint>

#include "rmu.h"

namespace undo {

enum Target : int { OWN, FORWARD, REVERSE, JSD };

// Fields of the state, one double per token each: the running maximum m and sum of exponentials l of an online softmax, and more.
// With u = z_s - M_S and v = z_t - M_T: L_S = sum e**u, L_T = sum e**v, DIFFERENCE = sum (e**u - e**v), CROSS = sum e**u (u - v).
enum Field : int { M_S, L_S, M_T, L_T, DIFFERENCE, CROSS, ENERGY, TOP_S, TOP_T, LABEL, VALUE, MIXED, FIELDS };

// z = cap * tanh(scale * (product + bias) / cap) / temperature
struct Shape {
  float scale = 1, cap = 0, temperature = 1;  // cap 0: none
  const float* bias = nullptr;                // [vocabulary]
  bool identity() const { return scale == 1 && cap == 0 && temperature == 1 && !bias; }
};

// One chunk of tokens. Arrays over tokens have `stride` entries, a multiple of 16; entries past `tokens` are padding.
struct Chunk {
  int64_t tokens = 0, stride = 0, leading = 0;  // `leading`: floats from z[v] to z[v + 1]
  int target = OWN;
  bool uniform = false;       // the teacher is uniform: its logits are 0 and never read
  bool statistics = false;
  bool own_term = true;       // false: `own` is 0 everywhere if the target is another than OWN
  float beta = 0.5f, other = 0.5f;  // of jsd; other = 1 - beta, which float32 cannot form when beta is near 1
  Shape student, teacher;
  double* state = nullptr;    // [FIELDS][stride]
  double* partial = nullptr;  // [tile / BLOCK][FIELDS][stride]
  // [stride]: log p = (z - base) - log_sum; gap = log_sum_s - log_sum_t, not formed from the two; offset: KL(s||t) or KL(s||m).
  const float *base_s = nullptr, *base_t = nullptr, *log_sum_s = nullptr, *log_sum_t = nullptr, *gap = nullptr, *offset = nullptr;
  const float *weight = nullptr, *own = nullptr;  // [stride] factors of the divergence's gradient and of p_s
  const int64_t* labels = nullptr;                // [stride], -1 for none
  const float* label_weight = nullptr;            // [stride]
  int64_t known = 0;                              // entries per token of a sparse teacher
  const int64_t* indices = nullptr;               // [stride][known], -1 for none
  float* picked = nullptr;                        // [stride][known]: output (logits) while `picking`, then input (gradients)
  bool picking = false;
};

constexpr int64_t WIDEST = 16;  // lanes of the widest vector; strides over tokens are a multiple
constexpr int64_t BLOCK = 128;  // vocabulary entries whose sums are float32: two logits of 16 tokens fill half of a 32 KB cache

struct LossKernels {
  const char* name;
  // Applies bias, scale, softcap and temperature in place; removes a sparse teacher's entries.
  void (*shape)(const Chunk&, float* z, const Shape&, bool student, int64_t first, int64_t entries);
  // Adds maxima and sums of exponentials to the state; shapes the logits first unless `shaped`.
  void (*stats)(const Chunk&, float* z_s, float* z_t, int64_t first, int64_t entries, bool shaped);
  // Adds the loss to the state; with `gradient`, overwrites z_s by d total / d product.
  void (*loss)(const Chunk&, float* z_s, const float* z_t, int64_t first, int64_t entries, bool gradient);
  double (*rmu)(const Rmu&);
};

const LossKernels& loss_kernels(const char* instruction_set);  // "": the best of this machine
extern const LossKernels avx512_kernels, avx2_kernels, neon_kernels, plain_kernels;

}  // namespace undo
