// The inner product with vdpbf16ps, or what UNDO_DOT stands for. Include inside a namespace of its own, after the target pragma.
//
// 8 rows x 32 tokens stay in 16 registers during the loop over k. For each pair of k: 2 loads of 16 tokens, 8 broadcasts of a row's
// pair, 16 products, so the products need more of the processor's time than the loads; they follow each other at a distance of
// 16, more than their latency (6 cycles on Zen 4).

constexpr int64_t STEP = 8;  // rows

template <int PANELS>
void panels(const uint16_t* weight, int64_t stride_w, const Packed& packed, int64_t token, float* z, int64_t stride_z) {
  const uint32_t* panel[PANELS];
  for (int p = 0; p < PANELS; ++p) panel[p] = packed.panel(token + p * PRODUCT_TOKENS);
  for (int64_t first = 0; first < PRODUCT_ROWS; first += STEP) {
    __m512 sum[STEP][PANELS];
#pragma GCC unroll 8
    for (int r = 0; r < STEP; ++r) {
#pragma GCC unroll 2
      for (int p = 0; p < PANELS; ++p) sum[r][p] = _mm512_setzero_ps();
    }
    const uint16_t* row = weight + first * stride_w;
    for (int64_t pair = 0; pair < packed.width / 2; ++pair) {
      __m512i hidden[PANELS];
#pragma GCC unroll 2
      for (int p = 0; p < PANELS; ++p) hidden[p] = _mm512_loadu_si512(panel[p] + pair * PRODUCT_TOKENS);
#pragma GCC unroll 8
      for (int r = 0; r < STEP; ++r) {
        int32_t two;
        __builtin_memcpy(&two, row + r * stride_w + 2 * pair, sizeof two);
        const __m512i both = _mm512_set1_epi32(two);
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; ++p) sum[r][p] = UNDO_DOT(sum[r][p], hidden[p], both);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < STEP; ++r) {
#pragma GCC unroll 2
      for (int p = 0; p < PANELS; ++p) _mm512_storeu_ps(z + (first + r) * stride_z + token + p * PRODUCT_TOKENS, sum[r][p]);
    }
  }
}

void block(const uint16_t* weight, int64_t stride_w, const Packed& packed, float* z, int64_t stride_z) {
  int64_t token = 0;
  for (; token + 2 * PRODUCT_TOKENS <= packed.tokens; token += 2 * PRODUCT_TOKENS) {
    panels<2>(weight, stride_w, packed, token, z, stride_z);
  }
  if (token < packed.tokens) panels<1>(weight, stride_w, packed, token, z, stride_z);
}
