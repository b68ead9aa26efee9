#include "tulle/sparse_train.hpp"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "cpu/team.hpp"
#include "tulle/dispatch.hpp"

namespace tulle {
namespace {

// Columns of a block: a panel of 28 KiB in the level-1 cache. Where rows keep little, what a row costs beside its
// entries weighs more than misses to the level-2 cache (measured from 88 % on).
constexpr std::size_t kWidth = 112, kWideWidth = 160;
// How far ahead the move of values into the transpose's order prefetches.
constexpr std::size_t kRunsAhead = 12, kValuesAhead = 48;
constexpr std::size_t kMostSide = std::size_t{1} << 24;

std::size_t parts_of(std::size_t n, std::size_t size) { return (n + size - 1) / size; }

// Parts that share the panels of a task: their sums, 512 KiB, fit into the level-2 cache.
constexpr std::size_t kGroupParts = 2;

struct Groups {
  // Of two parts, where as many tasks are left for the threads (`whole`) and they are not needed one by one.
  Groups(std::size_t parts, bool whole) : size(whole ? kGroupParts : 1), count(parts_of(parts, size)) {}
  std::size_t size, count;
};

// Of one thread: a panel and the sums or gradients of a group of parts.
struct Scratch {
  float *panel, *sums;
};

class Workspace {
 public:
  // Valid until the next call from this thread.
  static const std::vector<Scratch>& of(std::size_t threads) {
    static thread_local Workspace own;
    while (own.scratch_.size() < threads) {
      constexpr std::size_t kPanel = kWideWidth * kPanelTokens, kSums = kGroupParts * kPartRows * kPanelTokens;
      own.memory_.emplace_back(new float[kPanel + kSums + kLine]);
      void* start = own.memory_.back().get();
      std::size_t space = (kPanel + kSums + kLine) * sizeof(float);
      auto* aligned =
          static_cast<float*>(std::align(kLine * sizeof(float), (kPanel + kSums) * sizeof(float), start, space));
      // Rows behind a part's last one are read, never used.
      std::fill_n(aligned, kPanel + kSums, 0.0f);
      own.scratch_.push_back({aligned, aligned + kPanel});
    }
    return own.scratch_;
  }

 private:
  static constexpr std::size_t kLine = 16;  // floats
  std::vector<std::unique_ptr<float[]>> memory_;
  std::vector<Scratch> scratch_;
};

void prefetch(const float* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address);
#else
  static_cast<void>(address);
#endif
}

// Brings what the next block will be packed from, rows far apart from each other, into the caches.
void fetch(const float* x, std::size_t stride, std::size_t tokens, std::size_t columns) {
  for (std::size_t t = 0; t < tokens; ++t) {
    for (std::size_t c = 0; c < columns; c += 16) prefetch(x + t * stride + c);
  }
}

// Calls work(i, scratch) for i < count on up to `threads` threads, in any order.
template <typename Work>
void in_parallel(std::size_t count, std::size_t threads, const Work& work) {
  threads = std::max<std::size_t>(std::min(threads, count), 1);
  const std::vector<Scratch>& scratch = Workspace::of(threads);
#if defined(_OPENMP)
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(dynamic, 1)
  for (std::int64_t i = 0; i < static_cast<std::int64_t>(count); ++i) {
    work(static_cast<std::size_t>(i), scratch[thread_number()]);
  }
#else
  for (std::size_t i = 0; i < count; ++i) work(i, scratch[0]);
#endif
}

}  // namespace

std::size_t SparsePattern::Side::part_rows(std::size_t part) const {
  return std::min(kPartRows, rows - part * kPartRows);
}

std::size_t SparsePattern::Side::block_columns(std::size_t block) const {
  return std::min(width, columns - block * width);
}

