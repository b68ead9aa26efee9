// The tile of flash_attention with AVX-512 BF16, kFlashQueries queries against the blocks of keys that they see.
//
//     6 rows x 64 columns = 24 of the 32 registers hold sums, of both products:
//
//                   b[step][0…15]  b[…16…31]  b[…32…47]  b[…48…63]     4 registers, loaded once per step
//     a[0][step] →  sum 0 0        sum 0 1    sum 0 2    sum 0 3
//     …                                                                one word of A in all lanes, 6 times per step
//     a[5][step] →  sum 5 0        sum 5 1    sum 5 2    sum 5 3
//
//     scores     A: queries, a word two channels           B: keys, a column one key        2 x 64 keys of a block
//     outputs    A: probabilities, a word two keys         B: values, a column one channel  64 channels at a time
//
// Between the two, a row's scores become probabilities: m is the largest score so far, and when it grows, what was
// summed up before is scaled by 2^(m before − m).
#include <immintrin.h>

#include "cpu/tables.hpp"

namespace tulle {
namespace {

constexpr std::size_t kRows = kFlashQueries, kHalf = kFlashKeys / 2, kVectors = kFlashKeys / 16;
constexpr float kMasked = -1e30f;

static inline __m512 multiply(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

// sum[r][v] += Σ over steps of a[r][step] · b[step][16 v …]; `stride`: words from one row of b to the next.
template <std::size_t kWide>
static inline void product(__m512 (&sum)[kRows][kWide], const std::uint32_t* const* a, const std::uint32_t* b,
                           std::size_t stride, std::size_t steps) {
  for (std::size_t k = 0; k < steps; ++k, b += stride) {
    __m512i right[kWide];
    for (std::size_t v = 0; v < kWide; ++v) right[v] = _mm512_loadu_si512(b + 16 * v);
    for (std::size_t r = 0; r < kRows; ++r) {
      const __m512i left = _mm512_set1_epi32(static_cast<int>(a[r][k]));
      for (std::size_t v = 0; v < kWide; ++v) sum[r][v] = multiply(sum[r][v], left, right[v]);
    }
  }
}

// 2^x for x <= 0: 2^n · 2^f with Taylor's polynomial on |f| <= 1/2, relative error below 3e-6.
static inline __m512 power_of_two(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(1.33335581e-3f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.61812911e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.55041087e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.40226507e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.93147181e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

struct Softmax {
  float most[kRows], before[kRows];  // m, and 2^(m before − m)
  __m512 total[kRows];
};

// out[r][16 first …] = before[r] · out + probabilities · values, for kWide registers of channels.
template <std::size_t kWide>
static inline void add_values(const FlashTile& t, std::size_t first, const std::uint32_t* values,
                              const std::uint32_t* const* probabilities, const Softmax& softmax,
                              float (*out)[kFlashChannels]) {
  __m512 sum[kRows][kWide];
  for (std::size_t r = 0; r < kRows; ++r) {
    const __m512 before = _mm512_set1_ps(softmax.before[r]);
    for (std::size_t v = 0; v < kWide; ++v) {
      sum[r][v] = _mm512_mul_ps(before, _mm512_load_ps(out[r] + 16 * (first + v)));
    }
  }
  product(sum, probabilities, values + 16 * first, t.head_dim, kHalf);
  for (std::size_t r = 0; r < kRows; ++r) {
    for (std::size_t v = 0; v < kWide; ++v) _mm512_store_ps(out[r] + 16 * (first + v), sum[r][v]);
  }
}

// Scores of a block to probabilities, in place of which they are written, two keys in a word.
static inline void probabilities_of(const FlashTile& t, std::size_t block, float (*scores)[kFlashKeys], bool masked,
                                    Softmax& softmax, std::uint32_t (*words)[kHalf]) {
  // e^(scale · s − m) is 2^(scale · log2 e · s − m log2 e); m is kept in that unit.
  const __m512 factor = _mm512_set1_ps(t.scale * 1.44269504f);
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  for (std::size_t r = 0; r < kRows; ++r) {
    __m512 x[kVectors];
    for (std::size_t v = 0; v < kVectors; ++v) x[v] = _mm512_mul_ps(factor, _mm512_load_ps(scores[r] + 16 * v));
    if (masked) {
      const int query = static_cast<int>(t.position + r), start = static_cast<int>(block * kFlashKeys);
      const __m512i last = _mm512_set1_epi32(query);
      const __m512i first = _mm512_set1_epi32(query - static_cast<int>(t.window));
      for (std::size_t v = 0; v < kVectors; ++v) {
        const __m512i key = _mm512_add_epi32(lanes, _mm512_set1_epi32(start + static_cast<int>(16 * v)));
        const __mmask16 seen = _mm512_cmple_epi32_mask(key, last) & _mm512_cmpgt_epi32_mask(key, first);
        x[v] = _mm512_mask_blend_ps(seen, _mm512_set1_ps(kMasked), x[v]);
      }
    }
    __m512 most = x[0];
    for (std::size_t v = 1; v < kVectors; ++v) most = _mm512_max_ps(most, x[v]);
    const float found = _mm512_reduce_max_ps(most);
    const float m = found > softmax.most[r] ? found : softmax.most[r];
    const __m512 shift = _mm512_set1_ps(m);
    const __m512 before = power_of_two(_mm512_set1_ps(softmax.most[r] - m));
    softmax.before[r] = _mm512_cvtss_f32(before);
    softmax.most[r] = m;
    __m512 sum = _mm512_mul_ps(softmax.total[r], before);
    for (std::size_t v = 0; v < kVectors; ++v) {
      x[v] = power_of_two(_mm512_sub_ps(x[v], shift));
      sum = _mm512_add_ps(sum, x[v]);
    }
    softmax.total[r] = sum;
    for (std::size_t v = 0; v < kVectors; v += 2) {
      const __m512bh two = _mm512_cvtne2ps_pbh(x[v + 1], x[v]);
      _mm512_store_si512(words[r] + 8 * v, reinterpret_cast<__m512i>(two));
    }
  }
}

void flash(const FlashTile& t) {
  alignas(64) float out[kRows][kFlashChannels];
  alignas(64) float scores[kRows][kFlashKeys];
  alignas(64) std::uint32_t words[kRows][kHalf];
  const std::uint32_t* probabilities[kRows];
  Softmax softmax;
  for (std::size_t r = 0; r < kRows; ++r) {
    probabilities[r] = words[r];
    softmax.most[r] = kMasked;
    softmax.total[r] = _mm512_setzero_ps();
    for (std::size_t i = 0; i < t.head_dim; i += 16) _mm512_store_ps(out[r] + i, _mm512_setzero_ps());
  }
  const std::size_t pairs = t.head_dim / 2, vectors = t.head_dim / 16;
  const std::size_t oldest = t.position + 1 > t.window ? t.position + 1 - t.window : 0;
  for (std::size_t block = oldest / kFlashKeys; block * kFlashKeys < t.position + t.rows; ++block) {
    const std::uint32_t* const keys = t.keys + block * kHalf * t.head_dim;
    const std::uint32_t* const values = t.values + block * kHalf * t.head_dim;
    for (std::size_t half = 0; half < 2; ++half) {
      __m512 sum[kRows][4];
      for (auto& row : sum) {
        for (__m512& s : row) s = _mm512_setzero_ps();
      }
      product(sum, t.queries, keys + half * pairs * kHalf, kHalf, pairs);
      for (std::size_t r = 0; r < kRows; ++r) {
        for (std::size_t v = 0; v < 4; ++v) _mm512_store_ps(scores[r] + half * kHalf + 16 * v, sum[r][v]);
      }
    }
    const std::size_t start = block * kFlashKeys;
    const bool masked = start + kFlashKeys - 1 > t.position || start + t.window < t.position + kRows;
    probabilities_of(t, block, scores, masked, softmax, words);
    std::size_t v = 0;
    for (; v + 4 <= vectors; v += 4) add_values<4>(t, v, values, probabilities, softmax, out);
    for (; v < vectors; ++v) add_values<1>(t, v, values, probabilities, softmax, out);
  }
  for (std::size_t r = 0; r < t.rows; ++r) {
    const __m512 inverse = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(softmax.total[r]));
    for (std::size_t i = 0; i < t.head_dim; i += 16) {
      const __m256bh y = _mm512_cvtneps_pbh(_mm512_mul_ps(inverse, _mm512_load_ps(out[r] + i)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(t.out[r] + i), reinterpret_cast<__m256i>(y));
    }
  }
}

}  // namespace

const FlashKernel avx512bf16_flash = flash;

}  // namespace tulle
