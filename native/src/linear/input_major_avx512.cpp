// Linears by columns by vpdpbusd: bytes of four inputs that a token has, interleaved, are units of 16 outputs × 4
// inputs. Few tokens, one after another: a stretch of quads with a line at a time, sums in registers. More tokens: a line
// of a chunk is brought into units in the level-2 cache once and met by all of them.
#include <immintrin.h>

#include <cstring>

#include "cpu/tables.hpp"

namespace tulle {
namespace {

#include "linear/avx512.inl"
#include "linear/avx512_multiply_accumulate.inl"
#include "linear/input_major_common.inl"
#include "linear/input_major_stream.inl"

// Lines of four inputs → units of 16 outputs × 4 inputs, of every code in a byte.
void interleave(__m512i a, __m512i b, __m512i c, __m512i d, __m512i units[4]) {
  const __m512i ab = _mm512_unpacklo_epi8(a, b), AB = _mm512_unpackhi_epi8(a, b);
  const __m512i cd = _mm512_unpacklo_epi8(c, d), CD = _mm512_unpackhi_epi8(c, d);
  units[0] = _mm512_unpacklo_epi16(ab, cd);
  units[1] = _mm512_unpackhi_epi16(ab, cd);
  units[2] = _mm512_unpacklo_epi16(AB, CD);
  units[3] = _mm512_unpackhi_epi16(AB, CD);
}

// The k-th code of each byte, times 2^(bits · k): a mask is cheaper than a shift, and a sum is divided once.
template <int kPerByte>
__m512i code(__m512i bytes, int k) {
  if constexpr (kPerByte == 1) return bytes;
  return _mm512_and_si512(bytes, _mm512_set1_epi8(static_cast<char>(((1 << (8 / kPerByte)) - 1) << (8 / kPerByte * k))));
}

template <int kPerByte>
__m512i divided(__m512i total, int k) {
  return kPerByte == 1 || k == 0 ? total : _mm512_srai_epi32(total, static_cast<unsigned>(8 / kPerByte * k));
}

// Units of a dense line at a quad.
template <int kCodes>
struct DenseLine {
  static constexpr int kPerByte = kCodes;
  static constexpr bool kOnce = false;
  static constexpr int kFetched = 1;  // pieces of 64 bytes at once
  static constexpr int kQuads = 8;  // of a stretch: what is fetched meanwhile fits into the level-2 cache
  const std::uint8_t* from;
  std::size_t bytes;  // from one input to the next

  DenseLine(const LinearView& w, std::size_t strip, std::size_t line)
      : from(dense_strip(w, strip) + (line - strip * w.strip_lines()) * kUnitBytes), bytes(column_bytes(w, strip)) {}

  const std::uint8_t* at(std::uint32_t place) const { return from + place * bytes; }

  void take(const std::uint32_t* places, __m512i units[4 * kPerByte]) const {
    for (std::size_t j = 0; j < 4; ++j) near(at(places[j]) + kUnitBytes);
    __m512i wide[4];
    interleave(_mm512_loadu_si512(at(places[0])), _mm512_loadu_si512(at(places[1])), _mm512_loadu_si512(at(places[2])),
               _mm512_loadu_si512(at(places[3])), wide);
#pragma GCC unroll 4
    for (int k = 0; k < kPerByte; ++k) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) units[4 * k + i] = code<kPerByte>(wide[i], k);
    }
  }
};

// The same of columns of fours.
template <int kCodes>
struct DenseFours {
  static constexpr int kPerByte = kCodes;
  static constexpr bool kOnce = false;
  static constexpr int kFetched = 4;
  static constexpr int kQuads = 8;
  const std::uint8_t* from;
  std::size_t bytes;  // from one column to the next

  DenseFours(const LinearView& w, std::size_t strip, std::size_t line)
      : from(dense_strip(w, strip) + (line - strip * w.strip_lines()) * 4 * kUnitBytes), bytes(column_bytes(w, strip)) {}

