#include "instruction_set.h"

#include <cstring>
#include <stdexcept>
#include <string>

namespace undo {

namespace {

const char* const NAMES[] = {"avx512", "avx2", "neon", "plain"};  // in the order of InstructionSet, which is best first

bool has(int set) {
#if defined(__x86_64__)
  if (set == AVX512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl");
  }
  if (set == AVX2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#elif defined(__aarch64__)
  if (set == NEON) return true;
#endif
  return set == PLAIN;
}

}  // namespace

bool has_instruction_set(const char* name) {
  for (int set = AVX512; set <= PLAIN; ++set) {
    if (!std::strcmp(name, NAMES[set])) return has(set);
  }
  return false;
}

InstructionSet instruction_set(const char* wanted) {
  std::string here;
  for (int set = AVX512; set <= PLAIN; ++set) {
    if (!has(set)) continue;
    if (!*wanted || !std::strcmp(wanted, NAMES[set])) return InstructionSet(set);
    here += (here.empty() ? "" : ", ") + std::string(NAMES[set]);
  }
  throw std::invalid_argument(std::string("instruction_set: got ") + wanted + ", wanted one that this machine has: " + here);
}

}  // namespace undo
