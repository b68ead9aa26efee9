// Linears in tiles, plain loops: the definition that the other files must equal, bit for bit where weights are codes.
//
//   chunk of a tile, expanded (pruned codes at their zero point)      inputs of token t
//   unit u: [o0: i0 i1 i2 i3][o1: i0 i1 i2 i3] … [o15: …]             x[4u … 4u+3]
//
//   per segment and output: total = −zero·Σx + Σ code·x  (32 bits)    sum = fma(float(total), scale, sum)
//                            with minima, then:             sum = fma(float(Σx), minimum, sum)
//   y = sum · step of the token       with scales of one byte: (sum · row scale) · step
#include <cmath>
#include <cstring>

#include "cpu/tables.hpp"
#include "linear/dense_code.hpp"

namespace tulle {
namespace {

#include "linear/common.inl"

bool kept(const LinearView& w, std::size_t index) { return (w.masks[index / 8] >> (index % 8)) & 1; }

unsigned low(std::uint8_t pair) { return pair & 15u; }
unsigned high(std::uint8_t pair) { return pair >> 4; }

// The codes that a sparse linear stores, one after the other. Of 4 bits, both units of a pair are counted from its first
// byte.
class Codes {
 public:
  Codes(WeightKind kind, const std::uint8_t* values) : nibbles_(kind == WeightKind::codes4), values_(values) {}

  // Before code `index` of the chunk, stored or not.
  void at(std::size_t index) {
    if (!nibbles_ || index % kPairCodes != 0) return;
    values_ += taken_[0] > taken_[1] ? taken_[0] : taken_[1];
    taken_[0] = taken_[1] = 0;
  }
  unsigned next(std::size_t index) {
    if (!nibbles_) return *values_++;
    const std::size_t odd = index / kUnitBytes % 2;
    const std::uint8_t pair = values_[taken_[odd]++];
    return odd == 0 ? low(pair) : high(pair);
  }

