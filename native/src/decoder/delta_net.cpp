// What a gated delta net does between its linears. Its outputs in `wide` are [q, k, v | z | b | a] of every token.
//
//   q, k, v ─ convolution, silu ─ q and k of unit length ─┐
//   b, a ─ β, decay ──────────────────────────────────────┴─ wait ─ delta rule ─ wait ─ norm, gate silu(z) ─► o
//
// The first step is one thread's business for a sequence and a head, and so is the delta rule; both go over the
// sequence's tokens in order and leave its record as it is behind the last of them.
#include <cmath>
#include <cstring>

#include "cpu/team.hpp"
#include "decoder/scalars.hpp"
#include "decoder/state.hpp"

namespace tulle {
namespace {

constexpr float kUnitEps = 1e-6f;  // of a head's squared length

}  // namespace

void Engine::State::delta_net(const Pass& pass, std::size_t index) {
  const DeltaNet& net = model.layers[index].delta;
  const std::vector<SequenceRun>& all = runs.all();
  const std::size_t heads = 2 * net.key_heads + net.value_heads;
  for (std::size_t i = pass.thread; i < all.size() * heads; i += pass.team) {
    convolve_head(pass, index, all[i / heads], i % heads);
  }
  wait();
  for (std::size_t i = pass.thread; i < all.size() * net.value_heads; i += pass.team) {
    delta_rule(pass, index, all[i / net.value_heads], i % net.value_heads);
  }
  wait();
}

// Head number `head` of queries, then of keys, then of values, in place; of a value head β and the decay, too.
void Engine::State::convolve_head(const Pass& pass, std::size_t index, const SequenceRun& run, std::size_t head) {
  const DeltaNet& net = model.layers[index].delta;
  const bool of_value = head >= 2 * net.key_heads;
  const std::size_t number = of_value ? head - 2 * net.key_heads : 0, width = of_value ? net.value_dim : net.key_dim;
  const std::size_t first = of_value ? 2 * net.keys() + number * width : head * width;
  const std::int32_t* const tokens = runs.tokens(run);
  const auto outputs = [&](std::size_t i, std::size_t at, std::size_t count) {
    return outputs_of(pass, index, static_cast<std::size_t>(tokens[i]), at, count);
  };
  for (std::size_t i = 0; i < run.count; ++i) outputs(i, first, width);
  convolve(pass, net.convolution, run, plans[index].qkv.outputs, first, width, first,
           states.of(run.slot) + plans[index].kept + net.matrices());
  if (!of_value) {
    for (std::size_t i = 0; i < run.count; ++i) {
      float* const x = wide.data() + static_cast<std::size_t>(tokens[i]) * plans[index].qkv.outputs + first;
      float scale = 1.0f / std::sqrt(ops.dot(x, x, width) + kUnitEps);
      if (head < net.key_heads) scale /= std::sqrt(static_cast<float>(width));
      ops.scaled(x, scale, width, x);
    }
    return;
  }
  const std::size_t b = net.channels() + net.values() + number, a = b + net.value_heads;
  for (std::size_t i = 0; i < run.count; ++i) {
    float *const beta = outputs(i, b, 1), *const decay = outputs(i, a, 1);
    *beta = sigmoid(*beta);
    *decay = std::exp(net.decay[number] * softplus(*decay + net.step_bias[number]));
  }
}

// A value head of one sequence: from `wide` and the record to `attended`.
void Engine::State::delta_rule(const Pass& pass, std::size_t index, const SequenceRun& run, std::size_t head) {
  const DeltaNet& net = model.layers[index].delta;
  const std::size_t own = net.key_dim * net.row(), key_head = head * net.key_heads / net.value_heads;
  float* const state = states.of(run.slot) + plans[index].kept + head * own;
  if (run.fresh) std::memset(state, 0, own * sizeof(float));
  DeltaTokens x{};
  x.tokens = runs.tokens(run);
  x.count = run.count;
  x.stride = plans[index].qkv.outputs;
  x.query = wide.data() + key_head * net.key_dim;
  x.key = x.query + net.keys();
  x.value = wide.data() + 2 * net.keys() + head * net.value_dim;
  x.beta = wide.data() + net.channels() + net.values() + head;
  x.decay = x.beta + net.value_heads;
  x.out = attended.data() + head * net.value_dim;
  x.out_stride = net.values();
  ops.delta_rule(x, net.key_dim, net.value_dim, state);
}

// What o reads: the norm of every head of token t, times silu(z).
const float* Engine::State::gated_heads(const Pass& pass, std::size_t index, std::size_t t) {
  const Layer& l = model.layers[index];
  const DeltaNet& net = l.delta;
  float *const found = vector(pass, 0), *const spare = of_thread[pass.thread].outputs.data();
  const float* const x = attended.data() + t * net.values();
  for (std::size_t at = 0; at < net.values(); at += net.value_dim) net.norm.run(ops, x + at, net.value_dim, found + at);
  const float* const z = reduce(pass, l.qkv, plans[index].qkv, partial_sums.wide, pass.n, wide.data(), t, net.channels(),
                                net.channels() + net.values(), spare);
  ops.gate(Gate::silu, nullptr, z, found, net.values(), found);
  return found;
}

}  // namespace tulle
