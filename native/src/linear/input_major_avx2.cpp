// Input-major linears by AVX2 (vpmaddubsw).
//
//   one quad = the lines of four active inputs a, b, c, d; half h of each is a register of 32 bytes:
//     unpack bytes   a0 b0 a1 b1 …    c0 d0 c1 d1 …
//     unpack words   a0 b0 c0 d0 | a1 b1 c1 d1 | …   = units[0 … 3]: 8 outputs × 4 inputs
//     total[k][i]    8 sums of units[i], of the k-th codes of their bytes
//     four           the quad's x, broadcast;  step: interleave, per k mask and shift, vpmaddubsw, add
//
// Dense lines, few tokens: a range of quads at a time, half a line's sums in registers. Sparse ones, and more tokens:
// a segment of a line is expanded to units in memory (up to 128 KiB) and multiplied there; of few tokens each expands
// the inputs that it has itself, of more all inputs are expanded once.
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
class ExpandedLine {
 public:
  // `next`: of a sparse linear where the codes of every block that is added go on, of a panel's lines taken in order.
  ExpandedLine(const LinearView& w, std::size_t line, std::size_t segment, std::uint8_t* to, std::size_t quads,
               std::uint32_t* next)
      : w_(w),
        next_(next),
        panel_(line / w.panel_lines()),
        within_(line - panel_ * w.panel_lines()),
        to_(to),
        stride_(quads * kUnitBytes) {
    if (!w.sparse()) return;
    for (std::size_t tile = 0; tile < 8; ++tile) {
      for (std::size_t o = 0; o < kTileRows; ++o) {
        const std::size_t all = line * w.line_tiles() + tile;
        const std::size_t at = w.scale_at(all, segment) + o;
        const std::uint8_t zero = w.zeros ? w.zeros[at] : w.zero;
        if (w.blocks4()) std::memset(zeros_[tile] + 4 * o, zero, 4);
        else zeros_[tile / 4][o / 4 * 16 + tile % 4 * 4 + o % 4] = zero;
      }
    }
  }

  void add(const std::uint32_t* blocks) {
    if (w_.blocks4()) add_blocks4(*blocks);
    else if (w_.sparse()) add_sparse(blocks);
    else add_dense(blocks);
    to_ += kUnitBytes;
  }

