// Products of bfloat16 hidden states and weights with float32 results. torch has none with a float32 output on CPUs, and rounding
// logits to bfloat16 before subtracting teacher from student would make the gradient useless.
//
// Each file bf16_*.cpp has the inner product of one kind of processor; bf16_product.cpp has everything else. 2 * rows * tokens *
// width FLOPs; reads 2 * rows * width bytes and the packed hidden states once per PRODUCT_ROWS rows (from the L2 cache), writes
// 4 * rows * tokens.
#pragma once
#include <cstdint>
#include <vector>

namespace undo {

constexpr int64_t PRODUCT_ROWS = 32;    // rows of weight of a block
constexpr int64_t PRODUCT_TOKENS = 16;  // tokens of a panel: one 64-byte line for each pair of k
constexpr int64_t PRODUCT_DEPTH = 32;   // the width is a multiple

// What to multiply: hidden as panels of tokens, [tokens / PRODUCT_TOKENS][width / 2][PRODUCT_TOKENS] words, with a pair of k in each.
struct Packed {
  const uint32_t* words;
  int64_t tokens, width;
  const uint32_t* panel(int64_t token) const { return words + token * (width / 2); }
};

struct Bf16Product {
  const char* name;  // as UNDO_CPU_ISA takes it
  const char* vectors;  // instruction set of the loss kernels that go with it
  bool emulated;  // for tests, and never chosen unless it is named
  bool (*available)();
  // z[row][token] for PRODUCT_ROWS readable rows of weight, `stride_w` apart, and all tokens.
  void (*block)(const uint16_t* weight, int64_t stride_w, const Packed&, float* z, int64_t stride_z);
};

// The products that this machine can run, best first; emulations are last.
const std::vector<const Bf16Product*>& bf16_products();

// Returns the named one. Throws if this machine lacks it.
const Bf16Product& bf16_product(const char* name);

// z[v][token] = sum_k weight[v][k] hidden[token][k] for `rows` rows of weight; no other row is read.
void bf16_project(const Bf16Product&, const uint16_t* weight, int64_t stride_w, int64_t rows, const Packed&, float* z,
                  int64_t stride_z);

}  // namespace undo
