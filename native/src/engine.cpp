#include "tulle/engine.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "buffer.hpp"
#include "inputs.hpp"
#include "pass.hpp"
#include "plan.hpp"
#include "sharpen.hpp"
#include "tulle/dispatch.hpp"

namespace tulle {
namespace {

std::size_t widest(const Model& model) {
  return std::max({model.hidden, model.intermediate, model.heads * model.head_dim, model.kv_heads * model.head_dim});
}

}  // namespace

std::uint64_t Linear::bytes() const {
  const LinearView& w = weight;
  const std::uint64_t weights = static_cast<std::uint64_t>(w.tiles()) * kTileRows * w.padded();
  std::uint64_t bytes = 0;
  if (w.is_codes()) bytes += static_cast<std::uint64_t>(w.tiles()) * kTileRows * w.scales_per_row() * (w.zeros ? 3 : 2);
  if (w.by_columns) return bytes + static_cast<std::uint64_t>(column_bytes() * static_cast<double>(w.padded()));
  if (w.sparse) return bytes + weights / 8 + w.offsets[w.tiles() * w.chunks()];
  const unsigned bits = w.kind == WeightKind::codes4 ? 4 : w.kind == WeightKind::codes8 ? 8 : w.kind == WeightKind::bf16 ? 16 : 32;
  return bytes + weights * bits / 8;
}

double Linear::column_bytes() const {
  const LinearView& w = weight;
  if (!w.by_columns) return 0;
  if (!w.sparse) return static_cast<double>(w.lines() * kUnitBytes);
  const double starts = 4.0 * static_cast<double>(w.strips()) / static_cast<double>(w.column_inputs());
  return static_cast<double>(w.offsets[w.strips()]) / static_cast<double>(w.padded()) + starts;
}

void check(const Model& m) {
  require(m.hidden > 0 && m.heads > 0 && m.kv_heads > 0 && m.vocabulary > 0, "sizes of the model", 1, 0);
  require(m.head_dim > 0 && m.head_dim % 2 == 0, "an even head_dim", 2, m.head_dim);
  require_equal("query heads left over by KV heads", 0, m.heads % m.kv_heads);
  require_equal("frequencies", m.head_dim / 2, m.inverse_frequencies.size());
  require(m.embedding != nullptr && m.norm != nullptr, "embedding and norm", 1, 0);
  require_equal("linears of the head", 1, m.head.linears.size());
  const auto fits = [](const Group& group, std::size_t inputs, std::initializer_list<std::size_t> outputs) {
    // Those that stand by columns may be one, its outputs one linear's behind another's.
    std::vector<std::size_t> wanted(outputs);
    if (group.linears.size() == 1) wanted = {std::accumulate(outputs.begin(), outputs.end(), std::size_t{0})};
    require_equal("linears of a group", wanted.size(), group.linears.size());
    for (const Transform& t : group.transforms) require_equal("channels of a transform", inputs, t.channels);
    std::size_t i = 0;
    for (std::size_t rows : wanted) {
      const Linear& linear = group.linears[i++];
      require_equal("inputs of a linear", inputs, linear.weight.columns);
      require_equal("outputs of a linear", rows, linear.weight.rows);
      tulle::check(linear.selection, inputs);
      if (!linear.weight.is_codes()) continue;
      require(linear.input.bits >= 2 && linear.input.bits <= 16, "bits of the inputs", 8, linear.input.bits);
      require_equal("inputs left over by scales", 0, inputs % linear.weight.scales_per_row());
      const std::size_t real = inputs / linear.weight.scales_per_row();
      const std::size_t room = linear.weight.segment * linear.weight.segments_per_scale;
      require(real <= room, "inputs per scale, at most", room, real);
    }
  };
  const std::size_t q = m.heads * m.head_dim, kv = m.kv_heads * m.head_dim;
  for (const Layer& layer : m.layers) {
    require(layer.input_norm != nullptr && layer.post_norm != nullptr, "norms of a layer", 2, 0);
    fits(layer.qkv, m.hidden, {q, kv, kv});
    fits(layer.o, q, {m.hidden});
    fits(layer.gate_up, m.hidden, {m.intermediate, m.intermediate});
    fits(layer.down, m.intermediate, {m.hidden});
  }
  fits(m.head, m.hidden, {m.vocabulary});
  if (m.head_rotation.channels) require_equal("channels of the head rotation", m.head_dim, m.head_rotation.channels);
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

  std::vector<Prepared> prepared;
  Buffer<float> pieced;  // [piece][token][output of the group]
  // Of passes of one token, per thread.
  struct alignas(kAlignment) Read {
    double bytes = 0;
  };
  std::vector<Read> read;
  std::uint64_t read_tokens = 0;
  bool counting = false;
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
    for (std::size_t i = 0; i < inputs; ++i) {
      Prepared p;
      p.floats = Buffer<float>(batch * float_width);
      p.steps = Buffer<float>(batch);
      for (std::size_t plane = 0; plane < (two_planes ? 2 : 1); ++plane) {
        p.plane[plane] = Buffer<std::int8_t>(batch * code_width);
        p.sums[plane] = Buffer<std::int32_t>(batch * segments);
        if (quad_width) p.quad_plane[plane] = Buffer<std::int8_t>(batch * quad_width);
      }
      if (quad_width) {
        p.quads = Buffer<std::uint32_t>(batch * quad_width);
        p.quad_starts = Buffer<std::uint32_t>(batch * (segments + 1));
        p.active = Buffer<std::uint32_t>(batch);
      }
      prepared.push_back(std::move(p));
    }
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
    score_floats = kQueries * context;
    scratch = std::max(scratch_bytes(batch), strip > 0 ? column_scratch_bytes(kColumnTokens) : 0);
    read.assign(threads, {});
    for (std::size_t t = 0; t < threads; ++t) {
      vectors.emplace_back(8 * vector_floats);
      strips.emplace_back(std::min(batch, kColumnTokens) * strip);
      scores.emplace_back(score_floats);
      scratches.emplace_back(scratch);
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
  void prepare(const Group& group, const Plan& plan, const float* x, std::size_t t, std::size_t thread) {
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
      prepared[i].take(ops, *plan.inputs[i], x, t, kept, kept + vector_floats);
    }
    if (counting) count(group, plan, t, thread);
  }

  // What token t will read of the group's weights.
  void count(const Group& group, const Plan& plan, std::size_t t, std::size_t thread) {
    for (std::size_t i = 0; i < group.linears.size(); ++i) {
      const Linear& l = group.linears[i];
      double bytes = static_cast<double>(l.bytes());
      if (l.weight.by_columns) {
        const double left_out = static_cast<double>(l.weight.padded()) - prepared[plan.input_of[i]].active.data()[t];
        bytes -= left_out * l.column_bytes();
      }
      read[thread].bytes += bytes;
    }
  }

  // A part of the group's outputs for n tokens, y [n][stride].
  void multiply(const Group& group, const Plan& plan, const Part& p, std::size_t n, float* y, std::size_t stride,
                std::size_t thread) {
    const Linear& l = group.linears[p.linear];
    if (l.weight.by_columns) return multiply_columns(l, plan, p, n, y, stride, thread);
    float* out = y + plan.output[p.linear];
    const Inputs x = prepared[plan.input_of[p.linear]].view(*plan.inputs[plan.input_of[p.linear]], 0, n);
    linear.run(l.weight, x, p.first, p.last, out, stride, scratches[thread].data());
    if (l.bias == nullptr) return;
    const std::size_t first = p.first * kTileRows, last = std::min(p.last * kTileRows, l.weight.rows);
    for (std::size_t t = 0; t < n; ++t) ops.add(out + t * stride + first, l.bias + first, last - first);
  }

  // Where there is one piece, the outputs themselves; otherwise sums to `pieced`.
  void multiply_columns(const Linear& l, const Plan& plan, const Part& p, std::size_t n, float* y, std::size_t stride,
                        std::size_t thread) {
    const LinearView& w = l.weight;
    const std::size_t outputs = strip_outputs(w), first = p.strip * outputs, count = std::min(outputs, w.rows - first);
    const std::size_t column = plan.output[p.linear] + first;
    float* const sums = strips[thread].data();
    for (std::size_t from = 0; from < n; from += kColumnTokens) {
      const std::size_t tokens = std::min(kColumnTokens, n - from);
      const Inputs x = prepared[plan.input_of[p.linear]].view(*plan.inputs[plan.input_of[p.linear]], from, tokens);
      linear.run_columns(w, x, p.strip, p.first, p.last, sums, outputs, scratches[thread].data());
      for (std::size_t t = 0; t < tokens; ++t) {
        if (plan.pieces[p.linear] > 1) {
          float* const to = pieced.data() + (p.piece * n + from + t) * plan.outputs + column;
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
        const float* const from = pieced.data() + t * plan.outputs + plan.output[i] + first;
        float* const total = strips[thread].data();
        std::memcpy(total, from, count * sizeof(float));
        for (std::size_t piece = 1; piece < plan.pieces[i]; ++piece) ops.add(total, from + piece * n * plan.outputs, count);
        ops.scaled(total, prepared[plan.input_of[i]].steps.data()[t], count, to);
        if (l.bias != nullptr) ops.add(to, l.bias + first, count);
      }
    }
  }

  // What is left of the group: this thread's own share, then the others'.
  void multiply(const Group& group, Plan& plan, std::size_t n, float* y, std::size_t stride, std::size_t thread) {
    for (std::size_t i = 0; i < threads; ++i) {
      Share& share = plan.shares[(thread + i) % threads];
      while (true) {
        const std::size_t next = share.taken.fetch_add(1, std::memory_order_relaxed);
        if (next >= share.parts.size()) break;
        multiply(group, plan, share.parts[next], n, y, stride, thread);
      }
    }
  }

  void restart(Plan& plan) {
    for (Share& share : plan.shares) share.taken.store(0, std::memory_order_relaxed);
  }

  void begin(const std::int32_t* tokens, const std::int32_t* positions, std::size_t t) {
    const std::size_t d = model.hidden, half = model.head_dim / 2;
    float* x = hidden.data() + t * d;
    const std::size_t row = static_cast<std::size_t>(tokens[t]) * d;
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
    for (std::size_t i = 0; i < half; ++i) {
      const float angle = static_cast<float>(positions[t]) * model.inverse_frequencies[i];
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

  // Head number `head` of the query heads, then the KV heads, of token t.
  void place(const Layer& layer, std::size_t index, std::size_t head, std::size_t t, std::size_t slot,
             std::size_t position, std::size_t thread) {
    const std::size_t d = model.head_dim, q = model.heads * d, kv = model.kv_heads * d;
    float* row = wide.data() + t * (q + 2 * kv);
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

  void attend(const Layer& layer, std::size_t index, std::size_t head, const Rows& rows, const std::int32_t* slots_of,
              const std::int32_t* positions, std::size_t thread) {
    const std::size_t d = model.head_dim, shared = model.heads / model.kv_heads;
    const std::size_t q = model.heads * d, stride = q + 2 * model.kv_heads * d;
    const float* queries[kQueries];
    float* out[kQueries];
    std::size_t begin_at[kQueries], end_at[kQueries];
    for (std::size_t r = 0; r < rows.count; ++r) {
      const std::size_t t = (rows.first + r) / shared, column = (head * shared + (rows.first + r) % shared) * d;
      queries[r] = wide.data() + t * stride + column;
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

  void run(const std::int32_t* tokens, const std::int32_t* slots_of, const std::int32_t* positions, std::size_t n,
           const std::int32_t* rows, std::size_t wanted, float* logits);
};

void Engine::State::run(const std::int32_t* tokens, const std::int32_t* slots_of, const std::int32_t* positions,
                        std::size_t n, const std::int32_t* rows, std::size_t wanted, float* logits) {
  const std::size_t d = model.hidden, q = model.heads * model.head_dim, kv = model.kv_heads * model.head_dim;
  const std::size_t shared = model.heads / model.kv_heads, per_row = model.heads + model.kv_heads;
  row_blocks.clear();
  for (std::size_t t = 0; t < n;) {
    std::size_t same = t + 1;
    while (same < n && slots_of[same] == slots_of[t]) ++same;
    for (std::size_t r = t * shared; r < same * shared; r += kQueries) {
      row_blocks.push_back({r, std::min(kQueries, same * shared - r)});
    }
    t = same;
  }
  counting = n == 1;
  read_tokens += counting;
  for (Plans& p : plans) {
    for (Plan* plan : {&p.qkv, &p.o, &p.gate_up, &p.down}) restart(*plan);
  }
  restart(head_plan);
#if defined(_OPENMP)
#pragma omp parallel num_threads(static_cast<int>(threads))
#endif
  {
    std::size_t thread = 0, team = 1;
#if defined(_OPENMP)
    thread = static_cast<std::size_t>(omp_get_thread_num());
    team = static_cast<std::size_t>(omp_get_num_threads());
#endif
    const std::size_t from = n * thread / team, to = n * (thread + 1) / team;
    float* const vector = vectors[thread].data();
    const auto wait = [] {
#if defined(_OPENMP)
#pragma omp barrier
#endif
    };
    const auto multiply_all = [&](const Group& group, Plan& plan, std::size_t count, float* y, std::size_t stride) {
      multiply(group, plan, count, y, stride, thread);
      wait();
      if (plan.most_pieces == 1) return;
      collect(group, plan, count, y, stride, thread, team);
      wait();
    };
    for (std::size_t t = from; t < to; ++t) begin(tokens, positions, t);
    for (std::size_t index = 0; index < model.layers.size(); ++index) {
      const Layer& layer = model.layers[index];
      Plans& plan = plans[index];
      for (std::size_t t = from; t < to; ++t) {
        float* x = hidden.data() + t * d;
        if (index > 0) ops.add(x, small.data() + t * d, d);
        ops.rms_norm(x, layer.input_norm, d, model.eps, vector);
        prepare(layer.qkv, plan.qkv, vector, t, thread);
      }
      wait();
      multiply_all(layer.qkv, plan.qkv, n, wide.data(), q + 2 * kv);
      for (std::size_t i = thread; i < n * per_row; i += team) {
        const std::size_t t = i / per_row;
        place(layer, index, i % per_row, t, static_cast<std::size_t>(slots_of[t]),
              static_cast<std::size_t>(positions[t]), thread);
      }
      wait();
      for (std::size_t i = thread; i < row_blocks.size() * model.kv_heads; i += team) {
        attend(layer, index, i / row_blocks.size(), row_blocks[i % row_blocks.size()], slots_of, positions, thread);
      }
      wait();
      for (std::size_t t = from; t < to; ++t) prepare(layer.o, plan.o, attended.data() + t * q, t, thread);
      wait();
      multiply_all(layer.o, plan.o, n, small.data(), d);
      for (std::size_t t = from; t < to; ++t) {
        float* x = hidden.data() + t * d;
        ops.add(x, small.data() + t * d, d);
        ops.rms_norm(x, layer.post_norm, d, model.eps, vector);
        prepare(layer.gate_up, plan.gate_up, vector, t, thread);
      }
      wait();
      multiply_all(layer.gate_up, plan.gate_up, n, wide.data(), 2 * model.intermediate);
      for (std::size_t t = from; t < to; ++t) {
        const float* gate = wide.data() + t * 2 * model.intermediate;
        ops.gate(model.gate, gate, gate + model.intermediate, model.intermediate, vector);
        prepare(layer.down, plan.down, vector, t, thread);
      }
      wait();
      multiply_all(layer.down, plan.down, n, small.data(), d);
    }
    for (std::size_t i = thread; i < wanted; i += team) {
      float* x = hidden.data() + static_cast<std::size_t>(rows[i]) * d;
      if (!model.layers.empty()) ops.add(x, small.data() + static_cast<std::size_t>(rows[i]) * d, d);
      float* normed = small.data() + static_cast<std::size_t>(rows[i]) * d;
      ops.rms_norm(x, model.norm, d, model.eps, normed);
      prepare(model.head, head_plan, normed, i, thread);
    }
    wait();
    if (wanted > 0) multiply_all(model.head, head_plan, wanted, logits, model.vocabulary);
    if (model.exact_head != nullptr) {
      for (std::size_t i = thread; i < wanted; i += team) {
        sharpen(small.data() + static_cast<std::size_t>(rows[i]) * d, logits + i * model.vocabulary);
      }
    }
  }
}

Engine::Engine(Model model, std::size_t slots, std::size_t context, std::size_t batch, CacheKind cache,
               std::size_t threads) {
  check(model);
  state_ = std::make_unique<State>(std::move(model), slots, context, batch, cache, threads);
}

Engine::~Engine() = default;

void Engine::forward(const std::int32_t* tokens, const std::int32_t* slots, const std::int32_t* positions,
                     std::size_t n, const std::int32_t* rows, std::size_t wanted, float* logits) {
  State& s = *state_;
  check_pass({s.model.vocabulary, s.slots, s.context, s.batch}, tokens, slots, positions, n, rows, wanted);
  s.run(tokens, slots, positions, n, rows, wanted, logits);
}

std::uint64_t Engine::weight_bytes() const {
  std::uint64_t bytes = 0;
  for (const Layer& layer : state_->model.layers) {
    for (const Group* group : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down}) {
      for (const Linear& linear : group->linears) bytes += linear.bytes();
    }
  }
  return bytes + state_->model.head.linears[0].bytes();
}

Engine::Reads Engine::take_reads() {
  Reads found{0, state_->read_tokens};
  for (State::Read& r : state_->read) {
    found.bytes += r.bytes;
    r.bytes = 0;
  }
  state_->read_tokens = 0;
  return found;
}

std::uint64_t Engine::cache_bytes() const {
  return state_->keys.bytes() + state_->values.bytes() + state_->cache_scales.bytes();
}

std::uint64_t Engine::work_bytes() const {
  const State& s = *state_;
  std::uint64_t bytes = 0;
  for (const Buffer<float>* b : {&s.pieced, &s.hidden, &s.attended, &s.small, &s.wide, &s.cosines, &s.sines}) bytes += b->bytes();
  for (const Prepared& p : s.prepared) {
    bytes += p.floats.bytes() + p.steps.bytes();
    for (int i = 0; i < 2; ++i) bytes += p.plane[i].bytes() + p.sums[i].bytes() + p.quad_plane[i].bytes();
    bytes += p.quads.bytes() + p.quad_starts.bytes() + p.active.bytes();
  }
  for (std::size_t t = 0; t < s.threads; ++t) {
    bytes += s.vectors[t].bytes() + s.scores[t].bytes() + s.strips[t].bytes() + s.scratches[t].bytes();
  }
  return bytes;
}

std::size_t Engine::vocabulary() const { return state_->model.vocabulary; }

}  // namespace tulle
