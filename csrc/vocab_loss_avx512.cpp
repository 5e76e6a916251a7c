// The kernels of the losses for avx512.
#include <cmath>
#include <cstdint>
#include <initializer_list>

#include "vocab_loss.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
#define UNDO_LANES 16
#define UNDO_FMA(a, b, c) _mm512_fmadd_ps(a, b, c)

namespace undo {
namespace avx512 {
#include "simd.h"
#include "vocab_loss_kernels.h"
#include "rmu_kernels.h"
}  // namespace avx512
const LossKernels avx512_kernels = {"avx512", avx512::shape_tile, avx512::stats_tile, avx512::loss_tile, avx512::rmu_loss};
}  // namespace undo
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
