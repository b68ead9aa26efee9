#include "decoder/state.hpp"

#include <algorithm>
#include <utility>

namespace tulle {
namespace {

constexpr std::size_t kVectors = 8;  // of ThreadMemory::vectors

std::size_t widest(const Model& m) {
  std::size_t found = std::max({m.hidden, m.heads * m.head_dim, m.kv_heads * m.head_dim, m.layer_inputs.width});
  for (const Layer& layer : m.layers) {
    found = std::max({found, layer.feed_forward.intermediate, 2 * layer.mixture.experts.size()});
    for (const FeedForward& expert : layer.mixture.experts) found = std::max(found, expert.intermediate);
    const MixerSizes mixer = m.mixer_sizes(layer);
    found = std::max({found, mixer.mixed, mixer.vector});
  }
  return found;
}

bool attends(const Layer& l) { return l.mixer == Mixer::attention || l.mixer == Mixer::latent; }

// What the layers keep that attend to keys and values of their own.
std::vector<KvSizes> kept_sizes(const Model& m) {
  std::vector<KvSizes> found;
  for (const Layer& l : m.layers) {
    if (l.mixer == Mixer::latent) found.push_back({m.kv_heads, m.head_dim, m.value_dim});
    if (l.mixer == Mixer::attention && l.kv_from < 0) found.push_back({l.kv_heads, l.head_dim, l.head_dim});
  }
  return found;
}

// Of a sequence's record, all layers together.
std::size_t floats_of(const Model& m) {
  std::size_t found = 0;
  for (const Layer& layer : m.layers) found += round_up(m.mixer_sizes(layer).state, 16);  // whole cache lines
  return found;
}

GroupInputs group_inputs(std::size_t count, const InputSizes& sizes, std::size_t tokens) {
  GroupInputs found;
  for (std::size_t i = 0; i < count; ++i) found.emplace_back(sizes, tokens);
  return found;
}

}  // namespace

Engine::State::State(Model m, const EngineSizes& s)
    : model(std::move(m)), sizes(checked(s)), table_width(round_up(sizes.context, kKeyBlock) / kKeyBlock),
      threads(std::max<std::size_t>(sizes.threads, 1)), linear(*active_isa().linear),
      ops(*active_isa().ops), plans(model.layers.size()),
      state_floats(floats_of(model)),
      cache(sizes.cache, kept_sizes(model), sizes.pages),
      states(sizes.slots, sizes.snapshots, state_floats), runs(sizes.slots, sizes.batch), check(model.vocabulary, sizes) {
  for (const Rotary& table : model.rotary) {
    rotary.emplace_back(sizes.batch, table.frequencies, table.scale, table.interleaved);
  }
  const std::size_t batch = sizes.batch;
  InputSizes input_sizes;
  std::size_t input_kinds = 1, panel = 0;
  const auto add = [&](const Group& group, Plan& plan, std::size_t& partial) {
    plan = plan_of(group, threads);
    input_kinds = std::max(input_kinds, plan.inputs.size());
    if (plan.most_parts > 1) partial = std::max(partial, plan.most_parts * plan.outputs);
    for (const Linear& l : group.linears) {
      if (l.weight.input_major()) panel = std::max(panel, l.weight.panel_outputs());
    }
    for (const Linear* l : plan.inputs) input_sizes.add(*l);
  };
  std::size_t partial_in = 0, partial_back = 0, cached = 0, floats = 0, outputs = 0, most_mixed = 0, inner = 0;
  InputSizes expert_sizes;
  std::size_t expert_kinds = 0, per_token = 0, most_experts = 0, marks = 0;
  const auto add_expert = [&](const Group& group, std::size_t own_threads, std::size_t& partial) {
    Outline outline = outline_of(group, own_threads);
    expert_kinds = std::max(expert_kinds, outline.inputs.size());
    if (outline.most_parts > 1) partial = std::max(partial, outline.most_parts * outline.outputs);
    for (const Linear& l : group.linears) {
      if (l.weight.input_major()) panel = std::max(panel, l.weight.panel_outputs());
    }
    for (const Linear* l : outline.inputs) expert_sizes.add(*l);
    return outline;
  };
  const auto add_mixture = [&](const Mixture& mixture, LayerPlans& to) {
    add(mixture.router.group, to.router, partial_in);
    const std::size_t own_threads = (threads + mixture.router.chosen - 1) / mixture.router.chosen;
    for (const FeedForward& one : mixture.experts) {
      const std::size_t number = to.experts.size();
      to.experts.push_back({add_expert(one.gate_up, own_threads, expert.wide_sums),
                            add_expert(one.down, own_threads, expert.back_sums), number});
      for (std::size_t i = 0; i < number && to.experts[number].like == number; ++i) {
        const bool first = to.experts[i].like == i;
        const bool alike = number < mixture.routed() || !mixture.expert_norm.present();
        if (first && alike && same_inputs(mixture.experts[i].gate_up, to.experts[i].gate_up, one.gate_up, to.experts[number].gate_up))
          to.experts[number].like = i;
      }
      expert.wide_row = std::max(expert.wide_row, 2 * one.intermediate);
      expert.gated_row = std::max(expert.gated_row, one.intermediate);
      inner = std::max(inner, one.intermediate);
    }
    outputs = std::max({outputs, mixture.experts.size() + 1, expert.wide_row});
    per_token = std::max(per_token, mixture.per_token());
    most_experts = std::max(most_experts, mixture.experts.size());
    marks = std::max(marks, mixture.routed() + mixture.router.groups);
  };
  InputSizes absorbed_keys, absorbed_values;
  std::size_t query_floats = 0, product_floats = 0, kept_floats = 0, parts = 0, rank = 0;
  const auto add_latent = [&](const LatentAttention& own, LayerPlans& to) {
    if (own.query_rank > 0) add(own.query_up, to.query_up, partial_back);
    query_floats = std::max(query_floats, model.heads * own.query());
    most_mixed = std::max(most_mixed, model.heads * own.tiled_value());
    if (!own.absorbed()) {
      add(own.kv_up, to.kv_up, partial_in);
      product_floats = std::max(product_floats, to.kv_up.outputs);
      kept_floats = std::max(kept_floats, own.rank + own.rotary);
      return;
    }
    product_floats = std::max(product_floats, own.keys.weight.rows);
    parts = std::max(parts, own.parts);
    rank = std::max(rank, own.rank);
    absorbed_keys.add(own.keys);
    absorbed_values.add(own.values);
  };
  std::vector<std::pair<std::size_t, std::size_t>> shapes;  // of attention, KV heads and their channels
  for (std::size_t i = 0; i < plans.size(); ++i) {
    const Layer& layer = model.layers[i];
    if (!attends(layer)) {
      plans[i].kept = floats;
    } else {
      const bool latent = layer.mixer == Mixer::latent, shares = !latent && layer.kv_from >= 0;
      plans[i].kept = shares ? plans[static_cast<std::size_t>(layer.kv_from)].kept : cached++;
      const std::pair shape{latent ? model.kv_heads : layer.kv_heads, latent ? model.head_dim : layer.head_dim};
      plans[i].attention = static_cast<std::size_t>(std::find(shapes.begin(), shapes.end(), shape) - shapes.begin());
      if (plans[i].attention == shapes.size()) {
        shapes.push_back(shape);
        attention.emplace_back(model.heads, shape.first, shape.second, batch, model.attention_scale, model.attention_cap);
      }
    }
    const MixerSizes mixer = model.mixer_sizes(layer);
    floats += round_up(mixer.state, 16);
    outputs = std::max(outputs, mixer.outputs);
    most_mixed = std::max(most_mixed, mixer.mixed);
    add(layer.qkv, plans[i].qkv, partial_in);
    add(layer.o, plans[i].o, partial_back);
    if (layer.mixer == Mixer::latent) add_latent(layer.latent, plans[i]);
    if (layer.input_gate.present()) {
      outputs = std::max(outputs, model.layer_inputs.width);
      add(layer.input_gate.gate, plans[i].input_gate, partial_in);
      add(layer.input_gate.down, plans[i].input_down, partial_back);
    }
    if (layer.mixture.present()) {
      add_mixture(layer.mixture, plans[i]);
      continue;
    }
    inner = std::max(inner, layer.feed_forward.intermediate);
    outputs = std::max(outputs, 2 * layer.feed_forward.intermediate);
    add(layer.feed_forward.gate_up, plans[i].gate_up, partial_in);
    add(layer.feed_forward.down, plans[i].down, partial_back);
  }
  add(model.head, head_plan, partial_in);
  if (model.layer_inputs.present()) {
    add(model.layer_inputs.projection, layer_inputs_plan, partial_in);
    layer_inputs = Buffer<float>(batch * layer_inputs_plan.outputs);
  }

  inputs = group_inputs(input_kinds, input_sizes, batch);
  partial_sums.wide = Buffer<float>(batch * partial_in);
  partial_sums.back = Buffer<float>(batch * partial_back);
  hidden = Buffer<float>(batch * model.hidden);
  attended = Buffer<float>(batch * most_mixed);
  back = Buffer<float>(batch * model.hidden);
  wide = Buffer<float>(batch * outputs);
  gated = Buffer<float>(inner);
  if (!model.gated) {
    ones = Buffer<float>(inner);
    std::fill_n(ones.data(), inner, 1.0f);
  }
  latent.queries = Buffer<float>(batch * query_floats);
  latent.products = Buffer<float>(batch * product_floats);
  latent.kept = Buffer<float>(batch * kept_floats);
  if (parts > 0) {
    latent.keys = group_inputs(1, absorbed_keys, batch * model.heads * parts);
    latent.values = group_inputs(1, absorbed_values, batch * model.heads);
  }
  if (per_token > 0) {
    const std::size_t rows = batch * per_token;
    expert_inputs = group_inputs(expert_kinds, expert_sizes, rows);
    routes = std::make_unique<Routes>(batch, per_token, most_experts);
    expert.wide = Buffer<float>(rows * expert.wide_row);
    expert.back = Buffer<float>(rows * model.hidden);
    expert.gated = Buffer<float>(per_token * expert.gated_row);
    expert.sums.wide = Buffer<float>(rows * expert.wide_sums);
    expert.sums.back = Buffer<float>(rows * expert.back_sums);
  }
  vector_floats = round_up(widest(model) + 16, 16);
  for (std::size_t t = 0; t < threads; ++t) {
    ThreadMemory memory;
    memory.vectors = Buffer<float>(kVectors * vector_floats);
    memory.scores = Buffer<float>(kQueries * table_width * kKeyBlock);
    memory.latents = Buffer<float>(2 * kQueries * rank);
    memory.panel_sums = Buffer<float>(std::min(batch, kInputMajorTokens) * panel);
    memory.kernel_scratch = Buffer<std::uint8_t>(
        std::max(scratch_bytes(batch), panel > 0 ? input_major_scratch_bytes(kInputMajorTokens) : 0));
    memory.inputs = group_inputs(input_kinds, input_sizes, 1);
    memory.hidden = Buffer<float>(model.hidden);
    memory.outputs = Buffer<float>(std::max(outputs, model.hidden));
    if (per_token > 0) {
      memory.expert_inputs = group_inputs(expert_kinds, expert_sizes, per_token);
      memory.routes = std::make_unique<Routes>(1, per_token, most_experts);
      memory.marks = Buffer<std::uint8_t>(marks);
    }
    of_thread.push_back(std::move(memory));
  }
}

std::uint64_t LatentMemory::bytes() const {
  std::uint64_t bytes = queries.bytes() + products.bytes() + kept.bytes();
  for (const GroupInputs* inputs : {&keys, &values}) {
    for (const QuantisedInputs& one : *inputs) bytes += one.bytes();
  }
  return bytes;
}

std::uint64_t Engine::State::work_bytes() const {
  std::uint64_t bytes = 0;
  for (const RotaryTables& table : rotary) bytes += table.bytes();
  for (const Buffer<float>* b : {&partial_sums.wide, &partial_sums.back, &hidden, &attended, &back, &wide, &gated, &ones, &layer_inputs,
                                 &expert.wide, &expert.back, &expert.gated, &expert.sums.wide, &expert.sums.back}) {
    bytes += b->bytes();
  }
  for (const QuantisedInputs& one : inputs) bytes += one.bytes();
  for (const QuantisedInputs& one : expert_inputs) bytes += one.bytes();
  if (routes != nullptr) bytes += routes->bytes();
  bytes += latent.bytes();
  for (const ThreadMemory& t : of_thread) {
    bytes += t.vectors.bytes() + t.latents.bytes() + t.scores.bytes() + t.panel_sums.bytes() + t.kernel_scratch.bytes();
    bytes += t.hidden.bytes() + t.outputs.bytes();
    for (const QuantisedInputs& one : t.inputs) bytes += one.bytes();
    for (const QuantisedInputs& one : t.expert_inputs) bytes += one.bytes();
    if (t.routes != nullptr) bytes += t.routes->bytes() + t.marks.bytes();
  }
  return bytes;
}

}  // namespace tulle
