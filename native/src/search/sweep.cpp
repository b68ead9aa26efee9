// sweep_block: cuts a block of columns into bands of kSweepRows rows, packs each and hands it to the sweep kernel.
//
//     in the order of the sweep, columns first        one band
//                     rows                            ┌ 64 rows ┐
//     ┌──────────────────────────────┐                │         │ columns of the block, at most a few hundred: with
//     │ done: errors d               │                └         ┘ value, weight, error and code it stays in the cache
//     ├──────┬──────┬──────┬─────────┤
//     │ band │ band │ band │ …       │  this block: value = w + feedback of all errors above, by BLAS, before the call
//     ├──────┴──────┴──────┴─────────┤
//     │ not reached                  │
//     └──────────────────────────────┘
#include <algorithm>
#include <memory>
#include <vector>

#include "tulle/search.hpp"

namespace tulle {
namespace {

// [columns][kSweepRows] of one thread, 64-byte aligned.
template <typename T>
class Tile {
 public:
  explicit Tile(std::size_t columns) : memory_(new T[columns * kSweepRows + 64]) {
    void* start = memory_.get();
    std::size_t space = (columns * kSweepRows + 64) * sizeof(T);
    data_ = static_cast<T*>(std::align(64, columns * kSweepRows * sizeof(T), start, space));
    std::fill_n(data_, columns * kSweepRows, T{});
  }
  T* data() { return data_; }

 private:
  std::unique_ptr<T[]> memory_;
  T* data_;
};

template <typename From, typename To>
void copy(const From* from, std::size_t from_stride, To* to, std::size_t to_stride, std::size_t columns,
          std::size_t rows) {
  for (std::size_t c = 0; c < columns; ++c) {
    for (std::size_t r = 0; r < rows; ++r) to[c * to_stride + r] = static_cast<To>(from[c * from_stride + r]);
  }
}

}  // namespace

void sweep_block(const SearchKernels& kernels, const SweepBlock& b, std::size_t threads) {
  const bool rounds = b.step != nullptr, masked = b.mask != nullptr, by_weight = b.weight != nullptr;
  std::vector<float> feedback(b.columns * b.columns);
  for (std::size_t j = 0; j < b.columns; ++j) {
    std::copy_n(b.feedback + j * b.feedback_stride, j, feedback.data() + j * b.columns);
  }
  const auto bands = static_cast<std::int64_t>((b.rows + kSweepRows - 1) / kSweepRows);
#pragma omp parallel num_threads(static_cast<int>(threads)) if (threads > 1)
  {
    Tile<float> weight(by_weight ? b.columns : 0), value(b.columns), error(b.columns), code(rounds ? b.columns : 0);
    Tile<float> grid(rounds ? 2 * b.columns : 0);
    Tile<std::uint8_t> mask(masked ? b.columns : 0);
    std::vector<const float*> step(b.columns), zero(b.columns);
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t band = 0; band < bands; ++band) {
      const std::size_t first = static_cast<std::size_t>(band) * kSweepRows, n = std::min(kSweepRows, b.rows - first);
      if (by_weight) copy(b.weight + first, b.rows, weight.data(), kSweepRows, b.columns, n);
      copy(b.value + first, b.rows, value.data(), kSweepRows, b.columns, n);
      if (masked) copy(b.mask + first, b.rows, mask.data(), kSweepRows, b.columns, n);
      for (std::size_t j = 0; rounds && j < b.columns; ++j) {
        const std::size_t at = static_cast<std::size_t>(b.group[j]) * b.rows + first;
        step[j] = b.step + at;
        zero[j] = b.zero + at;
        if (n == kSweepRows) continue;
        // Lanes beyond the last row divide by 1.
        float *const s = grid.data() + 2 * j * kSweepRows, *const z = s + kSweepRows;
        std::fill_n(std::copy_n(step[j], n, s), kSweepRows - n, 1.0f);
        std::fill_n(std::copy_n(zero[j], n, z), kSweepRows - n, 0.0f);
        step[j] = s;
        zero[j] = z;
      }
      kernels.sweep({b.columns, feedback.data(), by_weight ? weight.data() : nullptr, value.data(), error.data(),
                     rounds ? step.data() : nullptr, rounds ? zero.data() : nullptr, b.grid, code.data(),
                     masked ? mask.data() : nullptr, b.n, b.m, b.weighting});
      copy(value.data(), kSweepRows, b.value + first, b.rows, b.columns, n);
      copy(error.data(), kSweepRows, b.error + first, b.rows, b.columns, n);
      if (rounds) copy(code.data(), kSweepRows, b.codes + first, b.rows, b.columns, n);
      if (masked && b.m != 0) copy(mask.data(), kSweepRows, b.mask + first, b.rows, b.columns, n);
    }
  }
}

namespace {

constexpr std::size_t kTurned = 16;  // rows that are turned together, a cache line of floats

template <typename Move>
void by_bands(std::size_t rows, std::size_t columns, const std::int64_t* order, std::size_t threads, Move move) {
  const auto bands = static_cast<std::int64_t>((rows + kTurned - 1) / kTurned);
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static) if (threads > 1)
  for (std::int64_t band = 0; band < bands; ++band) {
    const std::size_t first = static_cast<std::size_t>(band) * kTurned, last = std::min(rows, first + kTurned);
    for (std::size_t c = 0; c < columns; ++c) {
      for (std::size_t r = first; r < last; ++r) move(c * rows + r, r * columns + static_cast<std::size_t>(order[c]));
    }
  }
}

}  // namespace

template <typename T>
void take_columns(const T* from, std::size_t rows, std::size_t columns, const std::int64_t* order, T* to,
                  std::size_t threads) {
  by_bands(rows, columns, order, threads, [=](std::size_t turned, std::size_t straight) { to[turned] = from[straight]; });
}

template <typename T>
void put_columns(const T* from, std::size_t rows, std::size_t columns, const std::int64_t* order, T* to,
                 std::size_t threads) {
  by_bands(rows, columns, order, threads, [=](std::size_t turned, std::size_t straight) { to[straight] = from[turned]; });
}

template void take_columns(const bool*, std::size_t, std::size_t, const std::int64_t*, bool*, std::size_t);
template void take_columns(const float*, std::size_t, std::size_t, const std::int64_t*, float*, std::size_t);
template void put_columns(const bool*, std::size_t, std::size_t, const std::int64_t*, bool*, std::size_t);
template void put_columns(const std::int16_t*, std::size_t, std::size_t, const std::int64_t*, std::int16_t*,
                          std::size_t);
template void put_columns(const float*, std::size_t, std::size_t, const std::int64_t*, float*, std::size_t);

}  // namespace tulle
