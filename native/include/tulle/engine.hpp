// A decoder on the engine's linears: tokens in, logits out, keys and values kept.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "tulle/linear.hpp"
#include "tulle/ops.hpp"
#include "tulle/pass.hpp"
#include "tulle/selection.hpp"

namespace tulle {

// x ↦ x·T of docs/reference/format.md, "Transforms", in front of linears that share an input.
struct Transform {
  enum class Kind : std::uint8_t { diagonal, permutation, hadamard, block_matrix, kronecker } kind;
  std::size_t channels = 0;
  std::size_t block = 0;                  // hadamard, block_matrix
  bool shared = false;                    // block_matrix
  std::size_t left = 0, right = 0;        // kronecker
  std::size_t base = 0;                   // hadamard: order of the factor that is no power of two
  std::vector<float> numbers;             // scale; matrix; left transposed, then right; the base's ±1 [base][base]
  std::vector<std::int32_t> index;        // permutation

  // y [channels] = x·T; y does not overlap x; `work`: `channels` floats.
  void run(const OpsKernels& ops, const float* x, float* y, float* work) const;
};

struct Linear {
  LinearView weight{};
  const float* bias = nullptr;  // [rows]
  Grid input{0, true, 1.0f};    // bits 0: floats; 16: what the model leaves unquantised, for codes
  Selection selection;          // after a grid of the model, before one of the engine's own
  bool engine_grid = false;        // the grid is the engine's

  // Bytes that one token reads, all inputs being active; and of these, what every input adds where weights are
  // input-major.
  std::uint64_t bytes() const;
  double bytes_per_input() const;
};

// Linears that share an input.
struct Group {
  std::vector<Transform> transforms;
  std::vector<Linear> linears;
};

// y = x / √(mean x² + eps) · gain + bias, the mean of x taken off before where it is `centred`.
struct Norm {
  const float *gain = nullptr, *bias = nullptr;
  float eps = 0;
  bool centred = false;

  bool present() const { return gain != nullptr; }
  // y may be x.
  void run(const OpsKernels& ops, const float* x, std::size_t n, float* y) const;
};

constexpr std::size_t kMostTaps = 16;

// A causal convolution along the tokens that keeps channels apart.
struct CausalConvolution {
  std::size_t channels = 0;
  std::size_t kernel = 0;       // tokens that an output sees, its own included; at most kMostTaps
  const float* taps = nullptr;  // [kernel][channels], the oldest token first
  const float* bias = nullptr;  // [channels], or none
  bool silu = false;            // of the sums

  std::size_t history() const { return (kernel - 1) * channels; }  // floats of a sequence, [kernel − 1][channels]
};

// Rows of a state are whole vectors.
inline std::size_t state_row(std::size_t channels) { return (channels + kStateLanes - 1) / kStateLanes * kStateLanes; }

// Linear attention by the gated delta rule (src/tulle/core/delta_rule.py). Behind the linears' queries, keys and values,
// which are convolved, come a gate z for every value channel, and b and a for every value head: β = σ(b),
// g = decay · softplus(a + step_bias).
struct DeltaNet {
  std::size_t key_heads = 0, value_heads = 0, key_dim = 0, value_dim = 0;
  CausalConvolution convolution;
  const float *decay = nullptr, *step_bias = nullptr;  // [value_heads]
  Norm norm;                           // of a head's outputs, [value_dim]

  std::size_t keys() const { return key_heads * key_dim; }
  std::size_t values() const { return value_heads * value_dim; }
  std::size_t channels() const { return 2 * keys() + values(); }
  std::size_t outputs() const { return channels() + values() + 2 * value_heads; }
  // Of a sequence's state [value_heads][key_dim][row], in floats; behind it the convolution's history.
  std::size_t row() const { return state_row(value_dim); }
  std::size_t matrices() const { return value_heads * key_dim * row(); }
};

// LFM2's mixer: of the linear's outputs [B | C | x] of every token, C ⊙ conv(B ⊙ x).
struct ShortConvolution {
  CausalConvolution convolution;
};

// Mamba-2 (src/tulle/core/state_space.py). The linear's outputs are [z | x, B, C | Δ]: a gate, what is convolved, and a
// step per head, softplus(Δ + step_bias) between `least` and `most`.
struct Mamba2 {
  std::size_t heads = 0, head_dim = 0, groups = 0, state = 0;  // state: channels of B and of C in a group of heads
  CausalConvolution convolution;
  const float *decay = nullptr, *step_bias = nullptr, *skip = nullptr;  // [heads]; decay: −e^A, skip: D
  float least = 0, most = 0;
  Norm norm;  // of the gated outputs, in `groups` equal parts, [width]

