// RMU's activation loss: sum_i factor_i mean_j (h_ij - c t_ij)**2 and its gradient, in one pass.
#pragma once
#include <cstdint>

namespace undo {

enum Kind : int { FLOAT32, BFLOAT16, FLOAT16 };

struct Rmu {
  int64_t tokens = 0, width = 0;
  const void *hidden = nullptr, *target = nullptr;
  int hidden_kind = FLOAT32, target_kind = FLOAT32;
  int64_t stride_hidden = 0, stride_target = 0;  // elements from one token to the next; 0: one target for all
  float coefficient = 1;
  const float* factor = nullptr;  // [tokens]; tokens of factor 0 are not read. Null: 1 / tokens each
  void* gradient = nullptr;       // [tokens][width], bfloat16 for bfloat16 hidden states, else float32; null: not wanted
  double* partial = nullptr;      // [tokens]
};

}  // namespace undo
