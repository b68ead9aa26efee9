// Linears by columns by vpmaddubsw. Dense lines: a stretch of a token's inputs at a time, half a line's sums in registers.
// Pruned ones, and more tokens: what inputs of a line's segment meet is brought into units in memory of up to 128 KiB and
// met there; of few tokens, each brings in what it has itself, of more, all inputs are brought in once.
#include <immintrin.h>

#include <cstring>

#include "cpu/tables.hpp"

namespace tulle {
namespace {

#include "linear/common.inl"
#include "linear/avx2.inl"
#include "linear/input_major_common.inl"
#include "linear/input_major_stream.inl"

// 32 bytes of the lines of four inputs → half of the units of 16 outputs × 4 inputs, of every code in a byte.
void interleave(__m256i a, __m256i b, __m256i c, __m256i d, __m256i units[4]) {
  const __m256i ab = _mm256_unpacklo_epi8(a, b), AB = _mm256_unpackhi_epi8(a, b);
  const __m256i cd = _mm256_unpacklo_epi8(c, d), CD = _mm256_unpackhi_epi8(c, d);
  units[0] = _mm256_unpacklo_epi16(ab, cd);
  units[1] = _mm256_unpackhi_epi16(ab, cd);
  units[2] = _mm256_unpacklo_epi16(AB, CD);
  units[3] = _mm256_unpackhi_epi16(AB, CD);
}

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
    __m256i zero[2] = {load(zeros), load(zeros + 32)}, codes[2];
    const std::size_t n = expand_unit<Part::low>(from, masks, zero, codes);
    for (int h = 0; h < 2; ++h) store(first + 32 * h, codes[h]);
    for (int h = 0; h < 2; ++h) zero[h] = load(more_zeros + 32 * h);
    const std::size_t m = expand_unit<Part::high>(from, masks + 8, zero, codes);
    for (int h = 0; h < 2; ++h) store(second + 32 * h, codes[h]);
    return static_cast<std::uint32_t>(n > m ? n : m);
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

// A segment of a sparse strip's lines for one token.
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
      meet<true, 1>(w, x, scale, segment, t, scratch + i * quads * kUnitBytes, quads, in, 0,
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

// Half h of the units of a dense line at a quad, of every code in a byte.
struct DenseLine {
  static constexpr int kFetched = 1;
  const std::uint8_t* from;
  std::size_t bytes;  // from one column to the next

  void take(const std::uint32_t* places, std::size_t h, __m256i units[4]) const {
    const std::uint8_t* const at = from + 32 * h;
    interleave(load(at + places[0] * bytes), load(at + places[1] * bytes), load(at + places[2] * bytes),
               load(at + places[3] * bytes), units);
  }
};

struct DenseFours {
  static constexpr int kFetched = 4;
  const std::uint8_t* from;
  std::size_t bytes;

  void take(const std::uint32_t* place, std::size_t h, __m256i units[4]) const {
    const std::uint8_t* const at = from + *place * bytes + 32 * h;
    for (std::size_t i = 0; i < 4; ++i) units[i] = load(at + kUnitBytes * i);
  }
};

// The k-th codes of bytes of kPerByte.
template <int kPerByte>
__m256i code(__m256i bytes, int k) {
  if constexpr (kPerByte == 1) return bytes;
  constexpr int kBits = 8 / kPerByte;
  return _mm256_and_si256(_mm256_srli_epi16(bytes, kBits * k), _mm256_set1_epi8((1 << kBits) - 1));
}

constexpr std::size_t kStretch = 8;  // quads

// A stretch with a line: sums of integers in totals [plane][stride], from the segment's first stretch to its last.
template <int kPerByte, class Line>
void meet_quads(const Inputs& x, const Quads& quads, const Stretch& s, const Line& weights, Ahead<Line::kFetched>& ahead,
                std::int32_t* totals, std::size_t stride) {
  constexpr int kAtOnce = kPerByte < 2 ? kPerByte : 2;  // codes of a byte whose sums fit into the registers
  bool fetch = true;
  for (std::size_t p = 0; p < x.planes; ++p) {
    for (std::size_t h = 0; h < 2; ++h) {
      for (int first = 0; first < kPerByte; first += kAtOnce) {
        std::int32_t* const at = totals + p * stride + static_cast<std::size_t>(first) * 64 + 8 * h;
        __m256i total[kAtOnce][4];
        for (int k = 0; k < kAtOnce; ++k) {
          for (int i = 0; i < 4; ++i) total[k][i] = s.fresh ? _mm256_setzero_si256() : load(at + 64 * k + 16 * i);
        }
        for (std::size_t quad = s.first; quad < s.last; ++quad) {
          __m256i units[4];
          weights.take(quads.at(quad), h, units);
          if (fetch) ahead.step();
          const __m256i four = broadcast4(quads.in[p] + 4 * quad);
          for (int k = 0; k < kAtOnce; ++k) {
            for (int i = 0; i < 4; ++i) total[k][i] = dot<(kPerByte > 1)>(total[k][i], code<kPerByte>(units[i], first + k), four);
          }
        }
        fetch = false;
        for (int k = 0; k < kAtOnce; ++k) {
          for (int i = 0; i < 4; ++i) store(at + 64 * k + 16 * i, total[k][i]);
        }
      }
    }
  }
}

// sums [outputs of a line] += a segment whose whole totals these are.
void add_segment(const LinearView& w, const Inputs& x, std::size_t token, const Stretch& s, const Scaling& scaling, std::size_t line,
                 const std::int32_t* totals, std::size_t stride, float* sums) {
  for (std::size_t i = 0; i < w.line_tiles(); ++i) {
    const std::size_t scale = scaling.of(line * w.line_tiles() + i);
    for (std::size_t o = 0; o < kTileRows; o += 8) {
      __m256 whole = _mm256_setzero_ps();
      for (std::size_t p = 0; p < x.planes; ++p) {
        const __m256i by_zero = correction(w, scale, o / 8, x.sums[p][token * x.sum_stride + s.segment]);
        const __m256i right = _mm256_add_epi32(load(totals + p * stride + i * kTileRows + o), by_zero);
        whole = _mm256_fmadd_ps(whole, _mm256_set1_ps(256), _mm256_cvtepi32_ps(right));
      }
      float* const to = sums + i * kTileRows + o;
      _mm256_store_ps(to, _mm256_fmadd_ps(whole, scales_at(w, scale, o / 8), _mm256_load_ps(to)));
    }
  }
}

// Segments [begin, end) of a dense strip for one token. `totals`: a strip's sums of integers, of all planes.
template <int kPerByte, class Line>
void run_dense(const LinearView& w, const Inputs& x, std::size_t strip, std::size_t begin, std::size_t end, std::size_t token,
               float* sums, std::int32_t* totals) {
  const std::size_t outputs = w.line_tiles() * kTileRows, lines = w.lines_of(strip), stride = lines * outputs;
  const std::uint8_t* const from = dense_strip(w, strip);
  const std::size_t bytes = column_bytes(w, strip);
  const Quads quads(w, x, token, end);
  const std::size_t start = quads.starts[begin];
  Ahead<Line::kFetched>(quads, start, least(start + kStretch, quads.end), from, bytes, nullptr, 0).finish();
  stretches(quads, begin, end, kStretch, [&](const Stretch& s, std::size_t later) {
    const Scaling scaling(w, s.segment);
    Ahead<Line::kFetched> ahead(quads, s.last, later, from, bytes, nullptr, (s.last - s.first) * lines);
    for (std::size_t i = 0; i < lines; ++i) {
      const Line weights{from + i * w.line_bytes(), bytes};
      std::int32_t* const of_line = totals + i * outputs;
      meet_quads<kPerByte>(x, quads, s, weights, ahead, of_line, stride);
      if (s.whole) add_segment(w, x, token, s, scaling, strip * w.strip_lines() + i, of_line, stride, sums + i * outputs);
    }
    ahead.finish();
  });
}

template <int kPerByte>
void run_dense(const LinearView& w, const Inputs& x, std::size_t strip, std::size_t begin, std::size_t end, std::size_t token,
               float* sums, std::int32_t* totals) {
  if (w.fours) run_dense<kPerByte, DenseFours>(w, x, strip, begin, end, token, sums, totals);
  else run_dense<kPerByte, DenseLine>(w, x, strip, begin, end, token, sums, totals);
}

}  // namespace

void avx2_run_columns(const LinearView& w, const Inputs& x, std::size_t strip, std::size_t first, std::size_t last,
                      float* sums, std::size_t stride, std::uint8_t* scratch) {
  const std::size_t count = w.lines_of(strip) * w.line_tiles() * kTileRows;
  for (std::size_t t = 0; t < x.tokens; ++t) std::memset(sums + t * stride, 0, count * sizeof(float));
  if (!w.sparse && x.tokens <= kFew) {
    auto* const totals = reinterpret_cast<std::int32_t*>(scratch);
    for (std::size_t t = 0; t < x.tokens; ++t) {
      switch (w.kind) {
        case WeightKind::codes2: run_dense<4>(w, x, strip, first, last, t, sums + t * stride, totals); break;
        case WeightKind::codes4: run_dense<2>(w, x, strip, first, last, t, sums + t * stride, totals); break;
        default: run_dense<1>(w, x, strip, first, last, t, sums + t * stride, totals);
      }
    }
    return;
  }
  for (std::size_t segment = first; segment < last; ++segment) {
    if (x.tokens > kFew) {
      if (w.kind == WeightKind::codes8) run_all<false>(w, x, strip, segment, sums, stride, scratch);
      else run_all<true>(w, x, strip, segment, sums, stride, scratch);
      continue;
    }
    for (std::size_t t = 0; t < x.tokens; ++t) run_one(w, x, strip, segment, t, sums + t * stride, scratch);
  }
}

}  // namespace tulle