  std::size_t width() const { return heads * head_dim; }
  std::size_t shared() const { return groups * state; }
  std::size_t channels() const { return width() + 2 * shared(); }
  std::size_t outputs() const { return width() + channels() + heads; }
  // Of a sequence's state [heads][state][row], in floats; behind it the convolution's history.
  std::size_t row() const { return state_row(head_dim); }
  std::size_t matrices() const { return heads * state * row(); }
};

// Latent attention (DeepSeek-AI 2024, section 2.1). The first linears give [queries, or the narrow vector that they come
// of | latent | what of a key is rotated, for all heads]. A linear kv_up gives the heads' keys and values of a latent.
//
// *Absorbed*, latents are kept as values and what is rotated as key: since q·(W_k·c) = (W_kᵀ·q)·c, queries are
// multiplied with W_kᵀ, and what a head's weights make of latents with W_v. So all heads share one small key and value.
// *Expanded*, which quantisers of heads' keys need, each head has a key [plain | rotated] and a value of its own.
struct LatentAttention {
  std::size_t query_rank = 0;  // of the narrow vector; 0: the first linears give the queries
  std::size_t rank = 0;        // of latents
  std::size_t plain = 0, rotary = 0, value = 0;  // channels of a head: of queries and keys, of values
  Norm query_norm, norm;       // of narrow vectors [query_rank], of latents [rank]
  Group query_up;              // where there is a narrow vector
  Group kv_up;                 // expanded
  // Absorbed: what kv_up would read of a latent is what is kept.
  std::vector<Transform> transforms;
  Grid grid{0, true, 1.0f};
  Selection selection;
  // W_kᵀ of plain channels, [head][part][rank / parts], and W_v of latents, [head][value]; the last size of both in
  // whole tiles. A part is what shares a scale in a row of W_k: queries are multiplied with it before.
  Linear keys, values;
  std::size_t parts = 1;
  const float* factors = nullptr;  // [head][part][plain], or null

  bool absorbed() const { return kv_up.linears.empty(); }
  std::size_t query() const { return plain + rotary; }  // of a head
  std::size_t tiled_part() const { return (rank / parts + kTileRows - 1) / kTileRows * kTileRows; }
  std::size_t tiled_value() const { return (value + kTileRows - 1) / kTileRows * kTileRows; }
};

// down(act(gate) · up), or down(act(up)): of a layer, or an expert.
struct FeedForward {
  std::size_t intermediate = 0;
  Group gate_up, down;

  bool present() const { return intermediate > 0; }
};

// Gives every token `chosen` experts with a weight each (src/tulle/models/routing.py).
struct Router {
  enum class Score : std::uint8_t { softmax, sigmoid } score = Score::softmax;
  Group group;  // to scores of experts, and, where the shared one has a gate, by a second linear to that
  std::size_t chosen = 0;
  bool normalise = false;  // weights are made to sum to 1
  float scale = 1;         // of weights
  const float* correction = nullptr;  // [experts], added to scores for choosing
  const float* expert_scales = nullptr;  // [experts], of weights, the last; or null
  Norm norm;  // [hidden], of the stream, where it does not read what the shared expert does
  // Equal groups of experts, of which `chosen_groups` are eligible by the sum of their `group_best` best scores.
  std::size_t groups = 1, chosen_groups = 1, group_best = 1;
};

// Σ of what a token's chosen experts give, weighted; and of what a shared one gives to every token, by σ of its gate.
struct Mixture {
  Router router;
  std::vector<FeedForward> experts;  // the shared one last
  bool shared = false, shared_gate = false;
  Norm expert_norm;                  // [hidden], of the stream, where routed experts do not read what the shared one does
  Norm shared_after, experts_after;  // [hidden], of what the shared expert gives, and of the sum of the others

  bool present() const { return !experts.empty(); }
  std::size_t routed() const { return experts.size() - (shared ? 1 : 0); }
  std::size_t per_token() const { return router.chosen + (shared ? 1 : 0); }
};

// What a layer does, behind its feed-forward, with an input p of its own of every token: x + norm(down(act(gate(x)) · p)).
struct InputGate {
  Group gate, down;
  Norm norm;  // [hidden]

