// What a Scaling Transformer's pass works with, and the parts of a layer; scaling.cpp puts them together.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/buffer.hpp"
#include "decoder/pass.hpp"
#include "decoder/top_logits.hpp"
#include "cpu/team.hpp"
#include "tulle/dispatch.hpp"
#include "tulle/scaling.hpp"

namespace tulle {

// Inputs of a multiplicative layer that are taken at once: of E, so many rows stay in the level-2 cache while the
// modules meet them.
constexpr std::size_t kInputs = 512;

// Of `count` equal things, where part `part` of `parts` begins; parts begin at multiples of `step`.
inline std::size_t begin_of(std::size_t count, std::size_t part, std::size_t parts, std::size_t step = 1) {
  return std::min(count, (count * part / parts + step - 1) / step * step);
}

inline void copy_row(WeightKind kind, const void* table, std::size_t row, std::size_t n, float* to) {
  if (kind == WeightKind::f32) {
    std::memcpy(to, static_cast<const float*>(table) + row * n, n * sizeof(float));
    return;
  }
  const std::uint16_t* from = static_cast<const std::uint16_t*>(table) + row * n;
  for (std::size_t i = 0; i < n; ++i) {
    const std::uint32_t bits = static_cast<std::uint32_t>(from[i]) << 16;
    std::memcpy(to + i, &bits, sizeof bits);
  }
}

struct ScalingEngine::State {
  ScalingModel model;
  std::size_t slots, context, batch, threads;
  CacheKind cache_kind;
  const ScalingKernels& kernels;
  const OpsKernels& ops;
  std::size_t rank = 0, image = 0;  // floats of a token's modules, with a module of zeros on either side
  bool codes_needed = false;

  Buffer<float> hidden, normed, q, k, v, attended, output, wide, ranks, parts, cosines, sines;
  Buffer<float> images;  // of the multiplicative layer's outputs, [batch][image]
  Buffer<float> past;    // the same of the last two tokens, [layer][slot][kPast][image]: position p at p % kPast
  Buffer<float> nothing; // the same of tokens before the first
  Buffer<std::int8_t> codes;
  Buffer<float> steps;
  Buffer<std::int32_t> sums;
  Buffer<std::uint8_t> keys, values;
  Buffer<float> cache_scales;
  std::size_t code_stride = 0;

  struct Scratch {
    Buffer<float> scores, scaled, modules, logits, active;
    Buffer<std::int32_t> units;
    std::uint64_t read = 0, skipped = 0;
  };
  std::vector<Scratch> scratch;  // per thread

  // Passes of one token since they were last asked for, and the units that these skipped.
  std::uint64_t single_tokens = 0, single_skipped = 0;

  // The next position of every sequence, if its convolutions remember.
  std::vector<std::size_t> next;
  // Of every token of a pass and the kPast before it: whose image it is. Oldest first.
  struct Origin {
    enum { before, passed, here } kind;
    std::size_t index;  // here: the token; passed: the place in `past`
  };
  std::vector<Origin> origins;        // [batch][kPast]
  std::vector<std::size_t> last_of;   // [slots]: one more than the last token of it in this pass so far
  std::vector<bool> remembered;       // [batch]: one of the last kPast of its sequence

  // Queries that share a pass over keys and values: of one sequence, `count` tokens from `first` on.
  struct Rows {
    std::size_t first, count;
  };
  std::vector<Rows> row_blocks;

