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
  // `next`: of a sparse linear where the codes of every column that is added go on, of a strip's lines taken in order.
  Panel(const LinearView& w, std::size_t line, std::size_t segment, std::uint8_t* to, std::size_t quads, std::uint32_t* next)
      : w_(w), next_(next), strip_(line / w.strip_lines()), within_(line - strip_ * w.strip_lines()), to_(to), stride_(quads * kUnitBytes) {
    if (!w.sparse) return;
    for (std::size_t tile = 0; tile < 8; ++tile) {
      for (std::size_t o = 0; o < kTileRows; ++o) {
        const std::size_t all = line * w.line_tiles() + tile;
        const std::size_t at = w.scale_at(all, segment) + o;
        const std::uint8_t zero = w.zeros ? w.zeros[at] : w.zero;
        if (w.fours) std::memset(zeros_[tile] + 4 * o, zero, 4);
        else zeros_[tile / 4][o / 4 * 16 + tile % 4 * 4 + o % 4] = zero;
      }
    }
  }

  void add(const std::uint32_t* places) {
    if (w_.fours) add_fours(*places);
    else if (w_.sparse) add_sparse(places);
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
      std::uint32_t& at = *next_++;
      const std::uint8_t* const from = sparse_strip(w_, strip_) + at;
      at += take_pair(masks + within_ * kLineMasks, from, zeros_[0], zeros_[1], codes[0][j], codes[1][j]);
    }
    for (std::size_t k = 0; k < 2; ++k) {
      for (std::size_t half = 0; half < kUnitBytes; half += 32) {
        __m256i units[4];
        interleave(load(codes[k][0] + half), load(codes[k][1] + half), load(codes[k][2] + half), load(codes[k][3] + half), units);
        for (std::size_t t = 0; t < 4; ++t) store(to_ + (k * 4 + t) * stride_ + half, units[t]);
      }
    }
  }

  // A column of four inputs: units already.
  void add_fours(std::uint32_t place) {
    if (w_.sparse) {
      const std::uint8_t* masks = sparse_strip(w_, strip_) + sparse_starts(w_, strip_)[place];
      std::uint32_t& at = *next_++;
      masks += within_ * w_.line_masks();
      for (std::size_t t = 0; t < 4; ++t, masks += kLineMasks) {
        const std::uint8_t* const from = sparse_strip(w_, strip_) + at;
        at += take_pair(masks, from, zeros_[t], zeros_[4 + t], to_ + t * stride_, to_ + (4 + t) * stride_);
      }
      return;
    }
    const std::uint8_t* const from = dense_strip(w_, strip_) + place * column_bytes(w_, strip_) + within_ * w_.line_bytes();
    const int per_byte = static_cast<int>(w_.line_tiles() / 4), bits = 8 / per_byte;
    const __m256i mask = _mm256_set1_epi8(static_cast<char>((1 << bits) - 1));
    for (std::size_t t = 0; t < 4; ++t) {
      for (std::size_t half = 0; half < kUnitBytes; half += 32) {
        const __m256i wide = load(from + t * kUnitBytes + half);
        for (int k = 0; k < per_byte; ++k) {
          const __m256i code = _mm256_and_si256(_mm256_srl_epi16(wide, _mm_cvtsi32_si128(bits * k)), mask);
          store(to_ + (static_cast<std::size_t>(k) * 4 + t) * stride_ + half, code);
        }
      }
    }
  }

  // What masks keep of two times 64 codes, pruned ones filled in; returns the bytes.
  static std::uint32_t take_pair(const std::uint8_t* masks, const std::uint8_t* from, const std::uint8_t* zeros,
                               const std::uint8_t* more_zeros, std::uint8_t* first, std::uint8_t* second) {
    std::uint8_t pair[kPairCodes + 8];
    unpack_pair(from, pair);
    const std::size_t n = expand_unit(pair, masks, zeros, first), m = expand_unit(pair + kUnitBytes, masks + 8, more_zeros, second);
    return static_cast<std::uint32_t>(n > m ? n : m);
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
  std::uint32_t* next_;
  std::size_t strip_, within_;
  std::uint8_t* to_;
  std::size_t stride_;
  std::uint8_t zeros_[8][kUnitBytes];  // of lines of one input two
};

// Up to so many tokens, each brings in the inputs that it has.
constexpr std::size_t kFew = 4;

// Where the codes of a sparse strip's columns begin; returns `next`.
std::uint32_t* begin_codes(const LinearView& w, std::size_t strip, const std::uint32_t* columns, std::size_t count,
                           std::uint32_t* next) {
  const std::uint32_t masks = static_cast<std::uint32_t>(w.lines_of(strip) * w.line_masks());
  for (std::size_t i = 0; w.sparse && i < count; ++i) next[i] = sparse_starts(w, strip)[columns[i]] + masks;
  return next;
}

