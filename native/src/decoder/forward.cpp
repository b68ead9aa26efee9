// Passes: of several tokens, and of one.
#include "decoder/state.hpp"
#include "cpu/team.hpp"

namespace tulle {

void Engine::State::run(const std::int32_t* tokens, const std::int32_t* slots_of, const std::int32_t* positions,
                        std::size_t n, const std::int32_t* rows, std::size_t wanted, float* logits) {
  const std::size_t d = model.hidden, q = model.heads * model.head_dim, kv = model.kv_heads * model.head_dim;
  const std::size_t per_row = model.heads + model.kv_heads;
  ready(slots_of, n);
  in_team(threads, [&](std::size_t thread, std::size_t team) {
    const std::size_t from = n * thread / team, to = n * (thread + 1) / team;
    float* const vector = vectors[thread].data();
    const auto multiply_all = [&](const Group& group, Plan& plan, std::size_t count, float* y, std::size_t stride) {
      multiply(group, plan, intake, count, y, stride, thread);
      wait();
      if (plan.most_pieces == 1) return;
      collect(group, plan, count, y, stride, thread, team);
      wait();
    };
    for (std::size_t t = from; t < to; ++t) {
      embed(tokens[t], hidden.data() + t * d);
      turn(positions[t], t);
    }
    for (std::size_t index = 0; index < model.layers.size(); ++index) {
      const Layer& layer = model.layers[index];
      Plans& plan = plans[index];
      for (std::size_t t = from; t < to; ++t) {
        float* x = hidden.data() + t * d;
        if (index > 0) ops.add(x, small.data() + t * d, d);
        ops.rms_norm(x, layer.input_norm, d, model.eps, vector);
        prepare(layer.qkv, plan.qkv, vector, t, thread, intake);
      }
      wait();
      multiply_all(layer.qkv, plan.qkv, n, wide.data(), q + 2 * kv);
      for (std::size_t i = thread; i < n * per_row; i += team) {
        const std::size_t t = i / per_row;
        place(layer, index, i % per_row, wide.data() + t * (q + 2 * kv), t, static_cast<std::size_t>(slots_of[t]),
              static_cast<std::size_t>(positions[t]), thread);
      }
      wait();
      for (std::size_t i = thread; i < row_blocks.size() * model.kv_heads; i += team) {
        attend(layer, index, i / row_blocks.size(), row_blocks[i % row_blocks.size()], wide.data(), slots_of, positions, thread);
      }
      wait();
      for (std::size_t t = from; t < to; ++t) prepare(layer.o, plan.o, attended.data() + t * q, t, thread, intake);
      wait();
      multiply_all(layer.o, plan.o, n, small.data(), d);
      for (std::size_t t = from; t < to; ++t) {
        float* x = hidden.data() + t * d;
        ops.add(x, small.data() + t * d, d);
        ops.rms_norm(x, layer.post_norm, d, model.eps, vector);
        prepare(layer.gate_up, plan.gate_up, vector, t, thread, intake);
      }
      wait();
      multiply_all(layer.gate_up, plan.gate_up, n, wide.data(), 2 * model.intermediate);
      for (std::size_t t = from; t < to; ++t) {
        const float* gate = wide.data() + t * 2 * model.intermediate;
        ops.gate(model.gate, gate, gate + model.intermediate, model.intermediate, vector);
        prepare(layer.down, plan.down, vector, t, thread, intake);
      }
      wait();
      multiply_all(layer.down, plan.down, n, small.data(), d);
    }
    for (std::size_t i = thread; i < wanted; i += team) {
      float* x = hidden.data() + static_cast<std::size_t>(rows[i]) * d;
      if (!model.layers.empty()) ops.add(x, small.data() + static_cast<std::size_t>(rows[i]) * d, d);
      float* normed = small.data() + static_cast<std::size_t>(rows[i]) * d;
      ops.rms_norm(x, model.norm, d, model.eps, normed);
      prepare(model.head, head_plan, normed, i, thread, intake);
    }
    wait();
    if (wanted > 0) multiply_all(model.head, head_plan, wanted, logits, model.vocabulary);
    if (model.exact_head != nullptr) {
      for (std::size_t i = thread; i < wanted; i += team) {
        sharpen(small.data() + static_cast<std::size_t>(rows[i]) * d, logits + i * model.vocabulary);
      }
    }
  });
}

// Threads meet six times a layer: everything that is not a product, each does for itself, or its heads and its part of the
// gates alone. Pieces go to two places in turn, so that what one thread still collects another may not yet overwrite.
void Engine::State::step(std::int32_t token, std::int32_t slot, std::int32_t position, bool wanted, float* logits) {
  const std::size_t d = model.hidden, q = model.heads * model.head_dim, kv = model.kv_heads * model.head_dim;
  const std::size_t shared = model.heads / model.kv_heads, width = model.intermediate;
  ready(&slot, 1);
  ++read_tokens;
  in_team(threads, [&](std::size_t thread, std::size_t team) {
    float *const x = own_hidden[thread].data(), *const vector = vectors[thread].data(), *const row = own_wide[thread].data();
    Intake& mine = own[thread];
    // x, the group's input, times the group's weights, to y or to pieces.
    const auto multiplied = [&](const Group& group, Plan& plan, const float* from, float* y, Buffer<float>& pieces) {
      mine.pieced = pieces.data();
      prepare(group, plan, from, 0, thread, mine);
      if (thread == 0) count(group, plan, mine);
      multiply(group, plan, mine, 1, y, plan.outputs, thread);
      wait();
    };
    const auto add_to_hidden = [&](const Group& group, const Plan& plan) {
      const float* y = small.data();
      if (plan.most_pieces > 1) gather(group, plan, mine, y, 0, d, row), y = row;
      ops.add(x, y, d);
    };
    // Bounds of a thread's part of the gates, of whole vectors: the same bits as all at once.
    const auto part = [&](std::size_t i) { return i == team ? width : std::min(width, round_up(width * i / team, 16)); };
    // A KV head and its queries are one thread's where all have as many.
    const bool whole_heads = model.kv_heads % team == 0;
    embed(token, x);
    if (thread == 0) turn(position, 0);  // known to all when the first products are
    for (std::size_t index = 0; index < model.layers.size(); ++index) {
      const Layer& layer = model.layers[index];
      Plans& plan = plans[index];
      if (index > 0) add_to_hidden(model.layers[index - 1].down, plans[index - 1].down);
      ops.rms_norm(x, layer.input_norm, d, model.eps, vector);
      multiplied(layer.qkv, plan.qkv, vector, wide.data(), pieced);
      gather(layer.qkv, plan.qkv, mine, wide.data(), 0, q + 2 * kv, row);
      for (std::size_t h = 0; h < model.kv_heads; ++h) {
        const bool own_head = h % team == thread;
        for (std::size_t head = h * shared; head < (h + 1) * shared && (own_head || !whole_heads); ++head) {
          place(layer, index, head, row, 0, static_cast<std::size_t>(slot), static_cast<std::size_t>(position), thread);
        }
        if (!own_head) continue;
        place(layer, index, model.heads + h, row, 0, static_cast<std::size_t>(slot), static_cast<std::size_t>(position), thread);
      }
      if (!whole_heads) wait();
      for (std::size_t i = 0; i < row_blocks.size() * model.kv_heads; ++i) {
        const std::size_t h = i / row_blocks.size();
        if ((whole_heads ? h : i) % team != thread) continue;
        attend(layer, index, h, row_blocks[i % row_blocks.size()], row, &slot, &position, thread);
      }
      wait();
      multiplied(layer.o, plan.o, attended.data(), small.data(), next_pieced);
      add_to_hidden(layer.o, plan.o);
      ops.rms_norm(x, layer.post_norm, d, model.eps, vector);
      multiplied(layer.gate_up, plan.gate_up, vector, wide.data(), pieced);
      const std::size_t first = part(thread), last = part(thread + 1);
      if (first < last) {
        float* const up = row + width;
        gather(layer.gate_up, plan.gate_up, mine, wide.data(), first, last, row);
        gather(layer.gate_up, plan.gate_up, mine, wide.data(), width + first, width + last, up);
        ops.gate(model.gate, row, up, last - first, gated.data() + first);
      }
      wait();
      multiplied(layer.down, plan.down, gated.data(), small.data(), next_pieced);
    }
    if (wanted) {
      if (!model.layers.empty()) add_to_hidden(model.layers.back().down, plans.back().down);
      ops.rms_norm(x, model.norm, d, model.eps, vector);
      multiplied(model.head, head_plan, vector, logits, pieced);
      if (thread == 0) {
        if (head_plan.most_pieces > 1) gather(model.head, head_plan, mine, logits, 0, model.vocabulary, logits);
        if (model.exact_head != nullptr) sharpen(vector, logits);
      }
    }
  });
}

}  // namespace tulle
