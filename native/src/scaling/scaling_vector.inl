// The Scaling Transformer's kernels in vectors of L = 16 floats (AVX-512) or 8 (AVX2). Internal linkage only: see
// cpu/tables.hpp.
//
//   rows, several tokens    sums[token][row]: 4 × 4 (AVX2 2 × 4) accumulators over L inputs; step: load 4 rows, per
//                           token load L inputs, 4 fused multiply-adds; a sum's lanes are added at the end
//   rows, one token; chosen 4 accumulators of one row; the row that comes kPrefetchBytes later is prefetched
//   codes                   vpdpbusd of 64 codes and inputs; Σ (code − 128)·x = Σ code·x − 128·Σx
//   panels                  sums[row][panel]: B [input][16 outputs] is loaded once for up to 4 rows of a; no sum runs
//                           across lanes
//   add_rows                y += factor·row, 4 rows in one pass over y

namespace scaling {

#if defined(__AVX512F__)
typedef __m512 Vector;
static inline Vector zero() { return _mm512_setzero_ps(); }
static inline Vector all(float x) { return _mm512_set1_ps(x); }
static inline Vector load(const float* from) { return _mm512_loadu_ps(from); }
static inline void store(float* to, Vector x) { _mm512_storeu_ps(to, x); }
static inline Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
static inline Vector multiply(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
static inline Vector fused(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
static inline Vector greater(Vector a, Vector b) { return _mm512_max_ps(a, b); }
static inline float sum(Vector x) { return _mm512_reduce_add_ps(x); }
static inline float greatest(Vector x) { return _mm512_reduce_max_ps(x); }
static inline unsigned equal(Vector a, Vector b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
static inline Vector load(const std::uint16_t* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
static inline Vector load(const std::uint8_t* from) {
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_xor_si128(codes, _mm_set1_epi8(-128))));
}
#else
typedef __m256 Vector;
static inline Vector zero() { return _mm256_setzero_ps(); }
static inline Vector all(float x) { return _mm256_set1_ps(x); }
static inline Vector load(const float* from) { return _mm256_loadu_ps(from); }
static inline void store(float* to, Vector x) { _mm256_storeu_ps(to, x); }
static inline Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
static inline Vector multiply(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
static inline Vector fused(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
static inline Vector greater(Vector a, Vector b) { return _mm256_max_ps(a, b); }
static inline float sum(Vector x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
static inline float greatest(Vector x) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
static inline unsigned equal(Vector a, Vector b) {
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)));
}
static inline Vector load(const std::uint16_t* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
static inline Vector load(const std::uint8_t* from) {
  const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_xor_si128(codes, _mm_set1_epi8(-128))));
}
#endif

constexpr std::size_t kLanes = sizeof(Vector) / sizeof(float);
constexpr std::size_t kLine = 64;
// Tokens and rows that share the registers.
constexpr std::size_t kRows = 4;
// Rows that are added in one pass over y.
constexpr std::size_t kAdded = 4;
// Bytes of a token's inputs from which on rows share their loads: they leave the level-1 cache to the weights then.
constexpr std::size_t kSharedInputBytes = 16384;
// Bytes that a chosen row is prefetched before its turn: what memory gives within its latency, and some more.
constexpr std::size_t kPrefetchBytes = 4096;

static inline float one(const float* from) { return *from; }
static inline float one(const std::uint16_t* from) {
  const std::uint32_t wide = static_cast<std::uint32_t>(*from) << 16;
  float found;
  std::memcpy(&found, &wide, sizeof found);
  return found;
}
static inline float one(const std::uint8_t* from) { return static_cast<float>(*from) - 128.0f; }

static inline void prefetch(const void* from) { _mm_prefetch(static_cast<const char*>(from), _MM_HINT_T0); }

// w·x, and the bytes at `upcoming` prefetched meanwhile, unless it is null.
template <bool kFetch, typename T>
static inline float dot(const T* w, const float* x, std::size_t n, const T* upcoming) {
  constexpr std::size_t kStep = 4 * kLanes;
  Vector sums[4] = {zero(), zero(), zero(), zero()};
  std::size_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    if (kFetch) {
      for (std::size_t b = 0; b < kStep * sizeof(T); b += kLine)
        prefetch(reinterpret_cast<const char*>(upcoming + i) + b);
    }
    for (std::size_t j = 0; j < 4; ++j) sums[j] = fused(load(w + i + j * kLanes), load(x + i + j * kLanes), sums[j]);
  }
  for (; i + kLanes <= n; i += kLanes) sums[0] = fused(load(w + i), load(x + i), sums[0]);
  float total = sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  for (; i < n; ++i) total += one(w + i) * x[i];
  return total;
}

// Σ (code − 128)·x; Σ x is `whole`.
template <bool kFetch>
static inline std::int32_t dot_codes(const std::uint8_t* w, const std::int8_t* x, std::size_t n, std::int32_t whole,
                                     const std::uint8_t* upcoming) {
#if defined(__AVX512VNNI__)
  __m512i sums[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
  std::size_t i = 0;
  for (; i + 128 <= n; i += 128) {
    if (kFetch) {
      prefetch(upcoming + i);
      prefetch(upcoming + i + kLine);
    }
    sums[0] = _mm512_dpbusd_epi32(sums[0], _mm512_loadu_si512(w + i), _mm512_loadu_si512(x + i));
    sums[1] = _mm512_dpbusd_epi32(sums[1], _mm512_loadu_si512(w + i + 64), _mm512_loadu_si512(x + i + 64));
  }
  for (; i < n; i += 64) {
    const __mmask64 real = n - i >= 64 ? ~__mmask64{0} : (__mmask64{1} << (n - i)) - 1;
    sums[0] = _mm512_dpbusd_epi32(sums[0], _mm512_maskz_loadu_epi8(real, w + i), _mm512_maskz_loadu_epi8(real, x + i));
  }
  return _mm512_reduce_add_epi32(_mm512_add_epi32(sums[0], sums[1])) - 128 * whole;
#else
  (void)whole;
  __m256i sums = _mm256_setzero_si256();
  std::size_t i = 0;
  for (; i + 16 <= n; i += 16) {
    if (kFetch && i % kLine == 0) prefetch(upcoming + i);
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + i));
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_xor_si128(codes, _mm_set1_epi8(-128)));
    const __m256i in = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i)));
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(wide, in));
  }
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1));
  std::int32_t total = _mm_cvtsi128_si32(half);
  for (; i < n; ++i) total += (w[i] - 128) * x[i];
  return total;
