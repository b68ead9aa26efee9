#include "tulle/engine.hpp"

#include <utility>

#include "decoder/state.hpp"

namespace tulle {

std::uint64_t Linear::bytes() const {
  const LinearView& w = weight;
  const std::uint64_t weights = static_cast<std::uint64_t>(w.tiles()) * kTileRows * w.padded();
  std::uint64_t bytes = 0;
  if (w.is_codes()) {
    const std::uint64_t number = scale_bytes(w.scale_kind);
    const std::uint64_t per_scale = number + (w.minima ? number : 0) + (w.zeros ? 1 : 0);
    bytes += static_cast<std::uint64_t>(w.tiles()) * kTileRows * w.scales_per_row() * per_scale;
    if (w.row_scales) bytes += static_cast<std::uint64_t>(w.tiles()) * kTileRows * sizeof(float);
  }
  if (w.input_major()) return bytes + static_cast<std::uint64_t>(bytes_per_input() * static_cast<double>(w.padded()));
  if (w.sparse()) return bytes + weights / 8 + w.offsets[w.tiles() * w.chunks()];
  return bytes + weights * bits_of(w.kind) / 8;
}

double Linear::bytes_per_input() const {
  const LinearView& w = weight;
  if (!w.input_major()) return 0;
  if (!w.sparse()) return static_cast<double>(w.lines() * kUnitBytes);
  const double starts = 4.0 * static_cast<double>(w.panels()) / static_cast<double>(w.block_inputs());
  return static_cast<double>(w.offsets[w.panels()]) / static_cast<double>(w.padded()) + starts;
}

Engine::Engine(Model model, const EngineSizes& sizes) {
  check(model);
  state_ = std::make_unique<State>(std::move(model), sizes);
}

Engine::~Engine() = default;

void Engine::forward(const PassInput& pass, float* logits) {
  const std::lock_guard<std::mutex> lock(state_->busy);
  state_->run(pass, logits, nullptr);
}

void Engine::embed(const PassInput& pass, float* hidden) {
  const std::lock_guard<std::mutex> lock(state_->busy);
  state_->run(pass, nullptr, hidden);
}

void Engine::State::run(const PassInput& pass, float* logits, float* embeddings) {
  check.run(pass);
  if (state_floats > 0) runs.find(states, pass.slots, pass.positions, pass.n);
  forward(pass, logits, embeddings);
  if (state_floats > 0) states.advance(pass.slots, pass.positions, pass.n);
}

void Engine::copy_page(std::size_t source, std::size_t target) {
  State& s = *state_;
  const std::lock_guard<std::mutex> lock(s.busy);
  s.check.page(source);
  s.check.page(target);
  s.cache.copy(source, target);
}

void Engine::save_state(std::size_t slot, std::size_t snapshot) {
  const std::lock_guard<std::mutex> lock(state_->busy);
  state_->states.save(slot, snapshot);
}

void Engine::load_state(std::size_t snapshot, std::size_t slot) {
  const std::lock_guard<std::mutex> lock(state_->busy);
  state_->states.load(snapshot, slot);
}

std::uint64_t Engine::state_bytes() const { return state_->states.record_bytes(); }

std::uint64_t Engine::weight_bytes() const {
  const auto of = [](const Group& group) {
    std::uint64_t bytes = 0;
    for (const Linear& linear : group.linears) bytes += linear.bytes();
    return bytes;
  };
  std::uint64_t bytes = of(state_->model.head);
  for (const Layer& layer : state_->model.layers) {
    const Mixture& mixture = layer.mixture;
    bytes += of(layer.qkv) + of(layer.o) + of(layer.feed_forward.gate_up) + of(layer.feed_forward.down);
    bytes += of(layer.latent.query_up) + of(layer.latent.kv_up);
    if (layer.mixer == Mixer::latent && layer.latent.absorbed()) {
      bytes += layer.latent.keys.bytes() + layer.latent.values.bytes();
    }
    if (!mixture.present()) continue;
    std::uint64_t all = 0;
    for (std::size_t i = 0; i < mixture.experts.size(); ++i) {
      const FeedForward& expert = mixture.experts[i];
      (i < mixture.routed() ? all : bytes) += of(expert.gate_up) + of(expert.down);
    }
    bytes += of(mixture.router.group) + all * mixture.router.chosen / mixture.routed();
  }
  return bytes;
}

Engine::Reads Engine::take_reads() {
  const std::lock_guard<std::mutex> lock(state_->busy);
  return std::exchange(state_->reads, Reads{0, 0});
}

std::uint64_t Engine::page_bytes() const { return state_->cache.page_bytes(); }

std::uint64_t Engine::cache_bytes() const { return state_->cache.bytes() + state_->states.bytes(); }

std::uint64_t Engine::work_bytes() const { return state_->work_bytes(); }

std::size_t Engine::vocabulary() const { return state_->model.vocabulary; }

std::size_t Engine::hidden() const { return state_->model.hidden; }

const EngineSizes& Engine::sizes() const { return state_->sizes; }

}  // namespace tulle
