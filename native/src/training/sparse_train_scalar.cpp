// Products with held masks, as sparse_train.hpp defines them.
//
//   panel [column][64 tokens]     sums [row][64 tokens]     one entry: sums[row] = fma(value, panel[column], sums[row])
#include <cmath>

#include "cpu/tables.hpp"

namespace tulle {
namespace {

constexpr std::size_t kLanes = 16;

std::size_t padded(std::size_t tokens) { return (tokens + kLanes - 1) / kLanes * kLanes; }

void pack(const float* x, std::size_t stride, std::size_t tokens, std::size_t columns, float* panel) {
  for (std::size_t c = 0; c < columns; ++c) {
    for (std::size_t t = 0; t < padded(tokens); ++t)
      panel[c * kPanelTokens + t] = t < tokens ? x[t * stride + c] : 0.0f;
  }
}

void unpack(const float* sums, std::size_t tokens, std::size_t rows, float* y, std::size_t stride) {
  for (std::size_t t = 0; t < tokens; ++t) {
    for (std::size_t r = 0; r < rows; ++r) y[t * stride + r] = sums[r * kPanelTokens + t];
  }
}

void multiply(const SparseBlock& block, const float* values, const float* panel, std::size_t tokens, float* sums) {
  const std::uint16_t* offset = block.offsets;
  for (std::size_t i = 0; i < block.run_count; ++i) {
    float* const row = sums + (block.runs[i] >> 8) * kPanelTokens;
    for (std::size_t n = block.runs[i] & 255; n > 0; --n, ++values, ++offset) {
      for (std::size_t t = 0; t < padded(tokens); ++t) row[t] = std::fma(*values, panel[*offset + t], row[t]);
    }
  }
}

void correlate(const SparseBlock& block, const float* panel, const float* gradients, std::size_t tokens, bool add,
               float* values) {
  const std::uint16_t* offset = block.offsets;
  for (std::size_t i = 0; i < block.run_count; ++i) {
    const float* const row = gradients + (block.runs[i] >> 8) * kPanelTokens;
    for (std::size_t n = block.runs[i] & 255; n > 0; --n, ++values, ++offset) {
      const float* const column = panel + *offset;
      float lane[kLanes], four[kLanes / 4];
      for (std::size_t l = 0; l < kLanes; ++l) {
        lane[l] = row[l] * column[l];
        for (std::size_t t = l + kLanes; t < padded(tokens); t += kLanes)
          lane[l] = std::fma(row[t], column[t], lane[l]);
      }
      for (std::size_t f = 0; f < kLanes / 4; ++f) {
        four[f] = (lane[4 * f] + lane[4 * f + 2]) + (lane[4 * f + 1] + lane[4 * f + 3]);
      }
      const float sum = (four[0] + four[2]) + (four[1] + four[3]);
      *values = add ? *values + sum : sum;
    }
  }
}

}  // namespace

const SparseTrainKernels scalar_sparse_train = {pack, unpack, multiply, correlate};

}  // namespace tulle
