// Vectors of UNDO_LANES floats for the instruction set that the including file is compiled for, with its fused multiply-add if any.
//
// Plain GCC/Clang vector types: arithmetic, comparison and ?: work lane by lane. Include after every standard header and after
// the target pragma, inside the namespace of the instruction set, so that no function is shared between two of them.

#define UNDO_INLINE inline __attribute__((always_inline))
#define UNDO_LAMBDA __attribute__((always_inline))

constexpr int LANES = UNDO_LANES;
typedef float V __attribute__((vector_size(4 * UNDO_LANES)));
typedef int32_t I __attribute__((vector_size(4 * UNDO_LANES)));
// At any address: a tensor that was mapped from a file may begin at an odd byte.
typedef float Unaligned __attribute__((vector_size(4 * UNDO_LANES), aligned(1), may_alias));

UNDO_INLINE V load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
UNDO_INLINE void store(float* p, V x) { *reinterpret_cast<Unaligned*>(p) = x; }
UNDO_INLINE V all(float x) { return x - V{}; }
UNDO_INLINE V fma(V a, V b, V c) { return UNDO_FMA(a, b, c); }
// Returns the second operand if either is NaN, so that a NaN in the second is kept.
UNDO_INLINE V max(V a, V b) { return a > b ? a : b; }
UNDO_INLINE V min(V a, V b) { return a < b ? a : b; }
UNDO_INLINE V magnitude(V x) { return (V)((I)x & 0x7FFFFFFF); }
UNDO_INLINE float largest(V x) {
  float result = x[0];
  for (int i = 1; i < LANES; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

constexpr float LOWEST = -87.0f;  // below, e**x is taken as 0: 1.6e-38

// x = n ln 2 + r, |r| <= ln 2 / 2. Returns r and 2**n; x within [LOWEST, 88].
UNDO_INLINE V reduce(V x, V& power) {
  const V shifter = all(12582912.0f);  // 1.5 * 2**23: rounds to the nearest integer, which the low bits then hold
  const V shifted = fma(x, all(1.44269504088896341f), shifter);
  const V n = shifted - shifter;
  power = (V)(((I)shifted - (I)shifter + 127) << 23);
  return fma(n, all(-1.42860677e-6f), fma(n, all(-0.693145752f), x));
}

// (e**r - 1 - r) / r**2 on |r| <= ln 2 / 2; the series to r**5 leaves 5e-9.
UNDO_INLINE V remainder(V r) {
  V y = fma(all(1.0f / 5040), r, all(1.0f / 720));
  y = fma(y, r, all(1.0f / 120));
  y = fma(y, r, all(1.0f / 24));
  y = fma(y, r, all(1.0f / 6));
  return fma(y, r, all(0.5f));
}

// e**x for x <= 88; 0 below LOWEST, NaN for NaN.
UNDO_INLINE V exp(V x) {
  V power;
  const V r = reduce(max(all(LOWEST), x), power);
  const V y = fma(fma(r * r, remainder(r), r), power, power);
  return x < LOWEST ? V{} : y;
}

// e = e**u, w = e**u - 1 and q = w - u for u <= 0, none with cancellation; q >= 0.
UNDO_INLINE void expm1(V u, V& e, V& w, V& q) {
  V power;
  const V r = reduce(max(all(LOWEST), u), power);
  const V square = r * r * remainder(r);
  const V far = fma(r + square, power, power - 1.0f);
  e = fma(r + square, power, power);
  w = u > -0.34657f ? r + square : far;
  q = u > -0.34657f ? square : far - u;
}

// tanh from expm1(-2 |x|), which keeps small arguments.
UNDO_INLINE V tanh(V x) {
  V e, w, q;
  expm1(-2.0f * magnitude(x), e, w, q);
  const V y = w / (w + 2.0f);  // -tanh |x|
  return x < 0.0f ? y : -y;
}

// log(1 + a) and h = a - log(1 + a) >= 0 for a > -1, from a and sum = 1 + a, each of which may be the more accurate one; h without
// cancellation for small a.
UNDO_INLINE V log1p(V a, V sum, V& h) {
  // near: with s = a / (2 + a), log1p(a) = 2 s + 2 s**3 / 3 + ... and a - 2 s = a s
  const V s = a / (a + 2.0f), s2 = s * s;
  V y = fma(all(2.0f / 11), s2, all(2.0f / 9));
  y = fma(y, s2, all(2.0f / 7));
  y = fma(y, s2, all(2.0f / 5));
  y = fma(y, s2, all(2.0f / 3));
  const V near = s * fma(s2, -y, a);
  // far: 1 + a = 2**n (1 + f), 1 + f in [sqrt(1/2), sqrt(2))
  const I bits = (I)sum - 0x3F3504F3;
  const V n = __builtin_convertvector(bits >> 23, V);
  const V f = (V)((bits & 0x007FFFFF) + 0x3F3504F3) - 1.0f;
  const V t = f / (f + 2.0f), t2 = t * t;
  V z = fma(all(2.0f / 11), t2, all(2.0f / 9));
  z = fma(z, t2, all(2.0f / 7));
  z = fma(z, t2, all(2.0f / 5));
  z = fma(z, t2, all(2.0f / 3));
  const V far = fma(n, all(0.69314718056f), fma(z * t2, t, 2.0f * t));
  const I small = magnitude(s) < 0.15f;
  h = small ? near : a - far;
  return small ? a - near : far;
}
