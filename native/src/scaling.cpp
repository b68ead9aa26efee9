#include "tulle/scaling.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "buffer.hpp"
#include "pass.hpp"
#include "sharpen.hpp"
#include "team.hpp"
#include "tulle/dispatch.hpp"

namespace tulle {
namespace {

// Tokens before the current one that a convolution sees.
constexpr std::size_t kPast = 2;
constexpr std::size_t kTaps = kPast + 1;
// Inputs of a multiplicative layer that are taken at once: of E, so many rows stay in the level-2 cache while the
// modules meet them.
constexpr std::size_t kInputs = 512;

bool is_float(WeightKind kind) { return kind == WeightKind::f32 || kind == WeightKind::bf16; }

void fits(const Matrix& w, const char* what, std::size_t rows, std::size_t columns, bool codes) {
  require(w.values != nullptr, what, rows, 0);
  require_equal(what, rows, w.rows);
  require_equal(what, columns, w.columns);
  const bool known = is_float(w.kind) || (codes && w.kind == WeightKind::codes8);
  if (!known) throw std::invalid_argument(std::string(what) + ": expected another kind of numbers");
  if (w.kind != WeightKind::codes8) return;
  require(w.scales != nullptr, "scales of codes", rows, 0);
  require(columns <= kCodeInputs, "inputs of codes, at most", kCodeInputs, columns);
}

void fits(const Panels& b, const char* what, std::size_t inputs, std::size_t outputs) {
  require(b.values != nullptr, what, outputs, 0);
  require_equal(what, inputs, b.inputs);
  require_equal(what, outputs, b.outputs);
  if (!is_float(b.kind)) throw std::invalid_argument(std::string(what) + ": expected bf16 or f32");
}

void fits(const Multiplicative& w, const char* what, std::size_t inputs, std::size_t modules, std::size_t outputs) {
  require_equal(what, 0, outputs % modules);
  fits(w.d, what, modules, inputs, false);
  fits(w.e, what, inputs, outputs / modules);
}

// Of `count` equal things, where part `part` of `parts` begins; parts begin at multiples of `step`.
std::size_t begin_of(std::size_t count, std::size_t part, std::size_t parts, std::size_t step = 1) {
  return std::min(count, (count * part / parts + step - 1) / step * step);
}

void copy_row(WeightKind kind, const void* table, std::size_t row, std::size_t n, float* to) {
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

}  // namespace

void check(const ScalingModel& m) {
  require(m.hidden > 0 && m.intermediate > 0 && m.heads > 0 && m.vocabulary > 0, "sizes of the model, at least", 1, 0);
  require(m.intermediate <= static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max()), "d_ff, at most",
          static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max()), m.intermediate);
  require_equal("channels left over by heads", 0, m.hidden % m.heads);
  if (!m.inverse_frequencies.empty()) {
    require_equal("frequencies", m.head_dim() / 2, m.inverse_frequencies.size());
    require_equal("channels of a head left over by pairs", 0, m.head_dim() % 2);
  }
  if (m.modules > 0) require_equal("channels left over by modules", 0, m.hidden % m.modules);
  if (m.block > 0) require_equal("units left over by blocks", 0, m.intermediate % m.block);
  require(m.embedding != nullptr && m.norm != nullptr && is_float(m.embedding_kind), "embedding and norm", 2, 0);
  const std::size_t d = m.hidden, f = m.intermediate;
  for (const ScalingLayer& l : m.layers) {
    require(l.input_norm != nullptr && l.post_norm != nullptr, "norms of a layer", 2, 0);
    if (m.modules == 0) {
      for (const Projection* p : {&l.q, &l.k, &l.v, &l.o}) fits(p->weight, "a projection of attention", d, d, true);
    } else {
      const std::size_t size = m.module_size();
      fits(l.multiplicative, "the multiplicative layer", d, m.modules, d);
      fits(l.q_conv.weight, "the convolution of q", kTaps * 3 * size, size);
      fits(l.k_conv.weight, "the convolution of k", kTaps * 3 * size, size);
      fits(l.v_conv.weight, "the convolution of v", kTaps * size, size);
    }
    fits(l.w1.weight, "w1", f, d, true);
    if (m.block == 0) {
      fits(l.w2.weight, "w2", d, f, true);
    } else {
      fits(l.w2.weight, "w2", f, d, true);
      fits(l.c1, "c1", l.c1.rows, d, true);
      require(l.c1.rows > 0, "rank of the controller, at least", 1, 0);
      fits(l.c2, "c2", l.c1.rows, f);
      require(l.c2_bias != nullptr, "bias of the controller", f, 0);
    }
  }
  if (m.loss_modules > 0) {
    fits(m.loss, "the loss layer", d, m.loss_modules, m.vocabulary);
  } else {
    fits(m.head, "the head", m.vocabulary, d, true);
  }
  if (m.exact_head.rows > 0) fits(m.exact_head, "the exact head", m.vocabulary, d, false);
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

void ScalingEngine::State::run(const std::int32_t* tokens, const std::int32_t* slots_of, const std::int32_t* positions,
                               std::size_t n, const std::int32_t* rows, std::size_t wanted, float* logits) {
  const std::size_t d = model.hidden, f = model.intermediate;
  row_blocks.clear();
  for (std::size_t t = 0; t < n;) {
    std::size_t same = t + 1;
    while (same < n && same < t + kQueries && slots_of[same] == slots_of[t]) ++same;
    row_blocks.push_back({t, same - t});
    t = same;
  }
  in_team(threads, [&](std::size_t thread, std::size_t team) {
    Scratch& s = scratch[thread];
    const std::size_t from = begin_of(n, thread, team), to = begin_of(n, thread + 1, team);
    // This thread's modules of every token: (token, module) counted through.
    const auto each_modules = [&](const auto& act) {
      const std::size_t count = model.modules, last = begin_of(n * count, thread + 1, team);
      for (std::size_t i = begin_of(n * count, thread, team); i < last;) {
        const std::size_t t = i / count, end = std::min(last, (t + 1) * count);
        act(t, i - t * count, end - t * count);
        i = end;
      }
    };
    // One token's units are shared by the threads, of several tokens each thread has its own.
    const std::size_t shared = n == 1 && model.block > 0 ? team : 1;
    const auto add_parts = [&](std::size_t t) {
      float* x = hidden.data() + t * d;
      for (std::size_t i = 0; i < shared; ++i) ops.add(x, parts.data() + (t + i) * d, d);
    };
    const auto norm = [&](const float* gain, std::size_t t) {
      float* to_row = normed.data() + t * d;
      ops.rms_norm(hidden.data() + t * d, gain, d, model.eps, to_row);
      quantise(to_row, d, t);
    };

    for (std::size_t t = from; t < to; ++t) {
      begin(tokens, positions, t);
      if (!model.layers.empty()) norm(model.layers[0].input_norm, t);
    }
    wait();
    for (std::size_t index = 0; index < model.layers.size(); ++index) {
      const ScalingLayer& l = model.layers[index];
      if (model.modules == 0) {
        project(l.q, normed.data(), n, q.data(), thread, team);
        project(l.k, normed.data(), n, k.data(), thread, team);
        project(l.v, normed.data(), n, v.data(), thread, team);
      } else {
        each_modules([&](std::size_t t, std::size_t first, std::size_t last) { make_image(l, t, first, last, s); });
        wait();
        each_modules([&](std::size_t t, std::size_t first, std::size_t last) {
          convolve(l.q_conv, 3, index, t, first, last, s, q.data());
          convolve(l.k_conv, 3, index, t, first, last, s, k.data());
          convolve(l.v_conv, 1, index, t, first, last, s, v.data());
        });
      }
      wait();
      for (std::size_t head = thread; head < model.heads; head += team) {
        for (std::size_t t = 0; t < n; ++t) {
          place(index, head, t, static_cast<std::size_t>(slots_of[t]), static_cast<std::size_t>(positions[t]));
        }
        for (const Rows& block : row_blocks) attend(index, head, block, slots_of, positions, s);
      }
      wait();
      if (model.modules == 0) {
        if (l.o.weight.kind == WeightKind::codes8) {
          for (std::size_t t = from; t < to; ++t) quantise(attended.data() + t * d, d, t);
          wait();
        }
        project(l.o, attended.data(), n, output.data(), thread, team);
        wait();
      }
      for (std::size_t t = from; t < to; ++t) {
        ops.add(hidden.data() + t * d, (model.modules == 0 ? output : attended).data() + t * d, d);
        norm(l.post_norm, t);
        if (model.modules == 0 || !remembered[t]) continue;
        const std::size_t place_of = static_cast<std::size_t>(positions[t]) % kPast;
        const std::size_t slot = static_cast<std::size_t>(slots_of[t]);
        std::memcpy(past.data() + ((index * slots + slot) * kPast + place_of) * image, images.data() + t * image,
                    image * sizeof(float));
      }
      wait();
      if (model.block == 0) {
        project(l.w1, normed.data(), n, wide.data(), thread, team, true);
        wait();
        if (l.w2.weight.kind == WeightKind::codes8) {
          for (std::size_t t = from; t < to; ++t) quantise(wide.data() + t * f, f, t);
          wait();
        }
        project(l.w2, wide.data(), n, parts.data(), thread, team);
      } else {
        project({l.c1, nullptr}, normed.data(), n, ranks.data(), thread, team);
        wait();
        const std::size_t blocks = f / model.block;
        if (n == 1) {
          choose(l, 0, begin_of(blocks, thread, team), begin_of(blocks, thread + 1, team), parts.data() + thread * d, s);
          if (thread == 0 && l.w2.bias != nullptr) ops.add(parts.data(), l.w2.bias, d);
        } else {
          for (std::size_t t = from; t < to; ++t) {
            choose(l, t, 0, blocks, parts.data() + t * d, s);
            if (l.w2.bias != nullptr) ops.add(parts.data() + t * d, l.w2.bias, d);
          }
        }
      }
      wait();
      for (std::size_t t = from; t < to; ++t) {
        add_parts(t);
        if (index + 1 < model.layers.size()) norm(model.layers[index + 1].input_norm, t);
      }
      wait();
    }
    for (std::size_t i = begin_of(wanted, thread, team); i < begin_of(wanted, thread + 1, team); ++i) {
      float* to_row = normed.data() + i * d;
      ops.rms_norm(hidden.data() + static_cast<std::size_t>(rows[i]) * d, model.norm, d, model.eps, to_row);
      quantise(to_row, d, i);
    }
    wait();
    if (model.loss_modules == 0) {
      if (wanted > 0) project({model.head, nullptr}, normed.data(), wanted, logits, thread, team);
    } else {
      const std::size_t size = model.vocabulary / model.loss_modules, panels = model.loss.e.panels();
      const std::size_t first = begin_of(panels, thread, team), last = begin_of(panels, thread + 1, team);
      const std::size_t stride = (last - first) * kPanel, real = std::min(stride, size - std::min(size, first * kPanel));
      for (std::size_t i = 0; i < wanted && first < last; ++i) {
        multiply(model.loss, normed.data() + i * d, 0, model.loss_modules, first, last, s, s.modules.data());
        for (std::size_t m = 0; m < model.loss_modules; ++m) {
          std::memcpy(logits + i * model.vocabulary + m * size + first * kPanel, s.modules.data() + m * stride,
                      real * sizeof(float));
        }
      }
    }
    if (model.exact_head.rows > 0) {
      wait();
      for (std::size_t i = begin_of(wanted, thread, team); i < begin_of(wanted, thread + 1, team); ++i) {
        sharpen(normed.data() + i * d, logits + i * model.vocabulary);
      }
    }
  });
}

ScalingEngine::ScalingEngine(ScalingModel model, std::size_t slots, std::size_t context, std::size_t batch,
                             CacheKind cache, std::size_t threads) {
  check(model);
  state_ = std::make_unique<State>(std::move(model), slots, context, batch, cache, threads);
}

ScalingEngine::~ScalingEngine() = default;

void ScalingEngine::forward(const std::int32_t* tokens, const std::int32_t* slots, const std::int32_t* positions,
                            std::size_t n, const std::int32_t* rows, std::size_t wanted, float* logits) {
  State& s = *state_;
  check_pass({s.model.vocabulary, s.slots, s.context, s.batch}, tokens, slots, positions, n, rows, wanted);
  if (s.model.modules > 0) s.find_past(slots, positions, n);
  const std::uint64_t before = units_skipped();
  s.run(tokens, slots, positions, n, rows, wanted, logits);
  if (n == 1) {
    ++s.single_tokens;
    s.single_skipped += units_skipped() - before;
  }
  if (s.model.modules == 0) return;
  for (std::size_t t = 0; t < n; ++t) {
    s.next[static_cast<std::size_t>(slots[t])] = static_cast<std::size_t>(positions[t]) + 1;
  }
}

std::uint64_t ScalingEngine::weight_bytes() const {
  const ScalingModel& m = state_->model;
  std::uint64_t bytes = m.loss_modules > 0 ? m.loss.bytes() : m.head.bytes();
  for (const ScalingLayer& l : m.layers) {
    if (m.modules == 0) {
      for (const Projection* p : {&l.q, &l.k, &l.v, &l.o}) bytes += p->weight.bytes();
    } else {
      bytes += l.multiplicative.bytes();
      for (const Convolution* c : {&l.q_conv, &l.k_conv, &l.v_conv}) bytes += c->weight.bytes();
    }
    const std::uint64_t units = l.w1.weight.bytes() + l.w2.weight.bytes();
    if (m.block == 0) bytes += units;
    else bytes += units / m.block + l.c1.bytes() + l.c2.bytes() + m.intermediate * sizeof(float);
  }
  return bytes;
}

std::uint64_t ScalingEngine::cache_bytes() const {
  const State& s = *state_;
  return s.keys.bytes() + s.values.bytes() + s.cache_scales.bytes() + s.past.bytes();
}

std::uint64_t ScalingEngine::work_bytes() const {
  const State& s = *state_;
  std::uint64_t bytes = s.codes.bytes() + s.sums.bytes();
  for (const Buffer<float>* b : {&s.hidden, &s.normed, &s.q, &s.k, &s.v, &s.attended, &s.output, &s.wide, &s.ranks,
                                 &s.parts, &s.cosines, &s.sines, &s.images, &s.nothing, &s.steps}) {
    bytes += b->bytes();
  }
  for (const State::Scratch& t : s.scratch) {
    for (const Buffer<float>* b : {&t.scores, &t.scaled, &t.modules, &t.logits, &t.active}) bytes += b->bytes();
    bytes += t.units.bytes();
  }
  return bytes;
}

std::size_t ScalingEngine::vocabulary() const { return state_->model.vocabulary; }

Engine::Reads ScalingEngine::take_reads() {
  State& s = *state_;
  double skipped = 0;
  if (s.single_skipped > 0) {
    // Only sparse feed-forwards skip, and all layers' rows are of one size.
    const Matrix& w = s.model.layers[0].w2.weight;
    skipped = static_cast<double>(s.single_skipped) * static_cast<double>(w.bytes()) / static_cast<double>(w.rows);
  }
  Engine::Reads found{};
  found.bytes = static_cast<double>(s.single_tokens) * static_cast<double>(weight_bytes()) - skipped;
  found.tokens = s.single_tokens;
  s.single_tokens = s.single_skipped = 0;
  return found;
}

std::uint64_t ScalingEngine::units_read() const {
  std::uint64_t count = 0;
  for (const State::Scratch& t : state_->scratch) count += t.read;
  return count;
}

std::uint64_t ScalingEngine::units_skipped() const {
  std::uint64_t count = 0;
  for (const State::Scratch& t : state_->scratch) count += t.skipped;
  return count;
}

}  // namespace tulle