  bool present() const { return norm.present(); }
};

// What mixes tokens in a layer. A kind that carries a state from token to token has floats of it in every sequence's
// record (RecurrentStates); attention has keys and values instead. A layer may be a feed-forward alone, or a mixer alone.
enum class Mixer : std::uint8_t { attention, delta_net, short_convolution, mamba2, none, latent };

struct Layer {
  Mixer mixer = Mixer::attention;
  // Of the mixer that it is.
  DeltaNet delta;
  ShortConvolution short_convolution;
  Mamba2 mamba;
  LatentAttention latent;
  // Before attention and feed-forward, and on their outputs; any of them may be missing.
  Norm input_norm, post_norm, attention_after, feed_forward_after;  // [hidden]
  Norm query_norm, key_norm;  // [head_dim], or of all heads at once
  Norm value_norm;            // [head_dim]
  Norm output_norm;           // of what o reads, [heads · head_dim]; attention's
  Norm inner_norm;            // of what down reads, [intermediate]
  Group qkv, o;
  FeedForward feed_forward;   // of a layer without
  Mixture mixture;
  InputGate input_gate;       // of a model whose layers have inputs of their own
  float output_scale = 1;     // of the stream behind the layer
  // Attention's. KV heads of head_dim channels each, as queries have; those of an earlier layer, or of its own (−1).
  std::size_t kv_heads = 0, head_dim = 0;
  int kv_from = -1;
  bool value_is_key = false;  // there are no linears for values: keys are, before their norm and position
  const float* sinks = nullptr;  // [heads], scores that take part in the softmax and have no value; or null
  std::size_t window = 0;  // tokens that attention reaches back, itself included; 0: all
  int rotary = 0;          // number of a table of the model; −1: queries and keys know no position
  float activation[4] = {};  // numbers of Gate::xielu
};

// Of a layer's mixer, in floats.
struct MixerSizes {
  std::size_t outputs;  // of qkv
  std::size_t mixed;    // inputs of o
  std::size_t state;    // in a sequence's record
  std::size_t vector;   // the longest that a thread works on, beside `mixed`
};

// Frequencies of rotary position embeddings, of the first 2 · size channels of a head.
struct Rotary {
  std::vector<float> frequencies;
  float scale = 1;           // of cosines and sines
  bool interleaved = false;  // channels 2i and 2i + 1 are rotated together, not i and i + size
};

// Embedding or head row by row, [vocabulary][hidden]: numbers, or the codes of a linear in dense tiles.
struct Table {
  const void* numbers = nullptr;
  WeightKind kind = WeightKind::f32;  // of the numbers, f32 or bf16
  LinearView codes{};                 // where there are no numbers

  bool present() const { return numbers != nullptr || codes.values != nullptr; }
  // x [hidden]. Of codes scale · (code − zero point) + minimum, in floats; on every instruction set the same bits.
  void copy_row(std::size_t row, std::size_t hidden, float* x) const;
};

// Gives every layer an input of its own of each token: of the embedding h, scaled, and the token's row of a table, which
// has a part for every layer, p = (norm(P·h / √hidden) + √width · part) / √2.
struct LayerInputs {
  std::size_t width = 0;  // of a layer's input; 0: layers have none
  Table table;            // [vocabulary · layer][width]
  Group projection;       // P, [layer · width][hidden]
  Norm norm;              // [width]

  bool present() const { return width > 0; }
};

struct Model {
  std::size_t hidden = 0, heads = 0, vocabulary = 0;
  std::size_t kv_heads = 0, head_dim = 0;  // of what latent attention keeps; attention's layers have their own
  Gate gate = Gate::silu;
  bool gated = true;           // a feed-forward of down(act(gate) · up), not of down(act(up))
  float gate_limit = 0;        // gate is at most this, and up at most this far from 0; 0: none
  float up_offset = 0;         // added to up
  bool parallel = false;       // attention and feed-forward read the same stream
  float residual_scale = 1;    // of what is added to the stream
  float embedding_scale = 1, logit_scale = 1;
  float logit_cap = 0;         // c of logits c · tanh(l / c); 0: none
  float attention_scale = 0;   // of q·k
  float attention_cap = 0;     // likewise
  bool output_gate = false;    // behind every query head come as many channels whose σ multiplies its output
  bool norm_all_heads = false, norm_after_rotary = false;  // of queries and keys
  std::size_t value_dim = 0;   // of the values that latent attention keeps
  // A query at position p is multiplied by 1 + beta · ln(1 + ⌊p / length⌋); length 0: by 1.
  float position_beta = 0;
  std::int32_t position_length = 0;
  std::vector<Rotary> rotary;
  Grid query{0, true, 1}, key{0, true, 1}, value{0, true, 1};
  std::vector<Transform> head_rotations;  // of the quantisers, one for each size of heads that is rotated
  Table embedding;
  LayerInputs layer_inputs;
  std::vector<Layer> layers;
  Norm norm;
  Group head;
  // The head as it was stored, where `head` is a rougher copy; or not present.
  Table exact_head;

