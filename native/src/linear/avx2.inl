// What the kernel files with AVX2 share. Internal linkage only: see cpu/tables.hpp.
//
//   Expanding 32 codes by their mask, without vpexpandb:
//     bits    each mask bit as a byte         1 0 1 1 | 0 1 …
//     before  set bits before it, of its 16   0 1 1 2 | 3 3 …     within 4 by a product, then of the 4 and the 8 before
//     codes   vpshufb(kept bytes, before)     zero points blended in where the bit is clear

__m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

__m256i broadcast4(const void* x) {
  std::int32_t four;
  std::memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

// What loops call for every few weights: constants are to stay in registers.
#if defined(_MSC_VER) && !defined(__clang__)
#define TULLE_INLINE __forceinline
#else
#define TULLE_INLINE inline __attribute__((always_inline))
#endif

// Times a constant, by the instruction: compilers make five shifts and sums of this one.
TULLE_INLINE __m256i multiply_constant(__m256i x, std::uint32_t constant) {
  __m256i y = _mm256_set1_epi32(static_cast<int>(constant));
#if defined(__GNUC__)
  __asm__("" : "+x"(y));
#endif
  return _mm256_mullo_epi32(x, y);
}

// For 32 mask bits: where each of 32 bytes comes from among what its half keeps, and 0xff where its bit is clear.
struct ExpandIndices {
  __m256i from, clear;
};

TULLE_INLINE ExpandIndices expand_indices(const std::uint8_t* mask) {
  const __m256i zero = _mm256_setzero_si256();
  const __m256i byte_of = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bytes = _mm256_shuffle_epi8(broadcast4(mask), byte_of);
  const __m256i own = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201));
  const __m256i clear = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, own), zero);
  const __m256i set = _mm256_add_epi8(clear, _mm256_set1_epi8(1));
  // How many are set before: within four by a product, then those of the four and of the eight before.
  const __m256i within = multiply_constant(set, 0x01010100);
  const long long none = static_cast<long long>(0x8080808080808080);
  const __m256i four =
      _mm256_set_epi64x(0x0b0b0b0b80808080, 0x0303030380808080, 0x0b0b0b0b80808080, 0x0303030380808080);
  const __m256i by_four = _mm256_shuffle_epi8(_mm256_add_epi8(within, set), four);
  const __m256i by_eight = _mm256_shuffle_epi8(_mm256_sad_epu8(set, zero), _mm256_set_epi64x(0, none, 0, none));
  return {_mm256_add_epi8(_mm256_add_epi8(within, by_four), by_eight), clear};
}

// What 32 mask bits keep, from `kept` on, each at its bit; the other bytes have no meaning. Reads 16 bytes
// from where each half begins.
TULLE_INLINE __m256i spread(const std::uint8_t* kept, std::uint32_t mask, const ExpandIndices& at) {
  const std::uint8_t* const more = kept + _mm_popcnt_u32(mask & 0xffff);
  const __m256i both = _mm256_inserti128_si256(
      _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kept))),
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(more)), 1);
  return _mm256_shuffle_epi8(both, at.from);
}

// Which of a byte's codes: all of it, the low nibble, the high one.
enum class Part { whole, low, high };

template <Part kPart>
__m256i part_of(__m256i bytes) {
  if constexpr (kPart == Part::whole) return bytes;
  if constexpr (kPart == Part::high) bytes = _mm256_srli_epi16(bytes, 4);
  return _mm256_and_si256(bytes, _mm256_set1_epi8(15));
}

// A unit's codes of those it keeps, pruned ones at their zero point (both in halves of 32); returns how many it keeps.
template <Part kPart>
TULLE_INLINE std::size_t expand_unit(const std::uint8_t* kept, const std::uint8_t* masks, const __m256i zeros[2],
                                     __m256i codes[2]) {
  std::uint64_t word;
  std::memcpy(&word, masks, 8);
  for (int h = 0; h < 2; ++h) {
    const auto mask = static_cast<std::uint32_t>(word >> (32 * h));
    const ExpandIndices at = expand_indices(masks + 4 * h);
    codes[h] = _mm256_blendv_epi8(part_of<kPart>(spread(kept, mask, at)), zeros[h], at.clear);
    if (h == 0) kept += _mm_popcnt_u32(mask);
  }
  return static_cast<std::size_t>(_mm_popcnt_u64(word));
}

template <int kValue>
struct Count {
  static constexpr int value = kValue;
};

// Adds Σ over the four inputs of each of 8 outputs. 16-bit sums of two products stay below 2^15 where codes have up to 7
// bits; those of 8 are widened, first and third apart from second and fourth.
template <int kBits>
__m256i dot(__m256i total, __m256i codes, __m256i x) {
  if constexpr (kBits < 8) {
    return _mm256_add_epi32(total, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(1)));
  } else {
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(codes, _mm256_set1_epi16(255)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(codes, 8), _mm256_srai_epi16(x, 8));
    return _mm256_add_epi32(_mm256_add_epi32(total, even), odd);
  }
}