 private:
  bool nibbles_;
  const std::uint8_t* values_;
  std::size_t taken_[2] = {0, 0};
};

// Codes of a tile's chunk in the order of the units, pruned ones at their zero point.
void expand_codes(const LinearView& w, std::size_t tile, std::size_t chunk, std::uint8_t* codes) {
  const std::size_t first = (tile * w.padded() + chunk * w.chunk_segments() * w.segment) * kTileRows;
  const std::size_t per_segment = w.segment * kTileRows, count = w.segments_of(chunk) * per_segment;
  if (!w.sparse()) {
    for (std::size_t i = 0; i < count; ++i) codes[i] = static_cast<std::uint8_t>(dense_code(w.kind, w.values, first + i));
    return;
  }
  Codes stored(w.kind, w.values + w.offsets[tile * w.chunks() + chunk]);
  for (std::size_t i = 0; i < count; ++i) {
    stored.at(i);
    if (!kept(w, first + i)) {
      const std::size_t scale = (chunk * w.chunk_segments() + i / per_segment) / w.segments_per_scale;
      codes[i] = w.zeros ? w.zeros[(tile * w.scales_per_row() + scale) * kTileRows + i / 4 % kTileRows] : w.zero;
      continue;
    }
    codes[i] = static_cast<std::uint8_t>(stored.next(i));
  }
}

// Weights of a tile's chunk as [inputs][16].
void expand_floats(const LinearView& w, std::size_t tile, std::size_t chunk, float* out) {
  const std::size_t pair = w.unit_inputs(), size = w.kind == WeightKind::bf16 ? 2 : 4;
  const std::size_t first = (tile * w.padded() + chunk * w.chunk_segments() * w.segment) * kTileRows;
  const std::size_t count = w.segments_of(chunk) * w.segment * kTileRows;
  const std::uint8_t* values = w.values + (w.sparse() ? w.offsets[tile * w.chunks() + chunk] : first * size);
  for (std::size_t i = 0; i < count; ++i) {
    float value = 0;
    if (!w.sparse() || kept(w, first + i)) {
      if (size == 2) {
        std::uint16_t bits;
        std::memcpy(&bits, values, 2);
        value = from_bf16(bits);
      } else {
        std::memcpy(&value, values, 4);
      }
      values += size;
    }
    const std::size_t unit = i / (kTileRows * pair), row = i / pair % kTileRows, input = unit * pair + i % pair;
    out[input * kTileRows + row] = value;
  }
}

void run_codes(const LinearView& w, const Inputs& x, std::size_t tile, float* sums, std::uint8_t* codes) {
  for (std::size_t chunk = 0; chunk < w.chunks(); ++chunk) {
    expand_codes(w, tile, chunk, codes);
    for (std::size_t s = 0; s < w.segments_of(chunk); ++s) {
      const std::size_t segment = chunk * w.chunk_segments() + s;
      const std::size_t scale = (tile * w.scales_per_row() + segment / w.segments_per_scale) * kTileRows;
      const std::uint8_t* units = codes + s * w.segment * kTileRows;
      for (std::size_t t = 0; t < x.tokens; ++t) {
        for (std::size_t row = 0; row < kTileRows; ++row) {
          const std::int32_t zero = w.zeros ? w.zeros[scale + row] : w.zero;
          float whole = 0;
          for (std::size_t p = 0; p < x.planes; ++p) {
            const std::int8_t* in = x.plane[p] + t * x.stride + segment * w.segment;
            std::int32_t total = -zero * x.sums[p][t * x.sum_stride + segment];
            for (std::size_t i = 0; i < w.segment; ++i) {
              total += static_cast<std::int32_t>(units[(i / 4 * kTileRows + row) * 4 + i % 4]) * in[i];
            }
            whole = whole * 256 + static_cast<float>(total);
          }
          float& sum = sums[t * kTileRows + row];
          sum = std::fma(whole, scale_value(w.scales, w.scale_kind, scale + row), sum);
          if (w.minima) sum = std::fma(input_sum(x, t, segment), scale_value(w.minima, w.scale_kind, scale + row), sum);
        }
      }
    }
  }
}

void run_floats(const LinearView& w, const Inputs& x, std::size_t tile, float* sums, float* weights) {
  for (std::size_t chunk = 0; chunk < w.chunks(); ++chunk) {
    expand_floats(w, tile, chunk, weights);
    const std::size_t inputs = w.segments_of(chunk) * w.segment;
    for (std::size_t t = 0; t < x.tokens; ++t) {
      const float* in = x.floats + t * x.stride + chunk * w.chunk_segments() * w.segment;
      for (std::size_t i = 0; i < inputs; ++i) {
        for (std::size_t row = 0; row < kTileRows; ++row) {
          sums[t * kTileRows + row] += weights[i * kTileRows + row] * in[i];
        }
      }
    }
  }
}

void run(const LinearView& w, const Inputs& x, std::size_t first, std::size_t last, float* y, std::size_t y_stride,
         std::uint8_t* scratch) {
  float* sums = reinterpret_cast<float*>(scratch + kChunkInputs * kTileRows * sizeof(float));
  for (std::size_t tile = first; tile < last; ++tile) {
    std::memset(sums, 0, x.tokens * kTileRows * sizeof(float));
    if (w.is_codes()) run_codes(w, x, tile, sums, scratch);
    else run_floats(w, x, tile, sums, reinterpret_cast<float*>(scratch));
    for (std::size_t t = 0; t < x.tokens; ++t) {
      for (std::size_t row = 0; row < rows_of(w, tile); ++row) {
        const float sum = sums[t * kTileRows + row];
        const std::size_t at = tile * kTileRows + row;
        y[t * y_stride + at] = w.is_codes() ? row_scaled(w, at, sum) * x.steps[t] : sum;
      }
    }
  }
}

}  // namespace

const LinearKernels scalar_linear = {run, scalar_run_input_major};

}  // namespace tulle