#endif
}

static inline float finished(const Matrix& w, std::size_t row, const RowInputs& x, std::size_t token,
                             std::int32_t total) {
  return static_cast<float>(total) * (w.scales[row] * x.steps[token]);
}

// kRows rows from `row` on with kTokens tokens from `token` on.
template <std::size_t kTokens, typename T>
static inline void row_tile(const Matrix& w, std::size_t row, const RowInputs& x, std::size_t token, float* y,
                            std::size_t y_stride) {
  const T* first = static_cast<const T*>(w.values) + row * w.columns;
  const float* in = x.floats + token * x.stride;
  Vector sums[kTokens][kRows];
  for (std::size_t t = 0; t < kTokens; ++t) {
    for (std::size_t r = 0; r < kRows; ++r) sums[t][r] = zero();
  }
  std::size_t i = 0;
  for (; i + kLanes <= w.columns; i += kLanes) {
    Vector weights[kRows];
    for (std::size_t r = 0; r < kRows; ++r) weights[r] = load(first + r * w.columns + i);
    for (std::size_t t = 0; t < kTokens; ++t) {
      const Vector one_token = load(in + t * x.stride + i);
      for (std::size_t r = 0; r < kRows; ++r) sums[t][r] = fused(weights[r], one_token, sums[t][r]);
    }
  }
  for (std::size_t t = 0; t < kTokens; ++t) {
    for (std::size_t r = 0; r < kRows; ++r) {
      float total = sum(sums[t][r]);
      for (std::size_t j = i; j < w.columns; ++j) total += one(first + r * w.columns + j) * in[t * x.stride + j];
      y[(token + t) * y_stride + row + r] = total;
    }
  }
}

