// Processes all segments in one parallel region, in chunks of a fixed size, so results do not depend on the number of threads.
#include "noise.h"

#include <algorithm>

#include "instruction_set.h"

namespace undo {

namespace {
constexpr int64_t CHUNK = 1 << 16;
}

const NoiseKernels& noise_kernels(const char* wanted) {
#if defined(__x86_64__)
  const NoiseKernels* kernels[] = {&avx512_noise, &avx2_noise, nullptr, &plain_noise};
#elif defined(__aarch64__)
  const NoiseKernels* kernels[] = {nullptr, nullptr, &neon_noise, &plain_noise};
#else
  const NoiseKernels* kernels[] = {nullptr, nullptr, nullptr, &plain_noise};
#endif
  return *kernels[instruction_set(wanted)];
}

std::vector<Sums> noise(const NoiseKernels& kernels, const std::vector<Segment>& segments, uint64_t seed, bool stochastic) {
  std::vector<int64_t> starts = {0};  // of each segment's chunks
  for (const Segment& s : segments) starts.push_back(starts.back() + (s.count + CHUNK - 1) / CHUNK);
  std::vector<Sums> parts(starts.back());
#pragma omp parallel for schedule(dynamic) if (parts.size() > 1)
  for (int64_t i = 0; i < int64_t(parts.size()); ++i) {
    const size_t at = std::upper_bound(starts.begin(), starts.end(), i) - starts.begin() - 1;
    const int64_t begin = (i - starts[at]) * CHUNK;
    parts[i] = kernels.part(segments[at], begin, std::min(begin + CHUNK, segments[at].count), seed, stochastic);
  }
  std::vector<Sums> sums(segments.size(), Sums{});
  for (size_t at = 0; at < segments.size(); ++at) {
    for (int64_t i = starts[at]; i < starts[at + 1]; ++i) {
      sums[at].before += parts[i].before;
      sums[at].noise += parts[i].noise;
      sums[at].after += parts[i].after;
    }
  }
  return sums;
}

}  // namespace undo
