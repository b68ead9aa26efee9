// The decoder's vector loops, for every kernel file to compile with its own flags. Internal linkage only: see
// cpu/tables.hpp. Written so that the compiler turns the inner loops into vector instructions.
//
//   sums over a vector   parts[j] += x[16·i + j], j < 16: sixteen lanes, added up at the end in one order, so that
//                        every instruction set gives the same bits
//   attention, scores    sums[row] += query[row][i] · keys[page][i][0 … 15]       16 scores of a query in a register
//   attention, values    sums[row][k] += p[row][t] · value[t][16·k … 16·k + 15]   rows share every load of a value

namespace ops {

// e^x for x <= 88, 0 far below: 2^n · 2^f with a polynomial on |f| <= 1/2, relative error below 2e-7.
static inline float exponential(float x) {
  const float clipped = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  const float t = clipped * 1.44269504f;
  const float moved = t + 12582912.0f, n = moved - 12582912.0f;
  const float f = (clipped - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 1.98412698e-4f;
  p = p * f + 1.38888889e-3f;
  p = p * f + 8.33333333e-3f;
  p = p * f + 4.16666667e-2f;
  p = p * f + 1.66666667e-1f;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  // n + 127 from the low bits of `moved`: NaN has no whole number that it could be cast to, and stays NaN by p.
  std::uint32_t bits;
  std::memcpy(&bits, &moved, sizeof bits);
  bits = (bits - 0x4b400000u + 127u) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

// To the nearest whole number, halves to even, for |x| < 2^22.
static inline float nearest(float x) { return (x + 12582912.0f) - 12582912.0f; }

static inline float limited(float x, float low, float high) {
  const float above = x < low ? low : x;
  return above > high ? high : above;
}

// The whole number of a quotient; of NaN the least one.
static inline std::int32_t whole(float x, GridRange r) {
  const float n = nearest(x / r.step), above = n > r.low ? n : r.low;
  return static_cast<std::int32_t>(above > r.high ? r.high : above);
}

static void rms_norm(const float* x, const float* gain, std::size_t n, float eps, float* y) {
  float parts[16] = {};
  std::size_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (std::size_t j = 0; j < 16; ++j) parts[j] += x[i + j] * x[i + j];
  }
  float total = 0;
  for (; i < n; ++i) total += x[i] * x[i];
  for (float part : parts) total += part;
  const float inverse = 1.0f / __builtin_sqrtf(total / static_cast<float>(n) + eps);
  for (i = 0; i < n; ++i) y[i] = gain[i] * (x[i] * inverse);
}

static void add(float* x, const float* y, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) x[i] += y[i];
}

static void scale(const float* x, const float* s, std::size_t n, float* y) {
  for (std::size_t i = 0; i < n; ++i) y[i] = x[i] * s[i];
}

static void scaled(const float* x, float s, std::size_t n, float* y) {
  for (std::size_t i = 0; i < n; ++i) y[i] = x[i] * s;
}

// Between −1 and 1, by the exponential of a number that is not above 0.
static inline float tangent(float x) {
  const float size = x < 0 ? -x : x, power = exponential(-2.0f * size), found = (1.0f - power) / (1.0f + power);
  return x < 0 ? -found : found;
}

static void soft_cap(float* x, std::size_t n, float cap) {
  for (std::size_t i = 0; i < n; ++i) x[i] = cap * tangent(x[i] / cap);
}

static void centre(const float* x, std::size_t n, float* y) {
  float parts[16] = {};
  std::size_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (std::size_t j = 0; j < 16; ++j) parts[j] += x[i + j];
  }
  float total = 0;
  for (; i < n; ++i) total += x[i];
  for (float part : parts) total += part;
  const float mean = total / static_cast<float>(n);
  for (i = 0; i < n; ++i) y[i] = x[i] - mean;
}