// A segment of a strip's lines for one token.
template <bool kNibbles>
void run_one(const LinearView& w, const Inputs& x, std::size_t strip, std::size_t segment, std::size_t t, float* sums,
             std::uint8_t* scratch) {
  const std::uint32_t* const starts = x.quad_starts + t * (w.segments + 1) + segment;
  const std::size_t quads = starts[1] - starts[0], at = t * x.quad_stride + starts[0], per_quad = 4 / w.column_inputs();
  const std::uint32_t* const columns = x.quads + at * per_quad;
  std::uint32_t next[kChunkInputs + 4];
  begin_codes(w, strip, columns, quads * per_quad, next);
  for (std::size_t l = 0; l < w.lines_of(strip); ++l, sums += w.line_tiles() * kTileRows) {
    const std::size_t line = strip * w.strip_lines() + l;
    Panel panel(w, line, segment, scratch, quads, next);
    for (std::size_t q = 0; q < quads; ++q) panel.add(columns + q * per_quad);
    const std::int8_t* in[2];
    for (std::size_t p = 0; p < x.planes; ++p) in[p] = x.quad_plane[p] + at * 4;
    for (std::size_t i = 0; i < w.line_tiles(); ++i) {
      const std::size_t tile = line * w.line_tiles() + i;
      const std::size_t scale = w.scale_at(tile, segment);
      // `sums` of one token stand where its tile's do.
      meet<kNibbles, 1>(w, x, scale, segment, t, scratch + i * quads * kUnitBytes, quads, in, 0,
                        sums + i * kTileRows - t * kTileRows);
    }
  }
}

// The same for all tokens, with all inputs.
template <bool kNibbles>
void run_all(const LinearView& w, const Inputs& x, std::size_t strip, std::size_t segment, float* sums, std::size_t stride,
             std::uint8_t* scratch) {
  float* const tile_sums = reinterpret_cast<float*>(scratch + kChunkInputs * w.line_tiles() * kTileRows);
  const std::size_t per_quad = 4 / w.column_inputs(), columns = w.segment / w.column_inputs();
  std::uint32_t next[kChunkInputs], all[kChunkInputs];
  for (std::size_t i = 0; i < columns; ++i) all[i] = static_cast<std::uint32_t>(segment * columns + i);
  begin_codes(w, strip, all, columns, next);
  for (std::size_t l = 0; l < w.lines_of(strip); ++l, sums += w.line_tiles() * kTileRows) {
    const std::size_t line = strip * w.strip_lines() + l;
    Panel panel(w, line, segment, scratch, w.segment / 4, next);
    for (std::size_t i = 0; i < columns; i += per_quad) panel.add(all + i);
    for (std::size_t i = 0; i < w.line_tiles(); ++i) {
      for (std::size_t t = 0; t < x.tokens; ++t) {
        std::memcpy(tile_sums + t * kTileRows, sums + t * stride + i * kTileRows, kTileRows * sizeof(float));
      }
      meet_all<kNibbles>(w, x, line * w.line_tiles() + i, segment, scratch + i * w.segment / 4 * kUnitBytes, tile_sums);
      for (std::size_t t = 0; t < x.tokens; ++t) {
        std::memcpy(sums + t * stride + i * kTileRows, tile_sums + t * kTileRows, kTileRows * sizeof(float));
      }
    }
  }
}

template <bool kNibbles>
void run(const LinearView& w, const Inputs& x, std::size_t strip, std::size_t segment, float* sums, std::size_t stride,
         std::uint8_t* scratch) {
  if (x.tokens > kFew) return run_all<kNibbles>(w, x, strip, segment, sums, stride, scratch);
  for (std::size_t t = 0; t < x.tokens; ++t) run_one<kNibbles>(w, x, strip, segment, t, sums + t * stride, scratch);
}

}  // namespace

void avx2_run_columns(const LinearView& w, const Inputs& x, std::size_t strip, std::size_t first, std::size_t last,
                      float* sums, std::size_t stride, std::uint8_t* scratch) {
  const std::size_t count = w.lines_of(strip) * w.line_tiles() * kTileRows;
  for (std::size_t t = 0; t < x.tokens; ++t) std::memset(sums + t * stride, 0, count * sizeof(float));
  for (std::size_t segment = first; segment < last; ++segment) {
    if (w.kind == WeightKind::codes8) run<false>(w, x, strip, segment, sums, stride, scratch);
    else run<true>(w, x, strip, segment, sums, stride, scratch);
  }
}

}  // namespace tulle
