// find_steps: cuts W into groups of kClipRows rows and hands them to the clip kernel.
//
//     W [R, C]            tile, a group of 16 rows, turned so that a row is a lane
//     ┌──┬──┬──┐          ┌ row 0 … row 15 ┐
//     │g0│g1│g2│ 16 rows  │                │ columns of the group
//     ├──┼──┼──┤          └                ┘
#include <algorithm>
#include <memory>

#include "tulle/search.hpp"

namespace tulle {

void find_steps(const SearchKernels& kernels, const ClipSearch& s, std::size_t threads) {
  const std::size_t groups = s.columns / s.width;
  const auto bands = static_cast<std::int64_t>((s.rows + kClipRows - 1) / kClipRows);
#pragma omp parallel num_threads(static_cast<int>(threads)) if (threads > 1)
  {
    std::unique_ptr<float[]> tile(new float[s.width * kClipRows]);
    alignas(64) float least[kClipRows], largest[kClipRows], step[kClipRows], zero[kClipRows];
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t band = 0; band < bands; ++band) {
      const std::size_t top = static_cast<std::size_t>(band) * kClipRows, rows = std::min(kClipRows, s.rows - top);
      for (std::size_t g = 0; g < groups; ++g) {
        if (rows < kClipRows) std::fill_n(tile.get(), s.width * kClipRows, 0.0f);
        std::fill_n(least, kClipRows, 0.0f);
        std::fill_n(largest, kClipRows, 0.0f);
        for (std::size_t r = 0; r < rows; ++r) {
          const std::size_t at = (top + r) * s.columns + g * s.width, one = (top + r) * groups + g;
          const float* const w = s.weight + at;
          const bool* const mask = s.mask == nullptr ? nullptr : s.mask + at;
          for (std::size_t c = 0; c < s.width; ++c) {
            tile[c * kClipRows + r] = mask == nullptr || mask[c] ? w[c] : 0.0f;
          }
          if (s.least != nullptr) {
            least[r] = s.least[one];
            largest[r] = s.largest[one];
          } else {
            for (std::size_t c = 0; c < s.width; ++c) {
              const float x = tile[c * kClipRows + r];
              least[r] = c == 0 || x < least[r] ? x : least[r];
              largest[r] = c == 0 || x > largest[r] ? x : largest[r];
            }
          }
        }
        kernels.clip({s.width, tile.get(), s.importance + g * s.width, s.grid, s.ratios, s.count, least, largest, step,
                      zero});
        for (std::size_t r = 0; r < rows; ++r) {
          s.step[(top + r) * groups + g] = step[r];
          s.zero[(top + r) * groups + g] = zero[r];
        }
      }
    }
  }
}

}  // namespace tulle