  void take(const std::uint32_t* place, __m512i units[4 * kPerByte]) const {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i wide = _mm512_loadu_si512(from + *place * bytes + 64 * i);
      near(from + *place * bytes + 64 * i + 256);
#pragma GCC unroll 4
      for (int k = 0; k < kPerByte; ++k) units[4 * k + i] = code<kPerByte>(wide, k);
    }
  }
};

// Quads of a stretch with a line. Sums of integers wait in totals [plane][stride], of this line, until all of
// the segment's quads are met; then sums [outputs of the line] += the segment.
template <int kPlanes, class Line>
void meet_quads(const LinearView& w, const Inputs& x, std::size_t token, std::size_t line, const Scaling& scaling,
                const Quads& quads, const Stretch& s, Ahead<Line::kFetched>& ahead, Line& weights, std::int32_t* totals, std::size_t stride, float* sums) {
  constexpr int kPerByte = Line::kPerByte, kTiles = 4 * kPerByte;
  // Sums of both planes do not fit into the registers beside those of 2-bit codes.
  constexpr int kAtOnce = kTiles * kPlanes <= 16 ? kPlanes : 1;
  static_assert(kAtOnce == kPlanes || !Line::kOnce, "a sparse line is taken once");
  __m512 whole[kTiles];
#pragma GCC unroll 2
  for (int plane = 0; plane < kPlanes; plane += kAtOnce) {
    __m512i total[kAtOnce][kTiles];
#pragma GCC unroll 2
    for (int p = 0; p < kAtOnce; ++p) {
      const std::int32_t* const from = totals + static_cast<std::size_t>(plane + p) * stride;
#pragma GCC unroll 16
      for (int i = 0; i < kTiles; ++i) total[p][i] = s.fresh ? _mm512_setzero_si512() : _mm512_load_si512(from + 16 * i);
    }
    for (std::size_t quad = s.first; quad < s.last; ++quad) {
      __m512i units[kTiles];
      weights.take(quads.at(quad), units);
      if (plane == 0) ahead.step();
#pragma GCC unroll 2
      for (int p = 0; p < kAtOnce; ++p) {
        const __m512i four = broadcast4(quads.in[plane + p] + 4 * quad);
#pragma GCC unroll 16
        for (int i = 0; i < kTiles; ++i) dot(total[p][i], units[i], four);
      }
    }
#pragma GCC unroll 2
    for (int p = 0; p < kAtOnce; ++p) {
      if (!s.whole) {
        std::int32_t* const to = totals + static_cast<std::size_t>(plane + p) * stride;
#pragma GCC unroll 16
        for (int i = 0; i < kTiles; ++i) _mm512_store_si512(to + 16 * i, total[p][i]);
        continue;
      }
      const std::int32_t sum = x.sums[plane + p][token * x.sum_stride + s.segment];
      const __m512i same = _mm512_set1_epi32(-static_cast<std::int32_t>(w.zero) * sum);
#pragma GCC unroll 16
      for (int i = 0; i < kTiles; ++i) {
        const std::size_t at = scaling.of(line * kTiles + static_cast<std::size_t>(i));
        const __m512i off = w.zeros == nullptr ? same : correction(w, zeros_at(w, at), sum);
        const __m512 part = _mm512_cvtepi32_ps(_mm512_add_epi32(divided<kPerByte>(total[p][i], i / 4), off));
        whole[i] = plane + p == 0 ? part : _mm512_fmadd_ps(whole[i], _mm512_set1_ps(256), part);
      }
    }
  }
  if (!s.whole) return;
#pragma GCC unroll 16
  for (int i = 0; i < kTiles; ++i) {
    const __m512 scales = scales_at(w.scales + scaling.of(line * kTiles + static_cast<std::size_t>(i)));
    float* const to = sums + i * static_cast<int>(kTileRows);
    _mm512_store_ps(to, _mm512_fmadd_ps(whole[i], scales, _mm512_load_ps(to)));
  }
}

