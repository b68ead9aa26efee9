// Searching the grid points of a layer's weights: clip search, the GPTQ/SparseGPT sweep over columns, and coordinate
// descent. What these mean stands in tulle/core (grid.py, sweep.py, descent.py); here is what runs in float32 on a CPU.
//
// W [R, C] is one linear's weight: R output channels (rows), C input channels (columns). Rows never meet each other,
// so every loop over rows runs on threads, and the result does not depend on how many there are. All instruction sets
// give the same bytes: a sum over rows' lanes is a chain of fused multiply-adds in the order written here.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tulle {

// Rows that a kernel treats together, one per lane, 64-byte aligned.
constexpr std::size_t kClipRows = 16, kSweepRows = 64;
// Channels of A and of B in one tile of accumulate_outer.
constexpr std::size_t kOuterChannels = 48;

// Codes of a grid: low..high, weight = step·(code − zero).
struct GridLevels {
  float low, high;
  bool symmetric;
};

// Clip search on one group of kClipRows rows.
struct ClipTile {
  std::size_t columns;      // of the group
  const float* weight;      // [columns][kClipRows]; 0 where pruned
  const float* importance;  // [columns]
  GridLevels grid;
  const float* ratios;  // [count], the first is 1
  std::size_t count;
  const float *least, *largest;  // [kClipRows], range at ratio 1
  float *step, *zero;            // [kClipRows] out
};

// One block of columns of the sweep, kSweepRows rows. Column j is compressed when its value is
// x_j = w_j + Σ_{i<j} d_i·feedback_ji, in one of two forms of the same sweep:
// - by the factor of H = V·Vᵀ: d_i = w_i − ŵ_i, feedback_ji = V_ij/V_jj;
// - by the factor of H⁻¹ = Uᵀ·U: d_i = x_i − ŵ_i, feedback_ji = −U_ij/U_ii. Here w_k with the feedback of the columns
//   before j < k is its best value when those are fixed, which is what a mask is chosen by.
struct SweepTile {
  std::size_t columns;
  const float* feedback;  // [columns][columns]: row j holds feedback_ji at i < j
  const float* weight;    // w, [columns][kSweepRows]; null: the second form
  float* value;           // [columns][kSweepRows] in: x, with what earlier blocks fed back; out: as compressed
  float* error;           // d, [columns][kSweepRows] out
  const float *const *step, *const *zero;  // per column [kSweepRows]; null: no grid, kept weights stay
  GridLevels grid;
  float* code;  // [columns][kSweepRows] out, with a grid
  // 1 = kept, [columns][kSweepRows]; null: all. With a pattern in: what may be kept; out: what is.
  std::uint8_t* mask;
  // N:M: of every m columns the n with the largest (value·weighting)²; m = 0: none. m divides `columns`.
  std::size_t n, m;
  const float* weighting;  // [columns]
};

// Coordinate descent on one row. Arrays are not aligned.
struct DescentRow {
  std::size_t columns, width;  // `width` columns per group
  const float* hessian;        // H, [columns][columns]
  const float* inverse;        // 1/H_jj, [columns]; 0 where pruned
  float* gradient;             // (w − ŵ)·H, [columns], kept up to date
  float* product;              // per group g, `stride` floats apart: Σ_{j in g} level_j·H_j, [columns], kept up to date
  std::size_t stride;
  float* level;  // code − zero, [columns]; 0 where pruned
  float* step;   // [groups], `step_stride` floats apart
  const float* zero;
  GridLevels grid;
  std::size_t sweeps;
  bool steps_first;  // all steps of a sweep before its codes; else group by group
  float row_scale;   // steps are 1 to 255 times this; 0: in bfloat16
};

// One tile of accumulate_outer: total = beta·total + alpha·Σ over pairs of tokens. A word holds a channel's bfloat16 of
// a pair's first token in its lower half, of the second in its upper half.
struct OuterTile {
  std::size_t pairs;
  const std::uint32_t *a, *b;  // [pairs][kOuterChannels], 64-byte aligned; zeros beyond rows and columns
  float* total;                // [rows][columns], `stride` floats from row to row, not aligned
  std::size_t stride, rows, columns;  // <= kOuterChannels of each
  float alpha, beta;
};
typedef void (*OuterKernel)(const OuterTile& tile);

