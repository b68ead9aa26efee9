// Linears by columns by vpmaddubsw: what some inputs of a line's segment meet is brought into units in the level-1 cache,
// and met by the tokens. Of few tokens, each brings in what it has itself; of more, all inputs are brought in once.
#include <immintrin.h>

#include <cstring>

#include "tables.hpp"

namespace tulle {
namespace {

#include "linear_common.inl"
#include "linear_avx2.inl"
#include "columns_common.inl"

// A line's inputs of a segment as units: [tile][quad][64].
class Panel {
 public:
  Panel(const LinearView& w, std::size_t line, std::size_t segment, std::uint8_t* to, std::size_t quads)
      : w_(w), strip_(line / w.strip_lines()), within_(line - strip_ * w.strip_lines()), to_(to), stride_(quads * kUnitBytes) {
    if (!w.sparse) return;
    for (std::size_t half = 0; half < 2; ++half) {
      for (std::size_t o = 0; o < 64; ++o) {
        const std::size_t tile = line * w.line_tiles() + half * 4 + o / kTileRows;
        const std::size_t at = (tile * w.scales_per_row() + segment / w.segments_per_scale) * kTileRows + o % kTileRows;
        zeros_[half][o % 16 / 4 * 16 + o / 16 * 4 + o % 4] = w.zeros ? w.zeros[at] : w.zero;
      }
    }
  }

  void add(const std::uint32_t* places) {
    if (w_.sparse) add_sparse(places);
    else add_dense(places);
    to_ += kUnitBytes;
  }

 private:
  void add_dense(const std::uint32_t* places) {
    const std::size_t bytes = column_bytes(w_, strip_);
    const std::uint8_t* const from = dense_strip(w_, strip_) + within_ * kUnitBytes;
    const std::uint8_t* lines[4];
    for (std::size_t j = 0; j < 4; ++j) lines[j] = from + places[j] * bytes;
    const int per_byte = static_cast<int>(w_.line_tiles() / 4), bits = 8 / per_byte;
    const __m256i mask = _mm256_set1_epi8(static_cast<char>((1 << bits) - 1));
    for (std::size_t half = 0; half < kUnitBytes; half += 32) {
      __m256i units[4];
      interleave(load(lines[0] + half), load(lines[1] + half), load(lines[2] + half), load(lines[3] + half), units);
      for (int k = 0; k < per_byte; ++k) {
        for (std::size_t t = 0; t < 4; ++t) {
          const __m256i code = _mm256_and_si256(_mm256_srl_epi16(units[t], _mm_cvtsi32_si128(bits * k)), mask);
          store(to_ + (static_cast<std::size_t>(k) * 4 + t) * stride_ + half, code);
        }
      }
    }
  }

  void add_sparse(const std::uint32_t* places) {
    std::uint8_t codes[2][4][kUnitBytes];
    for (std::size_t j = 0; j < 4; ++j) {
      const std::uint8_t* const masks = sparse_strip(w_, strip_) + sparse_starts(w_, strip_)[places[j]];
      const std::uint8_t* next = masks + w_.lines_of(strip_) * kLineMasks;
      for (std::size_t line = 0; line < within_; ++line) {
        std::uint64_t bits[2];
        std::memcpy(bits, masks + line * kLineMasks, sizeof bits);
        const auto even = _mm_popcnt_u64(bits[0]), odd = _mm_popcnt_u64(bits[1]);
        next += even > odd ? even : odd;
      }
      std::uint8_t pair[kPairCodes + 8];
      unpack_pair(next, pair);
      expand_unit(pair, masks + within_ * kLineMasks, zeros_[0], codes[0][j]);
      expand_unit(pair + kUnitBytes, masks + within_ * kLineMasks + 8, zeros_[1], codes[1][j]);
    }
    for (std::size_t k = 0; k < 2; ++k) {
      for (std::size_t half = 0; half < kUnitBytes; half += 32) {
        __m256i units[4];
        interleave(load(codes[k][0] + half), load(codes[k][1] + half), load(codes[k][2] + half), load(codes[k][3] + half), units);
        for (std::size_t t = 0; t < 4; ++t) store(to_ + (k * 4 + t) * stride_ + half, units[t]);
      }
    }
  }