static void gate(Gate kind, const float* numbers, const float* g, const float* up, std::size_t n, float* out) {
  if (kind == Gate::silu) {
    for (std::size_t i = 0; i < n; ++i) out[i] = g[i] / (1.0f + exponential(-g[i])) * up[i];
  } else if (kind == Gate::sigmoid) {
    for (std::size_t i = 0; i < n; ++i) out[i] = up[i] / (1.0f + exponential(-g[i]));
  } else if (kind == Gate::quick_gelu) {
    for (std::size_t i = 0; i < n; ++i) out[i] = g[i] / (1.0f + exponential(-1.702f * g[i])) * up[i];
  } else if (kind == Gate::relu) {
    for (std::size_t i = 0; i < n; ++i) out[i] = (g[i] > 0 ? g[i] : 0) * up[i];
  } else if (kind == Gate::relu2) {
    for (std::size_t i = 0; i < n; ++i) {
      const float positive = g[i] > 0 ? g[i] : 0;
      out[i] = positive * positive * up[i];
    }
  } else if (kind == Gate::xielu) {
    const float positive = numbers[0], negative = numbers[1], beta = numbers[2], eps = numbers[3];
    for (std::size_t i = 0; i < n; ++i) {
      const float x = g[i], below = (exponential(x < eps ? x : eps) - 1.0f - x) * negative;
      out[i] = ((x > 0 ? positive * x * x : below) + beta * x) * up[i];
    }
  } else {
    for (std::size_t i = 0; i < n; ++i) {
      const float inner = 1.5957691216f * (g[i] + 0.044715f * g[i] * g[i] * g[i]);
      out[i] = g[i] / (1.0f + exponential(-inner)) * up[i];
    }
  }
}

static void limit_gate(const float* gate, const float* up, std::size_t n, float limit, float offset, float* gate_to,
                       float* up_to) {
  const float most = limit > 0 ? limit : __builtin_inff();
  for (std::size_t i = 0; i < n; ++i) {
    gate_to[i] = gate[i] > most ? most : gate[i];
    up_to[i] = limited(up[i], -most, most) + offset;
  }
}

static GridRange range(const float* x, std::size_t n, Grid grid) {
  float least[16] = {}, most[16] = {};
  std::size_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (std::size_t j = 0; j < 16; ++j) {
      least[j] = x[i + j] < least[j] ? x[i + j] : least[j];
      most[j] = x[i + j] > most[j] ? x[i + j] : most[j];
    }
  }
  for (; i < n; ++i) {
    least[0] = x[i] < least[0] ? x[i] : least[0];
    most[0] = x[i] > most[0] ? x[i] : most[0];
  }
  for (std::size_t j = 1; j < 16; ++j) {
    least[0] = least[j] < least[0] ? least[j] : least[0];
    most[0] = most[j] > most[0] ? most[j] : most[0];
  }
  const float low = least[0], high = most[0];
  if (grid.symmetric) {
    // 16 bits: 127 · 256, so that both planes fit.
    const float top = grid.bits == 16 ? 32512.0f : static_cast<float>((1 << (grid.bits - 1)) - 1);
    float step = (high > -low ? high : -low) * grid.clip / top;
    step = step > 0 ? step : 1.0f;
    return {step, -top, top};
  }
  const float top = static_cast<float>((1 << grid.bits) - 1), start = low * grid.clip;
  float step = (high * grid.clip - start) / top;
  step = step > 0 ? step : 1.0f;
  const float found = nearest(-start / step), zero = found > 0 ? found : 0.0f;  // NaN where the step is infinite
  return {step, -zero, top - zero};
}

static void quantise(const float* x, std::size_t n, GridRange r, std::int8_t* high, std::int8_t* low) {
  if (low == nullptr) {
    for (std::size_t i = 0; i < n; ++i) {
      high[i] = static_cast<std::int8_t>(whole(x[i], r));
    }
    return;
  }
  for (std::size_t i = 0; i < n; ++i) {
    const std::int32_t both = whole(x[i], r), upper = (both + 128) >> 8;
    high[i] = static_cast<std::int8_t>(upper);
    low[i] = static_cast<std::int8_t>(both - upper * 256);
  }
}

static void fake_quantise(float* x, std::size_t n, GridRange r) {
  for (std::size_t i = 0; i < n; ++i) x[i] = limited(nearest(x[i] / r.step), r.low, r.high) * r.step;
}

static std::int32_t sum(const std::int8_t* x, std::size_t n) {
  std::int32_t total = 0;
  for (std::size_t i = 0; i < n; ++i) total += x[i];
  return total;
}

static void rope(float* x, const float* cosine, const float* sine, std::size_t n) {
  float* upper = x + n / 2;
  for (std::size_t i = 0; i < n / 2; ++i) {
    const float a = x[i], b = upper[i];
    x[i] = a * cosine[i] - b * sine[i];
    upper[i] = b * cosine[i] + a * sine[i];
  }
}