// Segments [begin, end) of a strip for one token. `totals`: a strip's sums of integers, of all planes.
template <class Line, int kPlanes>
void multiply_dense(const LinearView& w, const Inputs& x, std::size_t token, std::size_t strip, std::size_t begin,
                    std::size_t end, float* sums, std::int32_t* totals) {
  const std::size_t outputs = w.line_tiles() * kTileRows, first = strip * w.strip_lines(), lines = w.lines_of(strip);
  const std::uint8_t* const from = dense_strip(w, strip);
  const std::size_t bytes = column_bytes(w, strip), stride = lines * outputs;
  const Quads quads(w, x, token, end);
  const std::size_t start = quads.starts[begin];
  Ahead<Line::kFetched>(quads, start, least(start + Line::kQuads, quads.end), from, bytes, nullptr, 0).finish();
  stretches(quads, begin, end, Line::kQuads, [&](const Stretch& s, std::size_t later) {
    const Scaling scaling(w, s.segment);
    Ahead<Line::kFetched> ahead(quads, s.last, later, from, bytes, nullptr, (s.last - s.first) * lines);
    for (std::size_t i = 0; i < lines; ++i) {
      Line weights(w, strip, first + i);
      meet_quads<kPlanes>(w, x, token, first + i, scaling, quads, s, ahead, weights, totals + i * outputs, stride, sums + i * outputs);
    }
    ahead.finish();
  });
}

// Columns of a sparse strip as a stretch meets them, line after line: where each column's codes go on moves along.
struct SparseStrip {
  const std::uint8_t* from;
  const std::uint32_t* starts;  // of the columns
  std::uint32_t* next;          // where codes go on, of the columns from `first_place` on
  const std::uint32_t* first_place;

  const std::uint8_t* masks(const std::uint32_t* place) const { return from + starts[*place]; }
  std::uint32_t& at(const std::uint32_t* place) const { return next[place - first_place]; }
};

// What the masks at `bits` keep of two times 64 codes, the second times 16, pruned ones filled in; returns the bytes.
std::uint32_t take_pair(const std::uint8_t* bits, const std::uint8_t* codes, __m512i zeros, __m512i high, __m512i& first,
                        __m512i& second) {
  const __m512i packed = _mm512_loadu_si512(codes);
  const __mmask64 even = mask64(bits), odd = mask64(bits + 8);
  first = _mm512_mask_expand_epi8(zeros, even, low_nibbles(packed));
  second = _mm512_mask_expand_epi8(high, odd, high_nibbles(packed));
  const auto n = _mm_popcnt_u64(even), m = _mm_popcnt_u64(odd);
  return static_cast<std::uint32_t>(n > m ? n : m);
}

// Zero points of four tiles, as a line's bytes.
__m512i zero_bytes(const LinearView& w, std::size_t tile, const Scaling& scaling) {
  if (w.zeros == nullptr) return _mm512_set1_epi8(static_cast<char>(w.zero));
  alignas(64) std::uint8_t bytes[64];
  for (std::size_t t = 0; t < 4; ++t) {
    std::memcpy(bytes + 16 * t, w.zeros + scaling.of(tile + t), 16);
  }
  const __m512i turned = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(turned, _mm512_load_si512(bytes));
}

// Units of a sparse line at a quad, to be taken once per line.
struct SparseLine {
  static constexpr int kPerByte = 2;
  static constexpr bool kOnce = true;
  static constexpr int kFetched = 4;  // columns are short, and what they end in is not a whole piece
  static constexpr int kQuads = 4;
  SparseStrip strip;
  std::size_t masks;  // bytes behind a column's start
  __m512i zeros, high;

  SparseLine(const LinearView& w, const SparseStrip& s, std::size_t line, std::size_t within, const Scaling& scaling)
      : strip(s), masks(within * kLineMasks), zeros(zero_bytes(w, line * 8, scaling)),
        high(_mm512_slli_epi16(zero_bytes(w, line * 8 + 4, scaling), 4)) {}

