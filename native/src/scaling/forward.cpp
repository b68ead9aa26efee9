// A pass of a Scaling Transformer: tokens in, logits out.
#include <cstring>

#include "cpu/team.hpp"
#include "decoder/embedding.hpp"
#include "decoder/top_logits.hpp"
#include "scaling/state.hpp"

namespace tulle {
namespace {

// act(token, first, last) for this thread's modules of every token: (token, module) counted through.
template <typename Act>
void each_modules(const ScalingPass& pass, std::size_t count, const Act& act) {
  const std::size_t last = begin_of(pass.n * count, pass.thread + 1, pass.team);
  for (std::size_t i = begin_of(pass.n * count, pass.thread, pass.team); i < last;) {
    const std::size_t t = i / count, end = std::min(last, (t + 1) * count);
    act(t, i - t * count, end - t * count);
    i = end;
  }
}

}  // namespace

void ScalingEngine::State::forward(const PassInput& input, float* logits, float* embeddings) {
  attention.group(input.slots, input.n);
  in_team(threads, [&](std::size_t thread, std::size_t team) {
    const ScalingPass pass{input, thread, team, begin_of(input.n, thread, team), begin_of(input.n, thread + 1, team),
                           scratch[thread]};
    for (std::size_t t = pass.first; t < pass.last; ++t) {
      copy_row(model.embedding_kind, model.embedding, static_cast<std::size_t>(pass.tokens[t]), model.hidden,
               hidden.data() + t * model.hidden);
      rotary.set(t, pass.positions[t]);
      if (!model.layers.empty()) norm(model.layers[0].input_norm, t);
    }
    wait();
    for (std::size_t index = 0; index < model.layers.size(); ++index) layer(pass, index);
    head(pass, logits, embeddings);
  });
}

void ScalingEngine::State::norm(const float* gain, std::size_t t) {
  const std::size_t d = model.hidden;
  float* to = normed.data() + t * d;
  ops.rms_norm(hidden.data() + t * d, gain, d, model.eps, to);
  quantise(to, d, t);
}

void ScalingEngine::State::layer(const ScalingPass& pass, std::size_t index) {
  const ScalingLayer& l = model.layers[index];
  const std::size_t d = model.hidden;
  queries_keys_values(pass, index);
  attend(pass, index);
  if (model.modules == 0) {
    if (l.o.weight.kind == WeightKind::codes8) {
      for (std::size_t t = pass.first; t < pass.last; ++t) quantise(attended.data() + t * d, d, t);
      wait();
    }
    project(pass, l.o, attended.data(), pass.n, output.data());
    wait();
  }
  for (std::size_t t = pass.first; t < pass.last; ++t) {
    ops.add(hidden.data() + t * d, (model.modules == 0 ? output : attended).data() + t * d, d);
    norm(l.post_norm, t);
    if (model.modules > 0) past.keep(index, t, pass.slots[t], pass.positions[t]);
  }
  wait();
  feed_forward(pass, l);
  wait();
  // Of one token, each thread has computed a part of the sparse feed-forward's units.
  const std::size_t parts = pass.n == 1 && model.block > 0 ? pass.team : 1;
  for (std::size_t t = pass.first; t < pass.last; ++t) {
    for (std::size_t i = 1; i < parts; ++i) ops.add(partials.data() + t * d, partials.data() + (t + i) * d, d);
    ops.add(hidden.data() + t * d, partials.data() + t * d, d);
    if (index + 1 < model.layers.size()) norm(model.layers[index + 1].input_norm, t);
  }
  wait();
}

void ScalingEngine::State::queries_keys_values(const ScalingPass& pass, std::size_t index) {
  const ScalingLayer& l = model.layers[index];
  if (model.modules == 0) {
    project(pass, l.q, normed.data(), pass.n, q.data());
    project(pass, l.k, normed.data(), pass.n, k.data());
    project(pass, l.v, normed.data(), pass.n, v.data());
  } else {
    each_modules(pass, model.modules, [&](std::size_t t, std::size_t first, std::size_t last) {
      make_image(l, t, first, last, pass.scratch);
    });
    wait();
    each_modules(pass, model.modules, [&](std::size_t t, std::size_t first, std::size_t last) {
      convolve(l.q_conv, 3, index, t, first, last, pass.scratch, q.data());
      convolve(l.k_conv, 3, index, t, first, last, pass.scratch, k.data());
      convolve(l.v_conv, 1, index, t, first, last, pass.scratch, v.data());
    });
  }
  wait();
}

void ScalingEngine::State::attend(const ScalingPass& pass, std::size_t index) {
  const std::size_t d = model.hidden, head_dim = model.head_dim();
  const Grid plain{0, true, 1.0f};
  for (std::size_t head = pass.thread; head < model.heads; head += pass.team) {
    for (std::size_t t = 0; t < pass.n; ++t) {
      const std::size_t at = t * d + head * head_dim;
      rotary.rotate(ops, t, q.data() + at);
      rotary.rotate(ops, t, k.data() + at);
      cache.append(ops, view(pass, index, head, static_cast<std::size_t>(pass.slots[t])),
                   static_cast<std::size_t>(pass.positions[t]), k.data() + at, v.data() + at, plain, plain);
    }
    for (const QueryBlock& block : attention.blocks()) {
      attention.run(ops, view(pass, index, head, attention.slot_of(block, pass.slots)), head, block, pass.positions, 0,
                    {q.data(), d, head_dim}, {attended.data(), d, head_dim}, nullptr, pass.scratch.scores.data());
    }
  }
  wait();
}

// Keys and values of a slot.
CacheView ScalingEngine::State::view(const ScalingPass& pass, std::size_t layer, std::size_t head,
                                     std::size_t slot) const {
  return cache.view(layer, head, pass.tables + slot * table_width);
}

// To `partials`.
void ScalingEngine::State::feed_forward(const ScalingPass& pass, const ScalingLayer& l) {
  const std::size_t d = model.hidden, f = model.intermediate;
  if (model.block == 0) {
    project(pass, l.w1, normed.data(), pass.n, wide.data(), true);
    wait();
    if (l.w2.weight.kind == WeightKind::codes8) {
      for (std::size_t t = pass.first; t < pass.last; ++t) quantise(wide.data() + t * f, f, t);
      wait();
    }
    project(pass, l.w2, wide.data(), pass.n, partials.data());
    return;
  }
  project(pass, {l.c1, nullptr}, normed.data(), pass.n, ranks.data());
  wait();
  const std::size_t blocks = f / model.block;
  // A token's units are added up in as many parts as there are threads, which share the parts of one token. Of several
  // tokens each thread has its own.
  const auto part = [&](std::size_t t, std::size_t number, float* to) {
    choose(l, t, begin_of(blocks, number, pass.team), begin_of(blocks, number + 1, pass.team), to, pass.scratch);
    if (number == 0 && l.w2.bias != nullptr) ops.add(to, l.w2.bias, d);
  };
  if (pass.n == 1) return part(0, pass.thread, partials.data() + pass.thread * d);
  for (std::size_t t = pass.first; t < pass.last; ++t) {
    float* const to = partials.data() + t * d;
    part(t, 0, to);
    for (std::size_t number = 1; number < pass.team; ++number) {
      part(t, number, pass.scratch.part.data());
      ops.add(to, pass.scratch.part.data(), d);
    }
  }
}

void ScalingEngine::State::head(const ScalingPass& pass, float* logits, float* embeddings) {
  const std::size_t d = model.hidden, wanted = pass.wanted;
  const std::size_t from = begin_of(wanted, pass.thread, pass.team), to = begin_of(wanted, pass.thread + 1, pass.team);
  for (std::size_t i = from; i < to; ++i) {
    float* x = embeddings != nullptr ? embeddings + i * d : normed.data() + i * d;
    ops.rms_norm(hidden.data() + static_cast<std::size_t>(pass.rows[i]) * d, model.norm, d, model.eps, x);
    if (embeddings == nullptr) quantise(x, d, i);
  }
  if (embeddings != nullptr) return;
  wait();
  if (model.loss_modules == 0) {
    if (wanted > 0) project(pass, {model.head, nullptr}, normed.data(), wanted, logits);
  } else {
    const std::size_t size = model.vocabulary / model.loss_modules, panels = model.loss.e.panels();
    const std::size_t first = begin_of(panels, pass.thread, pass.team),
                      last = begin_of(panels, pass.thread + 1, pass.team);
    const std::size_t stride = (last - first) * kPanel, real = std::min(stride, size - std::min(size, first * kPanel));
    for (std::size_t i = 0; i < wanted && first < last; ++i) {
      float* const modules = pass.scratch.modules.data();
      multiply(model.loss, normed.data() + i * d, 0, model.loss_modules, first, last, pass.scratch, modules);
      for (std::size_t m = 0; m < model.loss_modules; ++m) {
        std::memcpy(logits + i * model.vocabulary + m * size + first * kPanel, modules + m * stride,
                    real * sizeof(float));
      }
    }
  }
  const Matrix& exact = model.exact_head;
  if (exact.rows == 0) return;
  wait();
  for (std::size_t i = from; i < to; ++i) {
    recompute_top_logits(logits + i * model.vocabulary, model.vocabulary, [&](std::size_t token) {
      float logit = 0;
      const std::int32_t row = static_cast<std::int32_t>(token);
      kernels.chosen(exact, &row, 1, inputs_of(exact, normed.data() + i * d, 1), 0, &logit);
      return logit;
    });
  }
}

}  // namespace tulle
