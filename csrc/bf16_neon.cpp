// The inner product of Arm processors with bfloat16 (FEAT_BF16: Neoverse N2, V1 and later, Apple M2 and later).
//
// bfmmla multiplies 2 rows x 4 k by 4 k x 2 tokens. 8 rows x 8 tokens stay in 16 registers. For each 4 of k: 4 loads and 4 zips for
// the tokens, 8 half loads for the rows, and 16 products of 16 multiplications each. bfdot, which the same processors have,
// would need twice as many products.
#include "bf16_product.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace undo {
namespace bfmmla {

bool available() {
#if defined(__linux__)
  return getauxval(AT_HWCAP2) >> 14 & 1;  // HWCAP2_BF16
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) == 0 && has;
#else
  return false;
#endif
}

}  // namespace bfmmla
}  // namespace undo

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("bf16"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+bf16")
#endif

namespace undo {
namespace bfmmla {

constexpr int64_t SIDE = 8, DEPTH = 4;  // rows and tokens of a corner, and k of a step

void corner(const uint16_t* weight, int64_t stride_w, const uint32_t* panel, int64_t width, float* z, int64_t stride_z) {
  float32x4_t sum[SIDE / 2][SIDE / 2];  // each 2 rows x 2 tokens
  for (auto& row : sum) {
    for (auto& each : row) each = vdupq_n_f32(0);
  }
  for (int64_t k = 0; k < width; k += DEPTH) {
    const uint32_t* words = panel + k / 2 * PRODUCT_TOKENS;
    bfloat16x8_t tokens[SIDE / 2];
    for (int64_t t = 0; t < SIDE / 4; ++t) {
      const uint32x4_t first = vld1q_u32(words + 4 * t), second = vld1q_u32(words + PRODUCT_TOKENS + 4 * t);
      tokens[2 * t] = vreinterpretq_bf16_u32(vzip1q_u32(first, second));
      tokens[2 * t + 1] = vreinterpretq_bf16_u32(vzip2q_u32(first, second));
    }
    for (int64_t r = 0; r < SIDE / 2; ++r) {
      const uint16_t* row = weight + 2 * r * stride_w + k;
      const bfloat16x8_t rows = vreinterpretq_bf16_u16(vcombine_u16(vld1_u16(row), vld1_u16(row + stride_w)));
      for (int64_t t = 0; t < SIDE / 2; ++t) sum[r][t] = vbfmmlaq_f32(sum[r][t], rows, tokens[t]);
    }
  }
  for (int64_t r = 0; r < SIDE / 2; ++r) {
    float* out = z + 2 * r * stride_z;
    for (int64_t t = 0; t < SIDE / 2; ++t, out += 2) {
      vst1_f32(out, vget_low_f32(sum[r][t]));
      vst1_f32(out + stride_z, vget_high_f32(sum[r][t]));
    }
  }
}

void block(const uint16_t* weight, int64_t stride_w, const Packed& packed, float* z, int64_t stride_z) {
  for (int64_t token = 0; token < packed.tokens; token += SIDE) {
    const uint32_t* panel = packed.panel(token / PRODUCT_TOKENS * PRODUCT_TOKENS) + token % PRODUCT_TOKENS;
    for (int64_t row = 0; row < PRODUCT_ROWS; row += SIDE) {
      corner(weight + row * stride_w, stride_w, panel, packed.width, z + row * stride_z + token, stride_z);
    }
  }
}

}  // namespace bfmmla
extern const Bf16Product bfmmla_product = {"bfmmla", "neon", false, bfmmla::available, bfmmla::block};
}  // namespace undo
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