template <typename T>
static void float_rows(const Matrix& w, std::size_t first, std::size_t last, const RowInputs& x, float* y,
                       std::size_t y_stride) {
  constexpr std::size_t kTokens = kLanes == 16 ? 4 : 2;
  const T* values = static_cast<const T*>(w.values);
  std::size_t row = first;
  const bool shared = x.tokens > 1 || x.one_order || w.columns * sizeof(float) > kSharedInputBytes;
  for (; shared && row + kRows <= last; row += kRows) {
    std::size_t t = 0;
    for (; t + kTokens <= x.tokens; t += kTokens) row_tile<kTokens, T>(w, row, x, t, y, y_stride);
    for (; t < x.tokens; ++t) row_tile<1, T>(w, row, x, t, y, y_stride);
  }
  for (; row < last; ++row) {
    const T* weights = values + row * w.columns;
    for (std::size_t t = 0; t < x.tokens; ++t) {
      y[t * y_stride + row] = dot<false, T>(weights, x.floats + t * x.stride, w.columns, nullptr);
    }
  }
}

static void rows(const Matrix& w, std::size_t first, std::size_t last, const RowInputs& x, float* y,
                 std::size_t y_stride) {
  if (w.kind == WeightKind::f32) return float_rows<float>(w, first, last, x, y, y_stride);
  if (w.kind == WeightKind::bf16) return float_rows<std::uint16_t>(w, first, last, x, y, y_stride);
  for (std::size_t row = first; row < last; ++row) {
    const std::uint8_t* codes = static_cast<const std::uint8_t*>(w.values) + row * w.columns;
    for (std::size_t t = 0; t < x.tokens; ++t) {
      const std::int32_t total = dot_codes<false>(codes, x.codes + t * x.stride, w.columns, x.sums[t], nullptr);
      y[t * y_stride + row] = finished(w, row, x, t, total);
    }
  }
}

// Which of a list's rows is prefetched while row i is multiplied: the one that begins kPrefetchBytes later.
static inline std::size_t upcoming_row(std::size_t row_bytes, std::size_t i, std::size_t count) {
  const std::size_t next = i + 1 + kPrefetchBytes / (row_bytes + 1);
  return next < count ? next : i;
}

template <typename T>
static void float_chosen(const Matrix& w, const std::int32_t* list, std::size_t count, const float* x, float* y) {
  const T* values = static_cast<const T*>(w.values);
  for (std::size_t i = 0; i < count; ++i) {
    const T* row = values + static_cast<std::size_t>(list[i]) * w.columns;
    const T* upcoming =
        values + static_cast<std::size_t>(list[upcoming_row(w.columns * sizeof(T), i, count)]) * w.columns;
    y[i] = dot<true, T>(row, x, w.columns, upcoming);
  }
}

static void chosen(const Matrix& w, const std::int32_t* list, std::size_t count, const RowInputs& x, std::size_t token,
                   float* y) {
  const std::size_t in = token * x.stride;
  if (w.kind == WeightKind::f32) return float_chosen<float>(w, list, count, x.floats + in, y);
  if (w.kind == WeightKind::bf16) return float_chosen<std::uint16_t>(w, list, count, x.floats + in, y);
  const std::uint8_t* values = static_cast<const std::uint8_t*>(w.values);
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t row = static_cast<std::size_t>(list[i]);
    const std::uint8_t* upcoming =
        values + static_cast<std::size_t>(list[upcoming_row(w.columns, i, count)]) * w.columns;
    const std::int32_t total =
        dot_codes<true>(values + row * w.columns, x.codes + in, w.columns, x.sums[token], upcoming);
    y[i] = finished(w, row, x, token, total);
  }
}

