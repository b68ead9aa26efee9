// The gated delta rule and the short convolution in front of it. Included by ops.inl.
//
//   one token, 16 · kWide value channels   held += key[i] · S[i][…], seen += query[i] · S[i][…]     all key channels i
//                                          S[i][…] = decay · S[i][…] + key[i] · u[…]
//
// Value channels do not meet, so that a prompt's tokens run over a part of the state that stays in the first cache.

static_assert(kStateLanes == kKeyBlock, "a row of a state is whole Lanes");

// a · x + b · y, and sum += x · y
#if defined(__AVX2__) && !defined(__AVX512F__)
static inline void add_products(Lanes& sum, const Lanes& x, const Lanes& y) {
  sum.low += x.low * y.low;
  sum.high += x.high * y.high;
}
static inline Lanes combined(float a, const Lanes& x, float b, const Lanes& y) {
  return {a * x.low + b * y.low, a * x.high + b * y.high};
}
#else
static inline void add_products(Lanes& sum, const Lanes& x, const Lanes& y) { sum += x * y; }
static inline Lanes combined(float a, const Lanes& x, float b, const Lanes& y) { return a * x + b * y; }
#endif

#if defined(__AVX512F__)
constexpr std::size_t kStateWide = 4;
#elif defined(__AVX2__)
constexpr std::size_t kStateWide = 2;
#else
constexpr std::size_t kStateWide = 1;
#endif

static inline Lanes first_lanes(const float* from, std::size_t count) {
  float wide[kKeyBlock] = {};
  std::memcpy(wide, from, count * sizeof(float));
  return lanes(wide);
}

static inline void store_first(const Lanes& x, std::size_t count, float* to) {
  float wide[kKeyBlock];
  store(x, wide);
  std::memcpy(to, wide, count * sizeof(float));
}

// Value channels [at, at + 16 · kWide); of the last vector `count`.
template <std::size_t kWide>
static void delta_channels(const DeltaTokens& x, std::size_t d, std::size_t row, std::size_t at, std::size_t count,
                           float* state) {
  constexpr std::size_t kLast = kWide - 1;
  for (std::size_t t = 0; t < x.count; ++t) {
    const std::size_t token = static_cast<std::size_t>(x.tokens[t]), offset = token * x.stride;
    const float *const q = x.query + offset, *const k = x.key + offset, *const v = x.value + offset + at;
    const float decay = x.decay[offset], beta = x.beta[offset], both = dot(q, k, d);
    Lanes held[kWide] = {}, seen[kWide] = {}, u[kWide];
    for (std::size_t i = 0; i < d; ++i) {
      const float* const from = state + i * row + at;
      for (std::size_t w = 0; w < kWide; ++w) {
        const Lanes part = lanes(from + w * kKeyBlock);
        add_product(held[w], k[i], part);
        add_product(seen[w], q[i], part);
      }
    }
    float* const out = x.out + token * x.out_stride + at;
    for (std::size_t w = 0; w < kWide; ++w) {
      const bool whole = w < kLast || count == kKeyBlock;
      const Lanes value = whole ? lanes(v + w * kKeyBlock) : first_lanes(v + w * kKeyBlock, count);
      u[w] = combined(beta, value, -beta * decay, held[w]);
      const Lanes found = combined(decay, seen[w], both, u[w]);
      if (whole) store(found, out + w * kKeyBlock);
      else store_first(found, count, out + w * kKeyBlock);
    }
    for (std::size_t i = 0; i < d; ++i) {
      float* const to = state + i * row + at;
      for (std::size_t w = 0; w < kWide; ++w) {
        store(combined(decay, lanes(to + w * kKeyBlock), k[i], u[w]), to + w * kKeyBlock);
      }
    }
  }
}

static void delta_rule(const DeltaTokens& x, std::size_t key_dim, std::size_t value_dim, float* state) {
  const std::size_t row = (value_dim + kKeyBlock - 1) / kKeyBlock * kKeyBlock;
  std::size_t at = 0;
  for (; at + kStateWide * kKeyBlock <= value_dim; at += kStateWide * kKeyBlock) {
    delta_channels<kStateWide>(x, key_dim, row, at, kKeyBlock, state);
  }
  for (; at < value_dim; at += kKeyBlock) {
    delta_channels<1>(x, key_dim, row, at, value_dim - at < kKeyBlock ? value_dim - at : kKeyBlock, state);
  }
}

static void convolve(const float* const* inputs, const float* taps, std::size_t stride, std::size_t count,
                     const float* bias, bool silu, std::size_t n, float* out) {
  std::size_t i = 0;
  for (; i + kKeyBlock <= n; i += kKeyBlock) {
    Lanes sum = {};
    if (bias != nullptr) sum = lanes(bias + i);
    for (std::size_t k = 0; k < count; ++k) add_products(sum, lanes(taps + k * stride + i), lanes(inputs[k] + i));
    store(sum, out + i);
  }
  for (; i < n; ++i) {
    float sum = bias != nullptr ? bias[i] : 0.0f;
    for (std::size_t k = 0; k < count; ++k) sum += taps[k * stride + i] * inputs[k][i];
    out[i] = sum;
  }
  if (!silu) return;
  // A loop of its own: in one with the sums the compiler takes it apart, number by number.
  for (i = 0; i < n; ++i) out[i] = out[i] / (1.0f + exponential(-out[i]));
}