SparsePattern::Side SparsePattern::build(const std::uint8_t* mask, std::size_t rows, std::size_t columns,
                                         std::size_t row_step, std::size_t column_step, std::size_t kept,
                                         std::uint32_t* position) {
  Side side;
  side.rows = rows;
  side.columns = columns;
  side.width = 8 * kept < rows * columns ? kWideWidth : kWidth;
  side.parts = parts_of(rows, kPartRows);
  side.blocks = parts_of(columns, side.width);
  side.offsets.reserve(kept + kSlackOffsets);
  side.first_run.push_back(0);
  side.first_entry.push_back(0);
  std::vector<std::uint32_t> counts, order;
  for (std::size_t part = 0; part < side.parts; ++part) {
    const std::size_t first = part * kPartRows, height = side.part_rows(part);
    counts.resize(height);
    order.resize(height);
    for (std::size_t block = 0; block < side.blocks; ++block) {
      const std::size_t left = block * side.width, width = side.block_columns(block);
      std::vector<std::uint32_t> with(width + 2);  // with[n + 1]: rows of n entries, then how many have fewer
      for (std::size_t r = 0; r < height; ++r) {
        const std::uint8_t* row = mask + (first + r) * row_step + left * column_step;
        counts[r] = 0;
        for (std::size_t c = 0; c < width; ++c) counts[r] += row[c * column_step] != 0;
        ++with[counts[r] + 1];
      }
      const std::size_t empty = with[1];
      for (std::size_t n = 0; n < width; ++n) with[n + 1] += with[n];
      for (std::size_t r = 0; r < height; ++r) order[with[counts[r]]++] = static_cast<std::uint32_t>(r);
      for (std::size_t i = empty; i < height; ++i) {
        const std::size_t r = order[i];
        side.runs.push_back(static_cast<std::uint32_t>(r) << 8 | counts[r]);
        const std::uint8_t* row = mask + (first + r) * row_step + left * column_step;
        for (std::size_t c = 0; c < width; ++c) {
          if (row[c * column_step] == 0) continue;
          position[(first + r) * row_step + (left + c) * column_step] = static_cast<std::uint32_t>(side.offsets.size());
          side.offsets.push_back(static_cast<std::uint16_t>(c * kPanelTokens));
        }
      }
      side.first_run.push_back(side.runs.size());
      side.first_entry.push_back(side.offsets.size());
    }
  }
  side.offsets.resize(side.offsets.size() + kSlackOffsets);
  return side;
}

SparsePattern::SparsePattern(const std::uint8_t* mask, std::size_t rows, std::size_t columns)
    : rows_(rows), columns_(columns) {
  if (rows < 1 || columns < 1 || rows > kMostSide || columns > kMostSide) {
    throw std::invalid_argument("mask: expected 1 to 2^24 rows and columns, found " + std::to_string(rows) + " and " +
                                std::to_string(columns));
  }
  std::size_t kept = 0;
  for (std::size_t i = 0; i < rows * columns; ++i) kept += mask[i] != 0;
  if (kept >> 32 != 0)
    throw std::invalid_argument("mask: expected less than 2^32 kept entries, found " + std::to_string(kept));
  std::vector<std::uint32_t> from(rows * columns), to(rows * columns);
  forward_ = build(mask, rows, columns, columns, 1, kept, from.data());
  backward_ = build(mask, columns, rows, 1, columns, kept, to.data());
  targets_.reserve(kept);
  for (std::size_t top = 0; top < rows; top += backward_.width) {
    first_source_.push_back(sources_.size());
    first_target_.push_back(targets_.size());
    for (std::size_t left = 0; left < columns; left += forward_.width) {
      for (std::size_t r = top; r < std::min(rows, top + backward_.width); ++r) {
        const std::size_t begun = targets_.size();
        std::uint32_t first = 0;
        for (std::size_t i = r * columns + left; i < r * columns + std::min(columns, left + forward_.width); ++i) {
          if (mask[i] == 0) continue;
          if (targets_.size() == begun) first = from[i];
          targets_.push_back(to[i]);
        }
        if (targets_.size() > begun) sources_.push_back({first, static_cast<std::uint32_t>(targets_.size() - begun)});
      }
    }
  }
  first_source_.push_back(sources_.size());
  first_target_.push_back(targets_.size());
  sources_.resize(sources_.size() + kRunsAhead);
  targets_.resize(targets_.size() + kValuesAhead);
}

std::size_t SparsePattern::bytes() const {
  std::size_t total = sources_.size() * sizeof(Run) + targets_.size() * sizeof(std::uint32_t);
  for (const Side* side : {&forward_, &backward_}) {
    total += side->runs.size() * sizeof(std::uint32_t) + side->offsets.size() * sizeof(std::uint16_t) +
             2 * side->first_run.size() * sizeof(std::uint64_t);
  }
  return total;
}

void SparsePattern::entries(std::int64_t* entries) const {
  for (std::size_t part = 0, index = 0; part < forward_.parts; ++part) {
    for (std::size_t b = 0; b < forward_.blocks; ++b, ++index) {
      const SparseBlock block = forward_.block(index);
      const std::uint16_t* offset = block.offsets;
      for (std::size_t i = 0; i < block.run_count; ++i) {
        const std::size_t row = part * kPartRows + (block.runs[i] >> 8);
        for (std::size_t n = block.runs[i] & 255; n > 0; --n) {
          *entries++ = static_cast<std::int64_t>(row * columns_ + b * forward_.width + *offset++ / kPanelTokens);
        }
      }
    }
  }
}

