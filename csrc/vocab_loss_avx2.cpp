// The kernels of the losses for avx2.
#include <cmath>
#include <cstdint>
#include <initializer_list>

#include "vocab_loss.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define UNDO_LANES 8
#define UNDO_FMA(a, b, c) _mm256_fmadd_ps(a, b, c)

namespace undo {
namespace avx2 {
#include "simd.h"
#include "vocab_loss_kernels.h"
#include "rmu_kernels.h"
}  // namespace avx2
const LossKernels avx2_kernels = {"avx2", avx2::shape_tile, avx2::stats_tile, avx2::loss_tile, avx2::rmu_loss};
}  // namespace undo
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
