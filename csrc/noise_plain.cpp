// The noise for plain.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "noise.h"

// Four lanes without a fused multiply-add, in the compiler's own vectors: SSE2 on any 64-bit x86, and every other processor.
#define UNDO_LANES 4
#define UNDO_FMA(a, b, c) ((a) * (b) + (c))
#define UNDO_FMA_D(a, b, c) ((a) * (b) + (c))
#define UNDO_LOW_D(a) (D{(a)[0], (a)[1]})
#define UNDO_HIGH_D(a) (D{(a)[2], (a)[3]})
#define UNDO_SWAP(a) ((a) >> 32)
#define UNDO_XOR3(a, b, c) ((a) ^ (b) ^ (c))
#define UNDO_JOIN(a, b) (((a) & 0xFFFFFFFF) | (b) << 32)
#if defined(__SSE2__)
#include <emmintrin.h>
#define UNDO_SQRT(a) ((V)_mm_sqrt_ps(a))
#define UNDO_MUL32(a, b) ((W)_mm_mul_epu32((__m128i)(a), (__m128i)(b)))
#else
#define UNDO_SQRT(a) (V{std::sqrt((a)[0]), std::sqrt((a)[1]), std::sqrt((a)[2]), std::sqrt((a)[3])})
#define UNDO_MUL32(a, b) (((a) & 0xFFFFFFFF) * (b))
#endif
#define UNDO_LOW(a, b) (V{(a)[0], (b)[0], (a)[1], (b)[1]})
#define UNDO_HIGH(a, b) (V{(a)[2], (b)[2], (a)[3], (b)[3]})

namespace undo {
namespace plain {
#include "simd.h"
#include "philox.h"
#include "noise_kernels.h"
}  // namespace plain
const NoiseKernels plain_noise = {"plain", plain::noise_part, plain::noise_words};
}  // namespace undo
