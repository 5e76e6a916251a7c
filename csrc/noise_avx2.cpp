// The noise for avx2.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "noise.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define UNDO_LANES 8
#define UNDO_FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define UNDO_FMA_D(a, b, c) _mm256_fmadd_pd(a, b, c)
#define UNDO_LOW_D(a) ((D)_mm256_cvtps_pd(_mm256_castps256_ps128(a)))
#define UNDO_HIGH_D(a) ((D)_mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)))
#define UNDO_SQRT(a) ((V)_mm256_sqrt_ps(a))
#define UNDO_LOW(a, b) ((V)_mm256_unpacklo_ps(a, b))
#define UNDO_HIGH(a, b) ((V)_mm256_unpackhi_ps(a, b))
#define UNDO_MUL32(a, b) ((W)_mm256_mul_epu32((__m256i)(a), (__m256i)(b)))
#define UNDO_SWAP(a) ((W)_mm256_shuffle_epi32((__m256i)(a), 0xB1))
#define UNDO_XOR3(a, b, c) ((a) ^ (b) ^ (c))
#define UNDO_JOIN(a, b) ((W)_mm256_blend_epi32((__m256i)(a), _mm256_shuffle_epi32((__m256i)(b), 0xB1), 0xAA))  // low halves

namespace undo {
namespace avx2 {
#include "simd.h"
#include "philox.h"
#include "noise_kernels.h"
}  // namespace avx2
const NoiseKernels avx2_noise = {"avx2", avx2::noise_part, avx2::noise_words};
}  // namespace undo
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
