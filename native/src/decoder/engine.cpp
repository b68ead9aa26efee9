#include "tulle/engine.hpp"

#include <numeric>

#include "decoder/pass.hpp"
#include "decoder/state.hpp"

namespace tulle {

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
  if (n == 1) s.step(*tokens, *slots, *positions, wanted > 0, logits);
  else s.run(tokens, slots, positions, n, rows, wanted, logits);
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
  const Reads found{state_->read_bytes, state_->read_tokens};
  state_->read_bytes = 0;
  state_->read_tokens = 0;
  return found;
}

std::uint64_t Engine::cache_bytes() const {
  return state_->keys.bytes() + state_->values.bytes() + state_->cache_scales.bytes();
}

std::uint64_t Engine::work_bytes() const {
  const State& s = *state_;
  std::uint64_t bytes = 0;
  for (const Buffer<float>* b : {&s.pieced, &s.next_pieced, &s.hidden, &s.attended, &s.small, &s.wide, &s.gated, &s.cosines,
                                 &s.sines}) {
    bytes += b->bytes();
  }
  const auto add = [&](const State::Intake& intake) {
    for (const Prepared& p : intake.inputs) {
      bytes += p.floats.bytes() + p.steps.bytes();
      for (int i = 0; i < 2; ++i) bytes += p.plane[i].bytes() + p.sums[i].bytes() + p.quad_plane[i].bytes();
      bytes += p.quads.bytes() + p.quad_starts.bytes() + p.active.bytes();
    }
  };
  add(s.intake);
  for (std::size_t t = 0; t < s.threads; ++t) {
    bytes += s.vectors[t].bytes() + s.scores[t].bytes() + s.strips[t].bytes() + s.scratches[t].bytes();
    bytes += s.own_hidden[t].bytes() + s.own_wide[t].bytes();
    add(s.own[t]);
  }
  return bytes;
}

std::size_t Engine::vocabulary() const { return state_->model.vocabulary; }

}  // namespace tulle
