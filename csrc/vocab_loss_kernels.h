// The kernels of vocab_loss.h, with the vectors of simd.h. In a form that does not cancel, with x = log p_s - log p_t:
//
//   KL(t||s) = sum p_t (expm1(x) - x)     dKL/dz_s = p_t expm1(x)
//   KL(s||t) = sum p_s (expm1(-x) + x)    dKL/dz_s = p_s (x - KL)
//   JSD      = sum m (beta phi(t/m - 1) + (1 - beta) phi(s/m - 1)),  phi(y) = (1 + y) log(1 + y) - y
//              dJSD/dz_s = (1 - beta) p_s (log(s/m) - KL(s||m)),     m = beta t + (1 - beta) s
//
// Everything is computed from the larger probability and u = -|x|, so that nothing overflows and nothing cancels: p_t expm1(x) = -p_s expm1(-x).
// x = (z_s - m_s) - (z_t - m_t) - gap. The gap of the two logarithms comes from the sum of the differences (DIFFERENCE), not from the
// difference of the sums: float32 sums are accurate to 1e-7, and a student that agrees with a peaked teacher has smaller gradients.
// Infinite logits follow the limits of these formulas (see reference/divergence.py): a logarithm of a ratio is clamped at LEAST only
// where it multiplies a probability of 0, because 0 * inf would be NaN.
// Cost per element: two exponentials in the statistics, two in the loss (JSD: two more logarithms); 8 bytes read twice and 4 written.

UNDO_INLINE V shaped(V z, const Shape& shape, float bias) {
  z = (z + bias) * shape.scale;
  if (shape.cap != 0) z = shape.cap * tanh(z * (1 / shape.cap));
  return shape.temperature == 1 ? z : z * (1 / shape.temperature);
}

constexpr float LEAST = -200.0f;  // far below LOWEST

UNDO_INLINE float bias_of(const Shape& shape, int64_t v) {
  float bias = 0;
  if (shape.bias) __builtin_memcpy(&bias, shape.bias + v, sizeof bias);  // at any address
  return bias;
}

void shape_tile(const Chunk& c, float* z, const Shape& shape, bool student, int64_t first, int64_t entries) {
  if (!shape.identity()) {
#pragma omp parallel for schedule(static)
    for (int64_t v = 0; v < entries; ++v) {
      const float bias = bias_of(shape, first + v);
      for (int64_t i = 0; i < c.stride; i += LANES) {
        float* at = z + v * c.leading + i;
        store(at, shaped(load(at), shape, bias));
      }
    }
  }
  if (!student || !c.known) return;
  for (int64_t i = 0; i < c.tokens; ++i) {
    for (int64_t j = 0; j < c.known; ++j) {
      const int64_t v = c.indices[i * c.known + j] - first;
      if (v < 0 || v >= entries) continue;
      if (c.picking) c.picked[i * c.known + j] = z[v * c.leading + i];
      z[v * c.leading + i] = -INFINITY;
    }
  }
}

UNDO_INLINE void put(double* field, int64_t i, V x) {
  for (int lane = 0; lane < LANES; ++lane) field[i + lane] = x[lane];
}

// Prefetches the cache lines of the next group of tokens: entries lie too far apart for the processor's own prefetching.
template <bool TEACHER>
UNDO_INLINE void next_lines(const Chunk& c, const float* z_s, const float* z_t, int64_t v) {
  __builtin_prefetch(z_s + v * c.leading + LANES);
  if (TEACHER && z_t) __builtin_prefetch(z_t + v * c.leading + LANES);
}

