#include "tulle/scaling.hpp"

#include <utility>

#include "scaling/state.hpp"

namespace tulle {

ScalingEngine::ScalingEngine(ScalingModel model, const EngineSizes& sizes) {
  check(model);
  state_ = std::make_unique<State>(std::move(model), sizes);
}

ScalingEngine::~ScalingEngine() = default;

void ScalingEngine::forward(const PassInput& pass, float* logits) {
  const std::lock_guard<std::mutex> lock(state_->busy);
  state_->run(pass, logits, nullptr);
}

void ScalingEngine::embed(const PassInput& pass, float* hidden) {
  const std::lock_guard<std::mutex> lock(state_->busy);
  state_->run(pass, nullptr, hidden);
}

void ScalingEngine::State::run(const PassInput& pass, float* logits, float* embeddings) {
  check.run(pass);
  if (model.modules > 0) past.find(pass.slots, pass.positions, pass.n);
  const std::uint64_t before = skipped();
  forward(pass, logits, embeddings);
  if (pass.n == 1) {
    ++single_tokens;
    single_skipped += skipped() - before;
  }
  if (model.modules > 0) states.advance(pass.slots, pass.positions, pass.n);
}

void ScalingEngine::copy_page(std::size_t source, std::size_t target) {
  State& s = *state_;
  const std::lock_guard<std::mutex> lock(s.busy);
  s.check.page(source);
  s.check.page(target);
  s.cache.copy(source, target);
}

void ScalingEngine::save_state(std::size_t slot, std::size_t snapshot) {
  const std::lock_guard<std::mutex> lock(state_->busy);
  state_->states.save(slot, snapshot);
}

void ScalingEngine::load_state(std::size_t snapshot, std::size_t slot) {
  const std::lock_guard<std::mutex> lock(state_->busy);
  state_->states.load(snapshot, slot);
}

std::uint64_t ScalingEngine::state_bytes() const { return state_->states.record_bytes(); }

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

std::uint64_t ScalingEngine::page_bytes() const { return state_->cache.page_bytes(); }

std::uint64_t ScalingEngine::cache_bytes() const { return state_->cache.bytes() + state_->states.bytes(); }

std::uint64_t ScalingEngine::work_bytes() const { return state_->work_bytes(); }

std::size_t ScalingEngine::vocabulary() const { return state_->model.vocabulary; }

std::size_t ScalingEngine::hidden() const { return state_->model.hidden; }

const EngineSizes& ScalingEngine::sizes() const { return state_->sizes; }

Engine::Reads ScalingEngine::take_reads() {
  State& s = *state_;
  const std::lock_guard<std::mutex> lock(s.busy);
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

std::uint64_t ScalingEngine::State::skipped() const {
  std::uint64_t count = 0;
  for (const ScalingScratch& t : scratch) count += t.skipped;
  return count;
}

std::uint64_t ScalingEngine::units_read() const {
  const std::lock_guard<std::mutex> lock(state_->busy);
  std::uint64_t count = 0;
  for (const ScalingScratch& t : state_->scratch) count += t.read;
  return count;
}

std::uint64_t ScalingEngine::units_skipped() const {
  const std::lock_guard<std::mutex> lock(state_->busy);
  return state_->skipped();
}

}  // namespace tulle
