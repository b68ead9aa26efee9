// Scores of swaps, plain loops: the definition that the other files must equal bit for bit.
//
//   excess = Σ over rows of max(0, value − limit)
#include "cpu/tables.hpp"

namespace tulle {
namespace {

#include "search/stripe_limits.inl"

template <typename T>
std::uint64_t excess(const T* values, const T* limits, std::size_t n) {
  std::uint64_t sum = 0;
  for (std::size_t i = 0; i < n; ++i)
    sum += values[i] > limits[i] ? static_cast<std::uint64_t>(values[i] - limits[i]) : 0;
  return sum;
}

}  // namespace

const PermutationKernels scalar_permutation = {
    {excess<std::uint8_t>, stripe_limits<std::uint8_t>},
    {excess<std::int16_t>, stripe_limits<std::int16_t>},
};

}  // namespace tulle
