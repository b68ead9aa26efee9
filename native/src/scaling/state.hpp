// What a Scaling Transformer keeps between passes, and the memory that a pass works in.
//
//   state.cpp     sizes and allocates all of it
//   products.cpp  rows, multiplicative layer, convolutions, the sparse feed-forward
//   forward.cpp   the pass
//
// KV cache, rotary tables, attention and embedding are the decoder's.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "cpu/buffer.hpp"
#include "decoder/attention.hpp"
#include "decoder/kv_cache.hpp"
#include "decoder/pass.hpp"
#include "decoder/recurrent_states.hpp"
#include "decoder/rotary.hpp"
#include "scaling/past.hpp"
#include "tulle/dispatch.hpp"
#include "tulle/scaling.hpp"

namespace tulle {

// Inputs of a multiplicative layer that are taken at once: of E, so many rows stay in the level-2 cache while the
// modules are multiplied with them.
constexpr std::size_t kInputs = 512;

// Of `count` equal things, where part `part` of `parts` begins; parts begin at multiples of `step`.
inline std::size_t begin_of(std::size_t count, std::size_t part, std::size_t parts, std::size_t step = 1) {
  return std::min(count, (count * part / parts + step - 1) / step * step);
}

// Memory of one thread.
struct ScalingScratch {
  Buffer<float> scores;           // attention
  Buffer<float> scaled, modules;  // multiplicative layer: inputs times D; outputs of modules
  Buffer<float> logits, active;   // sparse feed-forward: of all units; values of the chosen ones
  Buffer<float> part;             // a part of a token's outputs, [hidden]
  Buffer<std::int32_t> units;     // the chosen ones
  std::uint64_t read = 0, skipped = 0;
};

struct ScalingPass;

struct ScalingEngine::State {
  State(ScalingModel model, const EngineSizes& sizes);

  // One of `logits` and `embeddings` is null.
  void run(const PassInput& pass, float* logits, float* embeddings);
  std::uint64_t skipped() const;  // of units, as ScalingEngine::units_skipped
  std::uint64_t work_bytes() const;

  const ScalingModel model;
  const EngineSizes sizes;
  const std::size_t table_width;  // pages of a sequence, at most
  const std::size_t threads;
  std::mutex busy;  // held by whoever uses what follows
  const ScalingKernels& kernels;
  const OpsKernels& ops;
  KvCache cache;
  PassCheck check;
  RotaryTables rotary;
  Attention attention;
  RecurrentStates states;
  ConvolutionPast past;

  // Of all tokens of a pass.
  Buffer<float> hidden, normed, q, k, v, attended, output;  // [token][hidden]
  Buffer<float> wide;      // dense feed-forward: [token][intermediate]
  Buffer<float> ranks;     // controller: [token][rank]
  Buffer<float> partials;  // outputs of the feed-forward: [token][hidden], of one sparse one [thread][hidden]
  // Inputs of weights in codes: integers, a step per token, their sum.
  Buffer<std::int8_t> codes;
  Buffer<float> steps;
  Buffer<std::int32_t> sums;
  std::size_t code_stride = 0;  // 0: no weights in codes
  std::vector<ScalingScratch> scratch;  // per thread

  // Passes of one token since they were last asked for, and the units that these skipped.
  std::uint64_t single_tokens = 0, single_skipped = 0;

 private:
  // A pass that has been checked.
  void forward(const PassInput& input, float* logits, float* embeddings);

  // products.cpp
  void quantise(const float* x, std::size_t n, std::size_t t);
  RowInputs inputs_of(const Matrix& w, const float* x, std::size_t tokens) const;
  void project(const ScalingPass& pass, const Projection& p, const float* x, std::size_t n, float* y,
               bool relu = false) const;
  void multiply(const Multiplicative& w, const float* x, std::size_t first, std::size_t last, std::size_t from,
                std::size_t to, ScalingScratch& s, float* c) const;
  void make_image(const ScalingLayer& l, std::size_t t, std::size_t first, std::size_t last, ScalingScratch& s);
  void convolve(const Convolution& conv, std::size_t width, std::size_t layer, std::size_t t, std::size_t first,
                std::size_t last, ScalingScratch& s, float* y) const;
  void choose(const ScalingLayer& l, std::size_t t, std::size_t first, std::size_t last, float* to,
              ScalingScratch& s) const;

  // forward.cpp
  void layer(const ScalingPass& pass, std::size_t index);
  void queries_keys_values(const ScalingPass& pass, std::size_t index);
  void attend(const ScalingPass& pass, std::size_t index);
  void feed_forward(const ScalingPass& pass, const ScalingLayer& l);
  void head(const ScalingPass& pass, float* logits, float* embeddings);
  CacheView view(const ScalingPass& pass, std::size_t layer, std::size_t head, std::size_t slot) const;
  void norm(const float* gain, std::size_t t);
};

// A pass as one thread sees it; it computes the vectors of tokens [first, last).
struct ScalingPass : PassInput {
  std::size_t thread, team, first, last;
  ScalingScratch& scratch;
};

}  // namespace tulle
