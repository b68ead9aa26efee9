#include "decoder/plan.hpp"

#include <algorithm>
#include <numeric>

namespace tulle {
namespace {

bool same_input(const Linear& a, const Linear& b) {
  const LinearView &v = a.weight, &w = b.weight;
  if (v.is_codes() != w.is_codes() || v.padded() != w.padded()) return false;
  if (v.by_columns != w.by_columns || v.fours != w.fours) return false;  // what is listed
  if (a.input.bits != b.input.bits || a.input.symmetric != b.input.symmetric || a.input.clip != b.input.clip) return false;
  if (!(a.selection == b.selection) || a.own_grid != b.own_grid) return false;
  return !v.is_codes() || (v.segment == w.segment && v.segments_per_scale == w.segments_per_scale);
}

// Whole strips where all threads get as many, or many, so that no sum is cut. Otherwise segments: half of a strip's
// outputs would be shorter pieces of memory, with another thread's between them.
void add_columns(Plan& plan, std::size_t number, const LinearView& w, std::size_t threads) {
  const std::size_t strips = w.strips();
  const bool enough = strips >= 4 * threads;
  const std::size_t pieces = enough ? 1 : std::min(w.segments, threads / std::gcd(strips, threads));
  plan.pieces[number] = pieces;
  plan.most_pieces = std::max(plan.most_pieces, pieces);
  for (std::size_t i = 0; i < strips * pieces; ++i) {
    const std::size_t piece = i % pieces;
    plan.shares[i * threads / (strips * pieces)].parts.push_back(
        {number, w.segments * piece / pieces, w.segments * (piece + 1) / pieces, i / pieces, piece});
  }
}

}  // namespace

Plan plan_of(const Group& group, std::size_t threads) {
  Plan plan;
  std::uint64_t total = 0;
  for (const Linear& linear : group.linears) {
    std::size_t found = 0;
    while (found < plan.inputs.size() && !same_input(*plan.inputs[found], linear)) ++found;
    if (found == plan.inputs.size()) plan.inputs.push_back(&linear);
    plan.input_of.push_back(found);
    plan.output.push_back(plan.outputs);
    plan.outputs += linear.weight.rows;
    total += linear.bytes();
  }
  // By bytes: a tile costs what it weighs. Whole pairs, which kernels for several tokens take at once.
  plan.shares.resize(threads);
  plan.pieces.assign(group.linears.size(), 1);
  std::uint64_t before = 0;
  for (std::size_t i = 0; i < group.linears.size(); ++i) {
    const LinearView& w = group.linears[i].weight;
    if (w.by_columns) {
      add_columns(plan, i, w, threads);
      before += group.linears[i].bytes();
      continue;
    }
    const std::uint64_t bytes = group.linears[i].bytes();
    std::size_t first = 0;
    for (std::size_t t = 0; t < threads && first < w.tiles(); ++t) {
      const std::uint64_t end = total * (t + 1) / threads;
      std::size_t last = w.tiles();
      if (end < before + bytes) {
        if (end <= before) continue;
        last = std::min(w.tiles(), round_up((end - before) * w.tiles() / bytes, 2));
      }
      const std::size_t step = round_up(kPartBytes * w.tiles() / bytes + 1, 2);
      for (; first < last; first += step) plan.shares[t].parts.push_back({i, first, std::min(first + step, last)});
      first = last;
    }
    before += bytes;
  }
  return plan;
}

}  // namespace tulle
