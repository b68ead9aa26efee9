// What an engine keeps, and the parts that a pass is made of.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "cpu/buffer.hpp"
#include "decoder/quantised_inputs.hpp"
#include "decoder/plan.hpp"
#include "decoder/top_logits.hpp"
#include "tulle/dispatch.hpp"
#include "tulle/engine.hpp"

namespace tulle {

inline std::size_t widest(const Model& model) {
  return std::max({model.hidden, model.intermediate, model.heads * model.head_dim, model.kv_heads * model.head_dim});
}

struct Engine::State {
  Model model;
  std::size_t slots, context, batch, threads;
  CacheKind cache_kind;
  const LinearKernels& linear;
  const OpsKernels& ops;

  struct Plans {
    Plan qkv, o, gate_up, down;
  };
  std::vector<Plans> plans;
  Plan head_plan;

  // What a group's linears read, and where their sums go that come in pieces: [piece][token][output of the group].
  struct Intake {
    std::vector<Prepared> inputs;
    float* pieced = nullptr;
  };
  Intake intake;
  Buffer<float> pieced, next_pieced;
  // Of a pass of one token, per thread: each prepares what it reads by itself, since what another core has just written
  // takes longer to come than to be computed again.
  std::vector<Intake> own;
  std::vector<Buffer<float>> own_hidden, own_wide;
  Buffer<float> gated;
  // Of passes of one token.
  double read_bytes = 0;
  std::uint64_t read_tokens = 0;
  Buffer<float> hidden, attended, small, wide, cosines, sines;
  Buffer<std::uint8_t> keys, values;
  Buffer<float> cache_scales;
  // Per thread: three vectors for transforms, scores, and a kernel's scratch.
  std::size_t vector_floats, score_floats, scratch;
  std::vector<Buffer<float>> vectors, scores, strips;
  std::vector<Buffer<std::uint8_t>> scratches;

  // Rows of queries that share a pass: of one sequence, `count` of them from row `first` (token · shared + head).
  struct Rows {
    std::size_t first, count;
  };
  std::vector<Rows> row_blocks;

