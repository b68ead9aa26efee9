// A Scaling Transformer (docs/guide/scaling-transformers.md): tokens in, logits out. Each part of it is
// dense or sparse; of a sparse feed-forward, one token reads the controller and the rows of the chosen units alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "tulle/engine.hpp"
#include "tulle/linear.hpp"
#include "tulle/ops.hpp"

namespace tulle {

// Outputs that lie side by side in Panels.
constexpr std::size_t kPanel = 16;
// Inputs of a matrix of codes, at most: sums of 255 · 127 stay within 32 bits.
constexpr std::size_t kCodeInputs = 65536;

// Tokens before the current one that a convolution sees, and all that it sees.
constexpr std::size_t kPast = 2;
constexpr std::size_t kTaps = kPast + 1;

// A matrix row by row, read a row at a time.
struct Matrix {
  WeightKind kind = WeightKind::f32;  // f32, bf16, codes8
  std::size_t rows = 0, columns = 0;
  const void* values = nullptr;       // [rows][columns]; codes8: weight = scale · (code − 128)
  const float* scales = nullptr;      // codes8: [rows]

  std::size_t row_bytes() const {
    return columns * (kind == WeightKind::f32 ? 4 : kind == WeightKind::bf16 ? 2 : 1);
  }
  std::uint64_t bytes() const { return rows * (row_bytes() + (scales != nullptr ? 4 : 0)); }
};

// A matrix B [inputs][outputs] for few outputs or few inputs: kPanel outputs are one vector, no sum runs across it.
struct Panels {
  WeightKind kind = WeightKind::f32;  // f32, bf16
  std::size_t inputs = 0, outputs = 0;
  const void* values = nullptr;       // [panels()][inputs][kPanel], zeros beyond the outputs

  std::size_t panels() const { return (outputs + kPanel - 1) / kPanel; }
  std::uint64_t bytes() const { return panels() * kPanel * inputs * (kind == WeightKind::f32 ? 4 : 2); }
};

// Tokens' inputs of a Matrix: floats for one of floats, whole numbers (x̂ = step · code) for one of codes.
struct RowInputs {
  std::size_t tokens, stride;  // elements from one token to the next
  bool one_order;              // sums of one token in the order of several's
  const float* floats;
  const std::int8_t* codes;
  const float* steps;          // [tokens]
  const std::int32_t* sums;    // [tokens], Σ of a token's codes
};

struct ScalingKernels {
  // y[t · y_stride + r] = W[r]·x[t] for rows [first, last).
  void (*rows)(const Matrix& w, std::size_t first, std::size_t last, const RowInputs& x, float* y,
               std::size_t y_stride);
  // y[i] = W[chosen[i]]·x[token]
  void (*chosen)(const Matrix& w, const std::int32_t* chosen, std::size_t count, const RowInputs& x, std::size_t token,
                 float* y);
  // y [columns] += Σ_i factors[i]·W[chosen[i]]
  void (*add_rows)(const Matrix& w, const std::int32_t* chosen, const float* factors, std::size_t count, float* y);
  // c[r · c_stride + j] += Σ_k a[r · a_stride + k]·B[from + k][first · kPanel + j], for panels [first, last), inputs
  // [from, to) and `rows` rows.
  void (*panels)(const Panels& b, std::size_t first, std::size_t last, std::size_t from, std::size_t to, const float* a,
                 std::size_t a_stride, std::size_t rows, float* c, std::size_t c_stride);
  // y[i] = x[from + i]·W[row][from + i] for i < to − from; W of floats.
  void (*scaled)(const Matrix& w, std::size_t row, std::size_t from, std::size_t to, const float* x, float* y);
  // units[b] = unit + b · block + the first of the largest of x[b · block …]; 0 for NaN alone
  void (*argmax)(const float* x, std::size_t blocks, std::size_t block, std::int32_t unit, std::int32_t* units);
};

// y = W·x + bias
struct Projection {
  Matrix weight;
  const float* bias = nullptr;  // [rows] or null
};

// y[s, m] = Σ_i x_i·D[s, i]·E[m, i] (+ bias)
struct Multiplicative {
  Matrix d;                     // [S][inputs]
  Panels e;                     // Eᵀ: inputs × M
  const float* bias = nullptr;  // [S · M] or null

