// The search kernels with AVX2: a Vec is two registers of 8 floats, a Mask two of 8 lanes of all ones or zeros. See
// vector.inl for the tiles; the sweep's four Vecs are eight registers of sums.
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "tables.hpp"

namespace tulle {
namespace {

#include "common.inl"

constexpr std::size_t kLanes = 16;

struct Vec {
  __m256 a, b;
};
typedef Vec Mask;

static inline Vec all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline Vec load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
static inline void store(float* to, Vec x) {
  _mm256_storeu_ps(to, x.a);
  _mm256_storeu_ps(to + 8, x.b);
}
static inline Vec plus(Vec x, Vec y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
static inline Vec minus(Vec x, Vec y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
static inline Vec times(Vec x, Vec y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
static inline Vec over(Vec x, Vec y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
static inline Vec fused(Vec x, Vec y, Vec z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
static inline Vec minus_fused(Vec x, Vec y, Vec z) {  // z − x·y
  return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)};
}
static inline Vec least(Vec x, Vec y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
static inline Vec greatest(Vec x, Vec y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
static inline Vec absolute(Vec x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
static inline Vec negative(Vec x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_xor_ps(sign, x.a), _mm256_xor_ps(sign, x.b)};
}
// Nearest whole number, ties to even.
static inline Vec whole(Vec x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, kNearest), _mm256_round_ps(x.b, kNearest)};
}

static inline Mask less(Vec x, Vec y) {
  return {_mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ)};
}
static inline Mask not_less(Vec x, Vec y) {
  return {_mm256_cmp_ps(x.a, y.a, _CMP_GE_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_GE_OQ)};
}
static inline unsigned not_zero(Vec x) {
  const __m256 zero = _mm256_setzero_ps();
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(x.a, zero, _CMP_NEQ_UQ))) |
         static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(x.b, zero, _CMP_NEQ_UQ))) << 8;
}
static inline Mask both(Mask x, Mask y) { return {_mm256_and_ps(x.a, y.a), _mm256_and_ps(x.b, y.b)}; }
static inline Vec choose(Mask m, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.a, yes.a, m.a), _mm256_blendv_ps(no.b, yes.b, m.b)};
}
// From and to bytes, 1 = true.
static inline __m256 load_half(const std::uint8_t* from) {
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(wide, _mm256_setzero_si256()));
}
static inline Mask load_mask(const std::uint8_t* from) { return {load_half(from), load_half(from + 8)}; }
static inline void store_mask(std::uint8_t* to, Mask m) {
  const unsigned bits = not_zero(choose(m, all(1.0f), all(0.0f)));
  for (std::size_t l = 0; l < kLanes; ++l) to[l] = bits >> l & 1;
}

// The first n lanes, n <= 16; others are read as 0 and not written.
static inline __m256i lanes(std::size_t n, int from) {
  const __m256i lane = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(from));
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane);
}
static inline Vec load_first(const float* from, std::size_t n) {
  if (n == kLanes) return load(from);
  return {_mm256_maskload_ps(from, lanes(n, 0)), _mm256_maskload_ps(from + 8, lanes(n, 8))};
}
static inline void store_first(float* to, std::size_t n, Vec x) {
  _mm256_maskstore_ps(to, lanes(n, 0), x.a);
  _mm256_maskstore_ps(to + 8, lanes(n, 8), x.b);
}

static inline float tree(Vec x) {
  const __m256 eight = _mm256_add_ps(x.a, x.b);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

#include "vector.inl"

}  // namespace

const SearchKernels avx2_search = {clip, sweep, descend, nullptr};

}  // namespace tulle
