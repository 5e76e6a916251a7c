// The inner product of AVX512-BF16 with vdpbf16ps computed by AVX-512, so that its code is tested where the processor lacks it.
// Slower than widening the weight: only UNDO_CPU_ISA=avx512bf16-emulated chooses it.
#include "bf16_product.h"

#if defined(__x86_64__)
// GCC 12 warns about its own header.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

namespace undo {
namespace avx512bf16_emulated {

bool available() { return true; }

}  // namespace avx512bf16_emulated
}  // namespace undo

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl")
#endif

namespace undo {
namespace avx512bf16_emulated {

// Subnormal numbers as zeros of their sign.
inline __m512 flushed(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __mmask16 tiny = _mm512_testn_epi32_mask(bits, _mm512_set1_epi32(0x7F800000));
  return _mm512_castsi512_ps(_mm512_mask_and_epi32(bits, tiny, bits, _mm512_set1_epi32(int(0x80000000))));
}

// As Intel's manual defines the instruction: two fused multiply-adds, of the upper halves and then of the lower ones, each rounded
// to the nearest even number; subnormal inputs and results count as zero.
inline __m512 dot(__m512 sum, __m512i a, __m512i b) {
  const __m512i upper = _mm512_set1_epi32(int(0xFFFF0000));
  const __m512 a_high = flushed(_mm512_castsi512_ps(_mm512_and_si512(a, upper)));
  const __m512 b_high = flushed(_mm512_castsi512_ps(_mm512_and_si512(b, upper)));
  const __m512 a_low = flushed(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)));
  const __m512 b_low = flushed(_mm512_castsi512_ps(_mm512_slli_epi32(b, 16)));
  constexpr int NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  sum = flushed(_mm512_fmadd_round_ps(a_high, b_high, flushed(sum), NEAREST));
  return flushed(_mm512_fmadd_round_ps(a_low, b_low, sum, NEAREST));
}
#define UNDO_DOT(sum, a, b) dot(sum, a, b)
#include "bf16_avx512.h"

}  // namespace avx512bf16_emulated
extern const Bf16Product avx512bf16_emulated_product = {"avx512bf16-emulated", "avx512", true, avx512bf16_emulated::available,
                                                        avx512bf16_emulated::block};
}  // namespace undo
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
