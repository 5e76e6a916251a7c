// theta <- rn(rn(k * theta) + rn(c * n)), n = 2 * (w >> 8) + 1 - 2**24: uniform noise in place, float32.
// Reads and writes 8 bytes an element; the ten Philox rounds, about 25 integer operations an element, take most of the time.
// Compiled with -ffp-contract=off: a fused multiply-add would change the last bit of many results.
#include "noise.h"

#include <algorithm>

#include "philox.h"

namespace undo {

void noise_uniform_f32(float* theta, int64_t count, uint64_t start, uint64_t seed, uint64_t hashed, float k, float c) {
  const int64_t first = int64_t(start / 4), last = int64_t((start + uint64_t(count) + 3) / 4);
#pragma omp parallel for schedule(static) if (count > 16384)
  for (int64_t block = first; block < last; ++block) {
    uint32_t words[4];
    block_words(seed, hashed, 0, uint64_t(block), words);
    const int64_t base = 4 * block - int64_t(start);
    const int begin = int(std::max<int64_t>(0, -base)), end = int(std::min<int64_t>(4, count - base));
    for (int lane = begin; lane < end; ++lane) {
      const float n = float(2 * int32_t(words[lane] >> 8) + 1 - (1 << 24));
      const float kept = k * theta[base + lane];
      const float noise = c * n;
      theta[base + lane] = kept + noise;
    }
  }
}

}  // namespace undo
