// The inner product of processors with AVX512-BF16: AMD Zen 4 and later, Cooper Lake, Sapphire Rapids and later.
#include "bf16_product.h"

#if defined(__x86_64__)
#include <cpuid.h>
// GCC 12 warns about its own header.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

namespace undo {
namespace avx512bf16 {

bool available() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}

}  // namespace avx512bf16
}  // namespace undo

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512bf16")
#endif
#define UNDO_DOT(sum, a, b) _mm512_dpbf16_ps(sum, (__m512bh)(a), (__m512bh)(b))

namespace undo {
namespace avx512bf16 {
#include "bf16_avx512.h"
}  // namespace avx512bf16
extern const Bf16Product avx512bf16_product = {"avx512bf16", "avx512", false, avx512bf16::available, avx512bf16::block};
}  // namespace undo
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