  // Channels from one query head of `qkv` to the next.
  std::size_t query_step(const Layer& layer) const { return output_gate ? 2 * layer.head_dim : layer.head_dim; }
  // Of queries and keys of so many channels; null: none.
  const Transform* head_rotation(std::size_t channels) const {
    for (const Transform& t : head_rotations) {
      if (t.channels == channels) return &t;
    }
    return nullptr;
  }
  MixerSizes mixer_sizes(const Layer& layer) const {
    switch (layer.mixer) {
      case Mixer::attention: break;
      case Mixer::none: return {0, 0, 0, 0};
      case Mixer::delta_net: {
        const DeltaNet& net = layer.delta;
        return {net.outputs(), net.values(), net.matrices() + net.convolution.history(),
                (net.convolution.kernel - 1) * std::max(net.key_dim, net.value_dim)};
      }
      case Mixer::short_convolution: {
        const CausalConvolution& own = layer.short_convolution.convolution;
        return {3 * own.channels, own.channels, own.history(), own.history()};
      }
      case Mixer::mamba2: {
        const Mamba2& own = layer.mamba;
        return {own.outputs(), own.width(), own.matrices() + own.convolution.history(),
                (own.convolution.kernel - 1) * std::max(own.head_dim, own.state)};
      }
      case Mixer::latent: {
        const LatentAttention& own = layer.latent;
        const std::size_t queries = own.query_rank > 0 ? own.query_rank : heads * own.query();
        return {queries + own.rank + own.rotary, heads * own.value, 0, std::max({own.query_rank, own.rank, own.query()})};
      }
    }
    const std::size_t kv = layer.kv_heads * layer.head_dim;
    const std::size_t kept = layer.kv_from >= 0 ? 0 : layer.value_is_key ? kv : 2 * kv;
    return {heads * query_step(layer) + kept, heads * layer.head_dim, 0, kv};
  }
};

// Of every row of logits, so many of the largest are computed again from the exact head: what is chosen from them is
// then chosen as from the head that was stored.
constexpr std::size_t kExactLogits = 64;

// Throws std::invalid_argument where sizes do not fit each other, or a transform its numbers.
void check(const Transform& transform);
void check(const Model& model);

// Threads may share one: a call waits until another's is done.
class Engine {
 public:
  Engine(Model model, const EngineSizes& sizes);
  ~Engine();

  // logits [wanted][vocabulary]. Throws std::invalid_argument on anything out of range (see PassCheck).
  void forward(const PassInput& pass, float* logits);
  // The hidden states after the last norm instead, [wanted][hidden].
  void embed(const PassInput& pass, float* hidden);
  // Page `target` becomes what page `source` is, in all layers.
  void copy_page(std::size_t source, std::size_t target);
  // What a sequence carries beside its keys and values (see RecurrentStates). Where all layers are attention that is
  // nothing: state_bytes() is 0, and the others throw std::invalid_argument.
  void save_state(std::size_t slot, std::size_t snapshot);
  void load_state(std::size_t snapshot, std::size_t slot);
  std::uint64_t state_bytes() const;

  // Read per token where all inputs are active; of experts as many as a token has, of mean size.
  std::uint64_t weight_bytes() const;
  // What single tokens (passes of one token) have read, inputs left out not counted, and how many there were, since the
  // last call.
  struct Reads {
    double bytes;
    std::uint64_t tokens;
  };
  Reads take_reads();
  std::uint64_t page_bytes() const;
  std::uint64_t cache_bytes() const;  // of all pages, and of recurrent states with their snapshots
  std::uint64_t work_bytes() const;
  std::size_t vocabulary() const;
  std::size_t hidden() const;
  const EngineSizes& sizes() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace tulle
