#include "tulle/bandwidth.hpp"

#include <algorithm>
#include <chrono>
#include <vector>

namespace tulle {

double read_bandwidth(std::size_t bytes, std::size_t threads, std::size_t passes) {
  const std::size_t count = std::max<std::size_t>(bytes / sizeof(std::uint64_t), 1);
  const std::vector<std::uint64_t> data(count, 1);
  std::uint64_t total = 0;
  double best = 0;
  for (std::size_t pass = 0; pass < passes; ++pass) {
    const auto begun = std::chrono::steady_clock::now();
#if defined(_OPENMP)
#pragma omp parallel for num_threads(static_cast<int>(threads)) reduction(+ : total) schedule(static)
#endif
    for (std::int64_t i = 0; i < static_cast<std::int64_t>(count); ++i) total += data[static_cast<std::size_t>(i)];
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count();
    best = std::max(best, static_cast<double>(count * sizeof(std::uint64_t)) / seconds);
  }
  // The sum is used, so that no reading is left out.
  return total == count * passes ? best : 0;
}

}  // namespace tulle