  void take(const std::uint32_t* places, __m512i units[8]) const {
    __m512i low_bytes[4], high_bytes[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      std::uint32_t& at = strip.at(places + j);
      at += take_pair(strip.masks(places + j) + masks, strip.from + at, zeros, high, low_bytes[j], high_bytes[j]);
    }
    interleave(low_bytes[0], low_bytes[1], low_bytes[2], low_bytes[3], units);
    interleave(high_bytes[0], high_bytes[1], high_bytes[2], high_bytes[3], units + 4);
  }
};

// The same of columns of fours; kOwn: tiles have zero points of their own.
template <bool kOwn>
struct SparseFours {
  static constexpr int kPerByte = 2;
  static constexpr bool kOnce = true;
  static constexpr int kFetched = 4;
  static constexpr int kQuads = 8;
  SparseStrip strip;
  std::size_t masks;
  __m512i zeros[kOwn ? 4 : 1], high[kOwn ? 4 : 1];  // of the line's tiles

  SparseFours(const LinearView& w, const SparseStrip& s, std::size_t line, std::size_t within, const Scaling& scaling)
      : strip(s), masks(within * 4 * kLineMasks) {
    for (std::size_t t = 0; t < (kOwn ? 4 : 1); ++t) {
      zeros[t] = zeros_at(w, scaling.of(line * 8 + t)).bytes;
      high[t] = zeros_at(w, scaling.of(line * 8 + 4 + t)).high;
    }
  }

  void take(const std::uint32_t* place, __m512i units[8]) const {
    const std::uint8_t* const bits = strip.masks(place) + masks;
    std::uint32_t at = strip.at(place);
    near(bits + 64);
    near(strip.from + at + 128);
    near(strip.from + at + 192);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      at += take_pair(bits + kLineMasks * static_cast<std::size_t>(i), strip.from + at, zeros[kOwn ? i : 0], high[kOwn ? i : 0],
                      units[i], units[4 + i]);
    }
    strip.at(place) = at;
  }
};

template <class Line, int kPlanes>
void multiply_sparse(const LinearView& w, const Inputs& x, std::size_t token, std::size_t strip, std::size_t begin,
                     std::size_t end, float* sums, std::int32_t* totals) {
  const std::size_t outputs = w.line_tiles() * kTileRows, first = strip * w.strip_lines(), lines = w.lines_of(strip);
  const std::uint32_t masks = static_cast<std::uint32_t>(lines * w.line_masks());
  const std::uint8_t* const from = sparse_strip(w, strip);
  const std::uint32_t* const starts = sparse_starts(w, strip);
  const std::size_t stride = lines * outputs;
  std::uint32_t next[4 * Line::kQuads];
  const Quads quads(w, x, token, end);
  const std::size_t start = quads.starts[begin];
  Ahead<Line::kFetched>(quads, start, least(start + Line::kQuads, quads.end), from, 0, starts, 0).finish();
  stretches(quads, begin, end, Line::kQuads, [&](const Stretch& s, std::size_t later) {
    const Scaling scaling(w, s.segment);
    Ahead<Line::kFetched> ahead(quads, s.last, later, from, 0, starts, (s.last - s.first) * lines);
    const SparseStrip columns{from, starts, next, quads.at(s.first)};
    for (const std::uint32_t* p = columns.first_place; p != quads.at(s.last); ++p) columns.at(p) = starts[*p] + masks;
    for (std::size_t i = 0; i < lines; ++i) {
      Line weights(w, columns, first + i, i, scaling);
      meet_quads<kPlanes>(w, x, token, first + i, scaling, quads, s, ahead, weights, totals + i * outputs, stride, sums + i * outputs);
    }
    ahead.finish();
  });
}