// Sums of one block of vocabulary entries for LANES tokens, relative to their maximum. Once a tile has been merged its maximum serves
// the next ones too, so that they are read once; a block that rises far above it finds its own.
template <bool TEACHER>
UNDO_INLINE void block_stats(const Chunk& c, float* z_s, float* z_t, int64_t first, int64_t entries, bool done, double* out,
                             int64_t i) {
  const bool shape_s = !done && !c.student.identity(), shape_t = !done && !c.teacher.identity();
  const bool cross = TEACHER && c.target == REVERSE;
  const V lowest = all(-INFINITY);
  V from_s = {}, from_t = {}, m_s = lowest, m_t = lowest, l_s = {}, l_t = {}, difference = {}, energy = {}, crossed = {};
  bool known = !c.statistics;
  for (int lane = 0; lane < LANES; ++lane) {
    from_s[lane] = float(c.state[M_S * c.stride + i + lane]);
    known = known && std::isfinite(from_s[lane]);
    if (!TEACHER) continue;
    from_t[lane] = float(c.state[M_T * c.stride + i + lane]);
    known = known && std::isfinite(from_t[lane]);
  }
  auto add = [&](V s, int64_t at) UNDO_LAMBDA {
    const V u = s - from_s;
    if (!TEACHER) {
      l_s += exp(u);
      return;
    }
    const V v = load(z_t + at * c.leading) - from_t;
    V y = u - v;
    const I up = y > 0.0f;
    y = (u < LOWEST) & (v < LOWEST) ? V{} : y;  // both underflow; a NaN in either stays
    V e, w, q;
    const V big = exp(up ? u : v);
    expm1(-magnitude(y), e, w, q);
    const V change = big * w, small = big * e;
    l_s += up ? big : small;
    l_t += up ? small : big;
    difference += up ? -change : change;
    if (cross) crossed += (up ? big : small) * max(all(LEAST), y);  // +inf where the teacher alone has probability 0
    if (c.statistics) energy += (up ? small : big) * max(all(LEAST), v);
  };
  for (int64_t v = 0; v < entries; ++v) {
    next_lines<TEACHER>(c, z_s, z_t, v);
    V s = load(z_s + v * c.leading);
    if (shape_s) store(z_s + v * c.leading, s = shaped(s, c.student, bias_of(c.student, first + v)));
    m_s = max(m_s, s);
    if (TEACHER) {
      V t = load(z_t + v * c.leading);
      if (shape_t) store(z_t + v * c.leading, t = shaped(t, c.teacher, bias_of(c.teacher, first + v)));
      m_t = max(m_t, t);
    }
    if (known) add(s, v);
  }
  constexpr float ROOM = 8;  // the exponent's rounding grows with it
  if (!known || largest(m_s - from_s) > ROOM || (TEACHER && largest(m_t - from_t) > ROOM)) {
    // A block of nothing but -inf adds exp(-inf - 0) = 0.
    from_s = m_s == lowest ? V{} : m_s;
    from_t = m_t == lowest ? V{} : m_t;
    l_s = l_t = difference = energy = crossed = V{};
    for (int64_t v = 0; v < entries; ++v) add(load(z_s + v * c.leading), v);
  } else {
    m_s = from_s;
    m_t = from_t;
  }
  put(out + M_S * c.stride, i, m_s);
  put(out + L_S * c.stride, i, l_s);
  if (!TEACHER) return;
  put(out + DIFFERENCE * c.stride, i, difference);
  put(out + CROSS * c.stride, i, crossed);
  put(out + M_T * c.stride, i, m_t);
  put(out + L_T * c.stride, i, l_t);
  if (!c.statistics) return;
  put(out + ENERGY * c.stride, i, energy);
  V top_s = all(-1), top_t = all(-1);
  for (int64_t v = 0; v < entries; ++v) {
    const V at = all(float(first + v));
    top_s = top_s < 0.0f && load(z_s + v * c.leading) == m_s ? at : top_s;
    top_t = top_t < 0.0f && load(z_t + v * c.leading) == m_t ? at : top_t;
  }
  put(out + TOP_S * c.stride, i, top_s);
  put(out + TOP_T * c.stride, i, top_t);
}

// Returns the factor that rescales a sum relative to the maximum `m` to the maximum `to`; a sum over nothing stays 0.
inline double rescale(double m, double to) { return m == to ? 1 : m == -INFINITY ? 0 : std::exp(m - to); }

// Adds one block's sums of one token to the state's, both relative to the larger of their maxima.
inline void merge(const Chunk& c, double* state, const double* part, bool teacher) {
  const int64_t n = c.stride;
  if (part[M_S * n] == state[M_S * n] && (!teacher || part[M_T * n] == state[M_T * n])) {
    state[L_S * n] += part[L_S * n];
    if (!teacher) return;
    for (const int field : {int(L_T), int(DIFFERENCE), int(CROSS)}) state[field * n] += part[field * n];
    if (c.statistics) state[ENERGY * n] += part[ENERGY * n];
    return;
  }
  auto higher = [](double a, double b) { return a < b ? b : a; };
  const double m_s = higher(state[M_S * n], part[M_S * n]), m_t = teacher ? higher(state[M_T * n], part[M_T * n]) : 0;
  double total[FIELDS] = {};
  for (const double* one : {static_cast<const double*>(state), part}) {
    const double a = rescale(one[M_S * n], m_s), l_s = one[L_S * n];
    total[L_S] += a * l_s;
    if (!teacher) continue;
    const double b = rescale(one[M_T * n], m_t), l_t = one[L_T * n];
    total[L_T] += b * l_t;
    // sum (a e**u - b e**v) = b sum (e**u - e**v) + (a - b) sum e**u, with a - b taken without cancellation
    const double shift = (one[M_S * n] - m_s) - (one[M_T * n] - m_t);
    const double ahead = b == 0 || !std::isfinite(shift) ? a - b : b * std::expm1(shift);
    total[DIFFERENCE] += b * one[DIFFERENCE * n] + ahead * l_s;
    if (l_s > 0 && a > 0) total[CROSS] += a * (one[CROSS * n] + shift * l_s);
    if (c.statistics && l_t > 0) total[ENERGY] += b * (one[ENERGY * n] + (b == 0 ? 0 : (one[M_T * n] - m_t) * l_t));
  }
  state[M_S * n] = m_s;
  state[L_S * n] = total[L_S];
  if (!teacher) return;
  state[M_T * n] = m_t;
  for (const int field : {int(L_T), int(DIFFERENCE), int(CROSS), int(ENERGY)}) state[field * n] = total[field];
}

