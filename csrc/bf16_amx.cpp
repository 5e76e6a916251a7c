// The inner product on AMX tiles: 32 x 32 results stay in four tiles during the loop over k.
#include "bf16_product.h"

#if defined(__x86_64__)
#if defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#pragma GCC target("amx-tile,amx-bf16,avx512f")

namespace undo {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t columns[16] = {};  // bytes of a row
  uint8_t rows[16] = {};
};

constexpr int64_t TILE = 16;

bool request() {
  unsigned a = 7, b = 0, c = 0, d = 0;
  __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  const bool has = (d >> 22 & 1) && (d >> 24 & 1);  // AMX-BF16, AMX-TILE
  return has && syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
}

bool available() {
  static const bool available = request();
  return available;
}

void block(const uint16_t* weight, int64_t stride_w, const Packed& packed, float* z, int64_t stride_z) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.columns[tile] = 64;
    config.rows[tile] = TILE;
  }
  _tile_loadconfig(&config);
  for (int64_t t = 0; t < packed.tokens; t += 2 * TILE) {
    const bool two = packed.tokens - t > TILE;
    const uint32_t *left = packed.panel(t), *right = packed.panel(t + TILE);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < packed.width; k += PRODUCT_DEPTH) {
      _tile_loadd(4, weight + k, stride_w * 2);
      _tile_loadd(5, weight + TILE * stride_w + k, stride_w * 2);
      _tile_loadd(6, left + k / 2 * TILE, TILE * 4);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
      if (two) {
        _tile_loadd(7, right + k / 2 * TILE, TILE * 4);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    float* out = z + t;
    _tile_stored(0, out, stride_z * 4);
    _tile_stored(1, out + TILE * stride_z, stride_z * 4);
    if (two) {
      _tile_stored(2, out + TILE, stride_z * 4);
      _tile_stored(3, out + TILE * stride_z + TILE, stride_z * 4);
    }
  }
  _tile_release();
}

}  // namespace

extern const Bf16Product amx_product = {"amx", "avx512", false, available, block};

}  // namespace undo
#else
namespace undo {

extern const Bf16Product amx_product = {"amx", "avx512", false, [] { return false; }, nullptr};  // this compiler has no AMX

}  // namespace undo
#endif
#endif
