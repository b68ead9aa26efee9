// A decoder of the Llama family on the engine's linears: tokens in, logits out, keys and values kept.
#pragma once

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

struct Layer {
  const float *input_norm = nullptr, *post_norm = nullptr;   // [hidden]
  const float *query_norm = nullptr, *key_norm = nullptr;    // [head_dim] or null
  Group qkv, o, gate_up, down;
  std::size_t window = 0;  // tokens that attention reaches back, itself included; 0: all
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

struct Model {
  std::size_t hidden = 0, intermediate = 0, heads = 0, kv_heads = 0, head_dim = 0, vocabulary = 0;
  float eps = 0;
  Gate gate = Gate::silu;
  std::vector<float> inverse_frequencies;  // [head_dim / 2]
  float rope_scale = 1;                    // of cosines and sines
  Grid query{0, true, 1}, key{0, true, 1}, value{0, true, 1};
  Transform head_rotation;  // channels 0: none
  Table embedding;
  std::vector<Layer> layers;
  const float* norm = nullptr;
  Group head;
  // The head as it was stored, where `head` is a rougher copy; or not present.
  Table exact_head;
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
  // What a sequence carries beside its keys and values (see RecurrentStates). A decoder's carry nothing:
  // state_bytes() is 0, and these throw std::invalid_argument.
  void save_state(std::size_t slot, std::size_t snapshot);
  void load_state(std::size_t snapshot, std::size_t slot);
  std::uint64_t state_bytes() const { return 0; }

  std::uint64_t weight_bytes() const;  // read per token where all inputs are active
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