void SparsePattern::multiply(const Side& side, const float* values, const float* x, const float* bias,
                             std::size_t tokens, float* y, std::size_t threads) {
  const SparseTrainKernels& kernels = *active_isa().sparse_train;
  const std::size_t panels = parts_of(tokens, kPanelTokens);
  const Groups groups(side.parts, panels >= 2 * threads);
  in_parallel(panels * groups.count, threads, [&](std::size_t task, const Scratch& scratch) {
    const std::size_t part = task % groups.count * groups.size, end = std::min(side.parts, part + groups.size);
    const std::size_t first = task / groups.count * kPanelTokens, count = std::min(kPanelTokens, tokens - first);
    const std::size_t top = part * kPartRows, height = std::min(side.rows, end * kPartRows) - top;
    for (std::size_t r = 0; r < height; ++r) {
      std::fill_n(scratch.sums + r * kPanelTokens, kPanelTokens, bias != nullptr ? bias[top + r] : 0.0f);
    }
    for (std::size_t b = 0; b < side.blocks; ++b) {
      const float* from = x + first * side.columns + b * side.width;
      kernels.pack(from, side.columns, count, side.block_columns(b), scratch.panel);
      if (b + 1 < side.blocks) fetch(from + side.width, side.columns, count, side.block_columns(b + 1));
      for (std::size_t p = part; p < end; ++p) {
        const std::size_t index = p * side.blocks + b;
        kernels.multiply(side.block(index), values + side.first_entry[index], scratch.panel, count,
                         scratch.sums + (p - part) * kPartRows * kPanelTokens);
      }
    }
    kernels.unpack(scratch.sums, count, height, y + first * side.rows + top, side.rows);
  });
}

void SparsePattern::product(const float* values, const float* x, const float* bias, std::size_t tokens, float* y,
                            std::size_t threads) const {
  multiply(forward_, values, x, bias, tokens, y, threads);
}

void SparsePattern::input_gradient(const float* values, const float* dy, std::size_t tokens, float* dx,
                                   std::size_t threads) const {
  static thread_local std::vector<float> own;
  if (own.size() < kept()) own.resize(kept());
  float* const moved = own.data();
  in_parallel(backward_.blocks, threads, [&](std::size_t block, const Scratch&) {
    const std::uint32_t* target = targets_.data() + first_target_[block];
    for (std::size_t i = first_source_[block]; i < first_source_[block + 1]; ++i) {
      const float* from = values + sources_[i].first;
      for (const std::size_t line : {0, 16}) prefetch(values + sources_[i + kRunsAhead].first + line);
      for (const float* end = from + sources_[i].count; from != end; ++from) {
        prefetch(moved + target[kValuesAhead]);
        moved[*target++] = *from;
      }
    }
  });
  multiply(backward_, moved, dy, nullptr, tokens, dx, threads);
}

void SparsePattern::weight_gradient(const float* x, const float* dy, std::size_t tokens, float* dvalues,
                                    std::size_t threads) const {
  const SparseTrainKernels& kernels = *active_isa().sparse_train;
  const Side& side = forward_;
  if (tokens == 0) std::fill_n(dvalues, kept(), 0.0f);
  // Every task transposes the gradients of its rows: no more tasks than keep the threads busy.
  const Groups groups(side.parts, true);
  const std::size_t shares = std::min(side.blocks, parts_of(threads == 1 ? 1 : 2 * threads, groups.count));
  in_parallel(groups.count * shares, threads, [&](std::size_t task, const Scratch& scratch) {
    const std::size_t part = task / shares * groups.size, end = std::min(side.parts, part + groups.size);
    const std::size_t top = part * kPartRows, height = std::min(side.rows, end * kPartRows) - top;
    const std::size_t left = side.blocks * (task % shares) / shares, right = side.blocks * (task % shares + 1) / shares;
    for (std::size_t first = 0; first < tokens; first += kPanelTokens) {
      const std::size_t count = std::min(kPanelTokens, tokens - first);
      kernels.pack(dy + first * side.rows + top, side.rows, count, height, scratch.sums);
      for (std::size_t b = left; b < right; ++b) {
        const float* from = x + first * side.columns + b * side.width;
        kernels.pack(from, side.columns, count, side.block_columns(b), scratch.panel);
        if (b + 1 < right) fetch(from + side.width, side.columns, count, side.block_columns(b + 1));
        for (std::size_t p = part; p < end; ++p) {
          const std::size_t index = p * side.blocks + b;
          kernels.correlate(side.block(index), scratch.panel, scratch.sums + (p - part) * kPartRows * kPanelTokens,
                            count, first > 0, dvalues + side.first_entry[index]);
        }
      }
    }
  });
}

}  // namespace tulle