  State(ScalingModel m, std::size_t slots_, std::size_t context_, std::size_t batch_, CacheKind kind,
        std::size_t threads_)
      : model(std::move(m)), slots(slots_), context(round_up(context_, kKeyBlock)), batch(batch_),
        threads(std::max<std::size_t>(threads_, 1)), cache_kind(kind), kernels(*active_isa().scaling),
        ops(*active_isa().ops) {
    require(slots >= 1 && context_ >= 1 && batch >= 1, "slots, context and batch of at least", 1, 0);
    const std::size_t d = model.hidden, f = model.intermediate;
    for (const ScalingLayer& l : model.layers) {
      rank = std::max(rank, l.c1.rows);
      for (const Matrix* w : {&l.q.weight, &l.k.weight, &l.v.weight, &l.o.weight, &l.w1.weight, &l.w2.weight, &l.c1}) {
        codes_needed = codes_needed || w->kind == WeightKind::codes8;
      }
    }
    codes_needed = codes_needed || model.head.kind == WeightKind::codes8;
    hidden = Buffer<float>(batch * d);
    normed = Buffer<float>(batch * d);
    for (Buffer<float>* b : {&q, &k, &v, &attended, &output}) *b = Buffer<float>(batch * d);
    if (model.block == 0) wide = Buffer<float>(batch * f);
    ranks = Buffer<float>(batch * rank);
    parts = Buffer<float>(std::max(batch, threads) * d);
    if (codes_needed) {
      code_stride = round_up(std::max(d, model.block == 0 ? f : d), kAlignment);
      codes = Buffer<std::int8_t>(batch * code_stride);
      steps = Buffer<float>(batch);
      sums = Buffer<std::int32_t>(batch);
    }
    cosines = Buffer<float>(batch * model.head_dim() / 2);
    sines = Buffer<float>(batch * model.head_dim() / 2);
    if (model.modules > 0) {
      image = (model.modules + 2) * model.module_size();
      images = Buffer<float>(batch * image);
      past = Buffer<float>(model.layers.size() * slots * kPast * image);
      nothing = Buffer<float>(image);
      next.assign(slots, 0);
      origins.resize(batch * kPast);
      last_of.resize(slots);
      remembered.resize(batch);
    }
    const std::size_t heads = model.layers.size() * slots * model.heads;
    keys = Buffer<std::uint8_t>(heads * context * model.head_dim() * item_bytes(kind));
    values = Buffer<std::uint8_t>(heads * context * model.head_dim() * item_bytes(kind));
    if (kind == CacheKind::u8) cache_scales = Buffer<float>(heads * context * 4);
    const std::size_t columns = model.modules > 0 ? round_up(model.module_size(), kPanel) : 0;
    const std::size_t loss_columns = model.loss_modules > 0 ? model.loss.e.panels() * kPanel : 0;
    for (std::size_t t = 0; t < threads; ++t) {
      Scratch s;
      s.scores = Buffer<float>(kQueries * context);
      s.scaled = Buffer<float>(std::max(model.modules, model.loss_modules) * kInputs);
      s.modules = Buffer<float>(std::max(model.modules * columns, model.loss_modules * loss_columns));
      if (model.block > 0) {
        s.logits = Buffer<float>(round_up(f, kPanel) + kPanel);
        s.active = Buffer<float>(f / model.block);
        s.units = Buffer<std::int32_t>(f / model.block);
      }
      scratch.push_back(std::move(s));
    }
    row_blocks.reserve(batch);
  }

  CacheView cache(std::size_t layer, std::size_t slot, std::size_t head) const {
    const std::size_t index = ((layer * slots + slot) * model.heads + head) * context;
    const std::size_t bytes = index * model.head_dim() * item_bytes(cache_kind);
    return {cache_kind, model.head_dim(), keys.data() + bytes, values.data() + bytes,
            cache_kind == CacheKind::u8 ? cache_scales.data() + index * 4 : nullptr};
  }

  // Inputs of token t for weights of codes: 8 bits, one step per token.
  void quantise(const float* x, std::size_t n, std::size_t t) {
    if (!codes_needed) return;
    const GridRange range = ops.range(x, n, {8, true, 1.0f});
    std::int8_t* to = codes.data() + t * code_stride;
    ops.quantise(x, n, range, to, nullptr);
    steps.data()[t] = range.step;
    sums.data()[t] = ops.sum(to, n);
  }

  RowInputs inputs_of(const Matrix& w, const float* x, std::size_t tokens) const {
    if (w.kind != WeightKind::codes8) return {tokens, w.columns, x, nullptr, nullptr, nullptr};
    return {tokens, code_stride, nullptr, codes.data(), steps.data(), sums.data()};
  }

  // This thread's rows of y [n][rows] = x·Wᵀ + bias; x [n][columns].
  void project(const Projection& p, const float* x, std::size_t n, float* y, std::size_t thread, std::size_t team,
               bool relu = false) {
    const Matrix& w = p.weight;
    const std::size_t first = begin_of(w.rows, thread, team, 4), last = begin_of(w.rows, thread + 1, team, 4);
    if (first == last) return;
    kernels.rows(w, first, last, inputs_of(w, x, n), y, w.rows);
    for (std::size_t t = 0; t < n; ++t) {
      float* row = y + t * w.rows;
      if (p.bias != nullptr) ops.add(row + first, p.bias + first, last - first);
      if (!relu) continue;
      for (std::size_t i = first; i < last; ++i) row[i] = row[i] > 0 ? row[i] : 0;
    }
  }

