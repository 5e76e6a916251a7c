// The kernel of rmu.h, with the vectors of simd.h. Its memory traffic is minimal: per element it reads hidden (and the target, if
// each token has its own) and writes the gradient. Elements are summed in float32 blocks; blocks and tokens in double, in a fixed
// order, so results do not depend on the number of threads.

typedef uint16_t Halves __attribute__((vector_size(2 * UNDO_LANES), aligned(1), may_alias));
typedef uint16_t HalvesV __attribute__((vector_size(2 * UNDO_LANES)));

struct F32 {
  typedef float type;
  static UNDO_INLINE V get(const float* p) { return load(p); }
  static UNDO_INLINE void put(float* p, V x) { store(p, x); }
};

UNDO_INLINE I widen(const uint16_t* p) { return __builtin_convertvector(HalvesV(*reinterpret_cast<const Halves*>(p)), I); }

struct BF16 {
  typedef uint16_t type;
  static UNDO_INLINE V get(const uint16_t* p) { return (V)(widen(p) << 16); }
  // Rounds to nearest, ties to even; NaN stays NaN.
  static UNDO_INLINE void put(uint16_t* p, V x) {
    const I bits = (I)x;
    const I rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const I narrow = x == x ? rounded : (bits >> 16) | 0x40;
    *reinterpret_cast<Halves*>(p) = __builtin_convertvector(narrow, HalvesV);
  }
};

struct F16 {
  typedef uint16_t type;
  // A product shifts the exponent, which makes subnormals normal; infinity and NaN get their exponent back.
  static UNDO_INLINE V get(const uint16_t* p) {
    const I bits = widen(p);
    const I rest = (I)((V)((bits & 0x7FFF) << 13) * 0x1p112f);
    const I special = (bits & 0x7C00) == 0x7C00;
    return (V)(rest | (special & 0x7F800000) | ((bits & 0x8000) << 16));
  }
};

// The tail of a token's width goes through the same vectors, padded with zeros.
template <class T>
UNDO_INLINE V get_some(const typename T::type* p, int64_t count) {
  typename T::type buffer[LANES] = {};
  __builtin_memcpy(buffer, p, count * sizeof *p);
  return T::get(buffer);
}

template <class T>
UNDO_INLINE void put_some(typename T::type* p, int64_t count, V x) {
  typename T::type buffer[LANES];
  T::put(buffer, x);
  __builtin_memcpy(p, buffer, count * sizeof *p);
}

template <class H, class T, class G>
UNDO_INLINE double rmu_row(const Rmu& c, int64_t i, double factor, typename G::type* gradient) {
  const auto* h = static_cast<const typename H::type*>(c.hidden) + i * c.stride_hidden;
  const auto* t = static_cast<const typename T::type*>(c.target) + i * c.stride_target;
  const V minus = all(-c.coefficient);
  const double exact = 2 * factor / double(c.width);
  const V slope = all(float(exact)),
          rest = all(float(exact - float(exact)));  // in two parts: its rounding error would enter every element
  constexpr int64_t UNROLL = 4, STEP = UNROLL * LANES, BLOCK_WIDTH = 2048;
  double sum = 0;
  for (int64_t start = 0; start < c.width; start += BLOCK_WIDTH) {
    const int64_t end = start + BLOCK_WIDTH < c.width ? start + BLOCK_WIDTH : c.width;
    V squares[UNROLL] = {};
    int64_t j = start;
    for (; j + STEP <= end; j += STEP) {
      for (int64_t u = 0; u < UNROLL; ++u) {
        const V x = fma(minus, T::get(t + j + u * LANES), H::get(h + j + u * LANES));
        squares[u] = fma(x, x, squares[u]);
        if (gradient) G::put(gradient + j + u * LANES, fma(slope, x, rest * x));
      }
    }
    for (; j < end; j += LANES) {
      const int64_t count = end - j < LANES ? end - j : LANES;
      const V x = fma(minus, get_some<T>(t + j, count), get_some<H>(h + j, count));
      squares[0] = fma(x, x, squares[0]);
      if (gradient) put_some<G>(gradient + j, count, fma(slope, x, rest * x));
    }
    for (int lane = 0; lane < LANES; ++lane) {
      sum += double(squares[0][lane]) + double(squares[1][lane]) + double(squares[2][lane]) + double(squares[3][lane]);
    }
  }
  if (gradient && !(sum < INFINITY)) {
    // Again for a row that may have an infinite x: that is infinite after the first part, and the second may have the other sign.
    for (int64_t j = 0; j < c.width; j += LANES) {
      const int64_t count = c.width - j < LANES ? c.width - j : LANES;
      const V x = fma(minus, get_some<T>(t + j, count), get_some<H>(h + j, count));
      put_some<G>(gradient + j, count, fma(slope, x, magnitude(x) < INFINITY ? rest * x : V{}));
    }
  }
  return factor * sum / double(c.width);
}

template <class H, class T, class G>
void rmu_tokens(const Rmu& c) {
  auto* out = static_cast<typename G::type*>(c.gradient);
#pragma omp parallel for schedule(static) if (c.tokens * c.width > 32768)
  for (int64_t i = 0; i < c.tokens; ++i) {
    const double factor = c.factor ? double(c.factor[i]) : 1 / double(c.tokens);
    auto* gradient = out ? out + i * c.width : nullptr;
    if (factor == 0) {
      c.partial[i] = 0;
      for (int64_t j = 0; gradient && j < c.width; ++j) gradient[j] = 0;
    } else {
      c.partial[i] = rmu_row<H, T, G>(c, i, factor, gradient);
    }
  }
}

template <class H, class G>
void rmu_target(const Rmu& c) {
  if (c.target_kind == FLOAT32) rmu_tokens<H, F32, G>(c);
  else if (c.target_kind == BFLOAT16) rmu_tokens<H, BF16, G>(c);
  else rmu_tokens<H, F16, G>(c);
}

// Returns the loss.
double rmu_loss(const Rmu& c) {
  if (c.hidden_kind == FLOAT32) rmu_target<F32, F32>(c);
  else if (c.hidden_kind == BFLOAT16) rmu_target<BF16, BF16>(c);
  else rmu_target<F16, F32>(c);
  double total = 0;
  for (int64_t i = 0; i < c.tokens; ++i) total += c.partial[i];
  return total;
}