// y += Σ factors[r]·rows[r], the rows `upcoming` prefetched meanwhile.
template <std::size_t kCount, typename T>
static inline void add_group(const T* const* from, const T* const* upcoming, const float* factors, std::size_t n,
                             float* y) {
  constexpr std::size_t kStep = kLine / sizeof(T) > kLanes ? kLine / sizeof(T) : kLanes;
  std::size_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    for (std::size_t r = 0; r < kCount; ++r) prefetch(upcoming[r] + i);
    for (std::size_t j = i; j < i + kStep; j += kLanes) {
      Vector total = load(y + j);
      for (std::size_t r = 0; r < kCount; ++r) total = fused(all(factors[r]), load(from[r] + j), total);
      store(y + j, total);
    }
  }
  for (; i < n; ++i) {
    for (std::size_t r = 0; r < kCount; ++r) y[i] += factors[r] * one(from[r] + i);
  }
}

template <typename T>
static void add_kind(const Matrix& w, const std::int32_t* list, const float* factors, std::size_t count, float* y) {
  const T* values = static_cast<const T*>(w.values);
  const auto row = [&](std::size_t i) { return values + static_cast<std::size_t>(list[i]) * w.columns; };
  const auto factor = [&](std::size_t i) {
    return w.scales != nullptr ? factors[i] * w.scales[static_cast<std::size_t>(list[i])] : factors[i];
  };
  std::size_t i = 0;
  for (; i + kAdded <= count; i += kAdded) {
    const T* from[kAdded];
    const T* upcoming[kAdded];
    float by[kAdded];
    for (std::size_t r = 0; r < kAdded; ++r) {
      from[r] = row(i + r);
      upcoming[r] = row(i + kAdded + r < count ? i + kAdded + r : i + r);
      by[r] = factor(i + r);
    }
    add_group<kAdded, T>(from, upcoming, by, w.columns, y);
  }
  for (; i < count; ++i) {
    const T* from = row(i);
    const float by = factor(i);
    add_group<1, T>(&from, &from, &by, w.columns, y);
  }
}

static void add_rows(const Matrix& w, const std::int32_t* list, const float* factors, std::size_t count, float* y) {
  if (w.kind == WeightKind::f32) return add_kind<float>(w, list, factors, count, y);
  if (w.kind == WeightKind::bf16) return add_kind<std::uint16_t>(w, list, factors, count, y);
  add_kind<std::uint8_t>(w, list, factors, count, y);
}

// kCount rows of a with kWide panels.
template <std::size_t kCount, std::size_t kWide, typename T>
static inline void panel_tile(const Panels& b, std::size_t panel, std::size_t from, std::size_t to, const float* a,
                              std::size_t a_stride, float* c, std::size_t c_stride) {
  constexpr std::size_t kParts = kPanel / kLanes;
  const T* first = static_cast<const T*>(b.values) + (panel * b.inputs + from) * kPanel;
  const std::size_t next = b.inputs * kPanel;
  Vector sums[kCount][kWide * kParts];
  for (std::size_t r = 0; r < kCount; ++r) {
    for (std::size_t p = 0; p < kWide * kParts; ++p) sums[r][p] = load(c + r * c_stride + p * kLanes);
  }
  for (std::size_t k = 0; k < to - from; ++k) {
    Vector weights[kWide * kParts];
    for (std::size_t p = 0; p < kWide * kParts; ++p) {
      weights[p] = load(first + p / kParts * next + k * kPanel + p % kParts * kLanes);
    }
    for (std::size_t r = 0; r < kCount; ++r) {
      const Vector in = all(a[r * a_stride + k]);
      for (std::size_t p = 0; p < kWide * kParts; ++p) sums[r][p] = fused(in, weights[p], sums[r][p]);
    }
  }
  for (std::size_t r = 0; r < kCount; ++r) {
    for (std::size_t p = 0; p < kWide * kParts; ++p) store(c + r * c_stride + p * kLanes, sums[r][p]);
  }
}