  // c [modules [first, last)][panels [from, to) · kPanel] of the multiplicative layer, for one token.
  void multiply(const Multiplicative& w, const float* x, std::size_t first, std::size_t last, std::size_t from,
                std::size_t to, Scratch& s, float* c) {
    const std::size_t stride = (to - from) * kPanel, inputs = w.d.columns;
    std::memset(c, 0, (last - first) * stride * sizeof(float));
    for (std::size_t begin = 0; begin < inputs; begin += kInputs) {
      const std::size_t end = std::min(inputs, begin + kInputs);
      for (std::size_t m = first; m < last; ++m) {
        kernels.scaled(w.d, m, begin, end, x, s.scaled.data() + (m - first) * kInputs);
      }
      kernels.panels(w.e, from, to, begin, end, s.scaled.data(), kInputs, last - first, c, stride);
    }
  }

  // Modules [first, last) of token t's image.
  void make_image(const ScalingLayer& l, std::size_t t, std::size_t first, std::size_t last, Scratch& s) {
    const std::size_t size = model.module_size(), stride = l.multiplicative.e.panels() * kPanel;
    multiply(l.multiplicative, normed.data() + t * model.hidden, first, last, 0, l.multiplicative.e.panels(), s,
             s.modules.data());
    for (std::size_t m = first; m < last; ++m) {
      float* to = images.data() + t * image + (m + 1) * size;
      std::memcpy(to, s.modules.data() + (m - first) * stride, size * sizeof(float));
      if (l.multiplicative.bias != nullptr) ops.add(to, l.multiplicative.bias + m * size, size);
    }
  }

  const float* image_of(std::size_t layer, Origin o) const {
    if (o.kind == Origin::here) return images.data() + o.index * image;
    if (o.kind == Origin::passed) return past.data() + (layer * slots * kPast + o.index) * image;
    return nothing.data();
  }

  // Modules [first, last) of y for token t. `width`: modules that the convolution sees side by side.
  void convolve(const Convolution& conv, std::size_t width, std::size_t layer, std::size_t t, std::size_t first,
                std::size_t last, Scratch& s, float* y) {
    const std::size_t size = model.module_size(), stride = conv.weight.panels() * kPanel, inputs = width * size;
    float* c = s.modules.data();
    std::memset(c, 0, (last - first) * stride * sizeof(float));
    for (std::size_t tap = 0; tap < kTaps; ++tap) {
      const float* from = tap < kPast ? image_of(layer, origins[t * kPast + tap]) : images.data() + t * image;
      // Neighbouring modules overlap: a row begins `size` after the one before.
      from += (first + (width == 1 ? 1 : 0)) * size;
      kernels.panels(conv.weight, 0, conv.weight.panels(), tap * inputs, (tap + 1) * inputs, from, size, last - first,
                     c, stride);
    }
    for (std::size_t m = first; m < last; ++m) {
      float* to = y + t * model.hidden + m * size;
      std::memcpy(to, c + (m - first) * stride, size * sizeof(float));
      if (conv.bias != nullptr) ops.add(to, conv.bias, size);
    }
  }

  // Blocks [first, last) of the sparse feed-forward for token t, added to `part`.
  void choose(const ScalingLayer& l, std::size_t t, std::size_t first, std::size_t last, float* part, Scratch& s) {
    const std::size_t d = model.hidden, block = model.block, begin = first * block, end = last * block;
    const std::size_t from = begin / kPanel, to = (end + kPanel - 1) / kPanel;
    float* logits = s.logits.data();
    std::memset(logits, 0, (to - from) * kPanel * sizeof(float));
    kernels.panels(l.c2, from, to, 0, l.c1.rows, ranks.data() + t * l.c1.rows, l.c1.rows, 1, logits, 0);
    logits += begin - from * kPanel;
    ops.add(logits, l.c2_bias + begin, end - begin);
    kernels.argmax(logits, last - first, block, static_cast<std::int32_t>(begin), s.units.data());
    RowInputs x = inputs_of(l.w1.weight, normed.data(), 1);
    kernels.chosen(l.w1.weight, s.units.data(), last - first, x, t, s.active.data());
    std::size_t kept = 0;
    for (std::size_t i = 0; i < last - first; ++i) {
      if (!(s.active.data()[i] > 0)) continue;
      s.active.data()[kept] = s.active.data()[i];
      s.units.data()[kept++] = s.units.data()[i];
    }
    s.read += kept;
    s.skipped += last - first - kept;
    std::memset(part, 0, d * sizeof(float));
    kernels.add_rows(l.w2.weight, s.units.data(), s.active.data(), kept, part);
  }

