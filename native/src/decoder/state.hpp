// What a decoder keeps between passes, and the memory that a pass works in.
//
//   state.cpp          sizes and allocates all of it
//   delta_net.cpp      what gated delta nets do between their linears
//   convolution.cpp    causal convolutions of recurrent mixers, and the mixer that is one between two gates
//   mamba.cpp          what Mamba-2 does between its linears
//   group_product.cpp  a group of linears: quantise the inputs, multiply, reduce partial sums
//   forward.cpp        the pass: embedding, layers, logits
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "cpu/buffer.hpp"
#include "decoder/attention.hpp"
#include "decoder/kv_cache.hpp"
#include "decoder/pass.hpp"
#include "decoder/plan.hpp"
#include "decoder/quantised_inputs.hpp"
#include "decoder/recurrent_states.hpp"
#include "decoder/rotary.hpp"
#include "tulle/dispatch.hpp"
#include "tulle/engine.hpp"

namespace tulle {

// What the linears of a group read; one per kind of input that they ask for (Plan::inputs).
using GroupInputs = std::vector<QuantisedInputs>;

// Partial sums of linears whose inputs are cut between threads, [part][token][output of the group]. A group's outputs
// may still be reduced by one thread while another multiplies the next group, so there are two, used in turn:
// `wide` by qkv, gate and up and the head, `back` by the linears that lead back to the residual stream.
struct PartialSums {
  Buffer<float> wide, back;
};

// Memory of one thread.
struct ThreadMemory {
  Buffer<float> vectors;      // of `vector_floats` each; see Engine::State::vector
  Buffer<float> scores;       // attention: [kQueries][context]
  Buffer<float> panel_sums;   // input-major linears: [kInputMajorTokens][output of a panel]
  Buffer<std::uint8_t> kernel_scratch;
  // Of passes of one token, where every thread computes for itself what is no product: what another core has just
  // written takes longer to come than to be computed again.
  GroupInputs inputs;
  Buffer<float> hidden, outputs;
};

struct Pass;

struct Engine::State {
  struct LayerPlans {
    Plan qkv, o, gate_up, down;
    std::size_t kept = 0;  // of attention: its layer of the cache; otherwise where its floats begin in a record
  };

  State(Model model, const EngineSizes& sizes);

  // One of `logits` and `embeddings` is null. Throws std::invalid_argument on anything out of range.
  void run(const PassInput& input, float* logits, float* embeddings);
  void forward(const PassInput& input, float* logits, float* embeddings);
  std::uint64_t work_bytes() const;

  const Model model;
  const EngineSizes sizes;
  const std::size_t table_width;  // pages of a sequence, at most
  const std::size_t threads;
  std::mutex busy;  // held by whoever uses what follows
  const LinearKernels& linear;
  const OpsKernels& ops;

  std::vector<LayerPlans> plans;
  Plan head_plan;
  const std::size_t state_floats;  // of a record, filled in with `plans`
  KvCache cache;
  RecurrentStates states;
  SequenceRuns runs;  // of a model that has recurrent states
  PassCheck check;
  std::vector<RotaryTables> rotary;
  Attention attention;

  // Of all tokens of a pass.
  GroupInputs inputs;
  PartialSums partial_sums;
  Buffer<float> hidden;    // the residual stream, [token][hidden]
  Buffer<float> attended;  // what the mixer made, [token][inputs of o]
  Buffer<float> back;      // outputs of o and down, [token][hidden]
  Buffer<float> wide;      // outputs of qkv, or of gate and up, [token][outputs]
  Buffer<float> gated;     // of a pass of one token: [intermediate]
  Buffer<float> ones;      // [intermediate], of a feed-forward without gate
  std::vector<ThreadMemory> of_thread;
  std::size_t vector_floats;

  // What passes of one token have read of the weights, since it was last asked for.
  Reads reads{0, 0};

