// What a decoder keeps between passes, and the memory that a pass works in.
//
//   state.cpp          sizes and allocates all of it
//   delta_net.cpp      what gated delta nets do between their linears
//   convolution.cpp    causal convolutions of recurrent mixers, and the mixer that is one between two gates
//   mamba.cpp          what Mamba-2 does between its linears
//   latent.cpp         latent attention
//   layer_inputs.cpp   inputs of every layer's own
//   group_product.cpp  a group of linears: quantise the inputs, multiply, reduce partial sums
//   mixture.cpp        experts: which tokens go to which, and their products
//   routing.cpp        a token's experts and their weights
//   forward.cpp        the pass: embedding, layers, logits
#pragma once

#include <cstddef>
#include <atomic>
#include <cstdint>
#include <memory>
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

// A group's product with n tokens.
struct Product {
  const Group* group;
  const Outline* outline;
  const GroupInputs* inputs;
  std::size_t input;  // where they begin (InputRow::base)
  std::size_t n;
  float* sums;        // partial sums, [part][n][outputs]
  float* y;           // [n][outputs]
};

// Products that the threads share out together.
struct Products {
  std::vector<Product> all;
  std::vector<WorkItem> items;

  void clear();
  // `item_bytes`: what an item weighs, at least.
  void add(const Product& product, std::uint64_t item_bytes);
};

// Tokens of an expert: rows [first, first + count) of the experts' memory. What they read begins at row `input`, which
// is another expert's where one token alone has both, and they read the same.
struct ExpertRows {
  std::size_t expert, first, count, input;
};

// Which tokens of a pass go to which experts of a layer. Rows are sorted by expert, then by token.
struct Routes {
  Buffer<std::uint32_t> experts;  // [token][per token], ascending
  Buffer<float> weights;          // [token][per token]
  Buffer<std::uint32_t> rows;     // [token][per token]
  Buffer<std::uint32_t> next;     // [expert], of `arrange`
  Buffer<std::uint32_t> part_of;  // [expert], of those that have tokens: among `parts`
  std::vector<ExpertRows> parts;  // of experts that have tokens
  Products gate_up, down;

  Routes(std::size_t tokens, std::size_t per_token, std::size_t experts);
  std::uint64_t bytes() const;
};

// What experts compute, by rows.
struct ExpertMemory {
  Buffer<float> wide;   // outputs of gate and up, [row][wide_row]
  Buffer<float> back;   // outputs of down, [row][hidden]
  Buffer<float> gated;  // of a pass of one token: [row][gated_row]
  PartialSums sums;     // [row][sums of gate and up], [row][sums of down]
  std::size_t wide_row = 0, gated_row = 0, wide_sums = 0, back_sums = 0;
};

// What latent attention works in.
struct LatentMemory {
  Buffer<float> queries;   // [token][head][plain | rotary]
  Buffer<float> products;  // absorbed: queries as latents see them, [token][output of the absorbed keys]; otherwise
                           // the heads' keys and values, [token][output of kv_up]
  Buffer<float> kept;      // expanded: [token][latent, normed | what is rotated of a key, rotated]
  GroupInputs keys, values;  // absorbed, one each: row [head][part][token], and [head][token]

  std::uint64_t bytes() const;
};

// Memory of one thread.
struct ThreadMemory {
  Buffer<float> vectors;      // of `vector_floats` each; see Engine::State::vector
  Buffer<float> latents;      // latent attention: of the queries of a block, [kQueries][rank], and their outputs
  Buffer<float> scores;       // attention: [kQueries][context]
  Buffer<float> panel_sums;   // input-major linears: [kInputMajorTokens][output of a panel]
  Buffer<std::uint8_t> kernel_scratch;
  // Of passes of one token, where every thread computes for itself what is no product: what another core has just
  // written takes longer to come than to be computed again.
  GroupInputs inputs, expert_inputs;
  Buffer<float> hidden, outputs;
  std::unique_ptr<Routes> routes;
  Buffer<std::uint8_t> marks;  // of experts and their groups
};

struct Pass;

struct Engine::State {
  struct ExpertPlan {
    Outline gate_up, down;
    std::size_t like = 0;  // the first expert that reads the same of a token
  };
  struct LayerPlans {
    Plan qkv, o, gate_up, down, router;
    Plan query_up, kv_up;  // of latent attention
    Plan input_gate, input_down;
    std::vector<ExpertPlan> experts;
    std::size_t kept = 0;  // of attention, latent or not: its layer of the cache; otherwise where its floats begin in a record
    std::size_t attention = 0;  // number among Engine::State::attention
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
  Plan head_plan, layer_inputs_plan;
  const std::size_t state_floats;  // of a record, filled in with `plans`
  KvCache cache;
  RecurrentStates states;
  SequenceRuns runs;  // of a model that has recurrent states
  PassCheck check;
  std::vector<RotaryTables> rotary;
  std::vector<Attention> attention;  // one for each shape of heads