static void rope_interleaved(float* x, const float* cosine, const float* sine, std::size_t n) {
  for (std::size_t i = 0; i < n / 2; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1];
    x[2 * i] = a * cosine[i] - b * sine[i];
    x[2 * i + 1] = b * cosine[i] + a * sine[i];
  }
}

static void vector_matrix(const float* x, const float* m, std::size_t rows, std::size_t columns, float* y) {
  for (std::size_t r = 0; r < rows; ++r) {
    const float value = x[r];
    const float* row = m + r * columns;
    for (std::size_t c = 0; c < columns; ++c) y[c] += value * row[c];
  }
}

// Numbers of a cache as float32.
template <typename T>
static inline void widen(const T* from, std::size_t n, float* to) {
  for (std::size_t i = 0; i < n; ++i) to[i] = static_cast<float>(from[i]);
}

static inline void widen(const std::uint16_t* from, std::size_t n, float* to) {
  std::uint32_t* bits = reinterpret_cast<std::uint32_t*>(to);
  for (std::size_t i = 0; i < n; ++i) bits[i] = static_cast<std::uint32_t>(from[i]) << 16;
}

static float dot(const float* x, const float* w, std::size_t n) {
  float parts[16] = {};
  std::size_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (std::size_t j = 0; j < 16; ++j) parts[j] += x[i + j] * w[i + j];
  }
  float total = 0;
  for (; i < n; ++i) total += x[i] * w[i];
  for (float part : parts) total += part;
  return total;
}

static float dot_bf16(const float* x, const std::uint16_t* w, std::size_t n) {
  float parts[16] = {};
  std::size_t i = 0;
  for (; i + 16 <= n; i += 16) {
    float wide[16];
    widen(w + i, 16, wide);
    for (std::size_t j = 0; j < 16; ++j) parts[j] += x[i + j] * wide[j];
  }
  float total = 0;
  for (; i < n; ++i) {
    float one;
    widen(w + i, 1, &one);
    total += x[i] * one;
  }
  for (float part : parts) total += part;
  return total;
}

static void butterflies(float* x, std::size_t n, std::size_t count, float factor) {
  for (std::size_t i = 0; i < n * count; ++i) x[i] *= factor;
  for (std::size_t half = 1; half < n; half *= 2) {
    for (std::size_t start = 0; start < n * count; start += 2 * half) {
      float* a = x + start;
      float* b = a + half;
      for (std::size_t i = 0; i < half; ++i) {
        const float sum = a[i] + b[i], difference = a[i] - b[i];
        a[i] = sum;
        b[i] = difference;
      }
    }
  }
}

static inline std::uint16_t to_bf16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// A page's part of a vector: where its keys or values begin.
template <typename T>
static inline T* page_keys(const CacheView& c, std::size_t block) {
  return reinterpret_cast<T*>(c.keys + static_cast<std::size_t>(c.table[block]) * c.key_bytes);
}
template <typename T>
static inline T* page_values(const CacheView& c, std::size_t block) {
  return reinterpret_cast<T*>(c.values + static_cast<std::size_t>(c.table[block]) * c.value_bytes);
}
static inline float* page_scales(const CacheView& c, std::size_t block) {
  return c.scales + static_cast<std::size_t>(c.table[block]) * kPageScales;
}

// Of u4 caches: values of 32 channels share 16 bytes.
static inline std::size_t nibble_byte(std::size_t channel) { return channel / 32 * 16 + channel % 16; }
static inline bool in_high_nibble(std::size_t channel) { return channel % 32 >= 16; }

static inline unsigned code_of(float x, GridRange r) {
  return static_cast<unsigned>(whole(x, r) - static_cast<std::int32_t>(r.low));
}