 private:
  void add_dense(const std::uint32_t* blocks) {
    const std::size_t bytes = block_bytes(w_, panel_);
    const std::uint8_t* const from = dense_panel(w_, panel_) + within_ * kUnitBytes;
    const std::uint8_t* lines[4];
    for (std::size_t j = 0; j < 4; ++j) lines[j] = from + blocks[j] * bytes;
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

  void add_sparse(const std::uint32_t* blocks) {
    std::uint8_t codes[2][4][kUnitBytes];
    for (std::size_t j = 0; j < 4; ++j) {
      const std::uint8_t* const masks = sparse_panel(w_, panel_) + sparse_starts(w_, panel_)[blocks[j]];
      std::uint32_t& at = *next_++;
      const std::uint8_t* const from = sparse_panel(w_, panel_) + at;
      at += take_pair(masks + within_ * kLineMaskBytes, from, zeros_[0], zeros_[1], codes[0][j], codes[1][j]);
    }
    for (std::size_t k = 0; k < 2; ++k) {
      for (std::size_t half = 0; half < kUnitBytes; half += 32) {
        __m256i units[4];
        interleave(load(codes[k][0] + half), load(codes[k][1] + half), load(codes[k][2] + half),
                   load(codes[k][3] + half), units);
        for (std::size_t t = 0; t < 4; ++t) store(to_ + (k * 4 + t) * stride_ + half, units[t]);
      }
    }
  }

  // A block of 4: units already.
  void add_blocks4(std::uint32_t block) {
    if (w_.sparse()) {
      const std::uint8_t* masks = sparse_panel(w_, panel_) + sparse_starts(w_, panel_)[block];
      std::uint32_t& at = *next_++;
      masks += within_ * w_.line_mask_bytes();
      for (std::size_t t = 0; t < 4; ++t, masks += kLineMaskBytes) {
        const std::uint8_t* const from = sparse_panel(w_, panel_) + at;
        at += take_pair(masks, from, zeros_[t], zeros_[4 + t], to_ + t * stride_, to_ + (4 + t) * stride_);
      }
      return;
    }
    const std::uint8_t* const from =
        dense_panel(w_, panel_) + block * block_bytes(w_, panel_) + within_ * w_.line_bytes();
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

  // What masks keep of two times 64 codes, pruned ones at their zero points; returns the bytes.
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
  std::size_t panel_, within_;
  std::uint8_t* to_;
  std::size_t stride_;
  std::uint8_t zeros_[8][kUnitBytes];  // of lines of one input two
};

// Up to so many tokens, each brings in the inputs that it has.
constexpr std::size_t kFew = 4;

// Where the codes of a sparse panel's blocks begin; returns `next`.
std::uint32_t* begin_codes(const LinearView& w, std::size_t panel, const std::uint32_t* input_blocks, std::size_t count,
                           std::uint32_t* next) {
  const std::uint32_t masks = static_cast<std::uint32_t>(w.lines_of(panel) * w.line_mask_bytes());
  for (std::size_t i = 0; w.sparse() && i < count; ++i) next[i] = sparse_starts(w, panel)[input_blocks[i]] + masks;
  return next;
}

// A segment of a sparse panel's lines for one token.
void run_one(const LinearView& w, const Inputs& x, std::size_t panel, std::size_t segment, std::size_t t, float* sums,
             std::uint8_t* scratch) {
  const std::uint32_t* const starts = x.quad_starts + t * (w.segments + 1) + segment;
  const std::size_t quads = starts[1] - starts[0], at = t * x.quad_stride + starts[0], per_quad = 4 / w.block_inputs();
  const std::uint32_t* const input_blocks = x.quads + at * per_quad;
  std::uint32_t next[kChunkInputs + 4];
  begin_codes(w, panel, input_blocks, quads * per_quad, next);
  for (std::size_t l = 0; l < w.lines_of(panel); ++l, sums += w.line_tiles() * kTileRows) {
    const std::size_t line = panel * w.panel_lines() + l;
    ExpandedLine expanded(w, line, segment, scratch, quads, next);
    for (std::size_t q = 0; q < quads; ++q) expanded.add(input_blocks + q * per_quad);
    const std::int8_t* in[2];
    for (std::size_t p = 0; p < x.planes; ++p) in[p] = x.quad_plane[p] + at * 4;
    for (std::size_t i = 0; i < w.line_tiles(); ++i) {
      const std::size_t tile = line * w.line_tiles() + i;
      const std::size_t scale = w.scale_at(tile, segment);
      // `sums` of one token lie where its tile's do.
      multiply_accumulate<true, 1>(w, x, scale, segment, t, scratch + i * quads * kUnitBytes, quads, in, 0,
                        sums + i * kTileRows - t * kTileRows);
    }
  }
}

// The same for all tokens, with all inputs.
template <int kBits>
void run_all(const LinearView& w, const Inputs& x, std::size_t panel, std::size_t segment, float* sums,
             std::size_t stride, std::uint8_t* scratch) {
  float* const tile_sums = reinterpret_cast<float*>(scratch + kChunkInputs * w.line_tiles() * kTileRows);
  const std::size_t per_quad = 4 / w.block_inputs(), input_blocks = w.segment / w.block_inputs();
  std::uint32_t next[kChunkInputs], all[kChunkInputs];
  for (std::size_t i = 0; i < input_blocks; ++i) all[i] = static_cast<std::uint32_t>(segment * input_blocks + i);
  begin_codes(w, panel, all, input_blocks, next);
  for (std::size_t l = 0; l < w.lines_of(panel); ++l, sums += w.line_tiles() * kTileRows) {
    const std::size_t line = panel * w.panel_lines() + l;
    ExpandedLine expanded(w, line, segment, scratch, w.segment / 4, next);
    for (std::size_t i = 0; i < input_blocks; i += per_quad) expanded.add(all + i);
    for (std::size_t i = 0; i < w.line_tiles(); ++i) {
      for (std::size_t t = 0; t < x.tokens; ++t) {
        std::memcpy(tile_sums + t * kTileRows, sums + t * stride + i * kTileRows, kTileRows * sizeof(float));
      }
      multiply_accumulate_all<kBits>(w, x, line * w.line_tiles() + i, segment,
                                        scratch + i * w.segment / 4 * kUnitBytes, tile_sums);
      for (std::size_t t = 0; t < x.tokens; ++t) {
        std::memcpy(sums + t * stride + i * kTileRows, tile_sums + t * kTileRows, kTileRows * sizeof(float));
      }
    }
  }
}

// Half h of the units of a dense line at a quad, of every code in a byte.
struct DenseLine {
  static constexpr int kPrefetchLines = 1;
  const std::uint8_t* from;
  std::size_t bytes;  // from one block to the next

  void take(const std::uint32_t* blocks, std::size_t h, __m256i units[4]) const {
    const std::uint8_t* const at = from + 32 * h;
    interleave(load(at + blocks[0] * bytes), load(at + blocks[1] * bytes), load(at + blocks[2] * bytes),
               load(at + blocks[3] * bytes), units);
  }
};

struct DenseBlocks4 {
  static constexpr int kPrefetchLines = 4;
  const std::uint8_t* from;
  std::size_t bytes;

  void take(const std::uint32_t* block, std::size_t h, __m256i units[4]) const {
    const std::uint8_t* const at = from + *block * bytes + 32 * h;
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

constexpr std::size_t kRangeQuads = 8;  // quads

// A range times a line: sums of integers in totals [plane][stride], from the segment's first range to its last.
template <int kPerByte, class Line>
void multiply_accumulate_quads(const Inputs& x, const Quads& quads, const QuadRange& s, const Line& weights,
                               Prefetcher<Line::kPrefetchLines>& prefetcher, std::int32_t* totals, std::size_t stride) {
  constexpr int kAtOnce = kPerByte < 2 ? kPerByte : 2;  // codes of a byte whose sums fit into the registers
  bool prefetch = true;
  for (std::size_t p = 0; p < x.planes; ++p) {
    for (std::size_t h = 0; h < 2; ++h) {
      for (int first = 0; first < kPerByte; first += kAtOnce) {
        std::int32_t* const at = totals + p * stride + static_cast<std::size_t>(first) * 64 + 8 * h;
        __m256i total[kAtOnce][4];
        for (int k = 0; k < kAtOnce; ++k) {
          for (int i = 0; i < 4; ++i)
            total[k][i] = s.opens_segment ? _mm256_setzero_si256() : load(at + 64 * k + 16 * i);
        }
        for (std::size_t quad = s.first; quad < s.last; ++quad) {
          __m256i units[4];
          weights.take(quads.at(quad), h, units);
          if (prefetch) prefetcher.step();
          const __m256i four = broadcast4(quads.in[p] + 4 * quad);
          for (int k = 0; k < kAtOnce; ++k) {
            for (int i = 0; i < 4; ++i)
              total[k][i] = dot<8 / kPerByte>(total[k][i], code<kPerByte>(units[i], first + k), four);
          }
        }
        prefetch = false;
        for (int k = 0; k < kAtOnce; ++k) {
          for (int i = 0; i < 4; ++i) store(at + 64 * k + 16 * i, total[k][i]);
        }
      }
    }
  }
}

// sums [outputs of a line] += a segment whose whole totals these are.
void add_segment(const LinearView& w, const Inputs& x, std::size_t token, const QuadRange& s, const ScaleIndex& scaling,
                 std::size_t line, const std::int32_t* totals, std::size_t stride, float* sums) {
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
      _mm256_store_ps(to, _mm256_fmadd_ps(whole, scales_at(w.scales, w.scale_kind, scale + o), _mm256_load_ps(to)));
    }
  }
}

// Segments [begin, end) of a dense panel for one token. `totals`: a panel's sums of integers, of all planes.
template <int kPerByte, class Line>
void run_dense(const LinearView& w, const Inputs& x, std::size_t panel, std::size_t begin, std::size_t end,
               std::size_t token, float* sums, std::int32_t* totals) {
  const std::size_t outputs = w.line_tiles() * kTileRows, lines = w.lines_of(panel), stride = lines * outputs;
  const std::uint8_t* const from = dense_panel(w, panel);
  const std::size_t bytes = block_bytes(w, panel);
  const Quads quads(w, x, token, end);
  const std::size_t start = quads.starts[begin];
  Prefetcher<Line::kPrefetchLines>(quads, start, least(start + kRangeQuads, quads.end), from, bytes, nullptr, 0)
      .finish();
  for_each_range(quads, begin, end, kRangeQuads, [&](const QuadRange& s, std::size_t later) {
    const ScaleIndex scaling(w, s.segment);
    Prefetcher<Line::kPrefetchLines> prefetcher(quads, s.last, later, from, bytes, nullptr, (s.last - s.first) * lines);
    for (std::size_t i = 0; i < lines; ++i) {
      const Line weights{from + i * w.line_bytes(), bytes};
      std::int32_t* const of_line = totals + i * outputs;
      multiply_accumulate_quads<kPerByte>(x, quads, s, weights, prefetcher, of_line, stride);
      if (s.closes_segment)
        add_segment(w, x, token, s, scaling, panel * w.panel_lines() + i, of_line, stride, sums + i * outputs);
    }
    prefetcher.finish();
  });
}

template <int kPerByte>
void run_dense(const LinearView& w, const Inputs& x, std::size_t panel, std::size_t begin, std::size_t end,
               std::size_t token, float* sums, std::int32_t* totals) {
  if (w.blocks4()) run_dense<kPerByte, DenseBlocks4>(w, x, panel, begin, end, token, sums, totals);
  else run_dense<kPerByte, DenseLine>(w, x, panel, begin, end, token, sums, totals);
}

}  // namespace

void avx2_run_input_major(const LinearView& w, const Inputs& x, std::size_t panel, std::size_t first, std::size_t last,
                      float* sums, std::size_t stride, std::uint8_t* scratch) {
  const std::size_t count = w.lines_of(panel) * w.line_tiles() * kTileRows;
  for (std::size_t t = 0; t < x.tokens; ++t) std::memset(sums + t * stride, 0, count * sizeof(float));
  if (!w.sparse() && x.tokens <= kFew) {
    auto* const totals = reinterpret_cast<std::int32_t*>(scratch);
    for (std::size_t t = 0; t < x.tokens; ++t) {
      switch (w.kind) {
        case WeightKind::codes2: run_dense<4>(w, x, panel, first, last, t, sums + t * stride, totals); break;
        case WeightKind::codes4: run_dense<2>(w, x, panel, first, last, t, sums + t * stride, totals); break;
        default: run_dense<1>(w, x, panel, first, last, t, sums + t * stride, totals);
      }
    }
    return;
  }
  for (std::size_t segment = first; segment < last; ++segment) {
    if (x.tokens > kFew) {
      if (w.kind == WeightKind::codes8) run_all<8>(w, x, panel, segment, sums, stride, scratch);
      else run_all<4>(w, x, panel, segment, sums, stride, scratch);
      continue;
    }
    for (std::size_t t = 0; t < x.tokens; ++t) run_one(w, x, panel, segment, t, sums + t * stride, scratch);
  }
}

}  // namespace tulle
