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
std::size_t parts_of(const LinearView& w, std::size_t threads) {
  if (!w.input_major() || w.panels() >= 4 * threads) return 1;
  return std::min(w.segments, threads / std::gcd(w.panels(), threads));
}

// Number i of the items of an input-major linear that is cut into so many parts.
WorkItem part_of(const LinearView& w, std::size_t number, std::size_t parts, std::size_t i) {
  const std::size_t part = i % parts;
  return {number, w.segments * part / parts, w.segments * (part + 1) / parts, i / parts, part};
}

// Tiles that weigh `least` bytes together; whole pairs, which kernels for several tokens take at once.
std::size_t tiles_of(const Linear& linear, std::uint64_t least) {
  return round_up(least * linear.weight.tiles() / linear.bytes() + 1, 2);
}

bool same(const Transform& a, const Transform& b) {
  return a.kind == b.kind && a.channels == b.channels && a.block == b.block && a.shared == b.shared &&
         a.left == b.left && a.right == b.right && a.base == b.base && a.numbers == b.numbers && a.index == b.index;
}

}  // namespace

Outline outline_of(const Group& group, std::size_t threads) {
  Outline found;
  for (const Linear& linear : group.linears) {
    std::size_t input = 0;
    while (input < found.inputs.size() && !same_input(*found.inputs[input], linear)) ++input;
    if (input == found.inputs.size()) found.inputs.push_back(&linear);
    found.input_of.push_back(input);
    found.output.push_back(found.outputs);
    found.outputs += linear.weight.rows;
    found.parts.push_back(parts_of(linear.weight, threads));
    found.most_parts = std::max(found.most_parts, found.parts.back());
  }
  return found;
}

Plan plan_of(const Group& group, std::size_t threads) {
  Plan plan{outline_of(group, threads), {}};
  std::uint64_t total = 0;
  for (const Linear& linear : group.linears) total += linear.bytes();
  // By bytes: a tile costs what it weighs.
  plan.queues.resize(threads);
  std::uint64_t before = 0;
  for (std::size_t i = 0; i < group.linears.size(); ++i) {
    const LinearView& w = group.linears[i].weight;
    const std::uint64_t bytes = group.linears[i].bytes();
    if (w.input_major()) {
      const std::size_t count = w.panels() * plan.parts[i];
      for (std::size_t k = 0; k < count; ++k) {
        plan.queues[k * threads / count].items.push_back(part_of(w, i, plan.parts[i], k));
      }
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
      const std::size_t step = tiles_of(group.linears[i], kItemBytes);
      for (; first < last; first += step) plan.queues[t].items.push_back({i, first, std::min(first + step, last)});
      first = last;
    }
    before += bytes;
  }
  return plan;
}

void add_items(const Group& group, const Outline& outline, std::size_t number, std::uint64_t bytes,
               std::vector<WorkItem>& items) {
  const Linear& linear = group.linears[number];
  const LinearView& w = linear.weight;
  if (w.input_major()) {
    const std::size_t parts = outline.parts[number];
    for (std::size_t i = 0; i < w.panels() * parts; ++i) items.push_back(part_of(w, number, parts, i));
    return;
  }
  const std::size_t step = tiles_of(linear, bytes);
  for (std::size_t first = 0; first < w.tiles(); first += step) {
    items.push_back({number, first, std::min(first + step, w.tiles())});
  }
}

bool same_inputs(const Group& a, const Outline& of_a, const Group& b, const Outline& of_b) {
  const auto alike = [](const Linear* x, const Linear* y) { return same_input(*x, *y); };
  return std::equal(of_a.inputs.begin(), of_a.inputs.end(), of_b.inputs.begin(), of_b.inputs.end(), alike) &&
         std::equal(a.transforms.begin(), a.transforms.end(), b.transforms.begin(), b.transforms.end(), same);
}

}  // namespace tulle
