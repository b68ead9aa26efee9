// The search kernels with AVX-512: a Vec is one register of 16 floats, a Mask one of 16 bits. See vector.inl for the
// tiles.
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "tables.hpp"

namespace tulle {
namespace {

#include "common.inl"

constexpr std::size_t kLanes = 16;

typedef __m512 Vec;
typedef __mmask16 Mask;

static inline Vec all(float x) { return _mm512_set1_ps(x); }
static inline Vec load(const float* from) { return _mm512_loadu_ps(from); }
static inline void store(float* to, Vec x) { _mm512_storeu_ps(to, x); }
static inline Vec plus(Vec a, Vec b) { return _mm512_add_ps(a, b); }
static inline Vec minus(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
static inline Vec times(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
static inline Vec over(Vec a, Vec b) { return _mm512_div_ps(a, b); }
static inline Vec fused(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline Vec minus_fused(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }  // c − a·b
static inline Vec least(Vec a, Vec b) { return _mm512_min_ps(a, b); }
static inline Vec greatest(Vec a, Vec b) { return _mm512_max_ps(a, b); }
static inline Vec absolute(Vec x) { return _mm512_abs_ps(x); }
static inline Vec negative(Vec x) {
  return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(x), _mm512_set1_epi32(INT32_MIN)));
}
// Nearest whole number, ties to even.
static inline Vec whole(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

static inline Mask less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
static inline Mask not_less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
static inline unsigned not_zero(Vec x) { return _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NEQ_UQ); }
static inline Mask both(Mask a, Mask b) { return a & b; }
static inline Vec choose(Mask m, Vec yes, Vec no) { return _mm512_mask_blend_ps(m, no, yes); }
// From and to bytes, 1 = true.
static inline Mask load_mask(const std::uint8_t* from) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm_test_epi8_mask(bytes, bytes);
}
static inline void store_mask(std::uint8_t* to, Mask m) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_maskz_set1_epi8(m, 1));
}

// The first n lanes, n <= 16; others are read as 0 and not written.
static inline Mask lanes(std::size_t n) { return static_cast<Mask>((1u << n) - 1); }
static inline Vec load_first(const float* from, std::size_t n) { return _mm512_maskz_loadu_ps(lanes(n), from); }
static inline void store_first(float* to, std::size_t n, Vec x) { _mm512_mask_storeu_ps(to, lanes(n), x); }

static inline float tree(Vec x) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), _mm256_castpd_ps(_mm512_extractf64x4_pd(
                                                                    _mm512_castps_pd(x), 1)));
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

#include "vector.inl"

}  // namespace

const SearchKernels avx512_search = {clip, sweep, descend, nullptr};

}  // namespace tulle
