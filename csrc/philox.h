// Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
#pragma once
#include <cstdint>

namespace undo {

// Four words for one counter. Products are 32 x 32 -> 64 bits; everything else is exclusive or.
inline void philox_4x32_10(const uint32_t counter[4], uint32_t k0, uint32_t k1, uint32_t out[4]) {
  uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    const uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ k0, n2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
}

// The four words of one block of a parameter; see reference/philox.py for the counter's layout.
inline void block_words(uint64_t seed, uint64_t hashed, uint32_t stream, uint64_t block, uint32_t out[4]) {
  const uint32_t counter[4] = {uint32_t(block), uint32_t(block >> 32 & 0xFFFFFF) | stream << 24, uint32_t(hashed),
                               uint32_t(hashed >> 32)};
  philox_4x32_10(counter, uint32_t(seed), uint32_t(seed >> 32), out);
}

}  // namespace undo
