// descend: one row after the other, each with all it needs in the level-2 cache.
//
//     of one row:  gradient [C]         (w − ŵ)·H
//                  product [groups, C]  Σ_{j in group} level_j·H_j
//                  level [C], step [groups]
//
// A step that moves by m takes m·product[group] from the gradient: C operations, where a product with H would take
// C times the group's width. A code that changes by k takes k·step·H_j from the gradient and adds k·H_j to
// product[group]. Few codes change (some hundredths per sweep), so sweeps are cheap; what costs is the first product
// with H, which is BLAS's.
#include <algorithm>
#include <vector>

#include "tulle/search.hpp"

namespace tulle {

void open_levels(const Coded& d, const float* weight, float* level, float* residual, std::size_t threads) {
  const std::size_t groups = d.columns / d.width;
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static) if (threads > 1)
  for (std::int64_t row = 0; row < static_cast<std::int64_t>(d.rows); ++row) {
    const std::size_t r = static_cast<std::size_t>(row);
    for (std::size_t g = 0; g < groups; ++g) {
      const float step = d.step[r * groups + g], zero = d.zero[r * groups + g];
      const std::size_t first = r * d.columns + g * d.width;
      for (std::size_t i = first; i < first + d.width; ++i) {
        const bool kept = d.mask == nullptr || d.mask[i];
        level[i] = kept ? static_cast<float>(d.codes[i]) - zero : 0.0f;
        residual[i] = weight[i] - level[i] * step;
      }
    }
  }
}

void descend(const SearchKernels& kernels, const Descent& d, std::size_t threads) {
  const Coded& start = d.start;
  const std::size_t columns = start.columns, groups = columns / start.width;
  std::vector<float> inverse(columns);
  for (std::size_t c = 0; c < columns; ++c) inverse[c] = 1.0f / d.hessian[c * columns + c];
#pragma omp parallel num_threads(static_cast<int>(threads)) if (threads > 1)
  {
    std::vector<float> level(columns), kept(inverse);
#pragma omp for schedule(dynamic, 4)
    for (std::int64_t row = 0; row < static_cast<std::int64_t>(start.rows); ++row) {
      const std::size_t r = static_cast<std::size_t>(row), first = r * columns;
      const float* const zero = start.zero + r * groups;
      const bool* const mask = start.mask == nullptr ? nullptr : start.mask + first;
      for (std::size_t c = 0; c < columns; ++c) {
        const bool keep = mask == nullptr || mask[c];
        level[c] = keep ? static_cast<float>(start.codes[first + c]) - zero[c / start.width] : 0.0f;
        kept[c] = keep ? inverse[c] : 0.0f;
      }
      float* const step = d.step + r * groups;
      if (step != start.step + r * groups) std::copy_n(start.step + r * groups, groups, step);
      kernels.descend({columns, start.width, d.hessian, kept.data(), d.gradient + first, d.product + first,
                       start.rows * columns, level.data(), step, zero, d.grid, d.sweeps, d.steps_first,
                       d.row_scale == nullptr ? 0.0f : d.row_scale[r]});
      for (std::size_t c = 0; c < columns; ++c) {
        const bool keep = mask == nullptr || mask[c];
        d.codes[first + c] = keep ? static_cast<std::int16_t>(level[c] + zero[c / start.width]) : start.codes[first + c];
      }
    }
  }
}

}  // namespace tulle