static void append_to_cache(const CacheView& c, std::size_t position, const float* key, const float* value,
                            GridRange kr, GridRange vr) {
  const std::size_t keys_of = c.key_dim, d = c.value_dim, block = position / kKeyBlock, at = position % kKeyBlock;
  switch (c.kind) {
    case CacheKind::f32: {
      float* keys = page_keys<float>(c, block) + at;
      for (std::size_t i = 0; i < keys_of; ++i) keys[i * kKeyBlock] = key[i];
      std::memcpy(page_values<float>(c, block) + at * d, value, d * sizeof(float));
      return;
    }
    case CacheKind::bf16: {
      std::uint16_t *keys = page_keys<std::uint16_t>(c, block) + at, *values = page_values<std::uint16_t>(c, block);
      for (std::size_t i = 0; i < keys_of; ++i) keys[i * kKeyBlock] = to_bf16(key[i]);
      for (std::size_t i = 0; i < d; ++i) values[at * d + i] = to_bf16(value[i]);
      return;
    }
    case CacheKind::u8: {
      std::uint8_t *keys = page_keys<std::uint8_t>(c, block) + at, *values = page_values<std::uint8_t>(c, block) + at * d;
      for (std::size_t i = 0; i < keys_of; ++i) keys[i * kKeyBlock] = static_cast<std::uint8_t>(code_of(key[i], kr));
      for (std::size_t i = 0; i < d; ++i) values[i] = static_cast<std::uint8_t>(code_of(value[i], vr));
      break;
    }
    case CacheKind::u4: {
      const std::size_t row = c.value_bytes / kKeyBlock;
      std::uint8_t *keys = page_keys<std::uint8_t>(c, block) + at, *values = page_values<std::uint8_t>(c, block) + at * row;
      std::memset(values, 0, row);
      for (std::size_t i = 0; i < keys_of; ++i) {
        const unsigned k = code_of(key[i], kr);
        std::uint8_t& pair = keys[i / 2 * kKeyBlock];
        pair = static_cast<std::uint8_t>(i % 2 == 0 ? k : pair | k << 4);
      }
      for (std::size_t i = 0; i < d; ++i) {
        const unsigned v = code_of(value[i], vr);
        std::uint8_t& both = values[nibble_byte(i)];
        both = static_cast<std::uint8_t>(both | (in_high_nibble(i) ? v << 4 : v));
      }
    }
  }
  float* scales = page_scales(c, block) + at;
  scales[0] = kr.step;
  scales[kKeyBlock] = -kr.low;
  scales[2 * kKeyBlock] = vr.step;
  scales[3 * kKeyBlock] = -vr.low;
}

// 16 numbers that stay in registers: arrays of sums end up in memory where loops over rows surround them, and so does,
// with GCC 12, a vector that is wider than a register.
#if defined(__AVX2__) && !defined(__AVX512F__)
typedef float Half __attribute__((vector_size(kKeyBlock / 2 * sizeof(float))));
struct Lanes {
  Half low, high;
};
static inline Lanes lanes(const float* from) {
  Lanes found;
  std::memcpy(&found.low, from, sizeof found.low);
  std::memcpy(&found.high, from + kKeyBlock / 2, sizeof found.high);
  return found;
}
static inline void store(const Lanes& x, float* to) {
  std::memcpy(to, &x.low, sizeof x.low);
  std::memcpy(to + kKeyBlock / 2, &x.high, sizeof x.high);
}
// sum += factor · x
static inline void add_product(Lanes& sum, float factor, const Lanes& x) {
  sum.low += factor * x.low;
  sum.high += factor * x.high;
}
static inline void add_product(Lanes& sum, const Lanes& x, const Lanes& y) {
  sum.low += x.low * y.low;
  sum.high += x.high * y.high;
}
// (x − offset) / total
static inline Lanes normalised(const Lanes& x, float offset, float total) {
  return {(x.low - offset) / total, (x.high - offset) / total};
}
#else
typedef float Lanes __attribute__((vector_size(kKeyBlock * sizeof(float))));
static inline Lanes lanes(const float* from) {
  Lanes found;
  std::memcpy(&found, from, sizeof found);
  return found;
}
static inline void store(const Lanes& x, float* to) { std::memcpy(to, &x, sizeof x); }
static inline void add_product(Lanes& sum, float factor, const Lanes& x) { sum += factor * x; }
static inline void add_product(Lanes& sum, const Lanes& x, const Lanes& y) { sum += x * y; }
static inline Lanes normalised(const Lanes& x, float offset, float total) { return (x - offset) / total; }
#endif

typedef std::uint8_t Bytes __attribute__((vector_size(kKeyBlock)));

// Conversions by name where there are instructions for them: GCC 12 takes vectors apart, number by number.
#if defined(__AVX512F__)
static inline Lanes lanes(const std::uint16_t* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return reinterpret_cast<Lanes>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

static inline Lanes lanes(Bytes codes) {
  return reinterpret_cast<Lanes>(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(reinterpret_cast<__m128i>(codes))));
}
#elif defined(__AVX2__)
static inline Lanes lanes(const std::uint16_t* from) {
  const auto half = [&](std::size_t at) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  };
  return {half(0), half(8)};
}