// Keeps the logits of the labels before the gradient overwrites them.
inline void take_labels(const Chunk& c, const float* z_s, int64_t first, int64_t entries) {
  if (!c.labels) return;
  for (int64_t i = 0; i < c.tokens; ++i) {
    const int64_t v = c.labels[i] - first;
    if (v >= 0 && v < entries) c.state[LABEL * c.stride + i] = z_s[v * c.leading + i];
  }
}

void stats_tile(const Chunk& c, float* z_s, float* z_t, int64_t first, int64_t entries, bool done) {
  if (c.known && !done) {
    shape_tile(c, z_s, c.student, true, first, entries);
    done = true;
  }
  const int64_t groups = c.stride / LANES, blocks = (entries + BLOCK - 1) / BLOCK;
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t item = 0; item < groups * blocks; ++item) {
      const int64_t b = item / groups, i = item % groups * LANES, start = b * BLOCK;
      const int64_t count = entries - start < BLOCK ? entries - start : BLOCK;
      float *s = z_s + start * c.leading + i, *t = z_t ? z_t + start * c.leading + i : nullptr;
      double* out = c.partial + b * FIELDS * c.stride;
      if (t) block_stats<true>(c, s, t, first + start, count, done, out, i);
      else block_stats<false>(c, s, t, first + start, count, done, out, i);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < c.tokens; ++i) {
      double* state = c.state + i;
      for (int64_t b = 0; b < blocks; ++b) {
        const double* part = c.partial + b * FIELDS * c.stride + i;
        if (c.statistics) {
          const int64_t n = c.stride;
          if (part[M_S * n] > state[M_S * n] || state[TOP_S * n] < 0) state[TOP_S * n] = part[TOP_S * n];
          if (part[M_T * n] > state[M_T * n] || state[TOP_T * n] < 0) state[TOP_T * n] = part[TOP_T * n];
        }
        merge(c, state, part, z_t != nullptr);
      }
    }
  }
  take_labels(c, z_s, first, entries);
}

// TERM adds the student's own term (labels, log-sum-exp) to a divergence; most calls do without.
template <int TARGET, bool TERM>
UNDO_INLINE void block_loss(const Chunk& c, float* z_s, const float* z_t, int64_t entries, bool gradient, double* out, int64_t i) {
  const V base_s = load(c.base_s + i), log_l_s = load(c.log_sum_s + i), weight = load(c.weight + i), own = load(c.own + i);
  const V base_t = TARGET == OWN ? V{} : load(c.base_t + i), log_l_t = TARGET == OWN ? V{} : load(c.log_sum_t + i);
  const V gap = TARGET == OWN ? V{} : load(c.gap + i);
  const V offset = TARGET == REVERSE || TARGET == JSD ? load(c.offset + i) : V{};
  const V beta_s = all(c.other), beta_t = all(c.beta);
  const bool capped = c.student.cap != 0;
  const float uncap = capped ? c.student.temperature / c.student.cap : 0;
  V value = {}, mixed = {};
  for (int64_t v = 0; v < entries; ++v) {
    next_lines<TARGET != OWN>(c, z_s, z_t, v);
    const V s = load(z_s + v * c.leading);
    const V from_s = s - base_s, log_s = from_s - log_l_s;
    V g;
    if (TARGET == OWN) {
      if (!gradient) break;
      g = own * exp(log_s);
    } else {
      const V t = c.uniform ? V{} : load(z_t + v * c.leading);
      const V from_t = t - base_t, log_t = from_t - log_l_t;
      V x = (from_s - from_t) - gap;
      const I up = x > 0.0f;  // the student's probability is the larger one
      x = (log_s < LOWEST) & (log_t < LOWEST) ? V{} : x;  // both underflow; a NaN in either stays
      const V big = exp(up ? log_s : log_t), u = max(all(LEAST), -magnitude(x));
      V e, w, q;
      expm1(-magnitude(x), e, w, q);  // q is infinite where the smaller side is 0
      const V p_s = up ? big : big * e;
      if (TARGET == FORWARD || TARGET == REVERSE) {
        // KL from the larger side is big * q, from the smaller one big * (u**2 - q (1 - u)); separately where that would cancel.
        const V other = u > -0.34657f ? fma(-q, 1.0f - u, u * u) : fma(w, u, u - w);
        value = fma(big, (TARGET == FORWARD) ? (up ? other : q) : (up ? q : other), value);
        g = TARGET == FORWARD ? big * (up ? -w : w) : p_s * (max(all(LEAST), x) - offset);
      } else {
        const V low = up ? beta_t : beta_s, high = up ? beta_s : beta_t;  // weights of the smaller and the larger side in m
        const V ratio = fma(low, e, high);  // m / big = 1 + low w
        V h_big, h_small;
        const V log_ratio = log1p(low * w, ratio, h_big);
        const V y = high * w / ratio;  // small / m - 1
        const V near_m = log1p(y, y + 1.0f, h_small);
        const I near = y > -0.5f;
        const V log_small_m = near ? near_m : u - log_ratio, log_big_m = -log_ratio;
        // m phi(big / m - 1) / big and m phi(small / m - 1) / big
        const V phi_big = max(V{}, h_big);
        const V phi_small = max(V{}, near ? ratio * fma(y, y, -(y + 1.0f) * h_small) : fma(e, log_small_m, -high * w));
        value += big * fma(high, phi_big, low * phi_small);
        mixed += big * (up ? phi_big : phi_small);
        g = beta_s * p_s * ((up ? log_big_m : log_small_m) - offset);
      }
      g = TERM ? fma(own, p_s, g * weight) : g * weight;
    }
    if (gradient) {
      if (capped) g *= fma(s * uncap, -(s * uncap), all(1.0f));
      store(z_s + v * c.leading, g);
    }
  }
  put(out + VALUE * c.stride, i, value);
  put(out + MIXED * c.stride, i, mixed);
}

