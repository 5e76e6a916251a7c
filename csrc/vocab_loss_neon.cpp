// The kernels of the losses for neon.
#include <cmath>
#include <cstdint>
#include <initializer_list>

#include "vocab_loss.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#define UNDO_LANES 4
#define UNDO_FMA(a, b, c) ((V)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))

namespace undo {
namespace neon {
#include "simd.h"
#include "vocab_loss_kernels.h"
#include "rmu_kernels.h"
}  // namespace neon
const LossKernels neon_kernels = {"neon", neon::shape_tile, neon::stats_tile, neon::loss_tile, neon::rmu_loss};
}  // namespace undo
#endif
