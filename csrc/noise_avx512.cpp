// The noise for avx512.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "noise.h"

#if defined(__x86_64__)
// GCC 12 warns about its own header.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
#define UNDO_LANES 16
#define UNDO_FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define UNDO_FMA_D(a, b, c) _mm512_fmadd_pd(a, b, c)
#define UNDO_LOW_D(a) ((D)_mm512_cvtps_pd(_mm512_castps512_ps256(a)))
#define UNDO_HIGH_D(a) ((D)_mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1)))
#define UNDO_SQRT(a) ((V)_mm512_sqrt_ps(a))
#define UNDO_LOW(a, b) ((V)_mm512_unpacklo_ps(a, b))
#define UNDO_HIGH(a, b) ((V)_mm512_unpackhi_ps(a, b))
#define UNDO_MUL32(a, b) ((W)_mm512_mul_epu32((__m512i)(a), (__m512i)(b)))
#define UNDO_SWAP(a) ((W)_mm512_shuffle_epi32((__m512i)(a), _MM_PERM_CDAB))
#define UNDO_XOR3(a, b, c) ((W)_mm512_ternarylogic_epi64((__m512i)(a), (__m512i)(b), (__m512i)(c), 0x96))
#define UNDO_JOIN(a, b) ((W)_mm512_mask_shuffle_epi32((__m512i)(a), 0xAAAA, (__m512i)(b), _MM_PERM_CDAB))  // low halves

namespace undo {
namespace avx512 {
#include "simd.h"
#include "philox.h"
#include "noise_kernels.h"
}  // namespace avx512
const NoiseKernels avx512_noise = {"avx512", avx512::noise_part, avx512::noise_words};
}  // namespace undo
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