 private:
  // group_product.cpp
  void quantise_inputs(const Pass& pass, const Group& group, const Plan& plan, const float* x, std::size_t t);
  void multiply(const Pass& pass, const Group& group, Plan& plan, Buffer<float>& partial_sums, std::size_t n, float* y);
  void multiply_item(const Pass& pass, const Group& group, const Plan& plan, const WorkItem& item, float* partial_sums,
                     std::size_t n, float* y);
  void multiply_input_major(const Pass& pass, const Linear& linear, const Plan& plan, const WorkItem& item,
                            float* partial_sums, std::size_t n, float* y);
  const float* reduce(const Pass& pass, const Group& group, const Plan& plan, const Buffer<float>& partial_sums,
                      std::size_t n, const float* y, std::size_t t, std::size_t first, std::size_t last, float* to);
  void count_reads(const Group& group, const Plan& plan, const GroupInputs& inputs);

  // forward.cpp
  void layer(const Pass& pass, std::size_t index);
  void mix(const Pass& pass, std::size_t index);
  const float* mixer_output(const Pass& pass, std::size_t index, std::size_t t);
  void attend(const Pass& pass, std::size_t index);
  const float* mixed(const Pass& pass, std::size_t index, std::size_t t);
  void normalise_heads(const Pass& pass, std::size_t index);
  void append_head(const Pass& pass, std::size_t index, std::size_t head, std::size_t t);
  void finish_head(const Layer& layer, float* x, const Norm& norm, std::size_t t) const;
  void rotate_head(const Pass& pass, float* x) const;
  void feed_forward(const Pass& pass, std::size_t index);
  void add_to_residual(const Pass& pass, const Group& group, const Plan& plan, const Norm& after, std::size_t t);
  void head(const Pass& pass, float* logits, float* embeddings);
  CacheView view(const Pass& pass, std::size_t layer, std::size_t kv_head, std::size_t slot) const;
  float* vector(const Pass& pass, std::size_t number) const;

  // delta_net.cpp
  void delta_net(const Pass& pass, std::size_t index);
  void convolve_head(const Pass& pass, std::size_t index, const SequenceRun& run, std::size_t head);
  void delta_rule(const Pass& pass, std::size_t index, const SequenceRun& run, std::size_t head);
  const float* gated_heads(const Pass& pass, std::size_t index, std::size_t t);

  // convolution.cpp
  void convolve(const Pass& pass, const CausalConvolution& own, const SequenceRun& run, std::size_t stride,
                std::size_t first, std::size_t width, std::size_t at, float* history);
  float* outputs_of(const Pass& pass, std::size_t index, std::size_t token, std::size_t at, std::size_t width);
  void short_convolution(const Pass& pass, std::size_t index);
  const float* gated_convolution(const Pass& pass, std::size_t index, std::size_t t);

  // mamba.cpp
  void mamba(const Pass& pass, std::size_t index);
  void convolve_part(const Pass& pass, std::size_t index, const SequenceRun& run, std::size_t part);
  void state_space(const Pass& pass, std::size_t index, const SequenceRun& run, std::size_t head);
  const float* gated_groups(const Pass& pass, std::size_t index, std::size_t t);
};

// A pass as one thread sees it.
//
// Several tokens: a thread computes the vectors of its own tokens [first, last), in memory that all share, and waits
// before others read them. One token: every thread has a copy of the residual stream and of the quantised inputs, and
// computes both for itself, so that threads wait for each other six times a layer only.
struct Pass : PassInput {
  std::size_t thread, team;
  bool replicated;  // one token
  std::size_t first, last;
  float* hidden;  // [n][hidden]
  GroupInputs* inputs;

  // Part `thread` of n things, of whole vectors of 16: the same bits as all at once.
  std::size_t bound(std::size_t size, std::size_t part) const;
  // Others are about to read what this thread has computed of its own tokens.
  void publish() const;
};

}  // namespace tulle
