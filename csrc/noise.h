// In-place parameter noise, theta <- keep * theta + scale * N, in the roundings of reference/noise.py.
#pragma once
#include <cstdint>
#include <vector>

namespace undo {

enum class Law { UNIFORM, NORMAL, CONSTANT };
enum class Type { FLOAT32, BFLOAT16, FLOAT16, FLOAT64 };

// `count` contiguous elements. In the full parameter they begin at flat index `first`, and runs of `run` start `stride` apart.
struct Segment {
  void* data;
  int64_t count;
  Type type;
  Law law;
  uint64_t hashed;
  double keep, scale;
  int64_t first, run, stride;
};

struct Sums {
  double before, noise, after;  // sums of squares of theta before, of scale * N, and of theta after
};

struct NoiseKernels {
  const char* name;
  Sums (*part)(const Segment&, int64_t begin, int64_t end, uint64_t seed, bool stochastic);
  // Computes the four words of one Philox block.
  void (*words)(uint64_t seed, uint64_t hashed, uint32_t stream, uint64_t block, uint32_t out[4]);
};

const NoiseKernels& noise_kernels(const char* instruction_set);  // "": the best of this machine
extern const NoiseKernels avx512_noise, avx2_noise, neon_noise, plain_noise;

// Adds noise to all segments; returns the sums of each.
std::vector<Sums> noise(const NoiseKernels&, const std::vector<Segment>&, uint64_t seed, bool stochastic);

}  // namespace undo
