#pragma once
#include <cstdint>

namespace undo {

// Whether this processor and system have AMX tiles for bfloat16.
bool amx_available();

// z[v][token] = sum_k weight[v][k] hidden[token][k] in float32, from bfloat16: rows of `weight` are `stride_w` apart, `packed`
// is hidden with pairs of k in one word, [width / 2][tokens]. `tokens` is a multiple of 16 and `width` of 32.
void amx_project(const uint16_t* weight, int64_t stride_w, int64_t rows, const uint32_t* packed, int64_t tokens, int64_t width,
                 float* z, int64_t stride_z);

}  // namespace undo
