// A mixture of experts, as a layer's feed-forward.
//
//   router ─ experts of every token ─ their gate, up ─ act ─ down ─ weighted sum (when it is added to the stream)
//
// The products of all experts that have tokens are one stage: threads take items of any of them, and wait for each
// other once. An expert's tokens are rows that follow each other. Of one token, experts that read the same share a row
// of inputs; of several tokens they have copies, so that an expert's inputs are one block of memory.
//
// A shared expert is one that every token goes to.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/team.hpp"
#include "decoder/routing.hpp"
#include "decoder/state.hpp"

namespace tulle {
namespace {

// Bytes of an item of the experts' products: so that threads get several each, within limits.
std::uint64_t item_bytes(std::uint64_t all, std::size_t threads) {
  return std::clamp<std::uint64_t>(all / (16 * threads), kItemBytes / 8, kItemBytes);
}

std::uint64_t bytes_of(const Group& group) {
  std::uint64_t bytes = 0;
  for (const Linear& linear : group.linears) bytes += linear.bytes();
  return bytes;
}

}  // namespace

Routes::Routes(std::size_t tokens, std::size_t per_token, std::size_t most)
    : experts(tokens * per_token), weights(tokens * per_token), rows(tokens * per_token), next(most), part_of(most) {
  parts.reserve(std::min(most, tokens * per_token));
}

std::uint64_t Routes::bytes() const {
  return experts.bytes() + weights.bytes() + rows.bytes() + next.bytes() + part_of.bytes() + parts.capacity() * sizeof(ExpertRows);
}

void Engine::State::mixture(const Pass& pass, std::size_t index) {
  const Mixture& own = model.layers[index].mixture;
  // Nobody takes items of the layer before any more, and of this one nobody before the router's outputs are there.
  if (pass.thread == 0) {
    for (std::atomic<std::size_t>& count : taken) count.store(0, std::memory_order_relaxed);
  }
  multiply(pass, own.router.group, plans[index].router, partial_sums.wide, pass.n, wide.data());
  for (std::size_t t = pass.first; t < pass.last; ++t) route(pass, index, t);
  pass.publish();
  if (pass.replicated || pass.thread == 0) arrange(pass, index);
  pass.publish();
  for (std::size_t t = pass.first; t < pass.last; ++t) quantise_for_experts(pass, index, t);
  pass.publish();
  multiply(pass, pass.routes->gate_up, taken[0]);
  gate_experts(pass, index);
  multiply(pass, pass.routes->down, taken[1]);
}

// The experts of token t and their weights, of the router's outputs in `wide`.
void Engine::State::route(const Pass& pass, std::size_t index, std::size_t t) {
  const Mixture& mixture = model.layers[index].mixture;
  const Plan& plan = plans[index].router;
  const std::size_t routed = mixture.routed(), first = t * mixture.per_token(), chosen = mixture.router.chosen;
  std::uint32_t* const experts = pass.routes->experts.data() + first;
  float *const weights = pass.routes->weights.data() + first, *const scores = vector(pass, 1);
  const float* const outputs = reduce(pass, mixture.router.group, plan, partial_sums.wide, pass.n, wide.data(), t, 0,
                                      plan.outputs, scores);
  if (outputs != scores) std::memcpy(scores, outputs, plan.outputs * sizeof(float));
  const float gate = mixture.shared_gate ? 1.0f / (1.0f + std::exp(-scores[routed])) : 1.0f;
  choose_experts(mixture.router, scores, routed, experts, weights, vector(pass, 2), of_thread[pass.thread].marks.data());
  if (!mixture.shared) return;
  experts[chosen] = static_cast<std::uint32_t>(routed);
  weights[chosen] = gate;
}

// Rows of all tokens' experts, and the products with them.
void Engine::State::arrange(const Pass& pass, std::size_t index) {
  const Mixture& mixture = model.layers[index].mixture;
  const std::vector<ExpertPlan>& of = plans[index].experts;
  Routes& routes = *pass.routes;
  const std::size_t count = pass.n * mixture.per_token();
  const std::uint32_t* const experts = routes.experts.data();
  std::uint32_t* const next = routes.next.data();  // row of an expert's next token
  std::fill_n(next, of.size(), 0u);
  for (std::size_t i = 0; i < count; ++i) ++next[experts[i]];
  routes.parts.clear();
  std::size_t row = 0;
  std::uint64_t up_bytes = 0, down_bytes = 0;
  for (std::size_t e = 0; e < of.size(); ++e) {
    if (next[e] == 0) continue;
    ExpertRows part{e, row, next[e], row};
    next[e] = static_cast<std::uint32_t>(row);
    row += part.count;
    if (pass.replicated) {
      for (const ExpertRows& other : routes.parts) {
        if (of[other.expert].like == of[e].like && part.input == part.first) part.input = other.input;
      }
    }
    routes.part_of.data()[e] = static_cast<std::uint32_t>(routes.parts.size());
    routes.parts.push_back(part);
    up_bytes += bytes_of(mixture.experts[e].gate_up);
    down_bytes += bytes_of(mixture.experts[e].down);
  }
  for (std::size_t i = 0; i < count; ++i) routes.rows.data()[i] = next[experts[i]]++;
  routes.gate_up.clear();
  routes.down.clear();
  for (const ExpertRows& part : routes.parts) {
    const FeedForward& one = mixture.experts[part.expert];
    const ExpertPlan& plan = of[part.expert];
    const GroupInputs* const inputs = pass.expert_inputs;
    routes.gate_up.add({&one.gate_up, &plan.gate_up, inputs, part.input, part.count,
                        expert.sums.wide.data() + part.first * expert.wide_sums,
                        expert.wide.data() + part.first * expert.wide_row},
                       item_bytes(up_bytes, threads));
    routes.down.add({&one.down, &plan.down, inputs, part.first, part.count,
                     expert.sums.back.data() + part.first * expert.back_sums,
                     expert.back.data() + part.first * model.hidden},
                    item_bytes(down_bytes, threads));
  }
}

// The inputs of all of token t's experts.
void Engine::State::quantise_for_experts(const Pass& pass, std::size_t index, std::size_t t) {
  const Layer& l = model.layers[index];
  const Mixture& mixture = l.mixture;
  const bool apart = mixture.expert_norm.present();
  const float* x = read_stream(pass, apart ? mixture.expert_norm : l.post_norm, t);
  const std::vector<ExpertPlan>& of = plans[index].experts;
  const Routes& routes = *pass.routes;
  const std::size_t per_token = mixture.per_token();
  const std::uint32_t *const experts = routes.experts.data() + t * per_token,
                      *const rows = routes.rows.data() + t * per_token;
  const auto row_of = [&](std::size_t k) {
    const std::size_t base = routes.parts[routes.part_of.data()[experts[k]]].first;
    return InputRow{base, rows[k] - base};
  };
  for (std::size_t k = 0; k < per_token; ++k) {
    const Outline& outline = of[experts[k]].gate_up;
    if (apart && experts[k] == mixture.routed()) x = read_stream(pass, l.post_norm, t);  // the shared one, the last
    std::size_t same = 0;
    while (of[experts[same]].like != of[experts[k]].like) ++same;
    if (same == k) {
      quantise_inputs(pass, mixture.experts[experts[k]].gate_up, outline, x, *pass.expert_inputs, row_of(k));
    } else if (!pass.replicated) {
      for (std::size_t i = 0; i < outline.inputs.size(); ++i) {
        (*pass.expert_inputs)[i].copy(*outline.inputs[i], row_of(same), row_of(k));
      }
    }
  }
}

// From the experts' gate and up to the inputs of their down. Of one token, each thread computes a part of the channels
// of all of them.
void Engine::State::gate_experts(const Pass& pass, std::size_t index) {
  const Layer& l = model.layers[index];
  const Routes& routes = *pass.routes;
  float* const spare = of_thread[pass.thread].outputs.data();
  // Channels [first, last) of row number `row` of a part.
  const auto run = [&](std::size_t part, std::size_t row, std::size_t first, std::size_t last, float* to) {
    if (first >= last) return;
    const Product& product = routes.gate_up.all[part];
    const std::size_t width = l.mixture.experts[routes.parts[part].expert].intermediate;
    const float* const gate = reduce(product, row, first, last, spare);
    const float* const up =
        model.gated ? reduce(product, row, width + first, width + last, spare + width) : ones.data() + first;
    this->gate(l, gate, up, last - first, spare, spare + width, to + first);
  };
  const auto quantise = [&](const ExpertRows& part, const float* x, std::size_t row) {
    const Outline& outline = plans[index].experts[part.expert].down;
    quantise_inputs(pass, l.mixture.experts[part.expert].down, outline, x, *pass.expert_inputs, {part.first, row});
  };
  if (pass.replicated) {
    const auto gated_row = [&](const ExpertRows& part) { return expert.gated.data() + part.first * expert.gated_row; };
    for (std::size_t i = 0; i < routes.parts.size(); ++i) {
      const std::size_t width = l.mixture.experts[routes.parts[i].expert].intermediate;
      run(i, 0, pass.bound(width, pass.thread), pass.bound(width, pass.thread + 1), gated_row(routes.parts[i]));
    }
    wait();
    for (const ExpertRows& part : routes.parts) quantise(part, gated_row(part), 0);
    return;
  }
  const std::size_t rows = pass.n * l.mixture.per_token();
  const std::size_t begin = rows * pass.thread / pass.team, end = rows * (pass.thread + 1) / pass.team;
  for (std::size_t i = 0; i < routes.parts.size(); ++i) {
    const ExpertRows& part = routes.parts[i];
    for (std::size_t row = std::max(begin, part.first); row < std::min(end, part.first + part.count); ++row) {
      run(i, row - part.first, 0, l.mixture.experts[part.expert].intermediate, vector(pass, 0));
      quantise(part, vector(pass, 0), row - part.first);
    }
  }
  pass.publish();
}

// What the experts of token t gave, weighted.
const float* Engine::State::sum_of_experts(const Pass& pass, std::size_t index, std::size_t t) {
  const Mixture& mixture = model.layers[index].mixture;
  const Routes& routes = *pass.routes;
  const std::size_t per_token = mixture.per_token(), d = model.hidden;
  float *const total = vector(pass, 0), *const spare = vector(pass, 1);
  std::memset(total, 0, d * sizeof(float));
  const std::size_t chosen = mixture.router.chosen;
  for (std::size_t k = 0; k < per_token; ++k) {
    const std::size_t at = t * per_token + k, part = routes.part_of.data()[routes.experts.data()[at]];
    const std::size_t row = routes.rows.data()[at] - routes.parts[part].first;
    const float* y = reduce(routes.down.all[part], row, 0, d, spare);
    if (k == chosen && mixture.shared_after.present()) {
      mixture.shared_after.run(ops, y, d, spare);
      y = spare;
    }
    ops.vector_matrix(routes.weights.data() + at, y, 1, d, total);
    if (k + 1 == chosen && mixture.experts_after.present()) mixture.experts_after.run(ops, total, d, total);
  }
  return total;
}

}  // namespace tulle