  void begin(const std::int32_t* tokens, const std::int32_t* positions, std::size_t t) {
    copy_row(model.embedding_kind, model.embedding, static_cast<std::size_t>(tokens[t]), model.hidden,
             hidden.data() + t * model.hidden);
    const std::size_t half = model.inverse_frequencies.size();
    for (std::size_t i = 0; i < half; ++i) {
      const float angle = static_cast<float>(positions[t]) * model.inverse_frequencies[i];
      cosines.data()[t * half + i] = std::cos(angle);
      sines.data()[t * half + i] = std::sin(angle);
    }
  }

  // Key and value of head `head` of token t into the cache, the query to its position.
  void place(std::size_t layer, std::size_t head, std::size_t t, std::size_t slot, std::size_t position) {
    const std::size_t n = model.head_dim(), at = t * model.hidden + head * n, half = model.inverse_frequencies.size();
    float *query = q.data() + at, *key = k.data() + at, *value = v.data() + at;
    if (half > 0) {
      ops.rope(query, cosines.data() + t * half, sines.data() + t * half, n);
      ops.rope(key, cosines.data() + t * half, sines.data() + t * half, n);
    }
    GridRange key_range{}, value_range{};
    if (cache_kind == CacheKind::u8) {
      key_range = ops.range(key, n, {8, false, 1.0f});
      value_range = ops.range(value, n, {8, false, 1.0f});
    }
    ops.remember(cache(layer, slot, head), position, key, value, key_range, value_range);
  }

  void attend(std::size_t layer, std::size_t head, const Rows& rows, const std::int32_t* slots_of,
              const std::int32_t* positions, Scratch& s) {
    const float* queries[kQueries];
    float* out[kQueries];
    std::size_t first[kQueries], last[kQueries];
    for (std::size_t r = 0; r < rows.count; ++r) {
      const std::size_t t = rows.first + r, at = t * model.hidden + head * model.head_dim();
      queries[r] = q.data() + at;
      out[r] = attended.data() + at;
      first[r] = 0;
      last[r] = static_cast<std::size_t>(positions[t]) + 1;
    }
    const CacheView view = cache(layer, static_cast<std::size_t>(slots_of[rows.first]), head);
    ops.attend(view, rows.count, queries, first, last, 1.0f / std::sqrt(static_cast<float>(model.head_dim())), out,
               s.scores.data());
  }

  // Where the convolutions find the tokens before each one. Throws where a sequence goes on from somewhere else.
  void find_past(const std::int32_t* slots_of, const std::int32_t* positions, std::size_t n) {
    std::fill(last_of.begin(), last_of.end(), 0);
    for (std::size_t t = 0; t < n; ++t) {
      const std::size_t slot = static_cast<std::size_t>(slots_of[t]), position = static_cast<std::size_t>(positions[t]);
      const std::size_t before = last_of[slot];
      const std::size_t expected = before > 0 ? static_cast<std::size_t>(positions[before - 1]) + 1 : next[slot];
      if (position != expected && (position != 0 || before > 0)) {
        throw std::invalid_argument("position of sequence " + std::to_string(slot) + ": expected " +
                                    std::to_string(expected) + " or a start at 0, found " + std::to_string(position) +
                                    "; the convolutions remember the two tokens before alone");
      }
      for (std::size_t tap = 0; tap < kPast; ++tap) {
        const std::size_t back = kPast - tap;
        Origin& o = origins[t * kPast + tap];
        if (position < back) o = {Origin::before, 0};
        else if (before > 0 && back == 1) o = {Origin::here, before - 1};
        // The token before has found its own past.
        else if (before > 0) o = origins[(before - 1) * kPast + tap + 1];
        else o = {Origin::passed, slot * kPast + (position - back) % kPast};
      }
      last_of[slot] = t + 1;
    }
    // From the end: the last kPast of each sequence.
    std::fill(last_of.begin(), last_of.end(), 0);
    for (std::size_t t = n; t-- > 0;) remembered[t] = last_of[static_cast<std::size_t>(slots_of[t])]++ < kPast;
  }

  // Computes the largest logits again, from the exact head; x: the normed hidden state.
  void sharpen(const float* x, float* logits) const {
    const Matrix& w = model.exact_head;
    tulle::sharpen(logits, model.vocabulary, [&](std::size_t i) {
      float found = 0;
      const std::int32_t row = static_cast<std::int32_t>(i);
      kernels.chosen(w, &row, 1, inputs_of(w, x, 1), 0, &found);
      return found;
    });
  }

  void run(const std::int32_t* tokens, const std::int32_t* slots_of, const std::int32_t* positions, std::size_t n,
           const std::int32_t* rows, std::size_t wanted, float* logits);
};

}  // namespace tulle
