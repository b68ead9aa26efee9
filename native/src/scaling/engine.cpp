#include "tulle/scaling.hpp"

#include <utility>

#include "decoder/pass.hpp"
#include "scaling/state.hpp"

namespace tulle {

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
  if (s.model.modules > 0) s.past.find(slots, positions, n);
  const std::uint64_t before = units_skipped();
  s.forward(tokens, slots, positions, n, rows, wanted, logits);
  if (n == 1) {
    ++s.single_tokens;
    s.single_skipped += units_skipped() - before;
  }
  if (s.model.modules > 0) s.past.advance(slots, positions, n);
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
  return state_->cache.bytes() + state_->past.kept_bytes();
}

std::uint64_t ScalingEngine::work_bytes() const { return state_->work_bytes(); }

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
  for (const ScalingScratch& t : state_->scratch) count += t.read;
  return count;
}

std::uint64_t ScalingEngine::units_skipped() const {
  std::uint64_t count = 0;
  for (const ScalingScratch& t : state_->scratch) count += t.skipped;
  return count;
}

}  // namespace tulle