  State(Model m, std::size_t slots_, std::size_t context_, std::size_t batch_, CacheKind kind, std::size_t threads_)
      : model(std::move(m)), slots(slots_), context(round_up(context_, kKeyBlock)), batch(batch_),
        threads(std::max<std::size_t>(threads_, 1)), cache_kind(kind), linear(*active_isa().linear),
        ops(*active_isa().ops) {
    require(slots >= 1 && context_ >= 1 && batch >= 1, "slots, context and batch of at least", 1, 0);
    std::size_t inputs = 1, float_width = 0, code_width = 0, segments = 0, quad_width = 0, pieces = 0, strip = 0;
    bool two_planes = false;
    const auto add = [&](const Group& group, Plan& plan) {
      plan = plan_of(group, threads);
      inputs = std::max(inputs, plan.inputs.size());
      if (plan.most_pieces > 1) pieces = std::max(pieces, plan.most_pieces * plan.outputs);
      for (const Linear& l : group.linears) {
        if (l.weight.by_columns) strip = std::max(strip, strip_outputs(l.weight));
      }
      for (const Linear* l : plan.inputs) {
        if (!l->weight.is_codes()) {
          float_width = std::max(float_width, l->weight.padded());
          continue;
        }
        code_width = std::max(code_width, l->weight.padded());
        segments = std::max(segments, l->weight.segments);
        if (l->weight.by_columns) quad_width = std::max(quad_width, 4 * Prepared::quad_stride(l->weight));
        two_planes = two_planes || planes_of(l->input) == 2;
      }
    };
    plans.resize(model.layers.size());
    for (std::size_t i = 0; i < plans.size(); ++i) {
      add(model.layers[i].qkv, plans[i].qkv);
      add(model.layers[i].o, plans[i].o);
      add(model.layers[i].gate_up, plans[i].gate_up);
      add(model.layers[i].down, plans[i].down);
    }
    add(model.head, head_plan);
    const auto room = [&](std::size_t tokens) {
      Intake found;
      for (std::size_t i = 0; i < inputs; ++i) {
        Prepared p;
        p.floats = Buffer<float>(tokens * float_width);
        p.steps = Buffer<float>(tokens);
        for (std::size_t plane = 0; plane < (two_planes ? 2 : 1); ++plane) {
          p.plane[plane] = Buffer<std::int8_t>(tokens * code_width);
          p.sums[plane] = Buffer<std::int32_t>(tokens * segments);
          if (quad_width) p.quad_plane[plane] = Buffer<std::int8_t>(tokens * quad_width);
        }
        if (quad_width) {
          p.quads = Buffer<std::uint32_t>(tokens * quad_width);
          p.quad_starts = Buffer<std::uint32_t>(tokens * (segments + 1));
          p.active = Buffer<std::uint32_t>(tokens);
        }
        found.inputs.push_back(std::move(p));
      }
      return found;
    };
    intake = room(batch);
    const std::size_t q = model.heads * model.head_dim, kv = model.kv_heads * model.head_dim;
    hidden = Buffer<float>(batch * model.hidden);
    attended = Buffer<float>(batch * q);
    small = Buffer<float>(batch * model.hidden);
    wide = Buffer<float>(batch * std::max(q + 2 * kv, 2 * model.intermediate));
    cosines = Buffer<float>(batch * model.head_dim / 2);
    sines = Buffer<float>(batch * model.head_dim / 2);
    const std::size_t heads = model.layers.size() * slots * model.kv_heads;
    keys = Buffer<std::uint8_t>(heads * context * model.head_dim * item_bytes(kind));
    values = Buffer<std::uint8_t>(heads * context * model.head_dim * item_bytes(kind));
    if (kind == CacheKind::u8) cache_scales = Buffer<float>(heads * context * 4);
    vector_floats = round_up(widest(model) + 16, 16);
    pieced = Buffer<float>(batch * pieces);
    next_pieced = Buffer<float>(pieces);
    intake.pieced = pieced.data();
    gated = Buffer<float>(model.intermediate);
    score_floats = kQueries * context;
    scratch = std::max(scratch_bytes(batch), strip > 0 ? column_scratch_bytes(kColumnTokens) : 0);
    for (std::size_t t = 0; t < threads; ++t) {
      vectors.emplace_back(8 * vector_floats);
      strips.emplace_back(std::min(batch, kColumnTokens) * strip);
      scores.emplace_back(score_floats);
      scratches.emplace_back(scratch);
      own.push_back(room(1));
      own_hidden.emplace_back(model.hidden);
      own_wide.emplace_back(std::max({q + 2 * kv, 2 * model.intermediate, model.hidden}));
    }
    row_blocks.reserve(batch * model.heads / model.kv_heads);
  }

  CacheView cache(std::size_t layer, std::size_t slot, std::size_t head) const {
    const std::size_t index = ((layer * slots + slot) * model.kv_heads + head) * context;
    const std::size_t bytes = index * model.head_dim * item_bytes(cache_kind);
    return {cache_kind, model.head_dim, keys.data() + bytes, values.data() + bytes,
            cache_kind == CacheKind::u8 ? cache_scales.data() + index * 4 : nullptr};
  }

  // x, after the group's transforms, as input of the group's linears, for token number t.
  void prepare(const Group& group, const Plan& plan, const float* x, std::size_t t, std::size_t thread, Intake& to) {
    float* const spare[2] = {vectors[thread].data() + vector_floats, vectors[thread].data() + 2 * vector_floats};
    float* const work = vectors[thread].data() + 3 * vector_floats;
    int next = 0;
    for (const Transform& transform : group.transforms) {
      transform.run(ops, x, spare[next], work);
      x = spare[next];
      next = 1 - next;
    }
    float* const kept = vectors[thread].data() + 4 * vector_floats;
    for (std::size_t i = 0; i < plan.inputs.size(); ++i) {
      to.inputs[i].take(ops, *plan.inputs[i], x, t, kept, kept + vector_floats);
    }
  }

