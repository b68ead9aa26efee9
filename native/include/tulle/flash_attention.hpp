// Softmax attention over whole sequences in bfloat16, block by block with an online softmax (Dao et al. 2022,
// "FlashAttention", algorithm 1; Milakov & Gimelshein 2018): scores never stand in memory. Causal; blocks of keys that
// no query of a block sees are left out.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tulle {

// Queries that a kernel treats together, and keys of one block of theirs.
constexpr std::size_t kFlashQueries = 6, kFlashKeys = 128;

// One head's queries against one KV head, packed. A word holds two neighbouring bfloat16.
struct FlashTile {
  std::size_t rows;                             // queries, 1 to kFlashQueries
  const std::uint32_t* queries[kFlashQueries];  // [words of head_dim] each; beyond `rows` any
  std::uint16_t* out[kFlashQueries];            // [head_dim]
  std::size_t position;  // of the first query; it sees keys position - window + 1 ... position
  std::size_t window;
  std::size_t head_dim;
  // [blocks][half of a block][head_dim / 2][kFlashKeys / 2]: two channels of a key in a word.
  const std::uint32_t* keys;
  // [blocks][kFlashKeys / 2][head_dim]: a channel of two keys in a word.
  const std::uint32_t* values;
  float scale;
};
typedef void (*FlashKernel)(const FlashTile& tile);

// A tensor [batch, heads, tokens, head_dim] whose channels lie side by side; strides in elements.
template <typename T>
struct Sequences {
  T* data;
  std::size_t batch, heads, tokens;

  T* at(std::size_t b, std::size_t h, std::size_t t) const { return data + b * batch + h * heads + t * tokens; }
};

struct FlashAttention {
  std::size_t batch, heads, kv_heads, tokens, head_dim;  // heads: a multiple of kv_heads; head_dim: of 16
  std::size_t window;                                    // >= 1; `tokens` or more: all
  float scale;
  Sequences<const std::uint16_t> q, k, v;
  Sequences<std::uint16_t> out;
};

constexpr std::size_t kFlashChannels = 256;  // the widest head

// The result does not depend on the number of threads.
void flash_attention(FlashKernel kernel, const FlashAttention& attention, std::size_t threads);

}  // namespace tulle
