#pragma once
#include <cstdint>

namespace undo {

// Uniform noise on `count` float32 elements that begin at flat index `start` of the parameter with this name hash.
void noise_uniform_f32(float* theta, int64_t count, uint64_t start, uint64_t seed, uint64_t hashed, float k, float c);

}  // namespace undo