  // What the token of a pass will read of the group's weights.
  void count(const Group& group, const Plan& plan, const Intake& from) {
    for (std::size_t i = 0; i < group.linears.size(); ++i) {
      const Linear& l = group.linears[i];
      double bytes = static_cast<double>(l.bytes());
      if (l.weight.by_columns) {
        const double left_out = static_cast<double>(l.weight.padded()) - from.inputs[plan.input_of[i]].active.data()[0];
        bytes -= left_out * l.column_bytes();
      }
      read_bytes += bytes;
    }
  }

  // A part of the group's outputs for n tokens, y [n][stride].
  void multiply(const Group& group, const Plan& plan, const Part& p, const Intake& from, std::size_t n, float* y,
                std::size_t stride, std::size_t thread) {
    const Linear& l = group.linears[p.linear];
    if (l.weight.by_columns) return multiply_columns(l, plan, p, from, n, y, stride, thread);
    float* out = y + plan.output[p.linear];
    const Inputs x = from.inputs[plan.input_of[p.linear]].view(*plan.inputs[plan.input_of[p.linear]], 0, n);
    linear.run(l.weight, x, p.first, p.last, out, stride, scratches[thread].data());
    if (l.bias == nullptr) return;
    const std::size_t first = p.first * kTileRows, last = std::min(p.last * kTileRows, l.weight.rows);
    for (std::size_t t = 0; t < n; ++t) ops.add(out + t * stride + first, l.bias + first, last - first);
  }

  // Where there is one piece, the outputs themselves; otherwise sums to `pieced`.
  void multiply_columns(const Linear& l, const Plan& plan, const Part& p, const Intake& of, std::size_t n, float* y,
                        std::size_t stride, std::size_t thread) {
    const LinearView& w = l.weight;
    const std::size_t outputs = strip_outputs(w), first = p.strip * outputs, count = std::min(outputs, w.rows - first);
    const std::size_t column = plan.output[p.linear] + first;
    float* const sums = strips[thread].data();
    for (std::size_t from = 0; from < n; from += kColumnTokens) {
      const std::size_t tokens = std::min(kColumnTokens, n - from);
      const Inputs x = of.inputs[plan.input_of[p.linear]].view(*plan.inputs[plan.input_of[p.linear]], from, tokens);
      linear.run_columns(w, x, p.strip, p.first, p.last, sums, outputs, scratches[thread].data());
      for (std::size_t t = 0; t < tokens; ++t) {
        if (plan.pieces[p.linear] > 1) {
          float* const to = of.pieced + (p.piece * n + from + t) * plan.outputs + column;
          std::memcpy(to, sums + t * outputs, count * sizeof(float));
        } else {
          float* const to = y + (from + t) * stride + column;
          ops.scaled(sums + t * outputs, x.steps[t], count, to);
          if (l.bias != nullptr) ops.add(to, l.bias + first, count);
        }
      }
    }
  }

  // A thread's share of outputs whose sums came in pieces.
  void collect(const Group& group, const Plan& plan, std::size_t n, float* y, std::size_t stride, std::size_t thread,
               std::size_t team) {
    for (std::size_t i = 0; i < group.linears.size(); ++i) {
      const Linear& l = group.linears[i];
      if (plan.pieces[i] == 1) continue;
      const std::size_t first = l.weight.rows * thread / team, count = l.weight.rows * (thread + 1) / team - first;
      for (std::size_t t = 0; t < n; ++t) {
        float* const to = y + t * stride + plan.output[i] + first;
        const float* const from = intake.pieced + t * plan.outputs + plan.output[i] + first;
        std::memcpy(to, from, count * sizeof(float));
        for (std::size_t piece = 1; piece < plan.pieces[i]; ++piece) ops.add(to, from + piece * n * plan.outputs, count);
        ops.scaled(to, intake.inputs[plan.input_of[i]].steps.data()[t], count, to);
        if (l.bias != nullptr) ops.add(to, l.bias + first, count);
      }
    }
  }

