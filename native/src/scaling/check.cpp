// A Scaling Transformer's arrays, before a kernel sees them.
#include <limits>
#include <stdexcept>
#include <string>

#include "cpu/buffer.hpp"
#include "tulle/scaling.hpp"

namespace tulle {
namespace {

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

}  // namespace tulle
