// The kernels of the losses for plain.
#include <cmath>
#include <cstdint>
#include <initializer_list>

#include "vocab_loss.h"

// Four lanes: what every 64-bit machine has (SSE2, NEON).
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
