// The noise for neon.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "noise.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#define UNDO_LANES 4
#define UNDO_FMA(a, b, c) ((V)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#define UNDO_FMA_D(a, b, c) ((D)vfmaq_f64((float64x2_t)(c), (float64x2_t)(a), (float64x2_t)(b)))
#define UNDO_LOW_D(a) ((D)vcvt_f64_f32(vget_low_f32((float32x4_t)(a))))
#define UNDO_HIGH_D(a) ((D)vcvt_high_f64_f32((float32x4_t)(a)))
#define UNDO_SQRT(a) ((V)vsqrtq_f32((float32x4_t)(a)))
#define UNDO_LOW(a, b) ((V)vzip1q_f32((float32x4_t)(a), (float32x4_t)(b)))
#define UNDO_HIGH(a, b) ((V)vzip2q_f32((float32x4_t)(a), (float32x4_t)(b)))
#define UNDO_MUL32(a, b) ((W)vmull_u32(vmovn_u64((uint64x2_t)(a)), vmovn_u64((uint64x2_t)(b))))
#define UNDO_SWAP(a) ((a) >> 32)
#define UNDO_XOR3(a, b, c) ((a) ^ (b) ^ (c))
#define UNDO_JOIN(a, b) ((W)vtrn1q_u32((uint32x4_t)(a), (uint32x4_t)(b)))  // low halves

namespace undo {
namespace neon {
#include "simd.h"
#include "philox.h"
#include "noise_kernels.h"
}  // namespace neon
const NoiseKernels neon_noise = {"neon", neon::noise_part, neon::noise_words};
}  // namespace undo
#endif
