// The Scaling Transformer's kernels, plain loops: the definition that the vectorised ones must equal, bit for bit
// where weights are codes, up to the order of sums elsewhere.
//
//   rows, chosen   y[r] = W[r]·x            a matrix row by row
//   panels         c[j] += a[k]·B[k][j]     j within 16 outputs side by side
#include <cstring>

#include "cpu/tables.hpp"

namespace tulle {
namespace {

float from_bf16(std::uint16_t bits) {
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float found;
  std::memcpy(&found, &wide, sizeof found);
  return found;
}

// Number `index`; a code without its scale.
float number(WeightKind kind, const void* values, std::size_t index) {
  switch (kind) {
    case WeightKind::f32: return static_cast<const float*>(values)[index];
    case WeightKind::bf16: return from_bf16(static_cast<const std::uint16_t*>(values)[index]);
    default: return static_cast<float>(static_cast<const std::uint8_t*>(values)[index]) - 128.0f;
  }
}

float product(const Matrix& w, std::size_t row, const RowInputs& x, std::size_t token) {
  const std::size_t first = row * w.columns, at = token * x.stride;
  if (w.kind == WeightKind::codes8) {
    const std::uint8_t* codes = static_cast<const std::uint8_t*>(w.values) + first;
    std::int32_t total = 0;
    for (std::size_t i = 0; i < w.columns; ++i) total += (codes[i] - 128) * x.codes[at + i];
    return static_cast<float>(total) * (w.scales[row] * x.steps[token]);
  }
  float total = 0;
  for (std::size_t i = 0; i < w.columns; ++i) total += number(w.kind, w.values, first + i) * x.floats[at + i];
  return total;
}

void rows(const Matrix& w, std::size_t first, std::size_t last, const RowInputs& x, float* y, std::size_t y_stride) {
  for (std::size_t t = 0; t < x.tokens; ++t) {
    for (std::size_t row = first; row < last; ++row) y[t * y_stride + row] = product(w, row, x, t);
  }
}

void chosen(const Matrix& w, const std::int32_t* list, std::size_t count, const RowInputs& x, std::size_t token,
            float* y) {
  for (std::size_t i = 0; i < count; ++i) y[i] = product(w, static_cast<std::size_t>(list[i]), x, token);
}

void add_rows(const Matrix& w, const std::int32_t* list, const float* factors, std::size_t count, float* y) {
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t row = static_cast<std::size_t>(list[i]);
    const float factor = w.scales != nullptr ? factors[i] * w.scales[row] : factors[i];
    for (std::size_t c = 0; c < w.columns; ++c) y[c] += factor * number(w.kind, w.values, row * w.columns + c);
  }
}

void panels(const Panels& b, std::size_t first, std::size_t last, std::size_t from, std::size_t to, const float* a,
            std::size_t a_stride, std::size_t count, float* c, std::size_t c_stride) {
  for (std::size_t r = 0; r < count; ++r) {
    for (std::size_t panel = first; panel < last; ++panel) {
      float* out = c + r * c_stride + (panel - first) * kPanel;
      for (std::size_t k = from; k < to; ++k) {
        const std::size_t at = (panel * b.inputs + k) * kPanel;
        for (std::size_t j = 0; j < kPanel; ++j)
          out[j] += a[r * a_stride + k - from] * number(b.kind, b.values, at + j);
      }
    }
  }
}

void scaled(const Matrix& w, std::size_t row, std::size_t from, std::size_t to, const float* x, float* y) {
  for (std::size_t i = from; i < to; ++i) y[i - from] = x[i] * number(w.kind, w.values, row * w.columns + i);
}

void argmax(const float* x, std::size_t blocks, std::size_t block, std::int32_t unit, std::int32_t* units) {
  for (std::size_t b = 0; b < blocks; ++b, x += block) {
    std::size_t best = 0;
    for (std::size_t i = 1; i < block; ++i) {
      if (x[i] > x[best]) best = i;
    }
    units[b] = unit + static_cast<std::int32_t>(b * block + best);
  }
}

}  // namespace

const ScalingKernels scalar_scaling = {rows, chosen, add_rows, panels, scaled, argmax};

}  // namespace tulle