struct SearchKernels {
  void (*clip)(const ClipTile& tile);
  void (*sweep)(const SweepTile& tile);
  void (*descend)(const DescentRow& row);
  OuterKernel outer;  // null: the instruction set has no products of bfloat16
};

// What follows works on whole matrices, row-major, and cuts them into tiles.

// Step and zero [R, groups] of W [R, C] for the ratio with the least Σ importance·(w − ŵ)². `mask` [R, C] and the
// ranges `least`, `largest` [R, groups] may be null: all kept, each group's extremes (with 0).
struct ClipSearch {
  std::size_t rows, columns, width;
  const float *weight, *importance;
  const bool* mask;
  GridLevels grid;
  const float* ratios;
  std::size_t count;
  const float *least, *largest;
  float *step, *zero;
};
void find_steps(const SearchKernels& kernels, const ClipSearch& search, std::size_t threads);

// One block of the sweep, for all rows. Everything of the sweep is [columns, R] in the order of the sweep.
struct SweepBlock {
  std::size_t columns, rows;
  const float* feedback;  // [columns, feedback_stride], as SweepTile's
  std::size_t feedback_stride;
  const float* weight;    // null: the second form
  float *value, *error;
  const std::int64_t* group;  // [columns]: the row of step and zero
  const float *step, *zero;   // [groups, R]; null: no grid
  GridLevels grid;
  std::int16_t* codes;
  bool* mask;
  std::size_t n, m;
  const float* weighting;
};
void sweep_block(const SearchKernels& kernels, const SweepBlock& block, std::size_t threads);

// to[c, r] = from[r, order[c]] and to[r, order[c]] = from[c, r], for bool, int16 (put only) and float. `order` holds every
// column once.
template <typename T>
void take_columns(const T* from, std::size_t rows, std::size_t columns, const std::int64_t* order, T* to,
                  std::size_t threads);
template <typename T>
void put_columns(const T* from, std::size_t rows, std::size_t columns, const std::int64_t* order, T* to,
                 std::size_t threads);

// The codes of R rows, [R, C], and their grids; step and zero [R, groups].
struct Coded {
  std::size_t rows, columns, width;  // `width` columns per group
  const std::int16_t* codes;
  const float *step, *zero;
  const bool* mask;  // [R, C], or null: all kept
};

// What a descent starts from: level = code − zero (0 where pruned) and residual = w − step·level, [R, C] each.
void open_levels(const Coded& coded, const float* weight, float* level, float* residual, std::size_t threads);

// Descent on R rows. Codes of pruned entries stay.
struct Descent {
  Coded start;
  const float* hessian;
  float* gradient;  // [R, C]: residual·H; changed
  float* product;   // [groups, R, C]: of every group Σ level_j·H_j; changed
  std::int16_t* codes;  // out, may be the start's
  float* step;          // out, may be the start's
  GridLevels grid;
  std::size_t sweeps;
  bool steps_first;        // see DescentRow
  const float* row_scale;  // [R], see DescentRow; null: steps in bfloat16
};
void descend(const SearchKernels& kernels, const Descent& descent, std::size_t threads);

// total [M, N] = beta·total + alpha·Aᵀ·B, the statistics that a Hessian is made of: A [T, M] and B [T, N] in bfloat16,
// sums and total in float32. Products are exact; 384 tokens are added up from 0, then to the total. Denormal numbers of
// A and B count as zero. Needs kernels.outer. The result does not depend on the number of threads.
struct Outer {
  std::size_t tokens, rows, columns;  // T, M, N
  const std::uint16_t *a, *b;  // b null: B = A; the upper triangle is computed and mirrored, the lower is not read
  float* total;
  float alpha, beta;
};
void accumulate_outer(const SearchKernels& kernels, const Outer& outer, std::size_t threads);

}  // namespace tulle
