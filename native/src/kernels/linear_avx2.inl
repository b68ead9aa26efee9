// What the kernel files with AVX2 share. Internal linkage only: see tables.hpp.

// For 8 mask bits: where each of 8 bytes comes from, 0x80 where its bit is clear.
struct Shuffles {
  std::uint8_t from[256][8];
  constexpr Shuffles() : from() {
    for (int mask = 0; mask < 256; ++mask) {
      int next = 0;
      for (int bit = 0; bit < 8; ++bit) {
        from[mask][bit] = static_cast<std::uint8_t>((mask >> bit) & 1 ? next++ : 0x80);
      }
    }
  }
};
constexpr Shuffles kShuffles;

__m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

__m256i broadcast4(const std::int8_t* x) {
  std::int32_t four;
  std::memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

// Two units of 4-bit codes that share bytes.
void unpack_pair(const std::uint8_t* packed, std::uint8_t* codes) {
  const __m256i low = _mm256_set1_epi8(15);
  for (std::size_t i = 0; i < kUnitBytes; i += 32) {
    const __m256i pairs = load(packed + i);
    store(codes + i, _mm256_and_si256(pairs, low));
    store(codes + kUnitBytes + i, _mm256_and_si256(_mm256_srli_epi16(pairs, 4), low));
  }
}

// A unit's codes of those it keeps, pruned ones at their zero point; returns how many it keeps. Reads up to 7 codes more.
std::size_t expand_unit(const std::uint8_t* kept, const std::uint8_t* masks, const std::uint8_t* zeros,
                        std::uint8_t* codes) {
  const std::uint8_t* next = kept;
  for (std::size_t i = 0; i < kUnitBytes; i += 8, ++masks) {
    const __m128i from = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kShuffles.from[*masks]));
    const __m128i values = _mm_shuffle_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(next)), from);
    const __m128i zero = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros + i));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + i), _mm_blendv_epi8(values, zero, from));
    next += _mm_popcnt_u32(*masks);
  }
  return static_cast<std::size_t>(next - kept);
}

template <int kValue>
struct Count {
  static constexpr int value = kValue;
};

// Adds Σ over the four inputs of each of 8 outputs. 16-bit sums of two products stay below 2^15: codes of 4 bits are
// at most 15, and 8-bit ones are cut into 7 bits and the highest.
template <bool kNibbles>
__m256i dot(__m256i total, __m256i codes, __m256i x) {
  if constexpr (kNibbles) {
    return _mm256_add_epi32(total, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(1)));
  } else {
    const __m256i low = _mm256_maddubs_epi16(_mm256_and_si256(codes, _mm256_set1_epi8(127)), x);
    const __m256i top = _mm256_and_si256(_mm256_srli_epi16(codes, 7), _mm256_set1_epi8(1));
    const __m256i high = _mm256_maddubs_epi16(top, x);
    total = _mm256_add_epi32(total, _mm256_madd_epi16(low, _mm256_set1_epi16(1)));
    return _mm256_add_epi32(total, _mm256_madd_epi16(high, _mm256_set1_epi16(128)));
  }
}

// kTokens tokens from `token` on with `units` units of one segment of a tile; in[plane]: the first token's inputs of
// these, `stride` bytes from one token to the next; sums [tokens][16].
template <bool kNibbles, int kTokens>
void meet(const LinearView& w, const Inputs& x, std::size_t scale, std::size_t segment, std::size_t token,
          const std::uint8_t* codes, std::size_t units, const std::int8_t* const* in, std::size_t stride, float* sums) {
  alignas(32) std::int32_t wide[kTileRows];
  for (std::size_t i = 0; i < kTileRows; ++i) wide[i] = w.zeros ? w.zeros[scale + i] : w.zero;
  __m256 whole[2][kTokens];
  for (auto& half : whole) {
    for (auto& one : half) one = _mm256_setzero_ps();
  }
  for (std::size_t p = 0; p < x.planes; ++p) {
    __m256i total[2][kTokens];
    for (int t = 0; t < kTokens; ++t) {
      const __m256i sum = _mm256_set1_epi32(-x.sums[p][(token + t) * x.sum_stride + segment]);
      for (int h = 0; h < 2; ++h) total[h][t] = _mm256_mullo_epi32(load(wide + 8 * h), sum);
    }
    for (std::size_t u = 0; u < units; ++u) {
      const __m256i lower = load(codes + u * kUnitBytes), upper = load(codes + u * kUnitBytes + 32);
      for (int t = 0; t < kTokens; ++t) {
        const __m256i four = broadcast4(in[p] + t * stride + 4 * u);
        total[0][t] = dot<kNibbles>(total[0][t], lower, four);
        total[1][t] = dot<kNibbles>(total[1][t], upper, four);
      }
    }
    for (int t = 0; t < kTokens; ++t) {
      for (int h = 0; h < 2; ++h) {
        const __m256 part = _mm256_cvtepi32_ps(total[h][t]);
        whole[h][t] = _mm256_fmadd_ps(whole[h][t], _mm256_set1_ps(256), part);
      }
    }
  }
  for (int h = 0; h < 2; ++h) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w.scales + scale + 8 * h));
    const __m256 scales = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    for (int t = 0; t < kTokens; ++t) {
      float* sum = sums + (token + t) * kTileRows + 8 * h;
      _mm256_store_ps(sum, _mm256_fmadd_ps(whole[h][t], scales, _mm256_load_ps(sum)));
    }
  }
}

// All tokens with one segment of a tile; sums [tokens][16].
template <bool kNibbles>
void meet_all(const LinearView& w, const Inputs& x, std::size_t tile, std::size_t segment, const std::uint8_t* codes,
              float* sums) {
  const std::size_t scale = w.scale_at(tile, segment);
  const auto some = [&](auto count, std::size_t t) {
    const std::int8_t* in[2];
    for (std::size_t p = 0; p < x.planes; ++p) in[p] = x.plane[p] + t * x.stride + segment * w.segment;
    meet<kNibbles, decltype(count)::value>(w, x, scale, segment, t, codes, w.segment / 4, in, x.stride, sums);
  };
  std::size_t t = 0;
  for (; t + 4 <= x.tokens; t += 4) some(Count<4>(), t);
  for (; t < x.tokens; ++t) some(Count<1>(), t);
}
