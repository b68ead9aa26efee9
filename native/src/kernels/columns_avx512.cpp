// Linears by columns by vpdpbusd: bytes of four inputs that a token has, interleaved, are units of 16 outputs × 4
// inputs. One token: a line of a segment at a time, its sums in registers. Several tokens that together leave out too
// little: a line of a chunk is brought into units in the level-2 cache once and met by all of them.
#include <immintrin.h>

#include <cstring>

#include "tables.hpp"

namespace tulle {
namespace {

#include "linear_avx512.inl"
#include "linear_avx512_meet.inl"
#include "columns_common.inl"

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

// A token's quads of one segment.
struct Quads {
  std::size_t first, last;
  const std::uint32_t* places;
  const std::int8_t* in[2];

  Quads(const LinearView& w, const Inputs& x, std::size_t token, std::size_t segment) {
    const std::uint32_t* starts = x.quad_starts + token * (w.segments + 1) + segment;
    first = starts[0];
    last = starts[1];
    places = x.quads + token * x.quad_stride * 4;
    for (std::size_t p = 0; p < x.planes; ++p) in[p] = x.quad_plane[p] + token * x.quad_stride * 4;
  }
};

// Brings what the next segment reads into the level-2 cache, an input's lines together, spread evenly over the steps of
// this one: tokens have more inputs in one segment than in the next. The processor's own prefetchers follow a stream, and
// inputs that are left out tear it.
template <int kLines>
class Ahead {
 public:
  Ahead(const Quads& quads, const std::uint8_t* from, std::size_t bytes, std::size_t steps)
      : place_(quads.places + 4 * quads.first), end_(quads.places + 4 * quads.last), from_(from), bytes_(bytes) {
    spread(static_cast<std::size_t>(end_ - place_) * (bytes + kBytes - 1) / kBytes, steps);
  }

  Ahead(const Quads& quads, const std::uint8_t* from, const std::uint32_t* starts, std::size_t steps)
      : place_(quads.places + 4 * quads.first), end_(quads.places + 4 * quads.last), from_(from), starts_(starts) {
    std::size_t bursts = 0;
    for (const std::uint32_t* p = place_; p != end_; ++p) bursts += (starts[*p + 1] - starts[*p]) / kBytes + 1;
    spread(bursts, steps);
  }

  void step() {
    for (std::size_t i = 0; i < each_; ++i) {
      if (place_ == end_) return;
      const std::size_t start = starts_ == nullptr ? *place_ * bytes_ : starts_[*place_];
      const std::size_t room = starts_ == nullptr ? bytes_ : starts_[*place_ + 1] - start;
#pragma GCC unroll 4
      for (int line = 0; line < kLines; ++line) {
        _mm_prefetch(reinterpret_cast<const char*>(from_ + start + done_) + 64 * line, _MM_HINT_T1);
      }
      done_ += kBytes;
      if (done_ < room) continue;
      done_ = 0;
      ++place_;
    }
  }

  void finish() {
    while (place_ != end_) step();
  }

 private:
  static constexpr std::size_t kBytes = kLines * kUnitBytes;

  void spread(std::size_t bursts, std::size_t steps) { each_ = steps == 0 ? bursts : (bursts + steps - 1) / steps; }

  const std::uint32_t *place_, *end_;
  const std::uint8_t* from_;
  const std::uint32_t* starts_ = nullptr;
  std::size_t bytes_ = 0, done_ = 0, each_ = 1;
};

// Units of a dense line at a quad.
template <int kPerByte>
struct DenseLine {
  static constexpr int kFetched = 1;  // lines at once
  const std::uint8_t* from;
  std::size_t bytes;  // from one input to the next

  DenseLine(const LinearView& w, std::size_t strip, std::size_t line)
      : from(dense_strip(w, strip) + (line - strip * w.strip_lines()) * kUnitBytes), bytes(column_bytes(w, strip)) {}

  const std::uint8_t* at(std::uint32_t place) const { return from + place * bytes; }