  std::uint64_t bytes() const { return d.bytes() + e.bytes(); }
};

// Over (length × modules), causal: inputs are [3 tokens, the oldest first][1 or 3 modules][M], outputs M.
struct Convolution {
  Panels weight;
  const float* bias = nullptr;  // [M] or null
};

struct ScalingLayer {
  const float *input_norm = nullptr, *post_norm = nullptr;  // [hidden]
  // Dense attention.
  Projection q, k, v, o;
  // Sparse attention.
  Multiplicative multiplicative;
  Convolution q_conv, k_conv, v_conv;
  // Feed-forward. Dense: w1 [intermediate][hidden], w2 [hidden][intermediate]; sparse: both [intermediate][hidden].
  Projection w1, w2;
  // Controller of the sparse one.
  Matrix c1;       // [rank][hidden]
  Panels c2;       // rank × intermediate
  const float* c2_bias = nullptr;  // [intermediate]
};

struct ScalingModel {
  std::size_t hidden = 0, intermediate = 0, heads = 0, vocabulary = 0;
  std::size_t modules = 0;       // S of attention; 0: dense
  std::size_t block = 0;         // N of the feed-forward; 0: dense
  std::size_t loss_modules = 0;  // S of the head; 0: dense
  float eps = 0;
  std::vector<float> inverse_frequencies;  // [head_dim / 2], or none: no position embedding
  WeightKind embedding_kind = WeightKind::f32;
  const void* embedding = nullptr;         // [vocabulary][hidden] in f32 or bf16
  std::vector<ScalingLayer> layers;
  const float* norm = nullptr;             // [hidden]
  Matrix head;
  Multiplicative loss;
  // The head as it was stored, [vocabulary][hidden], where `head` is a rougher copy; no rows: none.
  Matrix exact_head;

  std::size_t head_dim() const { return hidden / heads; }
  std::size_t module_size() const { return hidden / modules; }
};

// Throws std::invalid_argument, one line, where sizes do not fit each other.
void check(const ScalingModel& model);

class ScalingEngine {
 public:
  // As of Engine (engine.hpp).
  ScalingEngine(ScalingModel model, const EngineSizes& sizes);
  ~ScalingEngine();

  // As of Engine. With sparse attention a sequence begins at position 0, or goes on where it was or where a state was
  // saved that has been loaded: the convolutions keep the two tokens before.
  void forward(const PassInput& pass, float* logits);
  void embed(const PassInput& pass, float* hidden);
  void copy_page(std::size_t source, std::size_t target);
  // The state of a slot's sequence, to go on from it later, in any slot. Without sparse attention there is none:
  // state_bytes() is 0, and these throw std::invalid_argument.
  void save_state(std::size_t slot, std::size_t snapshot);
  void load_state(std::size_t snapshot, std::size_t slot);
  std::uint64_t state_bytes() const;  // of one

  // Read per token, if no chosen unit is at zero.
  std::uint64_t weight_bytes() const;
  std::uint64_t page_bytes() const;
  std::uint64_t cache_bytes() const;
  std::uint64_t work_bytes() const;
  std::size_t vocabulary() const;
  std::size_t hidden() const;
  const EngineSizes& sizes() const;
  // As Engine::take_reads: rows of w2 that relu's zeros left out are not counted.
  Engine::Reads take_reads();
  // Chosen units so far whose row of w2 was read, and whose was not, since relu gave zero.
  std::uint64_t units_read() const;
  std::uint64_t units_skipped() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace tulle
