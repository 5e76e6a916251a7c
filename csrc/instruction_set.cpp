#include "instruction_set.h"

#include <cstring>
#include <stdexcept>
#include <string>

namespace undo {

InstructionSet instruction_set(const char* wanted) {
  const bool any = !*wanted;
#if defined(__x86_64__)
  const bool has512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (has512 && (any || !std::strcmp(wanted, "avx512"))) return AVX512;
  const bool has2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has2 && (any || !std::strcmp(wanted, "avx2"))) return AVX2;
#endif
  if (any || !std::strcmp(wanted, "plain")) return PLAIN;
  throw std::invalid_argument(std::string("instruction_set: got ") + wanted +
                              ", wanted one that this machine has: avx512, avx2 or plain");
}

}  // namespace undo
