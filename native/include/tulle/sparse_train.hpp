// Training with held masks: Y = X·Wᵀ + b, dX = dY·W and dW in float32, on the kept entries of W only.
//
// What is computed, whatever the instruction set and the number of threads:
//   y[t][o]  = b[o], then fma(w[o][k], x[t][k], ·) over the kept k, ascending;
//   dx[t][k] = 0, then fma(w[o][k], dy[t][o], ·) over the kept o, ascending;
//   dw[o][k] = sum over panels of 64 tokens, in order, of: 16 lanes l, each dy·x of token l, then fma of tokens l+16,
//              l+32, l+48; then per four lanes (l0+l2)+(l1+l3) = s, then (s0+s2)+(s1+s3).
//
// How: a panel of tokens lies transposed in the level-1 cache, [column][64], for a block of columns; the sums of a part
// of the rows stay in the level-2 cache. Every kept entry is then one broadcast, and a fused multiply-add with a memory
// operand for every vector of tokens. The load ports bound that, so four weights and four offsets are read at a time.
// Of a block, rows come sorted by how many entries they keep: equal counts in a row are loops that the branch predictor
// knows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tulle {

constexpr std::size_t kPanelTokens = 64;
constexpr std::size_t kPartRows = 1024;

// The kept entries of one part of the rows and one block of columns.
struct SparseBlock {
  const std::uint32_t* runs;    // [run_count]: row within the part · 256 + its number of entries, at least 1
  std::size_t run_count;
  const std::uint16_t* offsets;  // of every entry: column within the block · kPanelTokens
};

struct SparseTrainKernels {
  // panel[column][token] = x[token][column] for tokens <= kPanelTokens; zeros up to a multiple of 16 tokens.
  void (*pack)(const float* x, std::size_t stride, std::size_t tokens, std::size_t columns, float* panel);
  // y[token][row] = sums[row][token]. `sums`: readable up to a multiple of 8 rows.
  void (*unpack)(const float* sums, std::size_t tokens, std::size_t rows, float* y, std::size_t stride);
  // sums[row][token] += Σ value · panel[column][token], for `tokens` rounded up to 16.
  void (*multiply)(const SparseBlock& block, const float* values, const float* panel, std::size_t tokens, float* sums);
  // values[entry] (+)= Σ over tokens, rounded up to 16, of gradients[row][token] · panel[column][token].
  void (*correlate)(const SparseBlock& block, const float* panel, const float* gradients, std::size_t tokens, bool add,
                    float* values);
};

// A mask that is held, as the kernels walk through it. Immutable; calls from several threads do not disturb each other.
class SparsePattern {
 public:
  // mask [rows][columns]: kept where a byte is not 0. Throws std::invalid_argument beyond 2^24 rows or columns, or 2^32
  // entries.
  SparsePattern(const std::uint8_t* mask, std::size_t rows, std::size_t columns);

  std::size_t rows() const { return rows_; }
  std::size_t columns() const { return columns_; }
  std::size_t kept() const { return forward_.offsets.size() - kSlackOffsets; }
  std::size_t bytes() const;

  // entries [kept()]: row · columns + column of every value, in the order of all arrays of values.
  void entries(std::int64_t* entries) const;
  // x [tokens][columns], bias [rows] or null -> y [tokens][rows].
  void product(const float* values, const float* x, const float* bias, std::size_t tokens, float* y,
               std::size_t threads) const;
  // dy [tokens][rows] -> dx [tokens][columns].
  void input_gradient(const float* values, const float* dy, std::size_t tokens, float* dx, std::size_t threads) const;
  // x [tokens][columns], dy [tokens][rows] -> dvalues [kept()].
  void weight_gradient(const float* x, const float* dy, std::size_t tokens, float* dvalues, std::size_t threads) const;

 private:
  // Kernels read four offsets at a time.
  static constexpr std::size_t kSlackOffsets = 4;

  // W or its transpose, by parts of rows and, within them, blocks of columns.
  struct Side {
    std::size_t rows = 0, columns = 0, width = 0, parts = 0, blocks = 0;
    std::vector<std::uint64_t> first_run, first_entry;  // [parts · blocks + 1]
    std::vector<std::uint32_t> runs;
    std::vector<std::uint16_t> offsets;

    SparseBlock block(std::size_t index) const {
      return {runs.data() + first_run[index], static_cast<std::size_t>(first_run[index + 1] - first_run[index]),
              offsets.data() + first_entry[index]};
    }
    std::size_t part_rows(std::size_t part) const;
    std::size_t block_columns(std::size_t block) const;
  };

  // position [row · row_step + column · column_step]: where that entry's value lies.
  static Side build(const std::uint8_t* mask, std::size_t rows, std::size_t columns, std::size_t row_step,
                    std::size_t column_step, std::size_t kept, std::uint32_t* position);
  static void multiply(const Side& side, const float* values, const float* x, const float* bias, std::size_t tokens,
                       float* y, std::size_t threads);

  std::size_t rows_, columns_;
  Side forward_, backward_;

  // Values into the order of backward_, by tiles (a block of its columns by a block of forward_'s), so that neither
  // side leaves the level-1 cache: of a run, the first value and how many follow it; of every value, where it goes.
  struct Run {
    std::uint32_t first, count;
  };
  std::vector<Run> sources_;
  std::vector<std::uint32_t> targets_;
  std::vector<std::uint64_t> first_source_, first_target_;  // [backward_.blocks + 1]
};

}  // namespace tulle