template <int kPlanes>
void multiply(const LinearView& w, const Inputs& x, std::size_t token, std::size_t strip, std::size_t begin,
              std::size_t end, float* sums, std::int32_t* totals) {
  const auto run = [&](auto multiplied) { multiplied(w, x, token, strip, begin, end, sums, totals); };
  if (w.sparse && !w.fours) return run(multiply_sparse<SparseLine, kPlanes>);
  if (w.sparse) return run(w.zeros ? multiply_sparse<SparseFours<true>, kPlanes> : multiply_sparse<SparseFours<false>, kPlanes>);
  switch (w.kind) {
    case WeightKind::codes2: return run(w.fours ? multiply_dense<DenseFours<4>, kPlanes> : multiply_dense<DenseLine<4>, kPlanes>);
    case WeightKind::codes4: return run(w.fours ? multiply_dense<DenseFours<2>, kPlanes> : multiply_dense<DenseLine<2>, kPlanes>);
    default: return run(w.fours ? multiply_dense<DenseFours<1>, kPlanes> : multiply_dense<DenseLine<1>, kPlanes>);
  }
}

// Units of four inputs, codes divided, to[tile][unit].
template <int kPerByte>
void put(const __m512i units[4 * kPerByte], std::uint8_t* to) {
  for (std::size_t t = 0; t < 4 * kPerByte; ++t) {
    const __m512i one = _mm512_srli_epi16(units[t], static_cast<unsigned>(8 / kPerByte * (t / 4)));
    _mm512_store_si512(to + t * kChunkInputs * kTileRows, one);
  }
}

// Which columns four inputs from `input` on are.
void places_of(const LinearView& w, std::size_t input, std::uint32_t places[4]) {
  for (std::size_t j = 0; j < 4; ++j) places[j] = static_cast<std::uint32_t>(input / w.column_inputs() + j);
}

// Inputs [first, first + count) of a line as units, to[tile][unit]; count is a multiple of 4.
template <class Line>
void expand_quads(const LinearView& w, const Line& weights, std::size_t first, std::size_t count, std::uint8_t* to) {
  for (std::size_t i = 0; i < count; i += 4) {
    std::uint32_t places[4];
    places_of(w, first + i, places);
    __m512i units[4 * Line::kPerByte];
    weights.take(places, units);
    put<Line::kPerByte>(units, to + i * kTileRows);
  }
}

template <template <int> class Line>
void expand_dense(const LinearView& w, std::size_t line, std::size_t first, std::size_t count, std::uint8_t* to) {
  const auto run = [&](auto weights) { expand_quads(w, weights, first, count, to); };
  const std::size_t strip = line / w.strip_lines();
  switch (w.kind) {
    case WeightKind::codes2: return run(Line<4>(w, strip, line));
    case WeightKind::codes4: return run(Line<2>(w, strip, line));
    default: return run(Line<1>(w, strip, line));
  }
}

// `next`: where the codes of these inputs' columns go on, of a strip's lines taken in order.
template <class Line>
void expand_sparse(const LinearView& w, std::size_t line, std::size_t first, std::size_t count, std::uint8_t* to,
                   std::uint32_t* next) {
  const std::size_t strip = line / w.strip_lines();
  for (std::size_t i = 0; i < count; i += 4) {
    std::uint32_t places[4];
    places_of(w, first + i, places);
    const SparseStrip columns{sparse_strip(w, strip), sparse_starts(w, strip), next + i / w.column_inputs(), places};
    const Line weights(w, columns, line, line - strip * w.strip_lines(), Scaling(w, (first + i) / w.segment));
    __m512i units[8];
    weights.take(places, units);
    put<2>(units, to + i * kTileRows);
  }
}

void expand(const LinearView& w, std::size_t line, std::size_t first, std::size_t count, std::uint8_t* to,
            std::uint32_t* next) {
  if (!w.sparse) return w.fours ? expand_dense<DenseFours>(w, line, first, count, to) : expand_dense<DenseLine>(w, line, first, count, to);
  if (w.fours) return expand_sparse<SparseFours<true>>(w, line, first, count, to, next);
  expand_sparse<SparseLine>(w, line, first, count, to, next);
}

