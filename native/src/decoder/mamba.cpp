// What Mamba-2 does between its linears. Its outputs in `wide` are [z | x, B, C | Δ] of every token.
//
//   x, B, C ─ convolution, silu ─┐
//   Δ ─ step ────────────────────┴─ wait ─ state space ─ wait ─ gate silu(z), norm ─► o
//
// The first step is one thread's business for a sequence and a head of x or a group's B or C, and so is the state of a
// head; both go over the sequence's tokens in order and leave its record as it is behind the last of them.
#include <algorithm>
#include <cstring>

#include "cpu/team.hpp"
#include "decoder/scalars.hpp"
#include "decoder/state.hpp"

namespace tulle {

void Engine::State::mamba(const Pass& pass, std::size_t index) {
  const Mamba2& own = model.layers[index].mamba;
  const std::vector<SequenceRun>& all = runs.all();
  const std::size_t parts = own.heads + 2 * own.groups;
  for (std::size_t i = pass.thread; i < all.size() * parts; i += pass.team) {
    convolve_part(pass, index, all[i / parts], i % parts);
  }
  wait();
  for (std::size_t i = pass.thread; i < all.size() * own.heads; i += pass.team) {
    state_space(pass, index, all[i / own.heads], i % own.heads);
  }
  wait();
}

// Head number `part` of x, then groups of B, then of C, in place; of a head its steps, too.
void Engine::State::convolve_part(const Pass& pass, std::size_t index, const SequenceRun& run, std::size_t part) {
  const Mamba2& own = model.layers[index].mamba;
  const bool of_head = part < own.heads;
  const std::size_t width = of_head ? own.head_dim : own.state;
  const std::size_t first = of_head ? part * width : own.width() + (part - own.heads) * width;
  const std::size_t at = own.width() + first;  // behind z
  const std::int32_t* const tokens = runs.tokens(run);
  const auto outputs = [&](std::size_t i, std::size_t from, std::size_t count) {
    return outputs_of(pass, index, static_cast<std::size_t>(tokens[i]), from, count);
  };
  for (std::size_t i = 0; i < run.count; ++i) outputs(i, at, width);
  convolve(pass, own.convolution, run, plans[index].qkv.outputs, first, width, at,
           states.of(run.slot) + plans[index].kept + own.matrices());
  for (std::size_t i = 0; of_head && i < run.count; ++i) {
    float* const step = outputs(i, own.width() + own.channels() + part, 1);
    *step = std::min(std::max(softplus(*step + own.step_bias[part]), own.least), own.most);
  }
}

// A head of one sequence: from `wide` and the record to `attended`.
void Engine::State::state_space(const Pass& pass, std::size_t index, const SequenceRun& run, std::size_t head) {
  const Mamba2& own = model.layers[index].mamba;
  const std::size_t floats = own.state * own.row(), group = head * own.groups / own.heads;
  float* const state = states.of(run.slot) + plans[index].kept + head * floats;
  if (run.fresh) std::memset(state, 0, floats * sizeof(float));
  StateSpaceTokens x{};
  x.tokens = runs.tokens(run);
  x.count = run.count;
  x.stride = plans[index].qkv.outputs;
  x.x = wide.data() + own.width() + head * own.head_dim;
  x.b = wide.data() + 2 * own.width() + group * own.state;
  x.c = x.b + own.shared();
  x.step = wide.data() + own.width() + own.channels() + head;
  x.decay = own.decay[head];
  x.skip = own.skip[head];
  x.out = attended.data() + head * own.head_dim;
  x.out_stride = own.width();
  ops.state_space(x, own.state, own.head_dim, state);
}

// What o reads of token t: outputs times silu(z), normed group by group.
const float* Engine::State::gated_groups(const Pass& pass, std::size_t index, std::size_t t) {
  const Layer& l = model.layers[index];
  const Mamba2& own = l.mamba;
  const std::size_t width = own.width(), part = width / own.groups;
  float *const found = vector(pass, 0), *const spare = of_thread[pass.thread].outputs.data();
  const float* const z =
      reduce(pass, l.qkv, plans[index].qkv, partial_sums.wide, pass.n, wide.data(), t, 0, width, spare);
  ops.gate(Gate::silu, nullptr, z, attended.data() + t * width, width, found);
  Norm norm = own.norm;
  for (std::size_t at = 0; at < width; at += part, norm.gain += part) norm.run(ops, found + at, part, found + at);
  return found;
}

}  // namespace tulle
