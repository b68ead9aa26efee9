// The search kernels, as search.hpp defines them: one row, one column at a time.
//
// Sums along a row (the slope and the curvature of a step) run in 16 lanes, lane l taking every 16th column of the
// group from its l-th on, and are added up as a tree: 16 lanes, 8, 4, 2, 1.
#include <cmath>
#include <cstring>

#include "tables.hpp"

namespace tulle {
namespace {

#include "common.inl"

constexpr std::size_t kLanes = 16;

float clamp(float x, float low, float high) { return x < low ? low : (x > high ? high : x); }

// Step and zero of the range ratio·[least, largest].
void steps(float least, float largest, float ratio, const GridLevels& grid, float* step, float* zero) {
  float low = least * ratio, high = largest * ratio;
  if (grid.symmetric) {
    const float a = std::fabs(low), b = std::fabs(high);
    *step = storable_step((a > b ? a : b) / grid.high);
    *zero = 0.0f;
    return;
  }
  low = low < 0.0f ? low : 0.0f;
  high = high > 0.0f ? high : 0.0f;
  *step = storable_step((high - low) / grid.high);
  *zero = clamp(std::nearbyint(-low / *step), 0.0f, grid.high);
}

void clip(const ClipTile& t) {
  for (std::size_t r = 0; r < kClipRows; ++r) {
    float least_error = INFINITY;
    steps(t.least[r], t.largest[r], t.ratios[0], t.grid, &t.step[r], &t.zero[r]);
    for (std::size_t i = 0; i < t.count; ++i) {
      float step, zero, error = 0.0f;
      steps(t.least[r], t.largest[r], t.ratios[i], t.grid, &step, &zero);
      const float inverse = 1.0f / step;
      for (std::size_t c = 0; c < t.columns; ++c) {
        const float w = t.weight[c * kClipRows + r];
        const float level = clamp(std::nearbyint(w * inverse), t.grid.low - zero, t.grid.high - zero);
        const float d = std::fma(-level, step, w);
        error = std::fma(t.importance[c] * d, d, error);
      }
      if (error < least_error) {
        least_error = error;
        t.step[r] = step;
        t.zero[r] = zero;
      }
    }
  }
}

// Keeps the n largest (value·weighting)² of the m columns from `first` on among those that `mask` allows; of equal
// ones the first.
void keep_pattern(const SweepTile& t, std::size_t first, std::size_t r) {
  const auto score = [&](std::size_t c) {
    const float x = t.value[c * kSweepRows + r] * t.weighting[c];
    return t.mask[c * kSweepRows + r] ? x * x : -1.0f;
  };
  std::uint64_t kept[4] = {};
  for (std::size_t i = 0; i < t.m; ++i) {
    std::size_t rank = 0;
    for (std::size_t j = 0; j < t.m; ++j) {
      const float mine = score(first + i), other = score(first + j);
      rank += other > mine || (other == mine && j < i);
    }
    if (rank < t.n && t.mask[(first + i) * kSweepRows + r]) kept[i / 64] |= std::uint64_t{1} << i % 64;
  }
  for (std::size_t i = 0; i < t.m; ++i) t.mask[(first + i) * kSweepRows + r] = kept[i / 64] >> i % 64 & 1;
}

void sweep(const SweepTile& t) {
  const std::size_t stripe = t.m == 0 ? 1 : t.m;
  for (std::size_t r = 0; r < kSweepRows; ++r) {
    for (std::size_t first = 0; first < t.columns; first += stripe) {
      for (std::size_t j = first; j < first + stripe; ++j) {
        float& value = t.value[j * kSweepRows + r];
        for (std::size_t i = 0; i < first; ++i) {
          value = std::fma(t.feedback[j * t.columns + i], t.error[i * kSweepRows + r], value);
        }
      }
      if (t.m != 0) keep_pattern(t, first, r);
      for (std::size_t j = first; j < first + stripe; ++j) {
        const std::size_t at = j * kSweepRows + r;
        for (std::size_t i = first; i < j; ++i) {
          t.value[at] = std::fma(t.feedback[j * t.columns + i], t.error[i * kSweepRows + r], t.value[at]);
        }
        float kept = t.value[at];
        if (t.step != nullptr) {
          const float step = t.step[j][r], zero = t.zero[j][r];
          t.code[at] = clamp(std::nearbyint(kept / step) + zero, t.grid.low, t.grid.high);
          kept = (t.code[at] - zero) * step;
        }
        if (t.mask != nullptr && !t.mask[at]) kept = 0.0f;
        t.error[at] = (t.weight == nullptr ? t.value[at] : t.weight[at]) - kept;
      }
    }
  }
}

float dot(const float* a, const float* b, std::size_t n) {
  float lane[kLanes];
  for (std::size_t l = 0; l < kLanes; ++l) {
    lane[l] = 0.0f;
    for (std::size_t i = l; i < n; i += kLanes) lane[l] = std::fma(a[i], b[i], lane[l]);
  }
  for (std::size_t half = kLanes / 2; half > 0; half /= 2) {
    for (std::size_t l = 0; l < half; ++l) lane[l] += lane[l + half];
  }
  return lane[0];
}

void add(float factor, const float* x, float* y, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) y[i] = std::fma(factor, x[i], y[i]);
}

// Whether the group's step moved.
bool move_step(const DescentRow& d, std::size_t group) {
  const std::size_t first = group * d.width;
  float* const product = d.product + group * d.stride;
  const float slope = dot(d.level + first, d.gradient + first, d.width);
  const float curvature = dot(d.level + first, product + first, d.width);
  const float step = best_step(d.step[group], slope, curvature, d.row_scale), move = step - d.step[group];
  if (move == 0.0f) return false;
  d.step[group] = step;
  add(-move, product, d.gradient, d.columns);
  return true;
}

// Whether one of the group's codes changed.
bool move_codes(const DescentRow& d, std::size_t group) {
  bool moved = false;
  const float step = d.step[group], inverse = 1.0f / step;
  const float low = d.grid.low - d.zero[group], high = d.grid.high - d.zero[group];
  for (std::size_t j = group * d.width; j < (group + 1) * d.width; ++j) {
    const float wanted = std::fma(d.gradient[j] * d.inverse[j], inverse, d.level[j]);
    const float change = clamp(std::nearbyint(wanted), low, high) - d.level[j];
    if (change == 0.0f) continue;
    d.level[j] += change;
    add(-(change * step), d.hessian + j * d.columns, d.gradient, d.columns);
    add(change, d.hessian + j * d.columns, d.product + group * d.stride, d.columns);
    moved = true;
  }
  return moved;
}

void descend(const DescentRow& d) {
  const std::size_t groups = d.columns / d.width;
  for (std::size_t sweep = 0; sweep < d.sweeps; ++sweep) {
    bool moved = false;
    if (d.steps_first) {
      for (std::size_t g = 0; g < groups; ++g) moved |= move_step(d, g);
    }
    for (std::size_t g = 0; g < groups; ++g) {
      if (!d.steps_first) moved |= move_step(d, g);
      moved |= move_codes(d, g);
    }
    if (!moved) return;
  }
}

}  // namespace

const SearchKernels scalar_search = {clip, sweep, descend, nullptr};

}  // namespace tulle
