// Divides a product into blocks of rows for the inner products of bf16_*.cpp, one thread each.
#include "bf16_product.h"

#include <cstring>
#include <stdexcept>
#include <string>

#include "instruction_set.h"

namespace undo {

#if defined(__x86_64__)
extern const Bf16Product amx_product, avx512bf16_product, avx512bf16_emulated_product;
static const Bf16Product* const PRODUCTS[] = {&amx_product, &avx512bf16_product, &avx512bf16_emulated_product};
#elif defined(__aarch64__)
extern const Bf16Product bfmmla_product;
static const Bf16Product* const PRODUCTS[] = {&bfmmla_product};
#endif

const std::vector<const Bf16Product*>& bf16_products() {
  static const std::vector<const Bf16Product*> here = [] {
    std::vector<const Bf16Product*> found;
#if defined(__x86_64__) || defined(__aarch64__)
    for (const Bf16Product* product : PRODUCTS) {
      if (has_instruction_set(product->vectors) && product->available()) found.push_back(product);
    }
#endif
    return found;
  }();
  return here;
}

const Bf16Product& bf16_product(const char* name) {
  for (const Bf16Product* product : bf16_products()) {
    if (!std::strcmp(product->name, name)) return *product;
  }
  throw std::invalid_argument(std::string("bf16_product: got ") + name + ", wanted one that this machine has");
}

void bf16_project(const Bf16Product& product, const uint16_t* weight, int64_t stride_w, int64_t rows, const Packed& packed,
                  float* z, int64_t stride_z) {
  const int64_t whole = rows / PRODUCT_ROWS, rest = rows % PRODUCT_ROWS;
#pragma omp parallel for schedule(static)
  for (int64_t b = 0; b < whole; ++b) {
    product.block(weight + b * PRODUCT_ROWS * stride_w, stride_w, packed, z + b * PRODUCT_ROWS * stride_z, stride_z);
  }
  if (!rest) return;
  // The last rows are padded with zeros: nothing past the weight is read, and nothing past z is written.
  std::vector<uint16_t> last(PRODUCT_ROWS * packed.width);
  std::vector<float> out(PRODUCT_ROWS * packed.tokens);
  for (int64_t r = 0; r < rest; ++r) {
    std::memcpy(&last[r * packed.width], weight + (whole * PRODUCT_ROWS + r) * stride_w, packed.width * sizeof(uint16_t));
  }
  product.block(last.data(), packed.width, packed, out.data(), packed.tokens);
  for (int64_t r = 0; r < rest; ++r) {
    std::memcpy(z + (whole * PRODUCT_ROWS + r) * stride_z, &out[r * packed.tokens], packed.tokens * sizeof(float));
  }
}

}  // namespace undo
