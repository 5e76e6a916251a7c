// Adds noise to a range of elements, with the vectors of simd.h and philox.h. For each tile it first writes N into a buffer that
// stays in the L1 cache, for any dtype and law; then theta' = rn(rn(keep * theta) + rn(scale * N)).
//
// Philox takes 60 vector operations for 2 * LANES words, about as long as everything else; stochastic rounding needs a second draw.
// 8 bytes per float32 element are read and written. Each step is one rounding, in the order of reference/noise.py, so there are no
// fused multiply-adds except in the sums of squares, whose products are exact.

constexpr int64_t TILE = 1024;
constexpr int64_t GROUP = 2 * LANES;  // elements of one call of philox()

typedef double D __attribute__((vector_size(4 * UNDO_LANES)));
typedef double UnalignedD __attribute__((vector_size(4 * UNDO_LANES), aligned(1), may_alias));
typedef float Half __attribute__((vector_size(2 * UNDO_LANES), aligned(4), may_alias));
typedef uint32_t U __attribute__((vector_size(4 * UNDO_LANES)));
typedef uint16_t Short __attribute__((vector_size(2 * UNDO_LANES), aligned(1), may_alias));

UNDO_INLINE V to_float(I x) { return __builtin_convertvector(x, V); }
UNDO_INLINE I to_int(V x) { return __builtin_convertvector(x, I); }

// ---- N -----------------------------------------------------------------------------------------------------------------------

// 2 * (w >> 8) + 1 - 2**24
UNDO_INLINE V odd_integer(I w) { return to_float(((w >> 7) ^ I(I{} - 0x01000000)) | 1); }

template <int N>
UNDO_INLINE V horner(const float (&coefficients)[N], V x) {
  V value = all(coefficients[N - 1]);
  for (int i = N - 2; i >= 0; --i) value = value * x + coefficients[i];
  return value;
}

UNDO_INLINE V log(V u) {
  static constexpr float LOG[] = {0.3333333134651184f,  -0.24999989569187164f, 0.20000708103179932f,
                                  -0.1666848063468933f, 0.14249935746192932f,  -0.12411050498485565f,
                                  0.11661511659622192f, -0.115712009370327f,   0.07149753719568253f};
  const I bits = (I)u, exponent = (bits - 0x3F3504F3) >> 23;
  const V f = (V)(bits - (exponent << 23)) - 1.0f, square = f * f, e = to_float(exponent);
  V tail = f * square * horner(LOG, f);
  tail = tail + e * 1.42860682030941723212e-6f;
  tail = tail - square * 0.5f;
  return (tail + f) + e * 0.693145751953125f;
}

// Box-Muller transform of the words 0 and 2 (radius) and 1 and 3 (angle) of each block.
UNDO_INLINE void normal(I w_even, I w_odd, V& even, V& odd) {
  static constexpr float SIN[] = {3.1415927410125732f, -5.167712688446045f, 2.5501625537872314f, -0.5992020964622498f,
                                  0.08100174367427826f};
  static constexpr float COS[] = {1.0f, -4.934802055358887f, 4.058707237243652f, -1.335044503211975f, 0.23132924735546112f};
  const V u = to_float((I)((U)w_even >> 8) | 1) * 0x1p-24f;  // 2 * (w >> 9) + 1
  const V radius = UNDO_SQRT(log(u) * -2.0f);
  const V x = odd_integer(w_odd) * 0x1p-24f, turns = x * 2.0f + 0.5f;
  I q = to_int(turns);
  q += to_float(q) > turns;  // floor: the conversion truncates, which rounds negative numbers up
  const V r = x - to_float(q) * 0.5f, square = r * r;
  const V sine = r * horner(SIN, square), cosine = horner(COS, square);
  const I swapped = (q & 1) != 0;
  const I s = (I)(swapped ? cosine : sine) ^ (q & 2) << 30, c = (I)(swapped ? sine : cosine) ^ ((q + 1) & 2) << 30;
  even = radius * (V)c;
  odd = radius * (V)s;
}

template <Law LAW>
UNDO_INLINE void draw(const Key& key, uint64_t block, int64_t count, float* out) {
  for (int64_t at = 0; at < count; at += GROUP, block += LANES / 2) {
    I w_even, w_odd;
    V even, odd, low, high;
    philox(key, 0, block, w_even, w_odd);
    if (LAW == Law::NORMAL) {
      normal(w_even, w_odd, even, odd);
    } else {
      even = odd_integer(w_even);
      odd = odd_integer(w_odd);
    }
    interleave(even, odd, low, high);
    store(out + at, low);
    store(out + at + LANES, high);
  }
}