// Zero points times −Σ x of a segment, of 8 outputs from the h-th half on.
__m256i correction(const LinearView& w, std::size_t scale, std::size_t h, std::int32_t sum) {
  if (w.zeros == nullptr) return _mm256_set1_epi32(-static_cast<std::int32_t>(w.zero) * sum);
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(w.zeros + scale + 8 * h));
  return _mm256_mullo_epi32(_mm256_cvtepu8_epi32(bytes), _mm256_set1_epi32(-sum));
}

// Eight scales or minima from number `at` on.
__m256 scales_at(const void* from, ScaleKind kind, std::size_t at) {
  if (kind == ScaleKind::u8) {
    const void* const bytes = static_cast<const std::uint8_t*>(from) + at;
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(bytes))));
  }
  if (kind == ScaleKind::f32) return _mm256_loadu_ps(static_cast<const float*>(from) + at);
  const void* const halves = static_cast<const std::uint16_t*>(from) + at;
  const __m128i bits = _mm_loadu_si128(static_cast<const __m128i*>(halves));
  if (kind == ScaleKind::f16) return _mm256_cvtph_ps(bits);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// kTokens tokens from `token` on with `units` units of one segment of a tile; in[plane]: the first token's inputs of
// these, `stride` bytes from one token to the next; sums [tokens][16].
template <int kBits, int kTokens>
void multiply_accumulate(const LinearView& w, const Inputs& x, std::size_t scale, std::size_t segment,
                         std::size_t token, const std::uint8_t* codes, std::size_t units, const std::int8_t* const* in,
                         std::size_t stride, float* sums) {
  __m256 whole[2][kTokens];
  for (auto& half : whole) {
    for (auto& one : half) one = _mm256_setzero_ps();
  }
  for (std::size_t p = 0; p < x.planes; ++p) {
    __m256i total[2][kTokens];
    for (int t = 0; t < kTokens; ++t) {
      const std::int32_t sum = x.sums[p][(token + t) * x.sum_stride + segment];
      for (std::size_t h = 0; h < 2; ++h) total[h][t] = correction(w, scale, h, sum);
    }
    for (std::size_t u = 0; u < units; ++u) {
      const __m256i lower = load(codes + u * kUnitBytes), upper = load(codes + u * kUnitBytes + 32);
      for (int t = 0; t < kTokens; ++t) {
        const __m256i four = broadcast4(in[p] + t * stride + 4 * u);
        total[0][t] = dot<kBits>(total[0][t], lower, four);
        total[1][t] = dot<kBits>(total[1][t], upper, four);
      }
    }
    for (int t = 0; t < kTokens; ++t) {
      for (int h = 0; h < 2; ++h) {
        const __m256 part = _mm256_cvtepi32_ps(total[h][t]);
        whole[h][t] = _mm256_fmadd_ps(whole[h][t], _mm256_set1_ps(256), part);
      }
    }
  }
  for (std::size_t h = 0; h < 2; ++h) {
    const __m256 scales = scales_at(w.scales, w.scale_kind, scale + 8 * h);
    const __m256 minima = w.minima ? scales_at(w.minima, w.scale_kind, scale + 8 * h) : _mm256_setzero_ps();
    for (int t = 0; t < kTokens; ++t) {
      float* sum = sums + (token + t) * kTileRows + 8 * h;
      __m256 result = _mm256_fmadd_ps(whole[h][t], scales, _mm256_load_ps(sum));
      if (w.minima) {
        const __m256 inputs = _mm256_set1_ps(input_sum(x, token + static_cast<std::size_t>(t), segment));
        result = _mm256_fmadd_ps(inputs, minima, result);
      }
      _mm256_store_ps(sum, result);
    }
  }
}

// All tokens with one segment of a tile; sums [tokens][16].
template <int kBits>
void multiply_accumulate_all(const LinearView& w, const Inputs& x, std::size_t tile, std::size_t segment,
                             const std::uint8_t* codes, float* sums) {
  const std::size_t scale = w.scale_at(tile, segment);
  const auto some = [&](auto count, std::size_t t) {
    const std::int8_t* in[2];
    for (std::size_t p = 0; p < x.planes; ++p) in[p] = x.plane[p] + t * x.stride + segment * w.segment;
    multiply_accumulate<kBits, decltype(count)::value>(w, x, scale, segment, t, codes, w.segment / 4, in, x.stride,
                                                          sums);
  };
  std::size_t t = 0;
  for (; t + 4 <= x.tokens; t += 4) some(Count<4>(), t);
  for (; t < x.tokens; ++t) some(Count<1>(), t);
}