static inline Lanes lanes(Bytes codes) {
  const auto half = [](__m128i bytes) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)); };
  const __m128i all = reinterpret_cast<__m128i>(codes);
  return {half(all), half(_mm_srli_si128(all, 8))};
}
#else
static inline Lanes lanes(const std::uint16_t* from) {
  float wide[kKeyBlock];
  widen(from, kKeyBlock, wide);
  return lanes(wide);
}

static inline Lanes lanes(Bytes codes) {
  float wide[kKeyBlock];
  for (std::size_t i = 0; i < kKeyBlock; ++i) wide[i] = static_cast<float>(codes[i]);
  return lanes(wide);
}
#endif

static inline Bytes bytes(const std::uint8_t* from) {
  Bytes found;
  std::memcpy(&found, from, sizeof found);
  return found;
}

static inline Lanes lanes(const std::uint8_t* from) { return lanes(bytes(from)); }

// A number that a template takes from an argument.
template <std::size_t kCount>
struct Count {
  constexpr std::size_t operator()() const { return kCount; }
};

// In what a kind of cache is stored.
template <CacheKind kKind>
struct Stored {
  typedef std::uint8_t Type;
};
template <>
struct Stored<CacheKind::f32> {
  typedef float Type;
};
template <>
struct Stored<CacheKind::bf16> {
  typedef std::uint16_t Type;
};

template <CacheKind kKind>
constexpr bool kCodes = kKind == CacheKind::u8 || kKind == CacheKind::u4;

// How many sums of kRows rows are added to at once: as many as registers hold, so that no sum waits for itself.
#if defined(__AVX512F__)
template <std::size_t kRows>
constexpr std::size_t kPagesAtOnce = kRows > 2 ? 2 : 4;
constexpr std::size_t kWidest = 4;
#else
template <std::size_t kRows>
constexpr std::size_t kPagesAtOnce = kRows > 2 ? 1 : 2;
constexpr std::size_t kWidest = 2;
#endif

// Products of kRows queries with the keys of kPages pages, to[row][page · kKeyBlock …].
template <std::size_t kRows, std::size_t kPages, CacheKind kKind>
static inline void query_key_products(const typename Stored<kKind>::Type* const* keys, std::size_t d,
                                      const float* const* queries, float* const* to) {
  Lanes sums[kRows][kPages] = {};
  const auto add = [&](std::size_t i, const Lanes* column) {
    for (std::size_t r = 0; r < kRows; ++r) {
      for (std::size_t k = 0; k < kPages; ++k) add_product(sums[r][k], queries[r][i], column[k]);
    }
  };
  Lanes column[kPages];
  if constexpr (kKind == CacheKind::u4) {
    for (std::size_t i = 0; i < d; i += 2) {
      Bytes pairs[kPages];
      for (std::size_t k = 0; k < kPages; ++k) {
        pairs[k] = bytes(keys[k] + i / 2 * kKeyBlock);
        column[k] = lanes(pairs[k] & 15);
      }
      add(i, column);
      if (i + 1 == d) break;
      for (std::size_t k = 0; k < kPages; ++k) column[k] = lanes(pairs[k] >> 4);
      add(i + 1, column);
    }
  } else {
    for (std::size_t i = 0; i < d; ++i) {
      for (std::size_t k = 0; k < kPages; ++k) column[k] = lanes(keys[k] + i * kKeyBlock);
      add(i, column);
    }
  }
  for (std::size_t r = 0; r < kRows; ++r) {
    for (std::size_t k = 0; k < kPages; ++k) store(sums[r][k], to[r] + k * kKeyBlock);
  }
}

// kWide · kKeyBlock channels from `at` on, of the value that begins at `from`. Of u4, `at` is a multiple of 32.
template <std::size_t kWide, CacheKind kKind>
static inline void value_lanes(const typename Stored<kKind>::Type* from, std::size_t at, Lanes* value) {
  if constexpr (kKind == CacheKind::u4) {
    for (std::size_t k = 0; k < kWide; k += 2) {
      const Bytes both = bytes(from + at / 2 + k * kKeyBlock / 2);
      value[k] = lanes(both & 15);
      if (k + 1 < kWide) value[k + 1] = lanes(both >> 4);
    }
  } else {
    for (std::size_t k = 0; k < kWide; ++k) value[k] = lanes(from + at + k * kKeyBlock);
  }
}