  // One token's outputs [first, last) of a group that has been multiplied to `y`, or to pieces whose sums are collected.
  void gather(const Group& group, const Plan& plan, const Intake& from, const float* y, std::size_t first, std::size_t last,
              float* to) {
    for (std::size_t i = 0; i < group.linears.size(); ++i) {
      const Linear& l = group.linears[i];
      const std::size_t own_first = plan.output[i];
      const std::size_t begin = std::max(first, own_first), end = std::min(last, own_first + l.weight.rows);
      if (begin >= end) continue;
      float* const at = to + (begin - first);
      if (plan.pieces[i] == 1) {
        std::memcpy(at, y + begin, (end - begin) * sizeof(float));
        continue;
      }
      std::memcpy(at, from.pieced + begin, (end - begin) * sizeof(float));
      for (std::size_t piece = 1; piece < plan.pieces[i]; ++piece) {
        ops.add(at, from.pieced + piece * plan.outputs + begin, end - begin);
      }
      ops.scaled(at, from.inputs[plan.input_of[i]].steps.data()[0], end - begin, at);
      if (l.bias != nullptr) ops.add(at, l.bias + (begin - own_first), end - begin);
    }
  }

  // What is left of the group: this thread's own share, then the others'.
  void multiply(const Group& group, Plan& plan, const Intake& from, std::size_t n, float* y, std::size_t stride,
                std::size_t thread) {
    for (std::size_t i = 0; i < threads; ++i) {
      Share& share = plan.shares[(thread + i) % threads];
      while (true) {
        const std::size_t next = share.taken.fetch_add(1, std::memory_order_relaxed);
        if (next >= share.parts.size()) break;
        multiply(group, plan, share.parts[next], from, n, y, stride, thread);
      }
    }
  }

  void restart(Plan& plan) {
    for (Share& share : plan.shares) share.taken.store(0, std::memory_order_relaxed);
  }

  // A token's row of the embedding.
  void embed(std::int32_t token, float* x) const {
    const std::size_t d = model.hidden, row = static_cast<std::size_t>(token) * d;
    if (model.embedding_kind == WeightKind::f32) {
      std::memcpy(x, static_cast<const std::uint8_t*>(model.embedding) + row * 4, d * 4);
    } else {
      for (std::size_t i = 0; i < d; ++i) {
        std::uint16_t bits;
        std::memcpy(&bits, static_cast<const std::uint8_t*>(model.embedding) + (row + i) * 2, 2);
        const std::uint32_t wide_bits = static_cast<std::uint32_t>(bits) << 16;
        std::memcpy(x + i, &wide_bits, 4);
      }
    }
  }

  // Cosines and sines of token number t.
  void turn(std::int32_t position, std::size_t t) {
    const std::size_t half = model.head_dim / 2;
    for (std::size_t i = 0; i < half; ++i) {
      const float angle = static_cast<float>(position) * model.inverse_frequencies[i];
      cosines.data()[t * half + i] = std::cos(angle) * model.rope_scale;
      sines.data()[t * half + i] = std::sin(angle) * model.rope_scale;
    }
  }

  // Position, rotation and rounding of one query or key head.
  void finish_head(float* x, const float* gain, const Grid& grid, bool round, std::size_t t, std::size_t thread) {
    const std::size_t d = model.head_dim;
    if (gain != nullptr) ops.rms_norm(x, gain, d, model.eps, x);
    ops.rope(x, cosines.data() + t * d / 2, sines.data() + t * d / 2, d);
    if (model.head_rotation.channels) {
      float* turned = vectors[thread].data();
      model.head_rotation.run(ops, x, turned, vectors[thread].data() + vector_floats);
      std::memcpy(x, turned, d * sizeof(float));
    }
    if (round && grid.bits > 0) ops.fake(x, d, ops.range(x, d, grid));
  }

