#include "scaling/state.hpp"

#include <utility>

namespace tulle {
namespace {

// Floats of a token's modules, with a module of zeros on either side.
std::size_t image_of(const ScalingModel& m) { return m.modules > 0 ? (m.modules + 2) * m.module_size() : 0; }

bool any_codes(const ScalingModel& m) {
  const auto codes = [](const Matrix& w) { return w.kind == WeightKind::codes8; };
  for (const ScalingLayer& l : m.layers) {
    for (const Matrix* w : {&l.q.weight, &l.k.weight, &l.v.weight, &l.o.weight, &l.w1.weight, &l.w2.weight, &l.c1}) {
      if (codes(*w)) return true;
    }
  }
  return codes(m.head);
}

}  // namespace

ScalingEngine::State::State(ScalingModel m, const EngineSizes& s)
    : model(std::move(m)), sizes(checked(s)), table_width(round_up(sizes.context, kKeyBlock) / kKeyBlock),
      threads(std::max<std::size_t>(sizes.threads, 1)),
      kernels(*active_isa().scaling), ops(*active_isa().ops),
      cache(sizes.cache, std::vector<KvSizes>(model.layers.size(), {model.heads, model.head_dim(), model.head_dim()}),
            sizes.pages), check(model.vocabulary, sizes),
      rotary(sizes.batch, model.inverse_frequencies, 1.0f),
      attention(model.heads, model.heads, model.head_dim(), sizes.batch),
      states(sizes.slots, sizes.snapshots, ConvolutionPast::floats(model.layers.size(), image_of(model))),
      past(states, sizes.slots, sizes.batch, image_of(model)) {
  const std::size_t batch = sizes.batch;
  const std::size_t d = model.hidden, f = model.intermediate;
  std::size_t rank = 0;
  for (const ScalingLayer& l : model.layers) rank = std::max(rank, l.c1.rows);
  for (Buffer<float>* b : {&hidden, &normed, &q, &k, &v, &attended, &output}) *b = Buffer<float>(batch * d);
  if (model.block == 0) wide = Buffer<float>(batch * f);
  ranks = Buffer<float>(batch * rank);
  partials = Buffer<float>(std::max(batch, threads) * d);
  if (any_codes(model)) {
    code_stride = round_up(std::max(d, model.block == 0 ? f : d), kAlignment);
    codes = Buffer<std::int8_t>(batch * code_stride);
    steps = Buffer<float>(batch);
    sums = Buffer<std::int32_t>(batch);
  }
  const std::size_t columns = model.modules > 0 ? round_up(model.module_size(), kPanel) : 0;
  const std::size_t loss_columns = model.loss_modules > 0 ? model.loss.e.panels() * kPanel : 0;
  for (std::size_t t = 0; t < threads; ++t) {
    ScalingScratch own;
    own.scores = Buffer<float>(kQueries * table_width * kKeyBlock);
    own.scaled = Buffer<float>(std::max(model.modules, model.loss_modules) * kInputs);
    own.modules = Buffer<float>(std::max(model.modules * columns, model.loss_modules * loss_columns));
    if (model.block > 0) {
      own.part = Buffer<float>(d);
      own.logits = Buffer<float>(round_up(f, kPanel) + kPanel);
      own.active = Buffer<float>(f / model.block);
      own.units = Buffer<std::int32_t>(f / model.block);
    }
    scratch.push_back(std::move(own));
  }
}

std::uint64_t ScalingEngine::State::work_bytes() const {
  std::uint64_t bytes = codes.bytes() + sums.bytes() + rotary.bytes() + past.work_bytes();
  for (const Buffer<float>* b :
       {&hidden, &normed, &q, &k, &v, &attended, &output, &wide, &ranks, &partials, &steps}) {
    bytes += b->bytes();
  }
  for (const ScalingScratch& t : scratch) {
    for (const Buffer<float>* b : {&t.scores, &t.scaled, &t.modules, &t.logits, &t.active, &t.part}) bytes += b->bytes();
    bytes += t.units.bytes();
  }
  return bytes;
}

}  // namespace tulle
