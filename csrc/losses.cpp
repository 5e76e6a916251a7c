// Chooses the row kernels of the best instruction set that this machine has.
#include "losses.h"

#include <cstring>
#include <stdexcept>
#include <string>

namespace undo {

const RowKernels& row_kernels(const char* instruction_set) {
  const bool any = !*instruction_set;
#if defined(__x86_64__)
  const bool has512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (has512 && (any || !std::strcmp(instruction_set, "avx512"))) return avx512_kernels;
  const bool has2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has2 && (any || !std::strcmp(instruction_set, "avx2"))) return avx2_kernels;
#endif
  if (any || !std::strcmp(instruction_set, "plain")) return plain_kernels;
  throw std::invalid_argument(std::string("instruction_set: got ") + instruction_set +
                              ", wanted one that this machine has: avx512, avx2 or plain");
}

}  // namespace undo
