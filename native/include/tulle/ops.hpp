// What the engine computes between its linears, on float32 vectors.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tulle/flash_attention.hpp"

namespace tulle {

// Tokens of a page. A page's keys are stored [key_dim][kKeyBlock], so that one query is multiplied with them as vectors.
constexpr std::size_t kKeyBlock = 16;
// Queries that share a pass over keys and values.
constexpr std::size_t kQueries = 4;

enum class CacheKind : std::uint8_t { f32, bf16, u8, u4 };
enum class Gate : std::uint8_t { silu, relu, relu2, gelu_tanh, xielu, quick_gelu, sigmoid };

// One layer's keys and values of one KV head, in pages of which a sequence has some.
//
//   keys     [key_dim][kKeyBlock]. u4: [⌈key_dim / 2⌉][kKeyBlock] bytes, of an even channel (low) and the next one
//   values   [kKeyBlock][value_dim]. u4: [kKeyBlock][⌈value_dim / 32⌉][16] bytes, of channel j (low) and 16 + j of 32
//   scales   u8, u4: [4][kKeyBlock]: key steps, key zero points, value steps, value zero points: x = step · (u − zero)
struct CacheView {
  CacheKind kind;
  std::size_t key_dim, value_dim;
  std::uint8_t *keys, *values;  // of page 0; those of page p lie p · (key_bytes, value_bytes) further
  float* scales;                // likewise, p · kPageScales
  std::size_t key_bytes, value_bytes;
  const std::int32_t* table;    // the sequence's pages: tokens [b · kKeyBlock, …) are in page table[b]
};

constexpr std::size_t kPageScales = 4 * kKeyBlock;

// A quantiser of one vector (docs/reference/format.md, "Quantised inputs").
struct Grid {
  int bits;  // 0: none
  bool symmetric;
  float clip;
};

// step, and the least and greatest whole number.
struct GridRange {
  float step, low, high;
};

// So many numbers are at least `value`.
struct TopKThreshold {
  float value;
  std::size_t count;
};

// Rows of a recurrent state are whole vectors of so many floats; behind the last channel are zeros.
constexpr std::size_t kStateLanes = 16;

// Tokens that one head of a gated delta net goes through, in order. All of a token lies `stride` floats behind that of
// the token before it in the pass; pointers are to those of the pass's first token.
struct DeltaTokens {
  const std::int32_t* tokens;  // [count], numbers within the pass
  std::size_t count, stride;
  const float *query, *key, *value, *decay, *beta;
  float* out;
  std::size_t out_stride;
};

// Tokens that one head of a state space model goes through, likewise. It forgets by e^(decay · step).
struct StateSpaceTokens {
  const std::int32_t* tokens;
  std::size_t count, stride;
  const float *c, *b, *x, *step;
  float decay, skip;
  float* out;
  std::size_t out_stride;
};

struct OpsKernels {
  void (*rms_norm)(const float* x, const float* gain, std::size_t n, float eps, float* y);
  void (*add)(float* x, const float* y, std::size_t n);
  // y[i] = x[i] · s[i]
  void (*scale)(const float* x, const float* s, std::size_t n, float* y);
  // out = act(gate) · up. xielu's numbers: α_p, α_n, β, ε; others have none.
  void (*gate)(Gate kind, const float* numbers, const float* gate, const float* up, std::size_t n, float* out);
  // What a gate with a limit reads: min(gate, limit), and up between −limit and limit, plus offset. Limit 0: none.
  void (*limit_gate)(const float* gate, const float* up, std::size_t n, float limit, float offset, float* gate_to,
                     float* up_to);
  GridRange (*range)(const float* x, std::size_t n, Grid grid);
  // clip(round(x / step)); with a low plane: whole = 256 · high + low.
  void (*quantise)(const float* x, std::size_t n, GridRange range, std::int8_t* high, std::int8_t* low);
  // x ← step · clip(round(x / step))
  void (*fake_quantise)(float* x, std::size_t n, GridRange range);
  std::int32_t (*sum)(const std::int8_t* x, std::size_t n);
  // Rotates pairs (x[i], x[i + n/2]) by angles with the given cosines and sines [n/2].
  void (*rope)(float* x, const float* cosine, const float* sine, std::size_t n);
  // The same of pairs (x[2i], x[2i + 1]).
  void (*rope_interleaved)(float* x, const float* cosine, const float* sine, std::size_t n);
  // y = x − mean of x
  void (*centre)(const float* x, std::size_t n, float* y);
  // x ← cap · tanh(x / cap)
  void (*soft_cap)(float* x, std::size_t n, float cap);
  // y [columns] += x [rows] · m [rows][columns]
  void (*vector_matrix)(const float* x, const float* m, std::size_t rows, std::size_t columns, float* y);
  // Σ x·w for w of bfloat16 bits, and of floats.
  float (*dot_bf16)(const float* x, const std::uint16_t* w, std::size_t n);
  float (*dot)(const float* x, const float* w, std::size_t n);
  // Sylvester butterflies over runs of n = 2^k, `count` runs in a row, times `factor`.
  void (*butterflies)(float* x, std::size_t n, std::size_t count, float factor);
  // Key and value of the token at `position` into the cache; ranges are of u8 and u4 caches.
  void (*append_to_cache)(const CacheView& cache, std::size_t position, const float* key, const float* value,
                   GridRange key_range, GridRange value_range);
  // out[r][value_dim] for up to kQueries rows: row r attends to positions [begin[r], end[r]). `latents` [rows][value_dim]:
  // what of the queries is multiplied with the values, which are keys, too (latent attention), or null. `scores`:
  // kQueries times the greatest end, rounded up to kKeyBlock. cap 0: none; otherwise scores s become cap · tanh(s / cap).
  // sinks [rows]: one more score of each row, which has no value; or null.
  void (*attend)(const CacheView& cache, std::size_t rows, const float* const* queries, const float* const* latents,
                 const std::size_t* begin, const std::size_t* end, float scale, float cap, const float* sinks,
                 float* const* out, float* scores);
  // y[i] = x[i] · s
  void (*scaled)(const float* x, float s, std::size_t n, float* y);
  // The threshold of the `keep` largest of size [n], all >= 0: exactly so many, or more where equal numbers force it.
  // `spare`: n + 16 floats.
  TopKThreshold (*top_k_threshold)(const float* size, std::size_t n, std::size_t keep, float* spare);
  // Of codes in one plane or (low not null) two, those that are not zero, with their indices counted from `first` on,
  // in order; returns how many. Writes up to 16 elements beyond.
  std::size_t (*nonzero)(const std::int8_t* high, const std::int8_t* low, std::size_t n, std::uint32_t first,
                         std::uint32_t* indices, std::int8_t* kept_high, std::int8_t* kept_low);
  // The same of n blocks of 4 codes, those of which one at least is not zero; writes nothing beyond n blocks.
  std::size_t (*nonzero_blocks4)(const std::int8_t* high, const std::int8_t* low, std::size_t n, std::uint32_t first,
                               std::uint32_t* indices, std::int8_t* kept_high, std::int8_t* kept_low);
  // y[i] = |x[i]|
  void (*absolute)(const float* x, std::size_t n, float* y);
  // x[i] ← 0 where size[i] < least
  void (*drop_below)(float* x, const float* size, std::size_t n, float least);
  // Of n units of `unit` elements of size, all >= 0, the largest, or the sum of squares.
  void (*unit_sizes)(const float* size, std::size_t n, std::size_t unit, bool norm, float* to);
  // drop_below for units: x [n · unit], size [n].
  void (*drop_units_below)(float* x, const float* size, std::size_t n, std::size_t unit, float least);
  // out[i] = f(bias[i] + Σ_k taps[k · stride + i] · inputs[k][i]), k < count; f is silu or nothing, and there may be no
  // bias; `out` may be the last of the inputs.
  void (*convolve)(const float* const* inputs, const float* taps, std::size_t stride, std::size_t count,
                   const float* bias, bool silu, std::size_t n, float* out);
  // state [key_dim][value_dim, rounded up]: u = β · (v − decay · Sᵀk), out = decay · Sᵀq + (k·q) · u, S ← decay · S + k·uᵀ,
  // token after token: the same bits in any cut.
  void (*delta_rule)(const DeltaTokens& x, std::size_t key_dim, std::size_t value_dim, float* state);
  // state [n][head_dim, rounded up]: H ← e^(decay · step) · H + b·(step · x)ᵀ, out = Hᵀc + skip · x, token after token: the
  // same bits in any cut.
  void (*state_space)(const StateSpaceTokens& x, std::size_t n, std::size_t head_dim, float* state);
  FlashKernel flash;  // null: the instruction set has no products of bfloat16
};

}  // namespace tulle
