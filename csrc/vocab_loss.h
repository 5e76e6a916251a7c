// Row work of the vocabulary losses between two matrix products, on tiles z[v][token] of float32 logits.
//
// Tokens lie along the vector lanes, so that no step needs a sum across lanes, and a tile is read while it is still in the cache
// that the product left it in. Every sum has a fixed order: the bits do not depend on the number of threads.
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
  bool full = true;           // false: `own` is 0 everywhere and nobody asks for the Peak
  float beta = 0.5f, other = 0.5f;  // of jsd; other = 1 - beta, which float32 cannot form when beta is near 1
  Shape student, teacher;
  double* state = nullptr;    // [FIELDS][stride]
  double* partial = nullptr;  // [tile / BLOCK][FIELDS][stride]
  // [stride]: log p = (z - base) - log_sum; gap = log_sum_s - log_sum_t, not formed from the two; offset: KL(s||t) or KL(s||m).
  const float *base_s = nullptr, *base_t = nullptr, *log_sum_s = nullptr, *log_sum_t = nullptr, *gap = nullptr, *offset = nullptr;
  const float *weight = nullptr, *own = nullptr;  // [stride] factors of the divergence's gradient and of p_s
  const int64_t* labels = nullptr;                // [stride], -1 for none
  const float* label_weight = nullptr;            // [stride]
  int64_t known = 0;                              // entries a token of a sparse teacher
  const int64_t* indices = nullptr;               // [stride][known], -1 for none
  float* picked = nullptr;                        // [stride][known]: logits out while `picking`, then gradients in
  bool picking = false;
};

constexpr int64_t WIDEST = 16;  // lanes of the widest vector; strides over tokens are a multiple
constexpr int64_t BLOCK = 128;  // vocabulary rows whose sums are float32: two logits of 16 tokens fill half of a 32 KB cache

struct Peak {
  float largest;   // of |dloss/dz| before the tokens' weights
  double squares;  // sum of the squares of what was written
};

struct RowKernels {
  const char* name;
  // Bias, scale, softcap and temperature in place; takes a sparse teacher's entries out.
  void (*shape)(const Chunk&, float* z, const Shape&, bool student, int64_t first, int64_t rows);
  // Maxima and sums of exponentials into the state; shapes first unless told that it was done.
  void (*stats)(const Chunk&, float* z_s, float* z_t, int64_t first, int64_t rows, bool shaped);
  // Loss into the state; with `gradient`, d total / d product over z_s.
  Peak (*loss)(const Chunk&, float* z_s, const float* z_t, int64_t first, int64_t rows, bool gradient);
  double (*rmu)(const Rmu&);
};

const RowKernels& row_kernels(const char* instruction_set);  // "" for the best of this machine
extern const RowKernels avx512_kernels, avx2_kernels, plain_kernels;

}  // namespace undo
