#include "tulle/selection.hpp"

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/team.hpp"

namespace tulle {
namespace {

// drop(i) of those at the cut that are too many: of equal ones the last.
template <typename Drop>
void drop_surplus(const float* size, std::size_t n, const TopKThreshold& cut, std::size_t keep, Drop drop) {
  std::size_t surplus = cut.count - keep;
  for (std::size_t i = n; surplus > 0 && i-- > 0;) {
    if (size[i] != cut.value) continue;
    drop(i);
    --surplus;
  }
}

// Of size [n] the keep largest, ties to the lower index: zeroes x, `unit` inputs per size, elsewhere.
void keep_largest(const OpsKernels& ops, const float* size, std::size_t n, std::size_t keep, std::size_t unit, float* x,
                  float* spare) {
  if (keep >= n) return;
  const TopKThreshold cut = ops.top_k_threshold(size, n, keep, spare);
  if (unit == 1) {
    ops.drop_below(x, size, n, cut.value);
  } else {
    ops.drop_units_below(x, size, n, unit, cut.value);
  }
  drop_surplus(size, n, cut, keep, [&](std::size_t i) { std::memset(x + i * unit, 0, unit * sizeof(float)); });
}

float norm(const OpsKernels& ops, const float* x, std::size_t n) { return std::sqrt(ops.dot(x, x, n)); }

}  // namespace

bool Selection::operator==(const Selection& o) const {
  return kind == o.kind && keep == o.keep && block == o.block && unit == o.unit && norm == o.norm &&
         threshold == o.threshold && rescale == o.rescale && score == o.score;
}

float Selection::run(const OpsKernels& ops, float* x, std::size_t n, float* spare) const {
  if (kind == Kind::none) return 1.0f;
  const float before = rescale ? tulle::norm(ops, x, n) : 1.0f;
  float *const size = spare, *const units = spare + n + 16, *const rest = spare + 2 * (n + 16);
  if (kind == Kind::relu) {
    ops.drop_below(x, x, n, 0.0f);
  } else if (kind == Kind::threshold) {
    ops.absolute(x, n, size);
    ops.drop_below(x, size, n, std::nextafter(threshold, INFINITY));
  } else {
    ops.absolute(x, n, size);
    if (score != nullptr) ops.scale(size, score, n, size);
    const float* sizes = size;
    if (unit > 1) {
      ops.unit_sizes(size, n / unit, unit, this->norm, units);
      sizes = units;
    }
    for (std::size_t start = 0; start < n; start += block) {
      keep_largest(ops, sizes + start / unit, block / unit, keep / unit, unit, x + start, rest);
    }
  }
  if (!rescale) return 1.0f;
  const float after = tulle::norm(ops, x, n);
  return after > 0 ? before / after : 1.0f;
}

void keep_largest_mask(const OpsKernels& ops, const float* size, std::size_t rows, std::size_t n, std::size_t keep,
                       std::size_t threads, bool* mask) {
  if (keep >= n) {
    std::memset(mask, 1, rows * n);
    return;
  }
  // Room for every thread before they begin, so that none has to allocate.
  std::vector<float> spare(threads * (n + 16));
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static) if (threads > 1)
  for (std::size_t row = 0; row < rows; ++row) {
    const float* from = size + row * n;
    bool* to = mask + row * n;
    const TopKThreshold cut =
        ops.top_k_threshold(from, n, keep, spare.data() + thread_number() * (n + 16));
    for (std::size_t i = 0; i < n; ++i) to[i] = from[i] >= cut.value;
    drop_surplus(from, n, cut, keep, [&](std::size_t i) { to[i] = false; });
  }
}

void check(const Selection& s, std::size_t n) {
  if (s.kind != Selection::Kind::top_k) return;
  const bool whole = s.unit >= 1 && s.block >= 1 && n % s.block == 0 && s.block % s.unit == 0 && s.keep % s.unit == 0;
  if (whole && s.keep >= 1 && s.keep <= s.block) return;
  throw std::invalid_argument("selection of inputs: expected units in blocks that divide " + std::to_string(n) +
                              ", found " + std::to_string(s.keep) + " of " + std::to_string(s.block) + " by " +
                              std::to_string(s.unit));
}

}  // namespace tulle
