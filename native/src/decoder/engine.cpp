#include "tulle/engine.hpp"

#include <utility>

#include "decoder/pass.hpp"
#include "decoder/state.hpp"

namespace tulle {

std::uint64_t Linear::bytes() const {
  const LinearView& w = weight;
  const std::uint64_t weights = static_cast<std::uint64_t>(w.tiles()) * kTileRows * w.padded();
  std::uint64_t bytes = 0;
  if (w.is_codes()) {
    const std::uint64_t number = w.scale_kind == ScaleKind::f32 ? 4 : 2;
    const std::uint64_t per_scale = number + (w.minima ? number : 0) + (w.zeros ? 1 : 0);
    bytes += static_cast<std::uint64_t>(w.tiles()) * kTileRows * w.scales_per_row() * per_scale;
  }
  if (w.input_major()) return bytes + static_cast<std::uint64_t>(bytes_per_input() * static_cast<double>(w.padded()));
  if (w.sparse()) return bytes + weights / 8 + w.offsets[w.tiles() * w.chunks()];
  const unsigned bits = w.kind == WeightKind::codes4   ? 4
                        : w.kind == WeightKind::codes8 ? 8
                        : w.kind == WeightKind::bf16   ? 16
                                                       : 32;
  return bytes + weights * bits / 8;
}

double Linear::bytes_per_input() const {
  const LinearView& w = weight;
  if (!w.input_major()) return 0;
  if (!w.sparse()) return static_cast<double>(w.lines() * kUnitBytes);
  const double starts = 4.0 * static_cast<double>(w.panels()) / static_cast<double>(w.block_inputs());
  return static_cast<double>(w.offsets[w.panels()]) / static_cast<double>(w.padded()) + starts;
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
  s.forward(tokens, slots, positions, n, rows, wanted, logits);
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

Engine::Reads Engine::take_reads() { return std::exchange(state_->reads, Reads{0, 0}); }

std::uint64_t Engine::cache_bytes() const { return state_->cache.bytes(); }

std::uint64_t Engine::work_bytes() const { return state_->work_bytes(); }

std::size_t Engine::vocabulary() const { return state_->model.vocabulary; }

}  // namespace tulle
