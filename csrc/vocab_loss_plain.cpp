// The kernels of the losses for plain.
#include <cmath>
#include <cstdint>
#include <initializer_list>

#include "vocab_loss.h"

// Four lanes without a fused multiply-add, in the compiler's own vectors: SSE2 on any 64-bit x86, and every other processor.
#define UNDO_LANES 4
#define UNDO_FMA(a, b, c) ((a) * (b) + (c))

namespace undo {
namespace plain {
#include "simd.h"
#include "vocab_loss_kernels.h"
#include "rmu_kernels.h"
}  // namespace plain
const LossKernels plain_kernels = {"plain", plain::shape_tile, plain::stats_tile, plain::loss_tile, plain::rmu_loss};
}  // namespace undo
