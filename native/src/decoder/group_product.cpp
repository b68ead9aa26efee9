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
void Engine::State::quantise_inputs(const Pass& pass, const Group& group, const Plan& plan, const float* x,
                                    std::size_t t) {
  float* const transformed[2] = {vector(pass, 1), vector(pass, 2)};
  int next = 0;
  for (const Transform& transform : group.transforms) {
    transform.run(ops, x, transformed[next], vector(pass, 3));
    x = transformed[next];
    next = 1 - next;
  }
  for (std::size_t i = 0; i < plan.inputs.size(); ++i) {
    (*pass.inputs)[i].set(ops, *plan.inputs[i], x, t, vector(pass, 4), vector(pass, 5));
  }
}

// y [n][outputs of the group], or partial sums; all threads are done when it returns. A thread takes its own items,
// then those that others have not come to.
void Engine::State::multiply(const Pass& pass, const Group& group, Plan& plan, Buffer<float>& sums, std::size_t n,
                             float* y) {
  if (pass.replicated && pass.thread == 0) count_reads(group, plan, *pass.inputs);
  for (std::size_t i = 0; i < threads; ++i) {
    WorkQueue& queue = plan.queues[(pass.thread + i) % threads];
    while (true) {
      const std::size_t next = queue.taken.fetch_add(1, std::memory_order_relaxed);
      if (next >= queue.items.size()) break;
      multiply_item(pass, group, plan, queue.items[next], sums.data(), n, y);
    }
  }
  wait();
}

void Engine::State::multiply_item(const Pass& pass, const Group& group, const Plan& plan, const WorkItem& item,
                                  float* sums, std::size_t n, float* y) {
  const Linear& l = group.linears[item.linear];
  if (l.weight.input_major()) return multiply_input_major(pass, l, plan, item, sums, n, y);
  float* const out = y + plan.output[item.linear];
  const std::size_t input = plan.input_of[item.linear];
  linear.run(l.weight, (*pass.inputs)[input].view(*plan.inputs[input], 0, n), item.first, item.last, out, plan.outputs,
             of_thread[pass.thread].kernel_scratch.data());
  if (l.bias == nullptr) return;
  const std::size_t first = item.first * kTileRows, last = std::min(item.last * kTileRows, l.weight.rows);
  for (std::size_t t = 0; t < n; ++t) ops.add(out + t * plan.outputs + first, l.bias + first, last - first);
}

// Segments of a panel: the outputs themselves where its inputs are not cut, otherwise partial sums.
void Engine::State::multiply_input_major(const Pass& pass, const Linear& l, const Plan& plan, const WorkItem& item,
                                         float* sums, std::size_t n, float* y) {
  const LinearView& w = l.weight;
  const std::size_t outputs = w.panel_outputs(), first = item.panel * outputs,
                    count = std::min(outputs, w.rows - first);
  const std::size_t column = plan.output[item.linear] + first, input = plan.input_of[item.linear];
  const ThreadMemory& memory = of_thread[pass.thread];
  float* const found = memory.panel_sums.data();
  for (std::size_t from = 0; from < n; from += kInputMajorTokens) {
    const std::size_t tokens = std::min(kInputMajorTokens, n - from);
    const Inputs x = (*pass.inputs)[input].view(*plan.inputs[input], from, tokens);
    linear.run_input_major(w, x, item.panel, item.first, item.last, found, outputs, memory.kernel_scratch.data());
    for (std::size_t t = 0; t < tokens; ++t) {
      if (plan.parts[item.linear] > 1) {
        float* const to = sums + (item.part * n + from + t) * plan.outputs + column;
        std::memcpy(to, found + t * outputs, count * sizeof(float));
      } else {
        float* const to = y + (from + t) * plan.outputs + column;
        ops.scaled(found + t * outputs, x.steps[t], count, to);
        if (l.bias != nullptr) ops.add(to, l.bias + first, count);
      }
    }
  }
}

// Outputs [first, last) of token t: where `multiply` left them in y, or reduced from partial sums to `to`.
const float* Engine::State::reduce(const Pass& pass, const Group& group, const Plan& plan, const Buffer<float>& sums,
                                   std::size_t n, const float* y, std::size_t t, std::size_t first, std::size_t last,
                                   float* to) {
  const float* const row = y + t * plan.outputs;
  if (plan.most_parts == 1) return row + first;
  for (std::size_t i = 0; i < group.linears.size(); ++i) {
    const Linear& l = group.linears[i];
    const std::size_t own = plan.output[i];
    const std::size_t begin = std::max(first, own), end = std::min(last, own + l.weight.rows);
    if (begin >= end) continue;
    float* const at = to + (begin - first);
    if (plan.parts[i] == 1) {
      if (at != row + begin) std::memcpy(at, row + begin, (end - begin) * sizeof(float));
      continue;
    }
    const float* const from = sums.data() + t * plan.outputs + begin;
    std::memcpy(at, from, (end - begin) * sizeof(float));
    for (std::size_t part = 1; part < plan.parts[i]; ++part) ops.add(at, from + part * n * plan.outputs, end - begin);
    ops.scaled(at, (*pass.inputs)[plan.input_of[i]].step(t), end - begin, at);
    if (l.bias != nullptr) ops.add(at, l.bias + (begin - own), end - begin);
  }
  return to;
}

// Bytes of the group's weights that a pass of one token reads.
void Engine::State::count_reads(const Group& group, const Plan& plan, const GroupInputs& of) {
  for (std::size_t i = 0; i < group.linears.size(); ++i) {
    const Linear& l = group.linears[i];
    double bytes = static_cast<double>(l.bytes());
    if (l.weight.input_major()) {
      const double inactive =
          static_cast<double>(l.weight.padded()) - static_cast<double>(of[plan.input_of[i]].active(0));
      bytes -= inactive * l.bytes_per_input();
    }
    reads.bytes += bytes;
  }
}

}  // namespace tulle
