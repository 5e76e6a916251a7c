// Chooses the loss kernels of the best instruction set that this machine has.
#include "vocab_loss.h"

#include "instruction_set.h"

namespace undo {

const LossKernels& loss_kernels(const char* wanted) {
#if defined(__x86_64__)
  const LossKernels* kernels[] = {&avx512_kernels, &avx2_kernels, nullptr, &plain_kernels};
#elif defined(__aarch64__)
  const LossKernels* kernels[] = {nullptr, nullptr, &neon_kernels, &plain_kernels};
#else
  const LossKernels* kernels[] = {nullptr, nullptr, nullptr, &plain_kernels};
#endif
  return *kernels[instruction_set(wanted)];
}

}  // namespace undo
