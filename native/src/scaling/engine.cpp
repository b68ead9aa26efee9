#include "tulle/scaling.hpp"

#include <algorithm>
#include <cstring>

#include "scaling/state.hpp"

namespace tulle {

void ScalingEngine::State::run(const std::int32_t* tokens, const std::int32_t* slots_of, const std::int32_t* positions,
                               std::size_t n, const std::int32_t* rows, std::size_t wanted, float* logits) {
  const std::size_t d = model.hidden, f = model.intermediate;
  row_blocks.clear();
  for (std::size_t t = 0; t < n;) {
    std::size_t same = t + 1;
    while (same < n && same < t + kQueries && slots_of[same] == slots_of[t]) ++same;
    row_blocks.push_back({t, same - t});
    t = same;
  }
  in_team(threads, [&](std::size_t thread, std::size_t team) {
    Scratch& s = scratch[thread];
    const std::size_t from = begin_of(n, thread, team), to = begin_of(n, thread + 1, team);
    // This thread's modules of every token: (token, module) counted through.
    const auto each_modules = [&](const auto& act) {
      const std::size_t count = model.modules, last = begin_of(n * count, thread + 1, team);
      for (std::size_t i = begin_of(n * count, thread, team); i < last;) {
        const std::size_t t = i / count, end = std::min(last, (t + 1) * count);
        act(t, i - t * count, end - t * count);
        i = end;
      }
    };
    // One token's units are shared by the threads, of several tokens each thread has its own.
    const std::size_t shared = n == 1 && model.block > 0 ? team : 1;
    const auto add_parts = [&](std::size_t t) {
      float* x = hidden.data() + t * d;
      for (std::size_t i = 0; i < shared; ++i) ops.add(x, parts.data() + (t + i) * d, d);
    };
    const auto norm = [&](const float* gain, std::size_t t) {
      float* to_row = normed.data() + t * d;
      ops.rms_norm(hidden.data() + t * d, gain, d, model.eps, to_row);
      quantise(to_row, d, t);
    };

    for (std::size_t t = from; t < to; ++t) {
      begin(tokens, positions, t);
      if (!model.layers.empty()) norm(model.layers[0].input_norm, t);
    }
    wait();
    for (std::size_t index = 0; index < model.layers.size(); ++index) {
      const ScalingLayer& l = model.layers[index];
      if (model.modules == 0) {
        project(l.q, normed.data(), n, q.data(), thread, team);
        project(l.k, normed.data(), n, k.data(), thread, team);
        project(l.v, normed.data(), n, v.data(), thread, team);
      } else {
        each_modules([&](std::size_t t, std::size_t first, std::size_t last) { make_image(l, t, first, last, s); });
        wait();
        each_modules([&](std::size_t t, std::size_t first, std::size_t last) {
          convolve(l.q_conv, 3, index, t, first, last, s, q.data());
          convolve(l.k_conv, 3, index, t, first, last, s, k.data());
          convolve(l.v_conv, 1, index, t, first, last, s, v.data());
        });
      }
      wait();
      for (std::size_t head = thread; head < model.heads; head += team) {
        for (std::size_t t = 0; t < n; ++t) {
          place(index, head, t, static_cast<std::size_t>(slots_of[t]), static_cast<std::size_t>(positions[t]));
        }
        for (const Rows& block : row_blocks) attend(index, head, block, slots_of, positions, s);
      }
      wait();
      if (model.modules == 0) {
        if (l.o.weight.kind == WeightKind::codes8) {
          for (std::size_t t = from; t < to; ++t) quantise(attended.data() + t * d, d, t);
          wait();
        }
        project(l.o, attended.data(), n, output.data(), thread, team);
        wait();
      }
      for (std::size_t t = from; t < to; ++t) {
        ops.add(hidden.data() + t * d, (model.modules == 0 ? output : attended).data() + t * d, d);
        norm(l.post_norm, t);
        if (model.modules == 0 || !remembered[t]) continue;
        const std::size_t place_of = static_cast<std::size_t>(positions[t]) % kPast;
        const std::size_t slot = static_cast<std::size_t>(slots_of[t]);
        std::memcpy(past.data() + ((index * slots + slot) * kPast + place_of) * image, images.data() + t * image,
                    image * sizeof(float));
      }
      wait();
      if (model.block == 0) {
        project(l.w1, normed.data(), n, wide.data(), thread, team, true);
        wait();
        if (l.w2.weight.kind == WeightKind::codes8) {
          for (std::size_t t = from; t < to; ++t) quantise(wide.data() + t * f, f, t);
          wait();
        }
        project(l.w2, wide.data(), n, parts.data(), thread, team);
      } else {
        project({l.c1, nullptr}, normed.data(), n, ranks.data(), thread, team);
        wait();
        const std::size_t blocks = f / model.block;
        if (n == 1) {
          choose(l, 0, begin_of(blocks, thread, team), begin_of(blocks, thread + 1, team), parts.data() + thread * d, s);
          if (thread == 0 && l.w2.bias != nullptr) ops.add(parts.data(), l.w2.bias, d);
        } else {
          for (std::size_t t = from; t < to; ++t) {
            choose(l, t, 0, blocks, parts.data() + t * d, s);
            if (l.w2.bias != nullptr) ops.add(parts.data() + t * d, l.w2.bias, d);
          }
        }
      }
      wait();
      for (std::size_t t = from; t < to; ++t) {
        add_parts(t);
        if (index + 1 < model.layers.size()) norm(model.layers[index + 1].input_norm, t);
      }
      wait();
    }
    for (std::size_t i = begin_of(wanted, thread, team); i < begin_of(wanted, thread + 1, team); ++i) {
      float* to_row = normed.data() + i * d;
      ops.rms_norm(hidden.data() + static_cast<std::size_t>(rows[i]) * d, model.norm, d, model.eps, to_row);
      quantise(to_row, d, i);
    }
    wait();
    if (model.loss_modules == 0) {
      if (wanted > 0) project({model.head, nullptr}, normed.data(), wanted, logits, thread, team);
    } else {
      const std::size_t size = model.vocabulary / model.loss_modules, panels = model.loss.e.panels();
      const std::size_t first = begin_of(panels, thread, team), last = begin_of(panels, thread + 1, team);
      const std::size_t stride = (last - first) * kPanel, real = std::min(stride, size - std::min(size, first * kPanel));
      for (std::size_t i = 0; i < wanted && first < last; ++i) {
        multiply(model.loss, normed.data() + i * d, 0, model.loss_modules, first, last, s, s.modules.data());
        for (std::size_t m = 0; m < model.loss_modules; ++m) {
          std::memcpy(logits + i * model.vocabulary + m * size + first * kPanel, s.modules.data() + m * stride,
                      real * sizeof(float));
        }
      }
    }
    if (model.exact_head.rows > 0) {
      wait();
      for (std::size_t i = begin_of(wanted, thread, team); i < begin_of(wanted, thread + 1, team); ++i) {
        sharpen(normed.data() + i * d, logits + i * model.vocabulary);
      }
    }
  });
}

ScalingEngine::ScalingEngine(ScalingModel model, std::size_t slots, std::size_t context, std::size_t batch,
                             CacheKind cache, std::size_t threads) {
  check(model);
  state_ = std::make_unique<State>(std::move(model), slots, context, batch, cache, threads);
}

ScalingEngine::~ScalingEngine() = default;

void ScalingEngine::forward(const std::int32_t* tokens, const std::int32_t* slots, const std::int32_t* positions,
                            std::size_t n, const std::int32_t* rows, std::size_t wanted, float* logits) {
  State& s = *state_;
  check_pass({s.model.vocabulary, s.slots, s.context, s.batch}, tokens, slots, positions, n, rows, wanted);
  if (s.model.modules > 0) s.find_past(slots, positions, n);
  const std::uint64_t before = units_skipped();
  s.run(tokens, slots, positions, n, rows, wanted, logits);
  if (n == 1) {
    ++s.single_tokens;
    s.single_skipped += units_skipped() - before;
  }
  if (s.model.modules == 0) return;
  for (std::size_t t = 0; t < n; ++t) {
    s.next[static_cast<std::size_t>(slots[t])] = static_cast<std::size_t>(positions[t]) + 1;
  }
}

std::uint64_t ScalingEngine::weight_bytes() const {
  const ScalingModel& m = state_->model;
  std::uint64_t bytes = m.loss_modules > 0 ? m.loss.bytes() : m.head.bytes();
  for (const ScalingLayer& l : m.layers) {
    if (m.modules == 0) {
      for (const Projection* p : {&l.q, &l.k, &l.v, &l.o}) bytes += p->weight.bytes();
    } else {
      bytes += l.multiplicative.bytes();
      for (const Convolution* c : {&l.q_conv, &l.k_conv, &l.v_conv}) bytes += c->weight.bytes();
    }
    const std::uint64_t units = l.w1.weight.bytes() + l.w2.weight.bytes();
    if (m.block == 0) bytes += units;
    else bytes += units / m.block + l.c1.bytes() + l.c2.bytes() + m.intermediate * sizeof(float);
  }
  return bytes;
}

std::uint64_t ScalingEngine::cache_bytes() const {
  const State& s = *state_;
  return s.keys.bytes() + s.values.bytes() + s.cache_scales.bytes() + s.past.bytes();
}

std::uint64_t ScalingEngine::work_bytes() const {
  const State& s = *state_;
  std::uint64_t bytes = s.codes.bytes() + s.sums.bytes();
  for (const Buffer<float>* b : {&s.hidden, &s.normed, &s.q, &s.k, &s.v, &s.attended, &s.output, &s.wide, &s.ranks,
                                 &s.parts, &s.cosines, &s.sines, &s.images, &s.nothing, &s.steps}) {
    bytes += b->bytes();
  }
  for (const State::Scratch& t : s.scratch) {
    for (const Buffer<float>* b : {&t.scores, &t.scaled, &t.modules, &t.logits, &t.active}) bytes += b->bytes();
    bytes += t.units.bytes();
  }
  return bytes;
}

std::size_t ScalingEngine::vocabulary() const { return state_->model.vocabulary; }

Engine::Reads ScalingEngine::take_reads() {
  State& s = *state_;
  double skipped = 0;
  if (s.single_skipped > 0) {
    // Only sparse feed-forwards skip, and all layers' rows are of one size.
    const Matrix& w = s.model.layers[0].w2.weight;
    skipped = static_cast<double>(s.single_skipped) * static_cast<double>(w.bytes()) / static_cast<double>(w.rows);
  }
  Engine::Reads found{};
  found.bytes = static_cast<double>(s.single_tokens) * static_cast<double>(weight_bytes()) - skipped;
  found.tokens = s.single_tokens;
  s.single_tokens = s.single_skipped = 0;
  return found;
}

std::uint64_t ScalingEngine::units_read() const {
  std::uint64_t count = 0;
  for (const State::Scratch& t : state_->scratch) count += t.read;
  return count;
}

std::uint64_t ScalingEngine::units_skipped() const {
  std::uint64_t count = 0;
  for (const State::Scratch& t : state_->scratch) count += t.skipped;
  return count;
}

}  // namespace tulle
