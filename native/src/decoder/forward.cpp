// A pass: tokens in, logits out. One routine for one token, for prompts and for several sequences; Pass (state.hpp)
// says what differs. `multiply` ends with all threads waiting for each other.
//
//   residual stream ─ norm ─ qkv ─ rotary, append to the cache, attend ─ o ─(+)─ norm ─ gate, up ─ act ─ down ─(+)─ …
//                                 ├─ latents, see latent.cpp ────────────┤              └─ router, experts ─────┘
//                                 └─ convolution, delta rule ────────────┘
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/team.hpp"
#include "decoder/state.hpp"
#include "decoder/top_logits.hpp"

namespace tulle {

void Norm::run(const OpsKernels& ops, const float* x, std::size_t n, float* y) const {
  if (centred) {
    ops.centre(x, n, y);
    x = y;
  }
  ops.rms_norm(x, gain, n, eps, y);
  if (bias != nullptr) ops.add(y, bias, n);
}

std::size_t Pass::bound(std::size_t size, std::size_t part) const {
  return part == team ? size : std::min(size, round_up(size * part / team, 16));
}

void Pass::publish() const {
  if (!replicated) wait();
}

float* Engine::State::vector(const Pass& pass, std::size_t number) const {
  return of_thread[pass.thread].vectors.data() + number * vector_floats;
}

void Engine::State::forward(const PassInput& input, float* logits, float* embeddings) {
  const std::size_t n = input.n;
  const bool one = n == 1;
  for (Attention& shape : attention) shape.group(input.slots, n);
  for (LayerPlans& of : plans) {
    for (Plan* plan : {&of.qkv, &of.query_up, &of.kv_up, &of.o, &of.gate_up, &of.down, &of.router, &of.input_gate,
                       &of.input_down}) {
      plan->restart();
    }
  }
  head_plan.restart();
  layer_inputs_plan.restart();
  if (one) ++reads.tokens;
  in_team(threads, [&](std::size_t thread, std::size_t team) {
    ThreadMemory& memory = of_thread[thread];
    Pass pass{input, thread, team, one, 0, n, hidden.data(), &inputs, &expert_inputs, routes.get()};
    if (one) {
      pass.hidden = memory.hidden.data();
      pass.inputs = &memory.inputs;
      pass.expert_inputs = &memory.expert_inputs;
      pass.routes = memory.routes.get();
    } else {
      pass.first = n * thread / team;
      pass.last = n * (thread + 1) / team;
    }
    for (std::size_t t = pass.first; t < pass.last; ++t) {
      float* const x = pass.hidden + t * model.hidden;
      model.embedding.copy_row(static_cast<std::size_t>(pass.tokens[t]), model.hidden, x);
      if (model.embedding_scale != 1) ops.scaled(x, model.embedding_scale, model.hidden, x);
      if (one && thread != 0) continue;
      for (RotaryTables& table : rotary) table.set(t, pass.positions[t]);  // known to all when the first products are
    }
    if (model.layer_inputs.present()) prepare_layer_inputs(pass);
    for (std::size_t index = 0; index < model.layers.size(); ++index) layer(pass, index);
    if (pass.wanted > 0) head(pass, logits, embeddings);
  });
}

void Engine::State::layer(const Pass& pass, std::size_t index) {
  const Layer& l = model.layers[index];
  LayerPlans& plan = plans[index];
  const std::size_t n = pass.n;
  const bool mixes = l.mixer != Mixer::none;
  if (mixes) {
    for (std::size_t t = pass.first; t < pass.last; ++t) {
      if (index > 0) add_last(pass, index - 1, t);
      quantise_inputs(pass, l.qkv, plan.qkv, read_stream(pass, l.input_norm, t), t);
    }
    pass.publish();
    multiply(pass, l.qkv, plan.qkv, partial_sums.wide, n, wide.data());
    mix(pass, index);
    for (std::size_t t = pass.first; t < pass.last; ++t) {
      quantise_inputs(pass, l.o, plan.o, mixer_output(pass, index, t), t);
    }
    pass.publish();
    multiply(pass, l.o, plan.o, partial_sums.back, n, back.data());
  }
  const bool experts = l.mixture.present(), mixer_alone = !experts && !l.feed_forward.present();
  const Group& reader = experts ? l.mixture.router.group : l.feed_forward.gate_up;
  const Plan& read = experts ? plan.router : plan.gate_up;
  const Norm& before = experts && l.mixture.router.norm.present() ? l.mixture.router.norm : l.post_norm;
  float* const spare = of_thread[pass.thread].outputs.data();
  for (std::size_t t = pass.first; t < pass.last; ++t) {
    const auto add_before = [&] {
      if (!mixes) {
        if (index > 0) add_last(pass, index - 1, t);
        return;
      }
      const float* const y = reduce(pass, l.o, plan.o, partial_sums.back, n, back.data(), t, 0, model.hidden, spare);
      add_to_residual(pass, y, l.attention_after, t);
    };
    if (model.parallel) {
      // Before the stream changes; a norm of its own, or attention's.
      const float* const normed = read_stream(pass, l.post_norm.present() ? l.post_norm : l.input_norm, t);
      add_before();
      quantise_inputs(pass, reader, read, normed, t);
      continue;
    }
    add_before();
    if (mixer_alone) continue;
    quantise_inputs(pass, reader, read, read_stream(pass, before, t), t);
  }
  pass.publish();
  if (experts) {
    mixture(pass, index);
  } else if (!mixer_alone) {
    multiply(pass, l.feed_forward.gate_up, plan.gate_up, partial_sums.wide, n, wide.data());
    feed_forward(pass, index);
    multiply(pass, l.feed_forward.down, plan.down, partial_sums.back, n, back.data());
  }
  if (l.input_gate.present()) gate_input(pass, index);
}

// From the mixer's first linears, in `wide`, to what it carries and what it makes.
void Engine::State::mix(const Pass& pass, std::size_t index) {
  switch (model.layers[index].mixer) {
    case Mixer::attention: return attend(pass, index);
    case Mixer::delta_net: return delta_net(pass, index);
    case Mixer::short_convolution: return short_convolution(pass, index);
    case Mixer::mamba2: return mamba(pass, index);
    case Mixer::latent: return attend_latents(pass, index);
    case Mixer::none: return;
  }
}

// What o reads of token t.
const float* Engine::State::mixer_output(const Pass& pass, std::size_t index, std::size_t t) {
  switch (model.layers[index].mixer) {
    case Mixer::attention:
    case Mixer::none: break;
    case Mixer::delta_net: return gated_heads(pass, index, t);
    case Mixer::short_convolution: return gated_convolution(pass, index, t);
    case Mixer::mamba2: return gated_groups(pass, index, t);
    case Mixer::latent: return latent_output(pass, index, t);
  }
  return mixed(pass, index, t);
}

// What a group reads of token t's stream: the stream, or its norm, which vector 0 holds then.
const float* Engine::State::read_stream(const Pass& pass, const Norm& norm, std::size_t t) {
  const float* const x = pass.hidden + t * model.hidden;
  if (!norm.present()) return x;
  norm.run(ops, x, model.hidden, vector(pass, 0));
  return vector(pass, 0);
}

// What a layer's feed-forward gave of token t, added to the residual stream.
void Engine::State::add_feed_forward(const Pass& pass, std::size_t index, std::size_t t) {
  const Layer& l = model.layers[index];
  if (!l.mixture.present() && !l.feed_forward.present()) return;
  float* const spare = of_thread[pass.thread].outputs.data();
  const float* const y = l.mixture.present()
                             ? sum_of_experts(pass, index, t)
                             : reduce(pass, l.feed_forward.down, plans[index].down, partial_sums.back, pass.n,
                                      back.data(), t, 0, model.hidden, spare);
  add_to_residual(pass, y, l.feed_forward_after, t);
}

// What a layer's last product gave of token t, added to the residual stream, which is the layer's output then.
void Engine::State::add_last(const Pass& pass, std::size_t index, std::size_t t) {
  const Layer& l = model.layers[index];
  if (l.input_gate.present()) {
    float* const spare = of_thread[pass.thread].outputs.data();
    const float* const y = reduce(pass, l.input_gate.down, plans[index].input_down, partial_sums.back, pass.n, back.data(),
                                  t, 0, model.hidden, spare);
    l.input_gate.norm.run(ops, y, model.hidden, spare);
    ops.add(pass.hidden + t * model.hidden, spare, model.hidden);
  } else {
    add_feed_forward(pass, index, t);
  }
  float* const x = pass.hidden + t * model.hidden;
  if (l.output_scale != 1) ops.scaled(x, l.output_scale, model.hidden, x);
}

// y, what o or the feed-forward gave of token t, added to the residual stream.
void Engine::State::add_to_residual(const Pass& pass, const float* y, const Norm& after, std::size_t t) {
  float* const spare = of_thread[pass.thread].outputs.data();
  if (after.present()) {
    after.run(ops, y, model.hidden, spare);
    y = spare;
  }
  if (model.residual_scale != 1) {
    ops.scaled(y, model.residual_scale, model.hidden, spare);
    y = spare;
  }
  ops.add(pass.hidden + t * model.hidden, y, model.hidden);
}

// What o reads of attention: all heads' outputs of token t, normed and gated.
const float* Engine::State::mixed(const Pass& pass, std::size_t index, std::size_t t) {
  const Layer& l = model.layers[index];
  const Plan& plan = plans[index].qkv;
  const std::size_t d = l.head_dim, width = model.heads * d;
  float *const found = vector(pass, 0), *const spare = of_thread[pass.thread].outputs.data();
  const float* x = attended.data() + t * width;
  if (l.output_norm.present()) {
    l.output_norm.run(ops, x, width, found);
    x = found;
  }
  if (!model.output_gate) return x;
  for (std::size_t h = 0; h < model.heads; ++h) {
    const std::size_t first = h * model.query_step(l) + d;
    const float* const gate = reduce(pass, l.qkv, plan, partial_sums.wide, pass.n, wide.data(), t, first, first + d, spare);
    ops.gate(Gate::sigmoid, nullptr, gate, x + h * d, d, found + h * d);
  }
  return found;
}

// From queries, keys and values in `wide` to `attended`.
void Engine::State::attend(const Pass& pass, std::size_t index) {
  const Layer& l = model.layers[index];
  const std::size_t d = l.head_dim, q = model.heads * d, kv_heads = l.kv_heads, shared = model.heads / kv_heads;
  const Attention& own = attention[plans[index].attention];
  const std::size_t blocks = own.blocks().size(), appended = l.kv_from < 0 ? kv_heads : 0;
  const Vectors queries{wide.data(), plans[index].qkv.outputs, model.query_step(l)}, outputs{attended.data(), q, d};
  float* const scores = of_thread[pass.thread].scores.data();
  if (model.norm_all_heads) normalise_heads(pass, index);
  const auto run = [&](std::size_t kv_head, const QueryBlock& block) {
    const CacheView pages = view(pass, index, kv_head, own.slot_of(block, pass.slots));
    own.run(ops, pages, kv_head, block, pass.positions, l.window, queries, outputs, l.sinks, scores);
  };
  if (kv_heads % pass.team == 0) {
    // All threads get as many KV heads, and a head's queries and keys are one thread's business.
    for (std::size_t h = pass.thread; h < kv_heads; h += pass.team) {
      for (std::size_t t = 0; t < pass.n; ++t) {
        for (std::size_t head = h * shared; head < (h + 1) * shared; ++head) append_head(pass, index, head, t);
        if (appended > 0) append_head(pass, index, model.heads + h, t);
      }
      for (const QueryBlock& block : own.blocks()) run(h, block);
    }
  } else {
    const std::size_t heads = model.heads + appended;
    for (std::size_t i = pass.thread; i < pass.n * heads; i += pass.team)
      append_head(pass, index, i % heads, i / heads);
    wait();
    for (std::size_t i = pass.thread; i < blocks * kv_heads; i += pass.team) {
      run(i / blocks, own.blocks()[i % blocks]);
    }
  }
  wait();
}

// Norms of queries and keys over all heads at once. Of one token one thread does it.
void Engine::State::normalise_heads(const Pass& pass, std::size_t index) {
  const Layer& l = model.layers[index];
  const Plan& plan = plans[index].qkv;
  const std::size_t q = model.heads * l.head_dim, kv = l.kv_heads * l.head_dim;
  for (std::size_t t = pass.first; t < pass.last && (!pass.replicated || pass.thread == 0); ++t) {
    float* const row = wide.data() + t * plan.outputs;
    reduce(pass, l.qkv, plan, partial_sums.wide, pass.n, wide.data(), t, 0, plan.outputs, row);
    l.query_norm.run(ops, row, q, row);
    l.key_norm.run(ops, row + q, kv, row + q);
  }
  wait();
}

// Head number `head` of token t, query heads first, then KV heads: a query gets its position, a key and a value are
// appended to the cache.
void Engine::State::append_head(const Pass& pass, std::size_t index, std::size_t head, std::size_t t) {
  const Layer& l = model.layers[index];
  const Plan& plan = plans[index].qkv;
  const std::size_t d = l.head_dim, q = model.heads * model.query_step(l), kv = l.kv_heads * d;
  const Transform* const rotation = model.head_rotation(d);
  float* const row = wide.data() + t * plan.outputs;
  const auto of = [&](std::size_t first) {
    if (!model.norm_all_heads) reduce(pass, l.qkv, plan, partial_sums.wide, pass.n, wide.data(), t, first, first + d, row + first);
    return row + first;
  };
  if (head < model.heads) {
    float* const query = of(head * model.query_step(l));
    finish_head(l, query, l.query_norm, t);
    if (model.position_length > 0) {
      const std::int32_t steps = pass.positions[t] / model.position_length;
      ops.scaled(query, 1.0f + model.position_beta * std::log(1.0f + static_cast<float>(steps)), d, query);
    }
    if (rotation != nullptr) rotate_head(pass, *rotation, query);
    if (model.query.bits > 0) ops.fake_quantise(query, d, ops.range(query, d, model.query));
    return;
  }
  head -= model.heads;
  float* const key = of(q + head * d);
  float* value = vector(pass, 2);
  if (l.value_is_key) std::memcpy(value, key, d * sizeof(float));
  else value = of(q + kv + head * d);
  if (l.value_norm.present()) l.value_norm.run(ops, value, d, value);
  finish_head(l, key, l.key_norm, t);
  if (rotation != nullptr) rotate_head(pass, *rotation, key);
  cache.append(ops, view(pass, index, head, static_cast<std::size_t>(pass.slots[t])),
               static_cast<std::size_t>(pass.positions[t]), key, value, model.key, model.value);
}

// Keys and values of a slot.
CacheView Engine::State::view(const Pass& pass, std::size_t layer, std::size_t kv_head, std::size_t slot) const {
  return cache.view(plans[layer].kept, kv_head, pass.tables + slot * table_width);
}

// Norm and position of one query or key head.
void Engine::State::finish_head(const Layer& layer, float* x, const Norm& norm, std::size_t t) const {
  const bool own = norm.present() && !model.norm_all_heads;
  if (own && !model.norm_after_rotary) norm.run(ops, x, layer.head_dim, x);
  if (layer.rotary >= 0) rotary[static_cast<std::size_t>(layer.rotary)].rotate(ops, t, x);
  if (own && model.norm_after_rotary) norm.run(ops, x, layer.head_dim, x);
}

// The quantisers' rotation of one query or key head.
void Engine::State::rotate_head(const Pass& pass, const Transform& rotation, float* x) const {
  float* const rotated = vector(pass, 0);
  rotation.run(ops, x, rotated, vector(pass, 1));
  std::memcpy(x, rotated, rotation.channels * sizeof(float));
}

// act(gate) · up of n channels, both within the model's limit; the spare ones may be what they were reduced to.
void Engine::State::gate(const Layer& layer, const float* gate, const float* up, std::size_t n, float* spare_gate,
                         float* spare_up, float* out) const {
  if (model.gate_limit > 0 || model.up_offset != 0) {
    ops.limit_gate(gate, up, n, model.gate_limit, model.up_offset, spare_gate, spare_up);
    gate = spare_gate;
    up = spare_up;
  }
  ops.gate(model.gate, layer.activation, gate, up, n, out);
}

// From gate and up in `wide` to the inputs of down. Of one token, each thread computes a part of the channels.
void Engine::State::feed_forward(const Pass& pass, std::size_t index) {
  const Layer& l = model.layers[index];
  LayerPlans& plan = plans[index];
  const Group& reader = l.feed_forward.gate_up;
  const std::size_t width = l.feed_forward.intermediate;
  const std::size_t first = pass.replicated ? pass.bound(width, pass.thread) : 0;
  const std::size_t last = pass.replicated ? pass.bound(width, pass.thread + 1) : width;
  float* const product = pass.replicated ? gated.data() : vector(pass, 0);
  float* const spare = of_thread[pass.thread].outputs.data();
  const auto outputs = [&](std::size_t t, std::size_t from, std::size_t to, float* room) {
    return reduce(pass, reader, plan.gate_up, partial_sums.wide, pass.n, wide.data(), t, from, to, room);
  };
  for (std::size_t t = pass.first; t < pass.last; ++t) {
    if (first < last) {
      const float* const gate = outputs(t, first, last, spare);
      const float* const up =
          model.gated ? outputs(t, width + first, width + last, spare + width) : ones.data() + first;
      this->gate(l, gate, up, last - first, spare, spare + width, product + first);
    }
    if (pass.replicated) wait();
    const float* inner = product;
    if (l.inner_norm.present()) {
      l.inner_norm.run(ops, product, width, vector(pass, 1));
      inner = vector(pass, 1);
    }
    quantise_inputs(pass, l.feed_forward.down, plan.down, inner, t);
  }
  pass.publish();
}

void Engine::State::head(const Pass& pass, float* logits, float* embeddings) {
  const std::size_t d = model.hidden, vocabulary = model.vocabulary, step = pass.replicated ? 1 : pass.team;
  const std::size_t wanted = pass.wanted;
  const std::int32_t* const rows = pass.rows;
  const std::size_t begin = pass.replicated ? 0 : pass.thread;
  // Kept for the exact head. `back` is free once it has been added.
  const auto normed = [&](std::size_t row) { return pass.replicated ? vector(pass, 0) : back.data() + row * d; };
  for (std::size_t i = begin; i < wanted; i += step) {
    const std::size_t row = static_cast<std::size_t>(rows[i]);
    if (!model.layers.empty()) add_last(pass, model.layers.size() - 1, row);
    model.norm.run(ops, pass.hidden + row * d, d, normed(row));
    if (embeddings != nullptr && (!pass.replicated || pass.thread == 0)) {
      std::memcpy(embeddings + i * d, normed(row), d * sizeof(float));
    }
  }
  if (embeddings != nullptr) return;
  pass.publish();  // the steps of down's inputs have been read
  for (std::size_t i = begin; i < wanted; i += step) {
    quantise_inputs(pass, model.head, head_plan, normed(static_cast<std::size_t>(rows[i])), i);
  }
  pass.publish();
  multiply(pass, model.head, head_plan, partial_sums.wide, wanted, logits);
  for (std::size_t i = pass.thread; i < wanted; i += pass.team) {
    float* const row = logits + i * vocabulary;
    reduce(pass, model.head, head_plan, partial_sums.wide, wanted, logits, i, 0, vocabulary, row);
    const auto finish = [&] {
      if (model.logit_scale != 1) ops.scaled(row, model.logit_scale, vocabulary, row);
      if (model.logit_cap > 0) ops.soft_cap(row, vocabulary, model.logit_cap);
    };
    if (!model.exact_head.present()) {
      finish();
      continue;
    }
    const float *const x = normed(static_cast<std::size_t>(rows[i])), *const bias = model.head.linears[0].bias;
    recompute_top_logits(row, vocabulary, [&](std::size_t token) {
      const Table& exact = model.exact_head;
      const std::size_t at = token * d;
      float logit;
      if (exact.numbers == nullptr) {
        float* const weights = vector(pass, 1);
        exact.copy_row(token, d, weights);
        logit = ops.dot(x, weights, d);
      } else if (exact.kind == WeightKind::bf16) {
        logit = ops.dot_bf16(x, static_cast<const std::uint16_t*>(exact.numbers) + at, d);
      } else {
        logit = ops.dot(x, static_cast<const float*>(exact.numbers) + at, d);
      }
      return logit + (bias != nullptr ? bias[token] : 0.0f);
    });
    finish();
  }
}

}  // namespace tulle