  // Of all tokens of a pass.
  GroupInputs inputs, expert_inputs;
  std::unique_ptr<Routes> routes;
  ExpertMemory expert;
  LatentMemory latent;
  // How many items of the experts' products have been taken, of gate and up, and of down.
  alignas(kAlignment) std::atomic<std::size_t> taken[2] = {};
  PartialSums partial_sums;
  Buffer<float> hidden;    // the residual stream, [token][hidden]
  Buffer<float> attended;  // what the mixer made, [token][inputs of o]
  Buffer<float> back;      // outputs of o and down, [token][hidden]
  Buffer<float> wide;      // outputs of qkv, or of gate and up, [token][outputs]
  Buffer<float> layer_inputs;  // of a model whose layers have inputs of their own, [token][layer · width]
  Buffer<float> gated;     // of a pass of one token: [widest intermediate]
  Buffer<float> ones;      // likewise, of a feed-forward without gate
  std::vector<ThreadMemory> of_thread;
  std::size_t vector_floats;

  // What passes of one token have read of the weights, since it was last asked for.
  Reads reads{0, 0};

 private:
  // group_product.cpp
  void quantise_inputs(const Pass& pass, const Group& group, const Outline& outline, const float* x, std::size_t t);
  void quantise_inputs(const Pass& pass, const Group& group, const Outline& outline, const float* x,
                       GroupInputs& inputs, InputRow row);
  const float* transformed(const Pass& pass, const std::vector<Transform>& transforms, const float* x);
  void multiply(const Pass& pass, const Group& group, Plan& plan, Buffer<float>& partial_sums, std::size_t n, float* y);
  void multiply(const Pass& pass, const Products& products, std::atomic<std::size_t>& taken);
  void multiply_item(const Pass& pass, const Product& product, const WorkItem& item);
  void multiply_input_major(const Pass& pass, const Product& product, const WorkItem& item);
  const float* reduce(const Pass& pass, const Group& group, const Outline& outline, const Buffer<float>& partial_sums,
                      std::size_t n, float* y, std::size_t t, std::size_t first, std::size_t last, float* to);
  const float* reduce(const Product& product, std::size_t t, std::size_t first, std::size_t last, float* to);
  void count_reads(const Product& product);

  // forward.cpp
  void layer(const Pass& pass, std::size_t index);
  void mix(const Pass& pass, std::size_t index);
  const float* mixer_output(const Pass& pass, std::size_t index, std::size_t t);
  void attend(const Pass& pass, std::size_t index);
  const float* mixed(const Pass& pass, std::size_t index, std::size_t t);
  void normalise_heads(const Pass& pass, std::size_t index);
  void append_head(const Pass& pass, std::size_t index, std::size_t head, std::size_t t);
  void finish_head(const Layer& layer, float* x, const Norm& norm, std::size_t t) const;
  void rotate_head(const Pass& pass, const Transform& rotation, float* x) const;
  void feed_forward(const Pass& pass, std::size_t index);
  void gate(const Layer& layer, const float* gate, const float* up, std::size_t n, float* spare_gate, float* spare_up,
            float* out) const;
  const float* read_stream(const Pass& pass, const Norm& norm, std::size_t t);
  void add_feed_forward(const Pass& pass, std::size_t index, std::size_t t);
  void add_last(const Pass& pass, std::size_t index, std::size_t t);
  void add_to_residual(const Pass& pass, const float* y, const Norm& after, std::size_t t);
  void head(const Pass& pass, float* logits, float* embeddings);
  CacheView view(const Pass& pass, std::size_t layer, std::size_t kv_head, std::size_t slot) const;
  float* vector(const Pass& pass, std::size_t number) const;

  // layer_inputs.cpp
  void prepare_layer_inputs(const Pass& pass);
  void finish_layer_inputs(const Pass& pass, std::size_t t);
  void gate_input(const Pass& pass, std::size_t index);

  // mixture.cpp
  void mixture(const Pass& pass, std::size_t index);
  void route(const Pass& pass, std::size_t index, std::size_t t);
  void arrange(const Pass& pass, std::size_t index);
  void quantise_for_experts(const Pass& pass, std::size_t index, std::size_t t);
  void gate_experts(const Pass& pass, std::size_t index);
  const float* sum_of_experts(const Pass& pass, std::size_t index, std::size_t t);

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

  // latent.cpp
  void attend_latents(const Pass& pass, std::size_t index);
  void narrow(const Pass& pass, std::size_t index, std::size_t t);
  void keep_latent(const Pass& pass, std::size_t index, float* latent, float* rotated, std::size_t t);
  void absorb_query(const Pass& pass, std::size_t index, std::size_t head, std::size_t t);
  void attend_absorbed(const Pass& pass, std::size_t index, const QueryBlock& block);
  void expand(const Pass& pass, std::size_t index);
  void append_expanded(const Pass& pass, std::size_t index, std::size_t head, std::size_t t);
  void multiply_pieces(const Pass& pass, const Linear& l, const GroupInputs& x, std::size_t pieces, float* y);
  const float* latent_output(const Pass& pass, std::size_t index, std::size_t t);
};

// A pass as one thread sees it.
//
// Several tokens: a thread computes the vectors of its own tokens [first, last), in memory that all share, and waits
// before others read them. One token: every thread has a copy of the residual stream and of the quantised inputs, and
// computes both for itself, so that threads wait for each other six times a layer only (seven times where it has
// experts).
struct Pass : PassInput {
  std::size_t thread, team;
  bool replicated;  // one token
  std::size_t first, last;
  float* hidden;  // [n][hidden]
  GroupInputs *inputs, *expert_inputs;
  Routes* routes;

  // Part `thread` of n things, of whole vectors of 16: the same bits as all at once.
  std::size_t bound(std::size_t size, std::size_t part) const;
  // Others are about to read what this thread has computed of its own tokens.
  void publish() const;
};

}  // namespace tulle