// Channel `at` of a value.
template <CacheKind kKind>
static inline float value_channel(const typename Stored<kKind>::Type* from, std::size_t at) {
  float value;
  if constexpr (kKind == CacheKind::u4) {
    const unsigned both = from[nibble_byte(at)];
    value = static_cast<float>(in_high_nibble(at) ? both >> 4 : both & 15u);
  } else {
    widen(from + at, 1, &value);
  }
  return value;
}

// Products of kRows queries with the values of a page, which are keys, too, to[row][token]. kTokens of them at once: a
// product's bits depend on its own row and token alone.
template <std::size_t kRows, CacheKind kKind>
static inline void query_value_products(const CacheView& c, std::size_t block, const float* const* queries,
                                        float (*to)[kKeyBlock]) {
  typedef typename Stored<kKind>::Type T;
  constexpr std::size_t kTokens = kPagesAtOnce<kRows> * (kRows > 2 ? 2 : 1);
  constexpr std::size_t kWide = kKind == CacheKind::u4 ? 2 : 1;
  const std::size_t d = c.value_dim, row = c.value_bytes / kKeyBlock / sizeof(T);
  const T* from = page_values<T>(c, block);
  for (std::size_t t = 0; t < kKeyBlock; t += kTokens, from += kTokens * row) {
    Lanes sums[kRows][kTokens] = {};
    std::size_t at = 0;
    for (; at + kWide * kKeyBlock <= d; at += kWide * kKeyBlock) {
      Lanes value[kTokens][kWide];
      for (std::size_t j = 0; j < kTokens; ++j) value_lanes<kWide, kKind>(from + j * row, at, value[j]);
      for (std::size_t r = 0; r < kRows; ++r) {
        for (std::size_t k = 0; k < kWide; ++k) {
          const Lanes query = lanes(queries[r] + at + k * kKeyBlock);
          for (std::size_t j = 0; j < kTokens; ++j) add_product(sums[r][j], query, value[j][k]);
        }
      }
    }
    for (std::size_t r = 0; r < kRows; ++r) {
      for (std::size_t j = 0; j < kTokens; ++j) {
        float parts[kKeyBlock], total = 0;
        store(sums[r][j], parts);
        for (std::size_t i = at; i < d; ++i) total += queries[r][i] * value_channel<kKind>(from + j * row, i);
        for (float part : parts) total += part;
        to[r][t + j] = total;
      }
    }
  }
}

// Of the rows of a block: out = (Σ_t weights[t] · value t − offset) / total.
struct RowSums {
  float total, offset;
};

// The weights of values that are codes times their steps; the zero points are left to the offsets.
template <std::size_t kRows>
static inline void scale_weights(const CacheView& c, std::size_t first, float* scores, std::size_t width,
                                 RowSums* sums) {
  float parts[kRows][kKeyBlock] = {};
  for (std::size_t b = 0; b < width; b += kKeyBlock) {
    const float *steps = page_scales(c, (first + b) / kKeyBlock) + 2 * kKeyBlock, *zeros = steps + kKeyBlock;
    for (std::size_t r = 0; r < kRows; ++r) {
      float* weights = scores + r * width + b;
      for (std::size_t j = 0; j < kKeyBlock; ++j) {
        // Behind the last token a page holds what it was left with.
        const float weight = weights[j] > 0 ? weights[j] * steps[j] : 0.0f;
        weights[j] = weight;
        parts[r][j] += weight > 0 ? weight * zeros[j] : 0.0f;
      }
    }
  }
  for (std::size_t r = 0; r < kRows; ++r) {
    for (float part : parts[r]) sums[r].offset += part;
  }
}

