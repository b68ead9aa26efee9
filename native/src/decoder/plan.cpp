#include "decoder/plan.hpp"

#include <algorithm>
#include <numeric>

namespace tulle {
namespace {

bool same_input(const Linear& a, const Linear& b) {
  const LinearView &v = a.weight, &w = b.weight;
  if (v.is_codes() != w.is_codes() || v.padded() != w.padded()) return false;
  if (v.input_major() != w.input_major() || v.blocks4() != w.blocks4())
    return false;  // what is listed of the active inputs
  if (a.input.bits != b.input.bits || a.input.symmetric != b.input.symmetric || a.input.clip != b.input.clip)
    return false;
  if (!(a.selection == b.selection) || a.engine_grid != b.engine_grid) return false;
  return !v.is_codes() || (v.segment == w.segment && v.segments_per_scale == w.segments_per_scale);
}

// Whole panels where all threads get as many, or many, so that no sum is cut. Otherwise segments: half of a panel's
// outputs would be shorter runs of memory, with another thread's between them.
void add_input_major(Plan& plan, std::size_t number, const LinearView& w, std::size_t threads) {
  const std::size_t panels = w.panels();
  const bool enough = panels >= 4 * threads;
  const std::size_t parts = enough ? 1 : std::min(w.segments, threads / std::gcd(panels, threads));
  plan.parts[number] = parts;
  plan.most_parts = std::max(plan.most_parts, parts);
  for (std::size_t i = 0; i < panels * parts; ++i) {
    const std::size_t part = i % parts;
    plan.queues[i * threads / (panels * parts)].items.push_back(
        {number, w.segments * part / parts, w.segments * (part + 1) / parts, i / parts, part});
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
  plan.queues.resize(threads);
  plan.parts.assign(group.linears.size(), 1);
  std::uint64_t before = 0;
  for (std::size_t i = 0; i < group.linears.size(); ++i) {
    const LinearView& w = group.linears[i].weight;
    const std::uint64_t bytes = group.linears[i].bytes();
    if (w.input_major()) {
      add_input_major(plan, i, w, threads);
      before += bytes;
      continue;
    }
    std::size_t first = 0;
    for (std::size_t t = 0; t < threads && first < w.tiles(); ++t) {
      const std::uint64_t end = total * (t + 1) / threads;
      std::size_t last = w.tiles();
      if (end < before + bytes) {
        if (end <= before) continue;
        last = std::min(w.tiles(), round_up((end - before) * w.tiles() / bytes, 2));
      }
      const std::size_t step = round_up(kItemBytes * w.tiles() / bytes + 1, 2);
      for (; first < last; first += step) plan.queues[t].items.push_back({i, first, std::min(first + step, last)});
      first = last;
    }
    before += bytes;
  }
  return plan;
}

}  // namespace tulle