// Segments [begin, end) of a line for all tokens, a chunk at a time, inactive inputs as the zeros that they are; added to
// `to`. `next`: of all columns of these segments, as expand_sparse takes it.
void multiply_all(const LinearView& w, const Inputs& x, std::size_t line, std::size_t begin, std::size_t end, float* to,
                  std::size_t stride, std::uint8_t* codes, float* sums, std::uint32_t* next) {
  constexpr std::size_t kPanel = kChunkInputs * kTileRows;
  const std::size_t pair = x.tokens * 2 * kTileRows;  // sums of two tiles
  // f(of a tile and token: its sums here, and there)
  const auto each = [&](auto f) {
    for (std::size_t i = 0; i < w.line_tiles(); ++i) {
      for (std::size_t t = 0; t < x.tokens; ++t) f(sums + i / 2 * pair + (t * 2 + i % 2) * kTileRows, to + t * stride + i * kTileRows);
    }
  };
  each([](float* here, const float* there) { _mm512_store_ps(here, _mm512_load_ps(there)); });
  for (std::size_t first = begin; first < end; first += w.chunk_segments()) {
    const std::size_t count = least(w.chunk_segments(), end - first);
    expand(w, line, first * w.segment, count * w.segment, codes, next + (first - begin) * w.segment / w.column_inputs());
    for (std::size_t i = 0; i < w.line_tiles(); i += 2) {
      for (std::size_t s = 0; s < count; ++s) {
        const std::uint8_t* from = codes + i * kPanel + s * w.segment * kTileRows;
        const std::size_t tile = line * w.line_tiles() + i;
        if (x.planes == 1) meet_all<2, 1>(w, x, tile, first + s, from, kPanel, sums + i / 2 * pair);
        else meet_all<2, 2>(w, x, tile, first + s, from, kPanel, sums + i / 2 * pair);
      }
    }
  }
  each([](const float* here, float* there) { _mm512_store_ps(there, _mm512_load_ps(here)); });
}

// Up to so many tokens, each reads its own inputs of a strip, from the caches what another has read.
constexpr std::size_t kFew = 4;

}  // namespace

void avx512_run_columns(const LinearView& w, const Inputs& x, std::size_t strip, std::size_t first, std::size_t last,
                        float* sums, std::size_t stride, std::uint8_t* scratch) {
  const std::size_t outputs = w.line_tiles() * kTileRows;
  for (std::size_t t = 0; t < x.tokens; ++t) {
    std::memset(sums + t * stride, 0, w.lines_of(strip) * outputs * sizeof(float));
  }
  if (x.tokens > kFew) {
    float* const own = reinterpret_cast<float*>(scratch + kChunkInputs * outputs);
    // What is left of the scratch, as much again for lines of 4-bit codes, holds where codes go on, of so many segments.
    const std::size_t used = outputs * (kChunkInputs + x.tokens * sizeof(float)), columns = w.segment / w.column_inputs();
    const std::size_t room = (column_scratch_bytes(x.tokens) - used) / sizeof(std::uint32_t) / columns;
    auto* const next = reinterpret_cast<std::uint32_t*>(scratch + used);
    for (std::size_t begin = first, end; begin < last; begin = end) {
      end = w.sparse ? least(begin + room, last) : last;
      const std::uint32_t masks = static_cast<std::uint32_t>(w.lines_of(strip) * w.line_masks());
      for (std::size_t i = 0; w.sparse && i < (end - begin) * columns; ++i) {
        next[i] = sparse_starts(w, strip)[begin * columns + i] + masks;
      }
      for (std::size_t i = 0; i < w.lines_of(strip); ++i) {
        multiply_all(w, x, strip * w.strip_lines() + i, begin, end, sums + i * outputs, stride, scratch, own, next);
      }
    }
    return;
  }
  for (std::size_t t = 0; t < x.tokens; ++t) {
    auto* const totals = reinterpret_cast<std::int32_t*>(scratch);
    if (x.planes == 1) multiply<1>(w, x, t, strip, first, last, sums + t * stride, totals);
    else multiply<2>(w, x, t, strip, first, last, sums + t * stride, totals);
  }
}

}  // namespace tulle