UNDO_INLINE void draw_words(const Key& key, uint64_t block, int64_t count, float* out) {
  for (int64_t at = 0; at < count; at += GROUP, block += LANES / 2) {
    I even, odd;
    V low, high;
    philox(key, 1, block, even, odd);
    interleave((V)even, (V)odd, low, high);
    store(out + at, low);
    store(out + at + LANES, high);
  }
}

// ---- dtypes ------------------------------------------------------------------------------------------------------------------

UNDO_INLINE I load16(const uint16_t* p) { return __builtin_convertvector(*reinterpret_cast<const Short*>(p), I); }
UNDO_INLINE void store16(uint16_t* p, I x) { *reinterpret_cast<Short*>(p) = __builtin_convertvector(x, Short); }

// Each type's values as float32, and float32 rounded to it: to nearest, or up in magnitude where the lost part exceeds the word's
// high bits (the reference compares (word >> 8) * 2**-24 with the lost share; equal, since a share of b lost bits is a multiple of
// 2**-b). Values are bit patterns without the sign; those of a size are ordered as integers are.
struct Bfloat16 {
  static constexpr int32_t INFINITE = 0x7F80, NAN_ = 0x7FC0;
  static constexpr int32_t OVERFLOW_AT = 0x7F7F8000;  // rounding to nearest gives infinity from here on
  static UNDO_INLINE V wide(I x) { return (V)(x << 16); }
  static UNDO_INLINE I nearest(I m) { return (m + 0x7FFF + ((m >> 16) & 1)) >> 16; }
  static UNDO_INLINE I random(I m, I word) { return (m + (I)(~(U)word >> 16)) >> 16; }
};

struct Float16 {
  static constexpr int32_t INFINITE = 0x7C00, NAN_ = 0x7E00;
  static constexpr int32_t OVERFLOW_AT = 0x477FF000;
  static constexpr int32_t NORMAL = 0x38800000, BIAS = 112 << 23;  // 2**-14; the exponents' difference
  static UNDO_INLINE V wide(I x) {
    const I m = (x & 0x7FFF) << 13, sign = (x & 0x8000) << 16;
    const I tiny = (I)((V)(m + (113 << 23)) - 0x1p-14f);  // subnormal: m as the fraction of 2**-14
    const I bits = m < 1 << 23 ? tiny : m + (m >= (0x7C00 << 13) ? I{} + 2 * BIAS : I{} + BIAS);
    return (V)(bits | sign);
  }
  static UNDO_INLINE I nearest(I m) {
    const I tiny = (I)((V)m + 0.5f) - 0x3F000000;  // float32 has this spacing at 0.5
    return m < NORMAL ? tiny : (m + 0xFFF + ((m >> 13) & 1) - BIAS) >> 13;
  }
  static UNDO_INLINE I random(I m, I word) {
    const V steps = (V)(m < NORMAL ? m : I{}) * 0x1p24f;
    const I low = to_int(steps), up = to_float((I)((U)word >> 8)) * 0x1p-24f < steps - to_float(low);
    return m < NORMAL ? low - up : (m + (I)(~(U)word >> 19) - BIAS) >> 13;
  }
};

template <class T>
UNDO_INLINE I narrow(V x, const float* word) {
  const I m = (I)x & 0x7FFFFFFF, sign = (I)((U)x >> 16) & 0x8000, infinite = I{} + T::INFINITE;
  I y;
  if (word) {
    y = T::random(m, (I)load(word));
    y = y < infinite ? y : infinite - 1;
  } else {
    y = T::nearest(m);
  }
  y = m < T::OVERFLOW_AT ? y : m > 0x7F800000 ? I{} + T::NAN_ : infinite;
  return y | sign;
}

// ---- theta -------------------------------------------------------------------------------------------------------------------

struct Squares {
  D low = {}, high = {};
  UNDO_INLINE void add(V x) { add(UNDO_LOW_D(x), UNDO_HIGH_D(x)); }
  UNDO_INLINE void add(D a, D b) {
    low = UNDO_FMA_D(a, a, low);
    high = UNDO_FMA_D(b, b, high);
  }
  UNDO_INLINE double sum() const {
    double total = 0;
    for (int i = 0; i < LANES / 2; ++i) total += low[i] + high[i];
    return total;
  }
};

struct Total {
  Squares before, noise, after;
};

// Updates LANES elements.
struct Update {
  double keep, scale;
  float keep_f = float(keep), scale_f = float(scale);

