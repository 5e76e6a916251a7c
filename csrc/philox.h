// Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), LANES / 2 blocks at a time.
//
// Each word is in the low half of 64 bits, where the processor's 32 x 32 -> 64 bit multiply reads it; the high half is ignored.
// A round is therefore two products, two swaps of halves and two three-way exclusive ors, without any shuffling.
// Include after simd.h, inside the namespace of the instruction set.

typedef uint64_t W __attribute__((vector_size(4 * UNDO_LANES)));

UNDO_INLINE W words(uint64_t x) { return x - W{}; }

struct Key {
  uint64_t round[10][2], hash_low, hash_high;
  Key(uint64_t seed, uint64_t hashed) : hash_low(uint32_t(hashed)), hash_high(hashed >> 32) {
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (auto& k : round) {
      k[0] = k0;
      k[1] = k1;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
  }
};

// Computes LANES / 2 blocks from `first` on: words 0 and 2 into `even`, 1 and 3 into `odd`, in the order that interleave() expects.
// reference/philox.py describes the layout of the counter.
UNDO_INLINE void philox(const Key& key, uint64_t stream, uint64_t first, I& even, I& odd) {
  W block;
  for (int q = 0; q < LANES / 4; ++q) {
    block[2 * q] = q;
    block[2 * q + 1] = q + LANES / 4;
  }
  block += first;
  W c0 = block, c1 = (block >> 32 & 0xFFFFFF) | stream << 24, c2 = words(key.hash_low), c3 = words(key.hash_high);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const W p0 = UNDO_MUL32(c0, words(0xD2511F53u)), p1 = UNDO_MUL32(c2, words(0xCD9E8D57u));
    c0 = UNDO_XOR3(UNDO_SWAP(p1), c1, words(key.round[round][0]));
    c2 = UNDO_XOR3(UNDO_SWAP(p0), c3, words(key.round[round][1]));
    c1 = p1;
    c3 = p0;
  }
  even = (I)UNDO_JOIN(c0, c2);
  odd = (I)UNDO_JOIN(c1, c3);
}

// even[0] odd[0] even[1] odd[1] | even[4] odd[4] ... in `low`, the pairs between in `high`, 128 bits at a time.
UNDO_INLINE void interleave(V even, V odd, V& low, V& high) {
  low = UNDO_LOW(even, odd);
  high = UNDO_HIGH(even, odd);
}