// kWide · kKeyBlock channels of the outputs from `at` on. `first` begins a page.
template <std::size_t kRows, std::size_t kWide, CacheKind kKind>
static inline void weighted_values(const CacheView& c, std::size_t first, std::size_t last, std::size_t at,
                                   const float* scores, std::size_t width, const RowSums* rows, float* const* out) {
  typedef typename Stored<kKind>::Type T;
  const std::size_t row = c.value_bytes / kKeyBlock / sizeof(T);
  Lanes sums[kRows][kWide] = {};
  for (std::size_t start = first; start < last; start += kKeyBlock) {
    const T* from = page_values<T>(c, start / kKeyBlock);
    const float* weights = scores + (start - first);
    const std::size_t count = last - start < kKeyBlock ? last - start : kKeyBlock;
    for (std::size_t t = 0; t < count; ++t, from += row) {
      Lanes value[kWide];
      value_lanes<kWide, kKind>(from, at, value);
      for (std::size_t r = 0; r < kRows; ++r) {
        const float p = weights[r * width + t];
        for (std::size_t k = 0; k < kWide; ++k) add_product(sums[r][k], p, value[k]);
      }
    }
  }
  for (std::size_t r = 0; r < kRows; ++r) {
    for (std::size_t k = 0; k < kWide; ++k) {
      store(normalised(sums[r][k], rows[r].offset, rows[r].total), out[r] + at + k * kKeyBlock);
    }
  }
}

// e^(score − the largest) in place; returns their sum, that of `sink` included where it is not null. `width`: whole
// blocks, scores that are masked far below.
static inline float exponentials(float* scores, std::size_t width, const float* sink) {
  float mosts[kKeyBlock];
  for (float& most : mosts) most = sink != nullptr ? *sink : scores[0];
  for (std::size_t i = 0; i < width; i += kKeyBlock) {
    for (std::size_t j = 0; j < kKeyBlock; ++j) mosts[j] = scores[i + j] > mosts[j] ? scores[i + j] : mosts[j];
  }
  float most = mosts[0];
  for (float one : mosts) most = one > most ? one : most;
  float parts[kKeyBlock] = {};
  for (std::size_t i = 0; i < width; i += kKeyBlock) {
    for (std::size_t j = 0; j < kKeyBlock; ++j) {
      const float weight = scores[i + j] < -1e29f ? 0.0f : exponential(scores[i + j] - most);
      scores[i + j] = weight;
      parts[j] += weight;
    }
  }
  float total = sink != nullptr ? exponential(*sink - most) : 0.0f;
  for (float part : parts) total += part;
  return total;
}

template <std::size_t kRows, CacheKind kKind>
static void attend_rows(const CacheView& c, const float* const* queries, const float* const* latents,
                        const std::size_t* begin, const std::size_t* end, float factor, float cap, const float* sinks,
                        float* const* out, float* scores) {
  typedef typename Stored<kKind>::Type T;
  const std::size_t d = c.value_dim;
  std::size_t first = begin[0], last = end[0];
  float query_sums[kRows] = {}, latent_sums[kRows] = {};
  for (std::size_t r = 0; r < kRows; ++r) {
    first = begin[r] < first ? begin[r] : first;
    last = end[r] > last ? end[r] : last;
    if (kCodes<kKind>) {
      for (std::size_t i = 0; i < c.key_dim; ++i) query_sums[r] += queries[r][i];
    }
    if (kCodes<kKind> && latents != nullptr) {
      for (std::size_t i = 0; i < d; ++i) latent_sums[r] += latents[r][i];
    }
  }
  first = first / kKeyBlock * kKeyBlock;
  const std::size_t width = (last - first + kKeyBlock - 1) / kKeyBlock * kKeyBlock;
  const auto products = [&](auto pages, std::size_t b) {
    const T* keys[pages()];
    float* rows[kRows];
    for (std::size_t k = 0; k < pages(); ++k) keys[k] = page_keys<T>(c, (first + b) / kKeyBlock + k);
    for (std::size_t r = 0; r < kRows; ++r) rows[r] = scores + r * width + b;
    query_key_products<kRows, pages(), kKind>(keys, c.key_dim, queries, rows);
  };
  std::size_t done = 0;
  constexpr std::size_t kAtOnce = kPagesAtOnce<kRows>;
  for (; done + kAtOnce * kKeyBlock <= width; done += kAtOnce * kKeyBlock) products(Count<kAtOnce>(), done);
  for (; done < width; done += kKeyBlock) products(Count<1>(), done);
  for (std::size_t b = 0; b < width; b += kKeyBlock) {
    const std::size_t start = first + b;
    const float* scales = kCodes<kKind> ? page_scales(c, start / kKeyBlock) : nullptr;
    float of_values[kRows][kKeyBlock];
    if (latents != nullptr) query_value_products<kRows, kKind>(c, start / kKeyBlock, latents, of_values);
    for (std::size_t r = 0; r < kRows; ++r) {
      float* row = scores + r * width + b;
      if (kCodes<kKind>) {
        for (std::size_t j = 0; j < kKeyBlock; ++j) row[j] = (row[j] - scales[kKeyBlock + j] * query_sums[r]) * scales[j];
      }
      if (latents != nullptr) {
        for (std::size_t j = 0; j < kKeyBlock; ++j) {
          float more = of_values[r][j];
          if (kCodes<kKind>) more = (more - scales[3 * kKeyBlock + j] * latent_sums[r]) * scales[2 * kKeyBlock + j];
          row[j] += more;
        }
      }
      for (std::size_t j = 0; j < kKeyBlock; ++j) {
        const std::size_t position = start + j;
        float score = row[j] * factor;
        if (cap > 0) score = cap * tangent(score / cap);
        row[j] = position < begin[r] || position >= end[r] ? -1e30f : score;
      }
    }
  }
  RowSums sums[kRows];
  for (std::size_t r = 0; r < kRows; ++r) {
    sums[r] = {exponentials(scores + r * width, width, sinks != nullptr ? sinks + r : nullptr), 0.0f};
  }
  if (kCodes<kKind>) scale_weights<kRows>(c, first, scores, width, sums);
  std::size_t at = 0;
  const auto values = [&](auto wide) {
    for (; at + wide() * kKeyBlock <= d; at += wide() * kKeyBlock) {
      weighted_values<kRows, wide(), kKind>(c, first, last, at, scores, width, sums, out);
    }
  };
  if constexpr (kWidest > 2) values(Count<kWidest>());
  values(Count<2>());
  values(Count<1>());
  const std::size_t row = c.value_bytes / kKeyBlock / sizeof(T);
  for (; at < d; ++at) {
    for (std::size_t r = 0; r < kRows; ++r) {
      float sum = 0;
      for (std::size_t t = first; t < last; ++t) {
        const T* from = page_values<T>(c, t / kKeyBlock) + t % kKeyBlock * row;
        sum += scores[r * width + t - first] * value_channel<kKind>(from, at);
      }
      out[r][at] = (sum - sums[r].offset) / sums[r].total;
    }
  }
}

