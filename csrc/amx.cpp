// AMX products of bfloat16 hidden states and weights with float32 results. torch has none with a float32 output on CPUs, and
// rounding logits to bfloat16 before subtracting teacher from student would make the gradient useless.
//
// 32 x 32 results stay in four AMX tiles during the loop over k; the weight is read in its own layout, once per call. 2 * rows * tokens * width FLOPs;
// reads 2 * rows * width bytes and the packed hidden states once per 32 rows (from the L2 cache), writes 4 * rows * tokens.
#include "amx.h"

#include <cstring>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
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

constexpr int64_t SIDE = 32, TILE = 16, DEPTH = 32;

bool request() {
  unsigned a = 7, b = 0, c = 0, d = 0;
  __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  const bool has = (d >> 22 & 1) && (d >> 24 & 1);  // AMX-BF16, AMX-TILE
  return has && syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
}

// Results of up to SIDE rows and SIDE tokens, from SIDE readable rows of weight.
void block(const uint16_t* weight, int64_t stride_w, const uint32_t* packed, int64_t tokens, bool two, int64_t width, float* out,
           int64_t stride_out) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < width; k += DEPTH) {
    const uint32_t* b = packed + k / 2 * tokens;
    _tile_loadd(4, weight + k, stride_w * 2);
    _tile_loadd(5, weight + TILE * stride_w + k, stride_w * 2);
    _tile_loadd(6, b, tokens * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    if (two) {
      _tile_loadd(7, b + TILE, tokens * 4);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out, stride_out * 4);
  _tile_stored(1, out + TILE * stride_out, stride_out * 4);
  if (two) {
    _tile_stored(2, out + TILE, stride_out * 4);
    _tile_stored(3, out + TILE * stride_out + TILE, stride_out * 4);
  }
}

}  // namespace

bool amx_available() {
  static const bool available = request();
  return available;
}

void amx_project(const uint16_t* weight, int64_t stride_w, int64_t rows, const uint32_t* packed, int64_t tokens, int64_t width,
                 float* z, int64_t stride_z) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.columns[tile] = 64;
    config.rows[tile] = TILE;
  }
  const int64_t blocks = (rows + SIDE - 1) / SIDE;
#pragma omp parallel
  {
    _tile_loadconfig(&config);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = b * SIDE, count = rows - first < SIDE ? rows - first : SIDE;
      for (int64_t t = 0; t < tokens; t += SIDE) {
        const bool two = tokens - t > TILE;
        if (count == SIDE) {
          block(weight + first * stride_w, stride_w, packed + t, tokens, two, width, z + first * stride_z + t, stride_z);
          continue;
        }
        // The last rows go through a buffer, k by k: nothing past the weight is read.
        alignas(64) float out[SIDE * SIDE] = {}, part[SIDE * SIDE];
        alignas(64) uint16_t rows_of[SIDE * DEPTH] = {};
        for (int64_t k = 0; k < width; k += DEPTH) {
          for (int64_t r = 0; r < count; ++r) std::memcpy(rows_of + r * DEPTH, weight + (first + r) * stride_w + k, DEPTH * 2);
          block(rows_of, DEPTH, packed + k / 2 * tokens + t, tokens, two, DEPTH, part, SIDE);
          for (int64_t i = 0; i < SIDE * SIDE; ++i) out[i] += part[i];
        }
        for (int64_t r = 0; r < count; ++r) std::memcpy(z + (first + r) * stride_z + t, out + r * SIDE, (two ? SIDE : TILE) * 4);
      }
    }
    _tile_release();
  }
}

}  // namespace undo
#else
#include <stdexcept>

namespace undo {

bool amx_available() { return false; }

void amx_project(const uint16_t*, int64_t, int64_t, const uint32_t*, int64_t, int64_t, float*, int64_t) {
  throw std::logic_error("amx_project: this build has no AMX");
}

}  // namespace undo
#endif