  // Head number `head` of the query heads, then the KV heads, of token t, whose queries, keys and values are `row`.
  void place(const Layer& layer, std::size_t index, std::size_t head, float* row, std::size_t t, std::size_t slot,
             std::size_t position, std::size_t thread) {
    const std::size_t d = model.head_dim, q = model.heads * d, kv = model.kv_heads * d;
    if (head < model.heads) return finish_head(row + head * d, layer.query_norm, model.query, true, t, thread);
    head -= model.heads;
    float *key = row + q + head * d, *value = row + q + kv + head * d;
    const bool codes = cache_kind == CacheKind::u8;
    finish_head(key, layer.key_norm, model.key, !codes, t, thread);
    GridRange key_range{}, value_range{};
    if (codes) {
      const Grid plain{8, false, 1.0f};
      key_range = ops.range(key, d, model.key.bits ? model.key : plain);
      value_range = ops.range(value, d, model.value.bits ? model.value : plain);
    } else if (model.value.bits > 0) {
      ops.fake(value, d, ops.range(value, d, model.value));
    }
    ops.remember(cache(index, slot, head), position, key, value, key_range, value_range);
  }

  // `from`: queries, keys and values of all tokens.
  void attend(const Layer& layer, std::size_t index, std::size_t head, const Rows& rows, const float* from,
              const std::int32_t* slots_of, const std::int32_t* positions, std::size_t thread) {
    const std::size_t d = model.head_dim, shared = model.heads / model.kv_heads;
    const std::size_t q = model.heads * d, stride = q + 2 * model.kv_heads * d;
    const float* queries[kQueries];
    float* out[kQueries];
    std::size_t begin_at[kQueries], end_at[kQueries];
    for (std::size_t r = 0; r < rows.count; ++r) {
      const std::size_t t = (rows.first + r) / shared, column = (head * shared + (rows.first + r) % shared) * d;
      queries[r] = from + t * stride + column;
      out[r] = attended.data() + t * q + column;
      end_at[r] = static_cast<std::size_t>(positions[t]) + 1;
      begin_at[r] = layer.window != 0 && end_at[r] > layer.window ? end_at[r] - layer.window : 0;
    }
    const CacheView view = cache(index, static_cast<std::size_t>(slots_of[rows.first / shared]), head);
    ops.attend(view, rows.count, queries, begin_at, end_at, 1.0f / std::sqrt(static_cast<float>(d)), out,
               scores[thread].data());
  }

  // Computes the largest logits again, from the exact head; x: the normed hidden state.
  void sharpen(const float* x, float* logits) const {
    const float* bias = model.head.linears[0].bias;
    tulle::sharpen(logits, model.vocabulary, [&](std::size_t i) {
      const std::size_t at = i * model.hidden;
      const float found = model.exact_kind == WeightKind::bf16
          ? ops.dot_bf16(x, static_cast<const std::uint16_t*>(model.exact_head) + at, model.hidden)
          : ops.dot(x, static_cast<const float*>(model.exact_head) + at, model.hidden);
      return found + (bias != nullptr ? bias[i] : 0.0f);
    });
  }

  // Queries that share keys, and plans, ready for a pass.
  void ready(const std::int32_t* slots_of, std::size_t n) {
    const std::size_t shared = model.heads / model.kv_heads;
    row_blocks.clear();
    for (std::size_t t = 0; t < n;) {
      std::size_t same = t + 1;
      while (same < n && slots_of[same] == slots_of[t]) ++same;
      for (std::size_t r = t * shared; r < same * shared; r += kQueries) {
        row_blocks.push_back({r, std::min(kQueries, same * shared - r)});
      }
      t = same;
    }
    for (Plans& p : plans) {
      for (Plan* plan : {&p.qkv, &p.o, &p.gate_up, &p.down}) restart(*plan);
    }
    restart(head_plan);
  }

  void run(const std::int32_t* tokens, const std::int32_t* slots_of, const std::int32_t* positions, std::size_t n,
           const std::int32_t* rows, std::size_t wanted, float* logits);
  // The same of one token.
  void step(std::int32_t token, std::int32_t slot, std::int32_t position, bool wanted, float* logits);
};

}  // namespace tulle
