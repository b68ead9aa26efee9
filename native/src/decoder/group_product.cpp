// A group of linears that share an input: quantise the inputs, multiply, reduce partial sums.
//
//   x ─ transforms ─ quantise, select ─► inputs ─► multiply ─► y [token][output]
//                                                     └─ inputs cut between threads ─► partial sums ─ reduce ─► y
#include <algorithm>
#include <cstring>

#include "cpu/team.hpp"
#include "decoder/state.hpp"

namespace tulle {

// x, the group's input, as token t's input of its linears.
void Engine::State::quantise_inputs(const Pass& pass, const Group& group, const Outline& outline, const float* x,
                                    std::size_t t) {
  quantise_inputs(pass, group, outline, x, *pass.inputs, InputRow{0, t});
}

void Engine::State::quantise_inputs(const Pass& pass, const Group& group, const Outline& outline, const float* x,
                                    GroupInputs& to, InputRow row) {
  x = transformed(pass, group.transforms, x);
  for (std::size_t i = 0; i < outline.inputs.size(); ++i) {
    to[i].set(ops, *outline.inputs[i], x, row, vector(pass, 4), vector(pass, 5));
  }
}

// x behind the transforms: x itself where there are none, else vector 1 or 2.
const float* Engine::State::transformed(const Pass& pass, const std::vector<Transform>& transforms, const float* x) {
  float* const room[2] = {vector(pass, 1), vector(pass, 2)};
  int next = 0;
  for (const Transform& transform : transforms) {
    transform.run(ops, x, room[next], vector(pass, 3));
    x = room[next];
    next = 1 - next;
  }
  return x;
}

// y [n][outputs of the group], or partial sums; all threads are done when it returns. A thread takes its own items,
// then those that others have not come to.
void Engine::State::multiply(const Pass& pass, const Group& group, Plan& plan, Buffer<float>& sums, std::size_t n,
                             float* y) {
  const Product product{&group, &plan, pass.inputs, 0, n, sums.data(), y};
  if (pass.replicated && pass.thread == 0) count_reads(product);
  for (std::size_t i = 0; i < threads; ++i) {
    WorkQueue& queue = plan.queues[(pass.thread + i) % threads];
    while (true) {
      const std::size_t next = queue.taken.fetch_add(1, std::memory_order_relaxed);
      if (next >= queue.items.size()) break;
      multiply_item(pass, product, queue.items[next]);
    }
  }
  wait();
}

void Products::clear() {
  all.clear();
  items.clear();
}

void Products::add(const Product& product, std::uint64_t item_bytes) {
  const std::size_t first = items.size();
  for (std::size_t i = 0; i < product.group->linears.size(); ++i) {
    add_items(*product.group, *product.outline, i, item_bytes, items);
  }
  for (std::size_t i = first; i < items.size(); ++i) items[i].product = all.size();
  all.push_back(product);
}

// All of the products; all threads are done when it returns. `taken` is 0 before.
void Engine::State::multiply(const Pass& pass, const Products& products, std::atomic<std::size_t>& taken) {
  if (pass.replicated && pass.thread == 0) {
    for (const Product& product : products.all) count_reads(product);
  }
  while (true) {
    const std::size_t next = taken.fetch_add(1, std::memory_order_relaxed);
    if (next >= products.items.size()) break;
    const WorkItem& item = products.items[next];
    multiply_item(pass, products.all[item.product], item);
  }
  wait();
}

void Engine::State::multiply_item(const Pass& pass, const Product& p, const WorkItem& item) {
  const Linear& l = p.group->linears[item.linear];
  if (l.weight.input_major()) return multiply_input_major(pass, p, item);
  const Outline& outline = *p.outline;
  float* const out = p.y + outline.output[item.linear];
  const std::size_t input = outline.input_of[item.linear];
  linear.run(l.weight, (*p.inputs)[input].view(*outline.inputs[input], {p.input, 0}, p.n), item.first, item.last, out,
             outline.outputs, of_thread[pass.thread].kernel_scratch.data());
  if (l.bias == nullptr) return;
  const std::size_t first = item.first * kTileRows, last = std::min(item.last * kTileRows, l.weight.rows);
  for (std::size_t t = 0; t < p.n; ++t) ops.add(out + t * outline.outputs + first, l.bias + first, last - first);
}

// Segments of a panel: the outputs themselves where its inputs are not cut, otherwise partial sums.
void Engine::State::multiply_input_major(const Pass& pass, const Product& p, const WorkItem& item) {
  const Outline& outline = *p.outline;
  const Linear& l = p.group->linears[item.linear];
  const LinearView& w = l.weight;
  const std::size_t outputs = w.panel_outputs(), first = item.panel * outputs,
                    count = std::min(outputs, w.rows - first);
  const std::size_t column = outline.output[item.linear] + first, input = outline.input_of[item.linear];
  const ThreadMemory& memory = of_thread[pass.thread];
  float* const found = memory.panel_sums.data();
  for (std::size_t from = 0; from < p.n; from += kInputMajorTokens) {
    const std::size_t tokens = std::min(kInputMajorTokens, p.n - from);
    const Inputs x = (*p.inputs)[input].view(*outline.inputs[input], {p.input, from}, tokens);
    linear.run_input_major(w, x, item.panel, item.first, item.last, found, outputs, memory.kernel_scratch.data());
    for (std::size_t t = 0; t < tokens; ++t) {
      if (outline.parts[item.linear] > 1) {
        float* const to = p.sums + (item.part * p.n + from + t) * outline.outputs + column;
        std::memcpy(to, found + t * outputs, count * sizeof(float));
      } else {
        float* const to = p.y + (from + t) * outline.outputs + column;
        ops.scaled(found + t * outputs, x.steps[t], count, to);
        if (l.bias != nullptr) ops.add(to, l.bias + first, count);
      }
    }
  }
}

const float* Engine::State::reduce(const Pass& pass, const Group& group, const Outline& outline,
                                   const Buffer<float>& sums, std::size_t n, float* y, std::size_t t, std::size_t first,
                                   std::size_t last, float* to) {
  return reduce({&group, &outline, pass.inputs, 0, n, sums.data(), y}, t, first, last, to);
}

// Outputs [first, last) of token t: where `multiply` left them in y, or reduced from partial sums to `to`.
const float* Engine::State::reduce(const Product& p, std::size_t t, std::size_t first, std::size_t last, float* to) {
  const Outline& outline = *p.outline;
  const float* const row = p.y + t * outline.outputs;
  if (outline.most_parts == 1) return row + first;
  for (std::size_t i = 0; i < p.group->linears.size(); ++i) {
    const Linear& l = p.group->linears[i];
    const std::size_t own = outline.output[i];
    const std::size_t begin = std::max(first, own), end = std::min(last, own + l.weight.rows);
    if (begin >= end) continue;
    float* const at = to + (begin - first);
    if (outline.parts[i] == 1) {
      if (at != row + begin) std::memcpy(at, row + begin, (end - begin) * sizeof(float));
      continue;
    }
    const float* const from = p.sums + t * outline.outputs + begin;
    std::memcpy(at, from, (end - begin) * sizeof(float));
    for (std::size_t part = 1; part < outline.parts[i]; ++part) {
      ops.add(at, from + part * p.n * outline.outputs, end - begin);
    }
    ops.scaled(at, (*p.inputs)[outline.input_of[i]].step({p.input, t}), end - begin, at);
    if (l.bias != nullptr) ops.add(at, l.bias + (begin - own), end - begin);
  }
  return to;
}

// Bytes of the group's weights that one token reads.
void Engine::State::count_reads(const Product& p) {
  for (std::size_t i = 0; i < p.group->linears.size(); ++i) {
    const Linear& l = p.group->linears[i];
    double bytes = static_cast<double>(l.bytes());
    if (l.weight.input_major()) {
      const std::size_t active = (*p.inputs)[p.outline->input_of[i]].active({p.input, 0});
      bytes -= (static_cast<double>(l.weight.padded()) - static_cast<double>(active)) * l.bytes_per_input();
    }
    reads.bytes += bytes;
  }
}

}  // namespace tulle
