// Transposition by 8 × 8 blocks, for the kernel files of held masks on x86, each compiling it with its own flags.
//
//   x [token][column], 8 registers of 8 columns ─ unpack, shuffle, permute ─► [column][token], 8 registers of 8 tokens

static inline void transpose8(__m256 (&r)[8]) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}

// The first n of 8 lanes.
static inline __m256i first_lanes(std::size_t n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n < 8 ? static_cast<int>(n) : 8), lane);
}

static void pack(const float* x, std::size_t stride, std::size_t tokens, std::size_t columns, float* panel) {
  for (std::size_t t = 0; t < (tokens + 15) / 16 * 16; t += 8) {
    for (std::size_t c = 0; c < columns; c += 8) {
      const float* from = x + t * stride + c;
      float* to = panel + c * kPanelTokens + t;
      __m256 r[8];
      if (t + 8 <= tokens && c + 8 <= columns) {
        for (std::size_t i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(from + i * stride);
        transpose8(r);
        for (std::size_t i = 0; i < 8; ++i) _mm256_storeu_ps(to + i * kPanelTokens, r[i]);
        continue;
      }
      const __m256i mask = first_lanes(columns - c);
      for (std::size_t i = 0; i < 8; ++i) {
        r[i] = t + i < tokens ? _mm256_maskload_ps(from + i * stride, mask) : _mm256_setzero_ps();
      }
      transpose8(r);
      for (std::size_t i = 0; i < 8 && c + i < columns; ++i) _mm256_storeu_ps(to + i * kPanelTokens, r[i]);
    }
  }
}

static void unpack(const float* sums, std::size_t tokens, std::size_t rows, float* y, std::size_t stride) {
  for (std::size_t t = 0; t < tokens; t += 8) {
    for (std::size_t c = 0; c < rows; c += 8) {
      float* to = y + t * stride + c;
      __m256 r[8];
      for (std::size_t i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(sums + (c + i) * kPanelTokens + t);
      transpose8(r);
      if (t + 8 <= tokens && c + 8 <= rows) {
        for (std::size_t i = 0; i < 8; ++i) _mm256_storeu_ps(to + i * stride, r[i]);
      } else {
        const __m256i mask = first_lanes(rows - c);
        for (std::size_t i = 0; i < 8 && t + i < tokens; ++i) _mm256_maskstore_ps(to + i * stride, mask, r[i]);
      }
    }
  }
}

// Calls the instance of `f` for a panel of so many vectors of 16 tokens.
#define TULLE_BY_VECTORS(f, tokens, ...)             \
  switch (((tokens) + 15) / 16) {                    \
    case 1: return f<1>(__VA_ARGS__);                \
    case 2: return f<2>(__VA_ARGS__);                \
    case 3: return f<3>(__VA_ARGS__);                \
    default: return f<4>(__VA_ARGS__);               \
  }

// Four offsets at once, and where the column of one of them begins.
static inline std::uint64_t load4(const std::uint16_t* offsets) {
  std::uint64_t four;
  std::memcpy(&four, offsets, sizeof four);
  return four;
}

template <int kIndex>
static inline const float* column(const float* panel, std::uint64_t offsets) {
  return panel + static_cast<std::uint16_t>(offsets >> (16 * kIndex));
}
