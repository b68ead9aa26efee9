// Channel permutations for N:M sparsity (Pool & Yu 2021): which columns share a stripe of M, so that the N largest
// scores of every row and stripe add up to the most.
//
// What makes a swap cheap: let t be the N-th largest score of a row among the M-1 other columns of column p's stripe,
// its *limit* b_p. A column q in p's place then adds max(0, w_q - b_p) to what that row retains, whatever N and M are.
// With excess(w, b) = sum over rows of max(0, w - b), exchanging p and q gains
//     excess(w_q, b_p) + excess(w_p, b_q) - excess(w_p, b_p) - excess(w_q, b_q).
//
// Scores are integers, so that every instruction set takes the same decisions and gives the same permutation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tulle {

// Rows come in whole blocks of this many (zeros at the end), 64-byte aligned.
constexpr std::size_t kRowBlock = 64;

// T is std::uint8_t, or std::int16_t with values from 0 to 32767.
template <typename T>
struct ScoreKernels {
  // excess(values, limits) over n rows.
  std::uint64_t (*excess)(const T* values, const T* limits, std::size_t n);
  // The limits of the m columns of one stripe, `kept` < m of which are retained in every row.
  void (*limits)(const T* const* columns, std::size_t m, std::size_t kept, std::size_t n, T* const* limits);
};

struct PermutationKernels {
  ScoreKernels<std::uint8_t> score8;
  ScoreKernels<std::int16_t> score16;

  template <typename T>
  const ScoreKernels<T>& score_kernels() const {
    if constexpr (sizeof(T) == 1) return score8;
    else return score16;
  }
};

struct Annealing {
  std::size_t kept, m;       // N and M, 1 <= N < M
  std::uint64_t proposals;   // swaps that are looked at
  double start, end;         // temperatures, in units of the root mean square gain of a random swap
  std::uint64_t seed;
  std::size_t threads;       // the result does not depend on it
};

// The order of columns that retains the most of those seen: index[position] = column; stripe s holds the positions
// [sM, (s+1)M). `scores` are `columns` columns of `stride` rows, a multiple of kRowBlock, 64-byte aligned; `index` is
// the order to start from. `gain`: what the result retains beyond the start.
template <typename T>
std::vector<std::int64_t> anneal(const PermutationKernels& kernels, const T* scores, std::size_t columns,
                                 std::size_t stride, std::vector<std::int64_t> index, const Annealing& settings,
                                 std::int64_t* gain);

}  // namespace tulle