  static void interleave(__m256i a, __m256i b, __m256i c, __m256i d, __m256i units[4]) {
    const __m256i ab = _mm256_unpacklo_epi8(a, b), AB = _mm256_unpackhi_epi8(a, b);
    const __m256i cd = _mm256_unpacklo_epi8(c, d), CD = _mm256_unpackhi_epi8(c, d);
    units[0] = _mm256_unpacklo_epi16(ab, cd);
    units[1] = _mm256_unpackhi_epi16(ab, cd);
    units[2] = _mm256_unpacklo_epi16(AB, CD);
    units[3] = _mm256_unpackhi_epi16(AB, CD);
  }

  const LinearView& w_;
  std::size_t strip_, within_;
  std::uint8_t* to_;
  std::size_t stride_;
  std::uint8_t zeros_[2][kUnitBytes];
};

// Up to so many tokens, each brings in the inputs that it has.
constexpr std::size_t kFew = 4;

template <bool kNibbles>
void run(const LinearView& w, const Inputs& x, std::size_t line, std::size_t begin, std::size_t end, float* sums,
         std::size_t stride, std::uint8_t* scratch) {
  const std::size_t outputs = w.line_tiles() * kTileRows;
  float* const tile_sums = reinterpret_cast<float*>(scratch + kChunkInputs * outputs);
  for (std::size_t segment = begin; segment < end; ++segment) {
    if (x.tokens > kFew) {
      Panel panel(w, line, segment, scratch, w.segment / 4);
      for (std::size_t i = 0; i < w.segment; i += 4) {
        const std::uint32_t first = static_cast<std::uint32_t>(segment * w.segment + i);
        const std::uint32_t places[4] = {first, first + 1, first + 2, first + 3};
        panel.add(places);
      }
      for (std::size_t i = 0; i < w.line_tiles(); ++i) {
        for (std::size_t t = 0; t < x.tokens; ++t) {
          std::memcpy(tile_sums + t * kTileRows, sums + t * stride + i * kTileRows, kTileRows * sizeof(float));
        }
        meet_all<kNibbles>(w, x, line * w.line_tiles() + i, segment, scratch + i * w.segment / 4 * kUnitBytes, tile_sums);
        for (std::size_t t = 0; t < x.tokens; ++t) {
          std::memcpy(sums + t * stride + i * kTileRows, tile_sums + t * kTileRows, kTileRows * sizeof(float));
        }
      }
      continue;
    }
    for (std::size_t t = 0; t < x.tokens; ++t) {
      const std::uint32_t* const starts = x.quad_starts + t * (w.segments + 1) + segment;
      const std::size_t quads = starts[1] - starts[0], at = (t * x.quad_stride + starts[0]) * 4;
      Panel panel(w, line, segment, scratch, quads);
      for (std::size_t q = 0; q < quads; ++q) panel.add(x.quads + at + 4 * q);
      const std::int8_t* in[2];
      for (std::size_t p = 0; p < x.planes; ++p) in[p] = x.quad_plane[p] + at;
      for (std::size_t i = 0; i < w.line_tiles(); ++i) {
        const std::size_t tile = line * w.line_tiles() + i;
        const std::size_t scale = (tile * w.scales_per_row() + segment / w.segments_per_scale) * kTileRows;
        // `sums` of one token stand where its tile's do.
        meet<kNibbles, 1>(w, x, scale, segment, t, scratch + i * quads * kUnitBytes, quads, in, 0,
                          sums + t * stride + i * kTileRows - t * kTileRows);
      }
    }
  }
}

}  // namespace

void avx2_run_columns(const LinearView& w, const Inputs& x, std::size_t strip, std::size_t first, std::size_t last,
                      float* sums, std::size_t stride, std::uint8_t* scratch) {
  const std::size_t outputs = w.line_tiles() * kTileRows;
  const std::size_t begin = w.first_segment(first), end = w.first_segment(last);
  for (std::size_t t = 0; t < x.tokens; ++t) std::memset(sums + t * stride, 0, w.lines_of(strip) * outputs * sizeof(float));
  for (std::size_t i = 0; i < w.lines_of(strip); ++i) {
    const std::size_t line = strip * w.strip_lines() + i;
    if (w.kind == WeightKind::codes8) run<false>(w, x, line, begin, end, sums + i * outputs, stride, scratch);
    else run<true>(w, x, line, begin, end, sums + i * outputs, stride, scratch);
  }
}

}  // namespace tulle
