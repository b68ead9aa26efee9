// The products of a Scaling Transformer (docs/guide/scaling-transformers.md). Threads share outputs: rows of a matrix,
// modules of a multiplicative layer and of convolutions, blocks of units.
#include <cstring>

#include "scaling/state.hpp"

namespace tulle {

// Inputs of token t for weights of codes: 8 bits, one step per token.
void ScalingEngine::State::quantise(const float* x, std::size_t n, std::size_t t) {
  if (code_stride == 0) return;
  const GridRange range = ops.range(x, n, {8, true, 1.0f});
  std::int8_t* to = codes.data() + t * code_stride;
  ops.quantise(x, n, range, to, nullptr);
  steps.data()[t] = range.step;
  sums.data()[t] = ops.sum(to, n);
}

RowInputs ScalingEngine::State::inputs_of(const Matrix& w, const float* x, std::size_t tokens) const {
  if (w.kind != WeightKind::codes8) return {tokens, w.columns, sizes.deterministic, x, nullptr, nullptr, nullptr};
  return {tokens, code_stride, sizes.deterministic, nullptr, codes.data(), steps.data(), sums.data()};
}

// This thread's rows of y [n][rows] = x·Wᵀ + bias; x [n][columns].
void ScalingEngine::State::project(const ScalingPass& pass, const Projection& p, const float* x, std::size_t n,
                                   float* y, bool relu) const {
  const Matrix& w = p.weight;
  const std::size_t first = begin_of(w.rows, pass.thread, pass.team, 4);
  const std::size_t last = begin_of(w.rows, pass.thread + 1, pass.team, 4);
  if (first == last) return;
  kernels.rows(w, first, last, inputs_of(w, x, n), y, w.rows);
  for (std::size_t t = 0; t < n; ++t) {
    float* row = y + t * w.rows;
    if (p.bias != nullptr) ops.add(row + first, p.bias + first, last - first);
    if (!relu) continue;
    for (std::size_t i = first; i < last; ++i) row[i] = row[i] > 0 ? row[i] : 0;
  }
}

// c [modules [first, last)][panels [from, to) · kPanel] of the multiplicative layer, for one token.
void ScalingEngine::State::multiply(const Multiplicative& w, const float* x, std::size_t first, std::size_t last,
                                    std::size_t from, std::size_t to, ScalingScratch& s, float* c) const {
  const std::size_t stride = (to - from) * kPanel, inputs = w.d.columns;
  std::memset(c, 0, (last - first) * stride * sizeof(float));
  for (std::size_t begin = 0; begin < inputs; begin += kInputs) {
    const std::size_t end = std::min(inputs, begin + kInputs);
    for (std::size_t m = first; m < last; ++m) {
      kernels.scaled(w.d, m, begin, end, x, s.scaled.data() + (m - first) * kInputs);
    }
    kernels.panels(w.e, from, to, begin, end, s.scaled.data(), kInputs, last - first, c, stride);
  }
}

// Modules [first, last) of token t's image.
void ScalingEngine::State::make_image(const ScalingLayer& l, std::size_t t, std::size_t first, std::size_t last,
                                      ScalingScratch& s) {
  const Multiplicative& w = l.multiplicative;
  const std::size_t size = model.module_size(), stride = w.e.panels() * kPanel;
  multiply(w, normed.data() + t * model.hidden, first, last, 0, w.e.panels(), s, s.modules.data());
  for (std::size_t m = first; m < last; ++m) {
    float* to = past.image(t) + (m + 1) * size;
    std::memcpy(to, s.modules.data() + (m - first) * stride, size * sizeof(float));
    if (w.bias != nullptr) ops.add(to, w.bias + m * size, size);
  }
}

// Modules [first, last) of y for token t. `width`: modules that the convolution sees side by side.
void ScalingEngine::State::convolve(const Convolution& conv, std::size_t width, std::size_t layer, std::size_t t,
                                    std::size_t first, std::size_t last, ScalingScratch& s, float* y) const {
  const std::size_t size = model.module_size(), stride = conv.weight.panels() * kPanel, inputs = width * size;
  float* c = s.modules.data();
  std::memset(c, 0, (last - first) * stride * sizeof(float));
  for (std::size_t tap = 0; tap < kTaps; ++tap) {
    // Neighbouring modules overlap: a row begins `size` after the one before.
    const float* from = past.tap(layer, t, tap) + (first + (width == 1 ? 1 : 0)) * size;
    kernels.panels(conv.weight, 0, conv.weight.panels(), tap * inputs, (tap + 1) * inputs, from, size, last - first, c,
                   stride);
  }
  for (std::size_t m = first; m < last; ++m) {
    float* to = y + t * model.hidden + m * size;
    std::memcpy(to, c + (m - first) * stride, size * sizeof(float));
    if (conv.bias != nullptr) ops.add(to, conv.bias, size);
  }
}

// Blocks [first, last) of the sparse feed-forward for token t: to [hidden].
void ScalingEngine::State::choose(const ScalingLayer& l, std::size_t t, std::size_t first, std::size_t last, float* to,
                                  ScalingScratch& s) const {
  const std::size_t block = model.block, begin = first * block, end = last * block;
  const std::size_t from_panel = begin / kPanel, to_panel = (end + kPanel - 1) / kPanel;
  float* logits = s.logits.data();
  std::memset(logits, 0, (to_panel - from_panel) * kPanel * sizeof(float));
  kernels.panels(l.c2, from_panel, to_panel, 0, l.c1.rows, ranks.data() + t * l.c1.rows, l.c1.rows, 1, logits, 0);
  logits += begin - from_panel * kPanel;
  ops.add(logits, l.c2_bias + begin, end - begin);
  kernels.argmax(logits, last - first, block, static_cast<std::int32_t>(begin), s.units.data());
  kernels.chosen(l.w1.weight, s.units.data(), last - first, inputs_of(l.w1.weight, normed.data(), 1), t,
                 s.active.data());
  // A unit that relu sets to zero adds nothing: its row of w2 is not read.
  std::size_t kept = 0;
  for (std::size_t i = 0; i < last - first; ++i) {
    if (!(s.active.data()[i] > 0)) continue;
    s.active.data()[kept] = s.active.data()[i];
    s.units.data()[kept++] = s.units.data()[i];
  }
  s.read += kept;
  s.skipped += last - first - kept;
  std::memset(to, 0, model.hidden * sizeof(float));
  kernels.add_rows(l.w2.weight, s.units.data(), s.active.data(), kept, to);
}

}  // namespace tulle