template <CacheKind kKind>
static void attend_kind(const CacheView& c, std::size_t rows, const float* const* queries, const float* const* latents,
                        const std::size_t* begin, const std::size_t* end, float factor, float cap, const float* sinks,
                        float* const* out, float* scores) {
  switch (rows) {
    case 1: return attend_rows<1, kKind>(c, queries, latents, begin, end, factor, cap, sinks, out, scores);
    case 2: return attend_rows<2, kKind>(c, queries, latents, begin, end, factor, cap, sinks, out, scores);
    case 3: return attend_rows<3, kKind>(c, queries, latents, begin, end, factor, cap, sinks, out, scores);
    default: return attend_rows<4, kKind>(c, queries, latents, begin, end, factor, cap, sinks, out, scores);
  }
}

static void attend(const CacheView& c, std::size_t rows, const float* const* queries, const float* const* latents,
                   const std::size_t* begin, const std::size_t* end, float factor, float cap, const float* sinks,
                   float* const* out, float* scores) {
  switch (c.kind) {
    case CacheKind::f32: return attend_kind<CacheKind::f32>(c, rows, queries, latents, begin, end, factor, cap, sinks, out, scores);
    case CacheKind::bf16: return attend_kind<CacheKind::bf16>(c, rows, queries, latents, begin, end, factor, cap, sinks, out, scores);
    case CacheKind::u8: return attend_kind<CacheKind::u8>(c, rows, queries, latents, begin, end, factor, cap, sinks, out, scores);
    case CacheKind::u4: return attend_kind<CacheKind::u4>(c, rows, queries, latents, begin, end, factor, cap, sinks, out, scores);
  }
}

#include "decoder/delta_rule.inl"
#include "decoder/state_space.inl"
#include "decoder/top_k.inl"

constexpr OpsKernels kernels = {
    rms_norm,
    add,
    scale,
    gate,
    limit_gate,
    range,
    quantise,
    fake_quantise,
    sum,
    rope,
    rope_interleaved,
    centre,
    soft_cap,
    vector_matrix,
    dot_bf16,
    dot,
    butterflies,
    append_to_cache,
    attend,
    scaled,
    top_k_threshold,
    nonzero,
    nonzero_blocks4,
    absolute,
    drop_below,
    unit_sizes,
    drop_units_below,
    convolve,
    delta_rule,
    state_space,
    nullptr,
};

}  // namespace ops