  UNDO_INLINE V mixed(V old, const float* n, Total& total) const {
    const V added = load(n) * scale_f;
    total.before.add(old);
    total.noise.add(added);
    return old * keep_f + added;
  }
  UNDO_INLINE void operator()(float* theta, const float* n, const float*, Total& total) const {
    const V x = mixed(load(theta), n, total);
    store(theta, x);
    total.after.add(x);
  }
  UNDO_INLINE void operator()(double* theta, const float* n, const float*, Total& total) const {
    D old[2], added[2], x[2];
    for (int half = 0; half < 2; ++half) {
      UnalignedD* at = reinterpret_cast<UnalignedD*>(theta + half * LANES / 2);
      old[half] = *at;
      added[half] = __builtin_convertvector(*reinterpret_cast<const Half*>(n + half * LANES / 2), D) * scale;
      *at = x[half] = old[half] * keep + added[half];
    }
    total.before.add(old[0], old[1]);
    total.noise.add(added[0], added[1]);
    total.after.add(x[0], x[1]);
  }
  template <class T>
  UNDO_INLINE void sixteen(uint16_t* theta, const float* n, const float* word, Total& total) const {
    const I y = narrow<T>(mixed(T::wide(load16(theta)), n, total), word);
    store16(theta, y);
    total.after.add(T::wide(y));
  }
};

template <class T>
struct Update16 : Update {
  UNDO_INLINE void operator()(uint16_t* theta, const float* n, const float* word, Total& total) const {
    sixteen<T>(theta, n, word, total);
  }
};

template <class U, class E>
UNDO_INLINE void update(U step, E* theta, const float* n, const float* word, int64_t count, Total& total) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) step(theta + i, n + i, word ? word + i : nullptr, total);
  if (i == count) return;
  E rest[LANES] = {};  // zeros add nothing to the sums
  float n_rest[LANES] = {}, word_rest[LANES] = {};
  std::memcpy(rest, theta + i, sizeof(E) * (count - i));
  std::memcpy(n_rest, n + i, sizeof(float) * (count - i));
  if (word) std::memcpy(word_rest, word + i, sizeof(float) * (count - i));
  step(rest, n_rest, word ? word_rest : nullptr, total);
  std::memcpy(theta + i, rest, sizeof(E) * (count - i));
}

template <class U, class E>
Sums part_of(const Segment& s, const U& step, E* theta, int64_t begin, int64_t end, uint64_t seed, bool stochastic) {
  alignas(64) float n[TILE + GROUP], word[TILE + GROUP];
  const Key key(seed, s.hashed);
  Total total;
  if (s.law == Law::CONSTANT) std::fill(n, n + TILE + GROUP, 1.0f);
  for (int64_t at = begin; at < end;) {
    const int64_t run = at / s.run, within = at - run * s.run, index = s.first + run * s.stride + within, skip = index % 4;
    const int64_t count = std::min(std::min(s.run - within, end - at), TILE - skip);
    if (s.law == Law::UNIFORM) draw<Law::UNIFORM>(key, index / 4, skip + count, n);
    if (s.law == Law::NORMAL) draw<Law::NORMAL>(key, index / 4, skip + count, n);
    if (stochastic) draw_words(key, index / 4, skip + count, word);
    update(step, theta + at, n + skip, stochastic ? word + skip : nullptr, count, total);
    at += count;
  }
  return {total.before.sum(), total.noise.sum(), total.after.sum()};
}

Sums noise_part(const Segment& s, int64_t begin, int64_t end, uint64_t seed, bool stochastic) {
  const Update step = {s.keep, s.scale};
  switch (s.type) {
    case Type::FLOAT32: return part_of(s, step, static_cast<float*>(s.data), begin, end, seed, false);
    case Type::FLOAT64: return part_of(s, step, static_cast<double*>(s.data), begin, end, seed, false);
    case Type::BFLOAT16: return part_of(s, Update16<Bfloat16>{step}, static_cast<uint16_t*>(s.data), begin, end, seed, stochastic);
    default: return part_of(s, Update16<Float16>{step}, static_cast<uint16_t*>(s.data), begin, end, seed, stochastic);
  }
}

void noise_words(uint64_t seed, uint64_t hashed, uint32_t stream, uint64_t block, uint32_t out[4]) {
  I even, odd;
  philox(Key(seed, hashed), stream, block, even, odd);
  for (int i = 0; i < 4; ++i) out[i] = uint32_t(i % 2 ? odd[i / 2] : even[i / 2]);
}
