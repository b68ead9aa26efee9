// Causal convolutions of recurrent mixers, and LFM2's mixer, which is one between two gates. Its outputs in `wide` are
// [B, C, x] of every token.
//
//   B ⊙ x ─ convolution ─ wait ─ ⊙ C ─► o
//
// The first two are one thread's business for a sequence and a part of the channels; they leave the sequence's record
// as it is behind its last token.
#include <algorithm>
#include <cstring>

#include "cpu/team.hpp"
#include "decoder/state.hpp"

namespace tulle {
namespace {

constexpr std::size_t kPartChannels = 64;

}  // namespace

// Channels [first, first + width) of one sequence, in place in `wide`, where the first of them is column `at`.
// `history`: the convolution's part of the record.
void Engine::State::convolve(const Pass& pass, const CausalConvolution& own, const SequenceRun& run,
                             std::size_t stride, std::size_t first, std::size_t width, std::size_t at, float* history) {
  const std::size_t past = own.kernel - 1;
  float* const before = vector(pass, 0);  // [past][width]
  const std::int32_t* const tokens = runs.tokens(run);
  const auto row = [&](std::size_t i) { return wide.data() + static_cast<std::size_t>(tokens[i]) * stride + at; };
  for (std::size_t k = 0; k < past; ++k) {
    if (run.fresh) std::memset(before + k * width, 0, width * sizeof(float));
    else std::memcpy(before + k * width, history + k * own.channels + first, width * sizeof(float));
  }
  // Number i of what was before, followed by this run's.
  const auto input = [&](std::size_t i) { return i < past ? before + i * width : row(i - past); };
  for (std::size_t k = 0; k < past; ++k) {
    std::memcpy(history + k * own.channels + first, input(run.count + k), width * sizeof(float));
  }
  // From the end, since what is written is an input of the tokens behind it.
  for (std::size_t i = run.count; i-- > 0;) {
    const float* inputs[kMostTaps];
    for (std::size_t k = 0; k < own.kernel; ++k) inputs[k] = input(i + k);
    const float* const bias = own.bias == nullptr ? nullptr : own.bias + first;
    ops.convolve(inputs, own.taps + first, own.channels, own.kernel, bias, own.silu, width, row(i));
  }
}

// Columns [at, at + width) of `wide` of one of a run's tokens, partial sums added up.
float* Engine::State::outputs_of(const Pass& pass, std::size_t index, std::size_t token, std::size_t at,
                                 std::size_t width) {
  const Plan& plan = plans[index].qkv;
  float* const found = wide.data() + token * plan.outputs + at;
  reduce(pass, model.layers[index].qkv, plan, partial_sums.wide, pass.n, wide.data(), token, at, at + width, found);
  return found;
}

void Engine::State::short_convolution(const Pass& pass, std::size_t index) {
  const CausalConvolution& own = model.layers[index].short_convolution.convolution;
  const std::vector<SequenceRun>& all = runs.all();
  const std::size_t parts = (own.channels + kPartChannels - 1) / kPartChannels;
  for (std::size_t i = pass.thread; i < all.size() * parts; i += pass.team) {
    const SequenceRun& run = all[i / parts];
    const std::size_t first = i % parts * kPartChannels, width = std::min(kPartChannels, own.channels - first);
    const std::size_t at = 2 * own.channels + first;
    for (std::size_t k = 0; k < run.count; ++k) {
      const std::size_t token = static_cast<std::size_t>(runs.tokens(run)[k]);
      float* const x = outputs_of(pass, index, token, at, width);
      ops.scale(x, outputs_of(pass, index, token, first, width), width, x);
    }
    convolve(pass, own, run, plans[index].qkv.outputs, first, width, at, states.of(run.slot) + plans[index].kept);
  }
  wait();
}

// What o reads of token t.
const float* Engine::State::gated_convolution(const Pass& pass, std::size_t index, std::size_t t) {
  const Plan& plan = plans[index].qkv;
  const std::size_t channels = model.layers[index].short_convolution.convolution.channels;
  float *const found = vector(pass, 0), *const spare = of_thread[pass.thread].outputs.data();
  const float* const gate = reduce(pass, model.layers[index].qkv, plan, partial_sums.wide, pass.n, wide.data(), t,
                                   channels, 2 * channels, spare);
  ops.scale(wide.data() + t * plan.outputs + 2 * channels, gate, channels, found);
  return found;
}

}  // namespace tulle