template <std::size_t kWide, typename T>
static inline void panel_rows(const Panels& b, std::size_t panel, std::size_t from, std::size_t to, const float* a,
                              std::size_t a_stride, std::size_t count, float* c, std::size_t c_stride) {
  std::size_t r = 0;
  for (; r + 4 <= count; r += 4) {
    panel_tile<4, kWide, T>(b, panel, from, to, a + r * a_stride, a_stride, c + r * c_stride, c_stride);
  }
  switch (count - r) {
    case 3: return panel_tile<3, kWide, T>(b, panel, from, to, a + r * a_stride, a_stride, c + r * c_stride, c_stride);
    case 2: return panel_tile<2, kWide, T>(b, panel, from, to, a + r * a_stride, a_stride, c + r * c_stride, c_stride);
    case 1: return panel_tile<1, kWide, T>(b, panel, from, to, a + r * a_stride, a_stride, c + r * c_stride, c_stride);
    default: return;
  }
}

template <typename T>
static void panel_kind(const Panels& b, std::size_t first, std::size_t last, std::size_t from, std::size_t to,
                       const float* a, std::size_t a_stride, std::size_t count, float* c, std::size_t c_stride) {
  constexpr std::size_t kMost = kLanes == 16 ? 4 : 1;
  for (std::size_t panel = first; panel < last;) {
    // As even as they come: 9 panels are 3 and 3 and 3.
    const std::size_t left = last - panel, groups = (left + kMost - 1) / kMost, wide = (left + groups - 1) / groups;
    float* out = c + (panel - first) * kPanel;
    switch (wide) {
      case 4: panel_rows<4 <= kMost ? 4 : 1, T>(b, panel, from, to, a, a_stride, count, out, c_stride); break;
      case 3: panel_rows<3 <= kMost ? 3 : 1, T>(b, panel, from, to, a, a_stride, count, out, c_stride); break;
      case 2: panel_rows<2 <= kMost ? 2 : 1, T>(b, panel, from, to, a, a_stride, count, out, c_stride); break;
      default: panel_rows<1, T>(b, panel, from, to, a, a_stride, count, out, c_stride);
    }
    panel += wide;
  }
}

static void panels(const Panels& b, std::size_t first, std::size_t last, std::size_t from, std::size_t to,
                   const float* a, std::size_t a_stride, std::size_t count, float* c, std::size_t c_stride) {
  if (b.kind == WeightKind::f32) return panel_kind<float>(b, first, last, from, to, a, a_stride, count, c, c_stride);
  panel_kind<std::uint16_t>(b, first, last, from, to, a, a_stride, count, c, c_stride);
}

template <typename T>
static void scaled_kind(const T* w, const float* x, std::size_t n, float* y) {
  std::size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, multiply(load(w + i), load(x + i)));
  for (; i < n; ++i) y[i] = one(w + i) * x[i];
}

static void scaled(const Matrix& w, std::size_t row, std::size_t from, std::size_t to, const float* x, float* y) {
  const std::size_t at = row * w.columns + from;
  if (w.kind == WeightKind::f32) {
    return scaled_kind(static_cast<const float*>(w.values) + at, x + from, to - from, y);
  }
  scaled_kind(static_cast<const std::uint16_t*>(w.values) + at, x + from, to - from, y);
}

static std::size_t largest(const float* x, std::size_t n) {
  std::size_t i = 0;
  float most = x[0];
  if (n >= kLanes) {
    Vector best = load(x);
    for (i = kLanes; i + kLanes <= n; i += kLanes) best = greater(load(x + i), best);
    most = greatest(best);
  }
  for (; i < n; ++i) most = x[i] > most ? x[i] : most;
  for (i = 0; i + kLanes <= n; i += kLanes) {
    const unsigned found = equal(load(x + i), all(most));
    if (found != 0) return i + static_cast<std::size_t>(__builtin_ctz(found));
  }
  for (; i < n; ++i) {
    if (x[i] == most) return i;
  }
  return 0;  // NaN
}

static void argmax(const float* x, std::size_t blocks, std::size_t block, std::int32_t unit, std::int32_t* units) {
  for (std::size_t b = 0; b < blocks; ++b) {
    units[b] = unit + static_cast<std::int32_t>(b * block + largest(x + b * block, block));
  }
}

constexpr ScalingKernels kernels = {rows, chosen, add_rows, panels, scaled, argmax};

}  // namespace scaling