template <bool TERM>
UNDO_INLINE void block_loss_of(const Chunk& c, float* s, const float* t, int64_t entries, bool gradient, double* out, int64_t i) {
  if (c.target == OWN) block_loss<OWN, false>(c, s, t, entries, gradient, out, i);
  else if (c.target == FORWARD) block_loss<FORWARD, TERM>(c, s, t, entries, gradient, out, i);
  else if (c.target == REVERSE) block_loss<REVERSE, TERM>(c, s, t, entries, gradient, out, i);
  else block_loss<JSD, TERM>(c, s, t, entries, gradient, out, i);
}

void loss_tile(const Chunk& c, float* z_s, const float* z_t, int64_t first, int64_t entries, bool gradient) {
  const int64_t groups = c.stride / LANES, blocks = (entries + BLOCK - 1) / BLOCK;
  take_labels(c, z_s, first, entries);
#pragma omp parallel for schedule(static)
  for (int64_t item = 0; item < groups * blocks; ++item) {
    const int64_t b = item / groups, i = item % groups * LANES, start = b * BLOCK;
    const int64_t count = entries - start < BLOCK ? entries - start : BLOCK;
    float* s = z_s + start * c.leading + i;
    const float* t = z_t ? z_t + start * c.leading + i : nullptr;
    double* out = c.partial + b * FIELDS * c.stride;
    if (c.own_term) block_loss_of<true>(c, s, t, count, gradient, out, i);
    else block_loss_of<false>(c, s, t, count, gradient, out, i);
  }
  for (int64_t b = 0; b < blocks; ++b) {
    const double* part = c.partial + b * FIELDS * c.stride;
    for (int64_t i = 0; i < c.tokens; ++i) {
      c.state[VALUE * c.stride + i] += part[VALUE * c.stride + i];
      c.state[MIXED * c.stride + i] += part[MIXED * c.stride + i];
    }
  }
  if (!gradient) return;
  for (int64_t i = 0; i < c.tokens; ++i) {
    auto chain = [&](float z) {
      const float t = c.student.cap != 0 ? z * c.student.temperature / c.student.cap : 0;
      return 1 - t * t;
    };
    if (c.labels && c.labels[i] >= first && c.labels[i] < first + entries) {
      const float z = float(c.state[LABEL * c.stride + i]);
      float& g = z_s[(c.labels[i] - first) * c.leading + i];
      const double log_p = double(z) - double(c.base_s[i]) - double(c.log_sum_s[i]);
      // p - 1 without cancellation where the cross-entropy stands alone.
      if (c.target == OWN && c.own[i] == c.label_weight[i]) g = c.own[i] * chain(z) * float(std::expm1(log_p));
      else g -= c.label_weight[i] * chain(z);
    }
    for (int64_t j = 0; j < c.known; ++j) {
      const int64_t v = c.indices[i * c.known + j] - first;
      if (v < 0 || v >= entries) continue;
      z_s[v * c.leading + i] = c.picked[i * c.known + j];
    }
  }
}
