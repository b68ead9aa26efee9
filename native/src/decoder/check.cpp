// A decoder's sizes, before a kernel sees its arrays.
#include <initializer_list>
#include <numeric>
#include <utility>
#include <vector>

#include "cpu/buffer.hpp"
#include "tulle/engine.hpp"

namespace tulle {
namespace {

// 0 bits: no grid.
void check(const Grid& grid, int most) {
  require(grid.bits == 0 || (grid.bits >= 2 && grid.bits <= most), "bits of a grid, 2 to", static_cast<std::size_t>(most),
          static_cast<std::size_t>(grid.bits));
}

void check(const CausalConvolution& own) {
  require(own.channels > 0, "channels of a convolution", 1, 0);
  require(own.kernel >= 1 && own.kernel <= kMostTaps, "tokens of a convolution of 1, at most", kMostTaps, own.kernel);
  require(own.taps != nullptr, "taps of a convolution", 1, 0);
}

// Before numbers of floats are multiplied.
void check_state(std::size_t heads, std::size_t rows, std::size_t channels) {
  const double floats =
      static_cast<double>(heads) * static_cast<double>(rows) * static_cast<double>(channels + kStateLanes);
  require(floats < 0x1p44, "rows and channels of states that fit into memory, fewer than", rows, rows);
}

void check(const Mamba2& own) {
  require(own.heads > 0 && own.head_dim > 0 && own.groups > 0 && own.state > 0, "sizes of Mamba-2", 1, 0);
  require_equal("heads left over by groups", 0, own.heads % own.groups);
  check(own.convolution);
  require_equal("channels of Mamba-2's convolution", own.channels(), own.convolution.channels);
  const bool whole = own.decay != nullptr && own.step_bias != nullptr && own.skip != nullptr && own.norm.present();
  require(whole, "parameters of Mamba-2", 4, 0);
  check_state(own.heads, own.state, own.head_dim);
}

void check(const DeltaNet& net) {
  require(net.key_heads > 0 && net.key_dim > 0 && net.value_dim > 0, "sizes of a gated delta net", 1, 0);
  require_equal("value heads left over by key heads", 0, net.value_heads % net.key_heads);
  check(net.convolution);
  require_equal("channels of a delta net's convolution", net.channels(), net.convolution.channels);
  const bool whole = net.decay != nullptr && net.step_bias != nullptr;
  require(whole && net.norm.present(), "parameters of a gated delta net", 3, 0);
  check_state(net.value_heads, net.key_dim, net.value_dim);
}

// Sizes of latent attention by themselves.
void check(const LatentAttention& own, std::size_t heads) {
  require(own.rank > 0 && own.plain > 0 && own.rotary > 0 && own.value > 0, "sizes of latent attention", 1, 0);
  require(own.rotary % 2 == 0, "rotated channels of latent attention, an even number", own.rotary + 1, own.rotary);
  require(own.norm.present() && (own.query_rank == 0 || own.query_norm.present()), "norms of latent attention", 2, 1);
  if (!own.absorbed()) return;
  require(own.parts > 0 && own.rank % own.parts == 0, "parts of a latent, a divisor of", own.rank, own.parts);
  for (const Transform& t : own.transforms) require_equal("channels of a transform", own.rank, t.channels);
  check(own.grid, 8);
  tulle::check(own.selection, own.rank);
  require_equal("outputs of absorbed keys", heads * own.parts * own.tiled_part(), own.keys.weight.rows);
  require_equal("inputs of absorbed keys", own.plain, own.keys.weight.columns);
  require_equal("outputs of absorbed values", heads * own.tiled_value(), own.values.weight.rows);
  require_equal("inputs of absorbed values", own.rank, own.values.weight.columns);
  require(own.parts == 1 || own.factors != nullptr, "factors of absorbed keys", own.parts, 0);
  for (const Linear* l : {&own.keys, &own.values}) {
    require(!l->weight.input_major() && l->bias == nullptr, "absorbed linears in tiles without biases", 0, 1);
    require(l->selection.kind == Selection::Kind::none, "absorbed linears that see all inputs", 0, 1);
    check(l->input, 16);
    require(!l->weight.is_codes() || l->input.bits != 0, "bits of the inputs", 8, 0);
  }
}

}  // namespace

void check(const Transform& t) {
  using Kind = Transform::Kind;
  constexpr std::size_t kMost = std::size_t{1} << 24;  // so that products of two stay whole numbers
  require(t.channels >= 1 && t.channels <= kMost, "channels of a transform, at most", kMost, t.channels);
  const auto divides = [&](std::size_t part) {
    require(part > 0 && t.channels % part == 0, "block of a transform: a divisor of", t.channels, part);
  };
  std::size_t count = 0;
  switch (t.kind) {
    case Kind::diagonal: count = t.channels; break;
    case Kind::permutation: break;
    case Kind::hadamard: {
      divides(t.block);
      const bool whole = t.base > 0 && t.block % t.base == 0;
      const std::size_t run = whole ? t.block / t.base : 0;
      require(whole && (run & (run - 1)) == 0, "block of a Hadamard transform: base times a power of two", t.base,
              t.block);
      count = t.base > 1 ? t.base * t.base : 0;
      break;
    }
    case Kind::block_matrix:
      divides(t.block);
      count = t.block * (t.shared ? t.block : t.channels);
      break;
    case Kind::kronecker:
      divides(t.left);
      require_equal("right factor of a Kronecker transform", t.channels / t.left, t.right);
      count = t.left * t.left + t.right * t.right;
  }
  require_equal("numbers of a transform", count, t.numbers.size());
  require_equal("index of a transform", t.kind == Kind::permutation ? t.channels : 0, t.index.size());
  for (const std::int32_t value : t.index) {
    require(value >= 0 && static_cast<std::size_t>(value) < t.channels, "index of a permutation, below", t.channels,
            static_cast<std::size_t>(value));
  }
}

void check(const Model& m) {
  require(m.hidden > 0 && m.heads > 0 && m.vocabulary > 0, "sizes of the model", 1, 0);
  // Of what a layer keeps, and the table that rotates it.
  const auto check_heads = [&](std::size_t kv_heads, std::size_t head_dim, int rotary) {
    require(kv_heads > 0, "KV heads", 1, 0);
    require(head_dim > 0 && head_dim % 2 == 0, "an even head_dim", 2, head_dim);
    require_equal("query heads left over by KV heads", 0, m.heads % kv_heads);
    if (rotary < 0) return;
    const std::size_t frequencies = m.rotary[static_cast<std::size_t>(rotary)].frequencies.size();
    require(2 * frequencies <= head_dim, "frequencies, at most half of", head_dim, frequencies);
  };
  require(m.embedding.present() && m.norm.present(), "embedding and norm", 1, 0);
  const auto even_scales = [](std::size_t inputs, const LinearView& w) {
    require_equal("inputs left over by scales", 0, inputs % w.scales_per_row());
    const std::size_t real = inputs / w.scales_per_row(), room = w.segment * w.segments_per_scale;
    require(real <= room, "inputs per scale, at most", room, real);
  };
  const auto check_table = [&](const Table& table, std::size_t rows, std::size_t columns) {
    if (!table.present() || table.numbers != nullptr) return;
    const LinearView& w = table.codes;
    require(w.is_codes() && w.layout == Layout::tiles, "a table of codes in dense tiles", 1, 0);
    require(w.rows >= rows, "rows of a table, at least", rows, w.rows);
    require_equal("columns of a table", columns, w.columns);
    even_scales(columns, w);
  };
  for (const Table* table : {&m.embedding, &m.exact_head}) check_table(*table, m.vocabulary, m.hidden);
  check_table(m.layer_inputs.table, m.vocabulary * m.layers.size(), m.layer_inputs.width);
  require_equal("linears of the head", 1, m.head.linears.size());
  const auto fits = [&](const Group& group, std::size_t inputs, std::initializer_list<std::size_t> outputs) {
    // Input-major ones may be fused to one, its outputs one linear's behind another's.
    std::vector<std::size_t> wanted(outputs);
    if (group.linears.size() == 1) wanted = {std::accumulate(outputs.begin(), outputs.end(), std::size_t{0})};
    require_equal("linears of a group", wanted.size(), group.linears.size());
    for (const Transform& t : group.transforms) require_equal("channels of a transform", inputs, t.channels);
    std::size_t i = 0;
    for (std::size_t rows : wanted) {
      const Linear& linear = group.linears[i++];
      require_equal("inputs of a linear", inputs, linear.weight.columns);
      require_equal("outputs of a linear", rows, linear.weight.rows);
      tulle::check(linear.selection, inputs);
      check(linear.input, 16);
      if (!linear.weight.is_codes()) continue;
      require(linear.input.bits != 0, "bits of the inputs", 8, 0);
      even_scales(inputs, linear.weight);
    }
  };
  const auto check_router = [&](const Router& r, std::size_t experts, bool gate) {
    require(r.chosen >= 1 && r.chosen <= experts, "experts of a token of 1, at most", experts, r.chosen);
    require(r.groups >= 1 && experts % r.groups == 0, "equal groups of experts; a divisor of", experts, r.groups);
    require(r.chosen_groups >= 1 && r.chosen_groups <= r.groups, "chosen groups of 1, at most", r.groups,
            r.chosen_groups);
    const std::size_t own = experts / r.groups;
    require(r.group_best >= 1 && r.group_best <= own, "best experts of a group of 1, at most", own, r.group_best);
    require(r.chosen <= own * r.chosen_groups, "experts of a token, at most", own * r.chosen_groups, r.chosen);
    if (gate) fits(r.group, m.hidden, {experts, 1});
    else fits(r.group, m.hidden, {experts});
  };
  const auto check_feed_forward = [&](const FeedForward& f) {
    if (m.gated) fits(f.gate_up, m.hidden, {f.intermediate, f.intermediate});
    else fits(f.gate_up, m.hidden, {f.intermediate});
    fits(f.down, f.intermediate, {m.hidden});
  };
  const LayerInputs& own_inputs = m.layer_inputs;
  if (own_inputs.present()) {
    const std::size_t all = m.layers.size() * own_inputs.width;
    fits(own_inputs.projection, m.hidden, {all});
    require(own_inputs.norm.present() && own_inputs.table.present(), "norm and table of layers' inputs", 2, 0);
  }
  require(!m.output_gate || !m.norm_all_heads, "norms of all queries and keys beside an output gate", 0, 1);
  for (const Layer& layer : m.layers) {
    require(layer.rotary >= -1 && layer.rotary < static_cast<int>(m.rotary.size()), "rotary tables, fewer than",
            m.rotary.size(), static_cast<std::size_t>(layer.rotary));
    // What a pass runs without asking.
    const bool both = layer.query_norm.present() && layer.key_norm.present();
    require(layer.mixer != Mixer::attention || !m.norm_all_heads || both, "norms of all queries and keys", 2, 0);
    require(!m.parallel || layer.input_norm.present(), "a norm before attention and feed-forward side by side", 1, 0);
    const bool whole = layer.mixer != Mixer::none && (layer.mixture.present() || layer.feed_forward.present());
    require(!m.parallel || whole, "attention and feed-forward side by side", 2, 1);
    switch (layer.mixer) {
      case Mixer::attention: {
        const std::size_t q = m.heads * m.query_step(layer), kv = layer.kv_heads * layer.head_dim;
        check_heads(layer.kv_heads, layer.head_dim, layer.rotary);
        if (layer.kv_from < 0) {
          if (layer.value_is_key) fits(layer.qkv, m.hidden, {q, kv});
          else fits(layer.qkv, m.hidden, {q, kv, kv});
          break;
        }
        fits(layer.qkv, m.hidden, {q});
        const std::size_t from = static_cast<std::size_t>(layer.kv_from);
        const std::size_t index = static_cast<std::size_t>(&layer - m.layers.data());
        require(from < index, "keys and values of an earlier layer than", index, from);
        const Layer& source = m.layers[from];
        const bool keeps = source.mixer == Mixer::attention && source.kv_from < 0 && !m.norm_all_heads;
        require(keeps, "keys and values of a layer that keeps some", 1, 0);
        require_equal("KV heads of a layer that shares others'", source.kv_heads, layer.kv_heads);
        require_equal("head_dim of a layer that shares others' keys", source.head_dim, layer.head_dim);
        break;
      }
      case Mixer::delta_net: {
        const DeltaNet& net = layer.delta;
        check(net);
        const std::size_t values = net.values(), heads = net.value_heads;
        if (layer.qkv.linears.size() == 2) fits(layer.qkv, m.hidden, {net.channels() + values, 2 * heads});
        else fits(layer.qkv, m.hidden, {net.channels(), values, heads, heads});
        break;
      }
      case Mixer::short_convolution:
        check(layer.short_convolution.convolution);
        fits(layer.qkv, m.hidden, {3 * layer.short_convolution.convolution.channels});
        break;
      case Mixer::mamba2:
        check(layer.mamba);
        fits(layer.qkv, m.hidden, {layer.mamba.outputs()});
        break;
      case Mixer::latent: {
        const LatentAttention& own = layer.latent;
        const std::size_t queries = m.heads * own.query();
        check(own, m.heads);
        check_heads(m.kv_heads, m.head_dim, layer.rotary);
        fits(layer.qkv, m.hidden, {own.query_rank > 0 ? own.query_rank : queries, own.rank + own.rotary});
        if (own.query_rank > 0) fits(own.query_up, own.query_rank, {queries});
        if (!own.absorbed()) fits(own.kv_up, own.rank, {m.heads * (own.plain + own.value)});
        require_equal("KV heads of latent attention", own.absorbed() ? 1 : m.heads, m.kv_heads);
        require_equal("channels of keys", own.absorbed() ? own.rotary : own.query(), m.head_dim);
        require_equal("channels of values", own.absorbed() ? own.rank : own.value, m.value_dim);
        if (own.absorbed()) {
          for (const auto& [linear, inputs] : {std::pair{&own.keys, own.plain}, std::pair{&own.values, own.rank}}) {
            if (linear->weight.is_codes()) even_scales(inputs, linear->weight);
          }
          const bool plain = m.query.bits == 0 && m.key.bits == 0 && m.value.bits == 0 && m.head_rotations.empty();
          require(plain, "absorbed keys without quantisers of heads", 0, 1);
        }
        require(!m.output_gate && !m.norm_all_heads && m.position_length == 0 && m.attention_cap == 0 &&
                    m.attention_scale != 0 && layer.sinks == nullptr && layer.window == 0,
                "latent attention with a scale and nothing else", 0, 1);
        if (layer.rotary >= 0) {
          const std::size_t rotated = 2 * m.rotary[static_cast<std::size_t>(layer.rotary)].frequencies.size();
          require_equal("channels that are rotated", own.rotary, rotated);
        }
        break;
      }
      case Mixer::none: break;
    }
    if (layer.mixer != Mixer::none) fits(layer.o, m.mixer_sizes(layer).mixed, {m.hidden});
    require(layer.input_gate.present() == own_inputs.present(), "inputs of every layer's own, in all layers or none", 0, 1);
    if (layer.input_gate.present()) {
      require(!m.parallel, "layers' own inputs behind attention and feed-forward in turn", 1, 0);
      fits(layer.input_gate.gate, m.hidden, {own_inputs.width});
      fits(layer.input_gate.down, own_inputs.width, {m.hidden});
    }
    if (!layer.mixture.present()) {
      if (layer.feed_forward.present()) check_feed_forward(layer.feed_forward);
      continue;
    }
    require(!m.parallel && !layer.inner_norm.present(), "experts without norms of their own", 1, 0);
    require(layer.mixture.routed() >= 1, "experts, at least", 1, 0);
    check_router(layer.mixture.router, layer.mixture.routed(), layer.mixture.shared_gate);
    for (const FeedForward& expert : layer.mixture.experts) check_feed_forward(expert);
  }
  fits(m.head, m.hidden, {m.vocabulary});
  for (const Grid& grid : {m.query, m.key, m.value}) check(grid, 8);
}

}  // namespace tulle