  void take(const std::uint32_t* places, __m512i units[4 * kPerByte]) const {
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

// Quads that a line meets before the next line. Neighbours that are kept together make long pieces of memory, which want
// to be read in their order: a line of all inputs after another would be strides, whose rhythm a processor takes up,
// fetching inputs that are left out (int4, units of four: 17 ms a token against 12). Of inputs that stand alone all, so
// that sums stay in registers.
inline std::size_t group_of(const Inputs& x) { return x.together ? 2 : kChunkInputs; }

// Quads [first, last) of a segment of a line. Sums of integers wait in totals [plane][stride], of this line, until all of
// the segment's quads are met; then sums [outputs of the line] += the segment.
template <int kPerByte, int kPlanes, class Line>
void meet_quads(const LinearView& w, const Inputs& x, std::size_t token, std::size_t line, std::size_t segment,
                const Quads& quads, std::size_t first, std::size_t last, Ahead<Line::kFetched>& ahead, Line& weights, std::int32_t* totals,
                std::size_t stride, float* sums) {
  constexpr int kTiles = 4 * kPerByte;
  // Sums of both planes do not fit into the registers beside those of 2-bit codes.
  constexpr int kAtOnce = kTiles * kPlanes <= 16 ? kPlanes : 1;
  static_assert(kAtOnce == kPlanes || Line::kFetched == 1, "a sparse line is taken once");
  const bool fresh = first == quads.first, whole_segment = last == quads.last;
  __m512 whole[kTiles];
#pragma GCC unroll 2
  for (int plane = 0; plane < kPlanes; plane += kAtOnce) {
    __m512i total[kAtOnce][kTiles];
#pragma GCC unroll 2
    for (int p = 0; p < kAtOnce; ++p) {
      const std::int32_t* const from = totals + static_cast<std::size_t>(plane + p) * stride;
#pragma GCC unroll 16
      for (int i = 0; i < kTiles; ++i) total[p][i] = fresh ? _mm512_setzero_si512() : _mm512_load_si512(from + 16 * i);
    }
    for (std::size_t quad = first; quad < last; ++quad) {
      __m512i units[kTiles];
      weights.take(quads.places + 4 * quad, units);
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
      if (!whole_segment) {
        std::int32_t* const to = totals + static_cast<std::size_t>(plane + p) * stride;
#pragma GCC unroll 16
        for (int i = 0; i < kTiles; ++i) _mm512_store_si512(to + 16 * i, total[p][i]);
        continue;
      }
      const std::int32_t sum = x.sums[plane + p][token * x.sum_stride + segment];
#pragma GCC unroll 16
      for (int i = 0; i < kTiles; ++i) {
        const std::size_t tile = line * kTiles + static_cast<std::size_t>(i);
        const std::size_t scale = (tile * w.scales_per_row() + segment / w.segments_per_scale) * kTileRows;
        const __m512i right = _mm512_add_epi32(divided<kPerByte>(total[p][i], i / 4), correction(w, zeros_at(w, scale), sum));
        const __m512 part = _mm512_cvtepi32_ps(right);
        whole[i] = plane + p == 0 ? part : _mm512_fmadd_ps(whole[i], _mm512_set1_ps(256), part);
      }
    }
  }
  if (!whole_segment) return;
#pragma GCC unroll 16
  for (int i = 0; i < kTiles; ++i) {
    const std::size_t tile = line * kTiles + static_cast<std::size_t>(i);
    const std::size_t scale = (tile * w.scales_per_row() + segment / w.segments_per_scale) * kTileRows;
    float* const to = sums + i * static_cast<int>(kTileRows);
    _mm512_store_ps(to, _mm512_fmadd_ps(whole[i], scales_at(w.scales + scale), _mm512_load_ps(to)));
  }
}

// Segments [begin, end) of a strip for one token. `totals`: a strip's sums of integers, of all planes.
template <int kPerByte, int kPlanes>
void multiply_dense(const LinearView& w, const Inputs& x, std::size_t token, std::size_t strip, std::size_t begin,
                    std::size_t end, float* sums, std::int32_t* totals) {
  const std::size_t outputs = w.line_tiles() * kTileRows, first = strip * w.strip_lines(), lines = w.lines_of(strip);
  const std::uint8_t* const from = dense_strip(w, strip);
  const std::size_t bytes = column_bytes(w, strip), stride = lines * outputs;
  for (std::size_t segment = begin; segment < end; ++segment) {
    const Quads quads(w, x, token, segment), later(w, x, token, least(segment + 1, end - 1));
    if (segment == begin) Ahead<1>(quads, from, bytes, 0).finish();
    Ahead<1> ahead(later, from, bytes, (quads.last - quads.first) * lines);
    for (std::size_t quad = quads.first, step = group_of(x); quad < quads.last; quad += step) {
      for (std::size_t i = 0; i < lines; ++i) {
        DenseLine<kPerByte> weights(w, strip, first + i);
        meet_quads<kPerByte, kPlanes>(w, x, token, first + i, segment, quads, quad, least(quad + step, quads.last), ahead,
                               weights, totals + i * outputs, stride, sums + i * outputs);
      }
    }
    ahead.finish();
  }
}

// Units of a sparse line at a quad: what the masks keep of two times 64 outputs, the second times 16, pruned codes
// filled in. `next` holds where each input's codes go on.
struct SparseLine {
  static constexpr int kFetched = 4;  // pieces are short, and what they end in is not a whole line
  const std::uint8_t* strip;
  const std::uint32_t* starts;
  std::size_t masks;        // bytes behind an input's start
  std::uint32_t* next;
  std::size_t first_quad;   // of `next`
  __m512i zeros, high;
  const std::uint32_t* all;

  // Of a segment, line after line, once per line: where codes go on moves along.
  void take(const std::uint32_t* places, __m512i units[8]) const {
    std::uint32_t* const at = next + (places - all) - 4 * first_quad;
    __m512i low_bytes[4], high_bytes[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const std::uint8_t* const bits = strip + starts[places[j]] + masks;
      const __m512i packed = _mm512_loadu_si512(strip + at[j]);
      const __mmask64 even = mask64(bits), odd = mask64(bits + 8);
      low_bytes[j] = _mm512_mask_expand_epi8(zeros, even, low_nibbles(packed));
      high_bytes[j] = _mm512_mask_expand_epi8(high, odd, high_nibbles(packed));
      const auto n = _mm_popcnt_u64(even), m = _mm_popcnt_u64(odd);
      at[j] += static_cast<std::uint32_t>(n > m ? n : m);
    }
    interleave(low_bytes[0], low_bytes[1], low_bytes[2], low_bytes[3], units);
    interleave(high_bytes[0], high_bytes[1], high_bytes[2], high_bytes[3], units + 4);
  }
};

// Zero points of four tiles, as a line's bytes.
__m512i zero_bytes(const LinearView& w, std::size_t tile, std::size_t segment) {
  if (w.zeros == nullptr) return _mm512_set1_epi8(static_cast<char>(w.zero));
  alignas(64) std::uint8_t bytes[64];
  for (std::size_t t = 0; t < 4; ++t) {
    const std::size_t scale = ((tile + t) * w.scales_per_row() + segment / w.segments_per_scale) * kTileRows;
    std::memcpy(bytes + 16 * t, w.zeros + scale, 16);
  }
  const __m512i turned = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(turned, _mm512_load_si512(bytes));
}

template <int kPlanes>
void multiply_sparse(const LinearView& w, const Inputs& x, std::size_t token, std::size_t strip, std::size_t begin,
                     std::size_t end, float* sums, std::int32_t* totals) {
  const std::size_t outputs = w.line_tiles() * kTileRows, first = strip * w.strip_lines(), lines = w.lines_of(strip);
  const std::uint32_t masks = static_cast<std::uint32_t>(lines * kLineMasks);
  const std::uint8_t* const from = sparse_strip(w, strip);
  const std::uint32_t* const starts = sparse_starts(w, strip);
  const std::size_t stride = lines * outputs;
  std::uint32_t next[kChunkInputs + 4];
  for (std::size_t segment = begin; segment < end; ++segment) {
    const Quads quads(w, x, token, segment), later(w, x, token, least(segment + 1, end - 1));
    if (segment == begin) Ahead<4>(quads, from, starts, 0).finish();
    Ahead<4> ahead(later, from, starts, (quads.last - quads.first) * lines);
    for (std::size_t i = 4 * quads.first; i < 4 * quads.last; ++i) next[i - 4 * quads.first] = starts[quads.places[i]] + masks;
    for (std::size_t quad = quads.first, step = group_of(x); quad < quads.last; quad += step) {
      for (std::size_t i = 0; i < lines; ++i) {
        const std::size_t tile = (first + i) * w.line_tiles();
        SparseLine weights{from, starts, i * kLineMasks, next, quads.first, zero_bytes(w, tile, segment),
                           _mm512_slli_epi16(zero_bytes(w, tile + 4, segment), 4), quads.places};
        meet_quads<2, kPlanes>(w, x, token, first + i, segment, quads, quad, least(quad + step, quads.last), ahead,
                               weights, totals + i * outputs, stride, sums + i * outputs);
      }
    }
    ahead.finish();
  }
}

template <int kPlanes>
void multiply(const LinearView& w, const Inputs& x, std::size_t token, std::size_t strip, std::size_t begin,
              std::size_t end, float* sums, std::int32_t* totals) {
  if (w.sparse) return multiply_sparse<kPlanes>(w, x, token, strip, begin, end, sums, totals);
  switch (w.kind) {
    case WeightKind::codes2: return multiply_dense<4, kPlanes>(w, x, token, strip, begin, end, sums, totals);
    case WeightKind::codes4: return multiply_dense<2, kPlanes>(w, x, token, strip, begin, end, sums, totals);
    default: return multiply_dense<1, kPlanes>(w, x, token, strip, begin, end, sums, totals);
  }
}

// Inputs [first, first + count) of a line as units, to[tile][unit]; count is a multiple of 4.
template <int kPerByte>
void expand_dense(const LinearView& w, std::size_t line, std::size_t first, std::size_t count, std::uint8_t* to) {
  const DenseLine<kPerByte> weights(w, line / w.strip_lines(), line);
  for (std::size_t i = 0; i < count; i += 4) {
    std::uint32_t places[4];
    for (std::size_t j = 0; j < 4; ++j) places[j] = static_cast<std::uint32_t>(first + i + j);
    __m512i units[4 * kPerByte];
    weights.take(places, units);
    for (std::size_t t = 0; t < 4 * kPerByte; ++t) {
      const __m512i one = _mm512_srli_epi16(units[t], static_cast<unsigned>(8 / kPerByte * (t / 4)));
      _mm512_store_si512(to + t * kChunkInputs * kTileRows + i * kTileRows, one);
    }
  }
}

// `next`: where the codes of these inputs go on, of a strip's lines taken in order; null: they are counted.
void expand_sparse(const LinearView& w, std::size_t line, std::size_t first, std::size_t count, std::uint8_t* to,
                   std::uint32_t* next) {
  const std::size_t strip = line / w.strip_lines(), begin = strip * w.strip_lines();
  const std::uint8_t* const from = sparse_strip(w, strip);
  const std::uint32_t* const starts = sparse_starts(w, strip);
  for (std::size_t i = 0; i < count; i += 4) {
    std::uint32_t places[4], counted[4];
    for (std::size_t j = 0; j < 4; ++j) {
      places[j] = static_cast<std::uint32_t>(first + i + j);
      if (next != nullptr) continue;
      counted[j] = starts[places[j]] + static_cast<std::uint32_t>(w.lines_of(strip) * kLineMasks);
      for (std::size_t before = begin; before < line; ++before) {
        const std::uint8_t* bits = from + starts[places[j]] + (before - begin) * kLineMasks;
        const auto n = _mm_popcnt_u64(mask64(bits)), m = _mm_popcnt_u64(mask64(bits + 8));
        counted[j] += static_cast<std::uint32_t>(n > m ? n : m);
      }
    }
    const std::size_t segment = (first + i) / w.segment, tile = line * w.line_tiles();
    SparseLine weights{from, starts, (line - begin) * kLineMasks, next != nullptr ? next + i : counted, 0,
                       zero_bytes(w, tile, segment), _mm512_slli_epi16(zero_bytes(w, tile + 4, segment), 4), places};
    __m512i units[8];
    weights.take(places, units);
    for (std::size_t t = 0; t < 8; ++t) {
      const __m512i one = t < 4 ? units[t] : _mm512_srli_epi16(units[t], 4);
      _mm512_store_si512(to + t * kChunkInputs * kTileRows + i * kTileRows, one);
    }
  }
}

void expand(const LinearView& w, std::size_t line, std::size_t first, std::size_t count, std::uint8_t* to,
            std::uint32_t* next) {
  if (w.sparse) return expand_sparse(w, line, first, count, to, next);
  switch (w.kind) {
    case WeightKind::codes2: return expand_dense<4>(w, line, first, count, to);
    case WeightKind::codes4: return expand_dense<2>(w, line, first, count, to);
    default: return expand_dense<1>(w, line, first, count, to);
  }
}

// Chunks [begin, end) of a line for all tokens, inactive inputs as the zeros that they are. `next`: of all inputs of these
// chunks, as expand_sparse takes it.
void multiply_all(const LinearView& w, const Inputs& x, std::size_t line, std::size_t begin, std::size_t end, float* to,
                  std::size_t stride, std::uint8_t* codes, float* sums, std::uint32_t* next) {
  constexpr std::size_t kPanel = kChunkInputs * kTileRows;
  const std::size_t pair = x.tokens * 2 * kTileRows;  // sums of two tiles
  std::memset(sums, 0, w.line_tiles() / 2 * pair * sizeof(float));
  for (std::size_t chunk = begin; chunk < end; ++chunk) {
    const std::size_t first = chunk * w.chunk_segments();
    std::uint32_t* const of_chunk = next == nullptr ? nullptr : next + (first - begin * w.chunk_segments()) * w.segment;
    expand(w, line, first * w.segment, w.segments_of(chunk) * w.segment, codes, of_chunk);
    for (std::size_t i = 0; i < w.line_tiles(); i += 2) {
      for (std::size_t s = 0; s < w.segments_of(chunk); ++s) {
        const std::uint8_t* from = codes + i * kPanel + s * w.segment * kTileRows;
        const std::size_t tile = line * w.line_tiles() + i;
        if (x.planes == 1) meet_all<2, 1>(w, x, tile, first + s, from, kPanel, sums + i / 2 * pair);
        else meet_all<2, 2>(w, x, tile, first + s, from, kPanel, sums + i / 2 * pair);
      }
    }
  }
  for (std::size_t i = 0; i < w.line_tiles(); ++i) {
    for (std::size_t t = 0; t < x.tokens; ++t) {
      const float* const from = sums + i / 2 * pair + (t * 2 + i % 2) * kTileRows;
      _mm512_store_ps(to + t * stride + i * kTileRows, _mm512_load_ps(from));
    }
  }
}

// Up to so many tokens, each reads its own inputs of a strip, from the caches what another has read.
constexpr std::size_t kFew = 4;

}  // namespace

void avx512_run_columns(const LinearView& w, const Inputs& x, std::size_t strip, std::size_t first, std::size_t last,
                        float* sums, std::size_t stride, std::uint8_t* scratch) {
  const std::size_t outputs = w.line_tiles() * kTileRows;
  if (x.tokens > kFew) {
    float* const own = reinterpret_cast<float*>(scratch + kChunkInputs * outputs);
    // What is left of the scratch holds where codes go on, if it is enough.
    const std::size_t used = outputs * (kChunkInputs + x.tokens * sizeof(float)), start = w.first_segment(first) * w.segment;
    const std::size_t inputs = w.first_segment(last) * w.segment - start;
    std::uint32_t* next = nullptr;
    if (w.sparse && used + inputs * sizeof(std::uint32_t) <= column_scratch_bytes(x.tokens)) {
      next = reinterpret_cast<std::uint32_t*>(scratch + used);
      const std::uint32_t masks = static_cast<std::uint32_t>(w.lines_of(strip) * kLineMasks);
      for (std::size_t i = 0; i < inputs; ++i) next[i] = sparse_starts(w, strip)[start + i] + masks;
    }
    for (std::size_t i = 0; i < w.lines_of(strip); ++i) {
      multiply_all(w, x, strip * w.strip_lines() + i, first, last, sums + i * outputs, stride, scratch, own, next);
    }
    return;
  }
  const std::size_t begin = w.first_segment(first), end = w.first_segment(last);
  for (std::size_t t = 0; t < x.tokens; ++t) {
    std::memset(sums + t * stride, 0, w.lines_of(strip) * outputs * sizeof(float));
    auto* const totals = reinterpret_cast<std::int32_t*>(scratch);
    if (x.planes == 1) multiply<1>(w, x, t, strip, begin, end, sums + t * stride, totals);
    else multiply<2>(w, x, t, strip, begin, end, sums + t * stride, totals);
  }
}

}  // namespace tulle
