// Attention over pages against sums in double, for every kind of cache and instruction set, on heap buffers of exactly
// their size: under the address sanitizer a read or write past an end aborts. And what a pass is checked for.
#include <cmath>
#include <cstring>
#include <random>

#include "decoder/kv_cache.hpp"
#include "decoder/pass.hpp"
#include "decoder/recurrent_states.hpp"
#include "support.hpp"
#include "tulle/dispatch.hpp"

namespace {

using tulle::CacheKind;
using tulle::kKeyBlock;

constexpr std::size_t kPages = 9;

void fail(const char* isa, const char* what, std::size_t kind, std::size_t d) {
  ++failures;
  std::printf("FAILED %s %s, cache %zu, head_dim %zu\n", isa, what, kind, d);
}

std::vector<float> normal(std::size_t n, std::mt19937& rng) {
  std::normal_distribution<float> draw;
  std::vector<float> found(n);
  for (float& x : found) x = draw(rng);
  return found;
}

// What a cache keeps of x: what it is told to quantise to, or x rounded to bfloat16.
std::vector<float> kept(const tulle::OpsKernels& ops, CacheKind kind, std::vector<float> x, const tulle::Grid& grid) {
  if (kind == CacheKind::bf16) {
    for (float& one : x) {
      std::uint32_t bits;
      std::memcpy(&bits, &one, 4);
      bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
      std::memcpy(&one, &bits, 4);
    }
  } else if (kind != CacheKind::f32) {
    ops.fake_quantise(x.data(), x.size(), ops.range(x.data(), x.size(), grid));
  }
  return x;
}

// Keys of `dk` channels, values of `d`, which are multiplied with queries, too, where they are latents.
void attention_case(const tulle::Isa& isa, CacheKind kind, std::size_t dk, std::size_t d, bool latent,
                    std::size_t tokens, std::size_t window, std::mt19937& rng) {
  const tulle::OpsKernels& ops = *isa.ops;
  // The sizes of a page, from a cache of one page; its memory is not used.
  const tulle::CacheView sizes = tulle::KvCache(kind, {{1, dk, d}}, 1).view(0, 0, nullptr);
  const bool codes = kind == CacheKind::u8 || kind == CacheKind::u4;
  // What a page held before is of no account, NaN not either.
  const auto keys = exact(std::vector<std::uint8_t>(kPages * sizes.key_bytes, 0xff));
  const auto values = exact(std::vector<std::uint8_t>(kPages * sizes.value_bytes, 0xff));
  const auto scales = exact(std::vector<float>(codes ? kPages * tulle::kPageScales : 0, std::nanf("")));
  std::vector<std::int32_t> order = {5, 0, 8, 3, 7, 1, 2, 6, 4};
  order.resize((tokens + kKeyBlock - 1) / kKeyBlock);
  const auto table = exact(order);
  const tulle::CacheView view{kind, dk, d, keys.get(), values.get(), codes ? scales.get() : nullptr,
                              sizes.key_bytes, sizes.value_bytes, table.get()};
  const tulle::Grid grid{kind == CacheKind::u4 ? 4 : 8, false, 1.0f};
  std::vector<std::vector<float>> key, value;
  for (std::size_t t = 0; t < tokens; ++t) {
    const auto k = exact(normal(dk, rng)), v = exact(normal(d, rng));
    key.push_back(kept(ops, kind, {k.get(), k.get() + dk}, grid));
    value.push_back(kept(ops, kind, {v.get(), v.get() + d}, grid));
    ops.append_to_cache(view, t, k.get(), v.get(), ops.range(k.get(), dk, grid), ops.range(v.get(), d, grid));
  }
  for (std::size_t rows = 1; rows <= tulle::kQueries; ++rows) {
    std::vector<std::unique_ptr<float[]>> queries, outputs, of_latents;
    const float *from[tulle::kQueries], *latents[tulle::kQueries];
    float* to[tulle::kQueries];
    std::size_t begin[tulle::kQueries], end[tulle::kQueries];
    for (std::size_t r = 0; r < rows; ++r) {
      queries.push_back(exact(normal(dk, rng)));
      of_latents.push_back(exact(normal(d, rng)));
      latents[r] = of_latents[r].get();
      outputs.push_back(exact(std::vector<float>(d)));
      from[r] = queries[r].get();
      to[r] = outputs[r].get();
      end[r] = r + 1 == rows ? tokens : 1 + rng() % tokens;
      begin[r] = window != 0 && end[r] > window ? end[r] - window : 0;
    }
    const auto scores = exact(std::vector<float>(tulle::kQueries * order.size() * kKeyBlock));
    const float factor = 1.0f / std::sqrt(static_cast<float>(latent ? dk + d : dk));
    const float* const* const wide = latent ? latents : nullptr;
    ops.attend(view, rows, from, wide, begin, end, factor, 0, nullptr, to, scores.get());
    for (std::size_t r = 0; r < rows; ++r) {
      std::vector<double> p(tokens, 0.0);
      double total = 0;
      for (std::size_t t = begin[r]; t < end[r]; ++t) {
        double score = 0;
        for (std::size_t i = 0; i < dk; ++i) score += static_cast<double>(from[r][i]) * static_cast<double>(key[t][i]);
        for (std::size_t i = 0; latent && i < d; ++i) {
          score += static_cast<double>(latents[r][i]) * static_cast<double>(value[t][i]);
        }
        p[t] = std::exp(score * static_cast<double>(factor));
        total += p[t];
      }
      for (std::size_t i = 0; i < d; ++i) {
        double sum = 0;
        for (std::size_t t = 0; t < tokens; ++t) sum += p[t] / total * static_cast<double>(value[t][i]);
        // Weights and sums in 24 bits; codes are summed with their zero points.
        if (!(std::abs(static_cast<double>(to[r][i]) - sum) < 2e-5)) {
          return fail(isa.name, "attention", static_cast<std::size_t>(kind), d);
        }
      }
      // The same bits alone.
      const auto alone = exact(std::vector<float>(d));
      float* const only = alone.get();
      ops.attend(view, 1, from + r, latent ? latents + r : nullptr, begin + r, end + r, factor, 0, nullptr, &only, scores.get());
      if (std::memcmp(only, to[r], d * sizeof(float)) != 0) {
        return fail(isa.name, "attention of a row alone", static_cast<std::size_t>(kind), d);
      }
    }
  }
}

void copies(CacheKind kind) {
  // Layers of different sizes.
  const std::vector<tulle::KvSizes> layers = {{3, 10, 10}, {1, 34, 18}, {2, 6, 6}};
  const tulle::OpsKernels& ops = *tulle::active_isa().ops;
  tulle::KvCache cache(kind, layers, kPages);
  const std::int32_t pages[] = {3, 7};
  const tulle::Grid none{0, true, 1.0f};
  std::mt19937 rng(5);
  for (std::size_t layer = 0; layer < layers.size(); ++layer) {
    for (std::size_t head = 0; head < layers[layer].heads; ++head) {
      for (std::size_t t = 0; t < 5; ++t) {
        std::vector<float> k = normal(layers[layer].key_dim, rng), v = normal(layers[layer].value_dim, rng);
        cache.append(ops, cache.view(layer, head, pages), t, k.data(), v.data(), none, none);
      }
    }
  }
  cache.copy(3, 7);
  cache.copy(3, 3);
  for (std::size_t layer = 0; layer < layers.size(); ++layer) {
    for (std::size_t head = 0; head < layers[layer].heads; ++head) {
      const tulle::CacheView view = cache.view(layer, head, pages);
      const auto same = [&](const auto* data, std::size_t each) {
        return std::memcmp(data + 3 * each, data + 7 * each, each * sizeof *data) == 0;
      };
      const bool equal = same(view.keys, view.key_bytes) && same(view.values, view.value_bytes) &&
                         (view.scales == nullptr || same(view.scales, tulle::kPageScales));
      if (!equal) fail("any", "copy", static_cast<std::size_t>(kind), layers[layer].key_dim);
    }
  }
}

template <typename Call>
void refused(const char* line, Call call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    const std::string found = error.what();
    if (found.find(line) != std::string::npos && found.find('\n') == std::string::npos) return;
    std::printf("FAILED %s: says %s\n", line, error.what());
    ++failures;
    return;
  }
  std::printf("FAILED let through: %s\n", line);
  ++failures;
}

void passes() {
  // Two slots of two pages each, of three pages.
  tulle::PassCheck check(10, {3, 2, 20, 3, CacheKind::f32, 1});
  using Numbers = std::vector<std::int32_t>;
  const auto run = [&](Numbers slots, Numbers positions, Numbers tables, Numbers rows = {0}, Numbers tokens = {}) {
    tokens.resize(slots.size());
    const auto s = exact(slots), p = exact(positions), t = exact(tables), r = exact(rows), i = exact(tokens);
    check.run({i.get(), s.get(), p.get(), slots.size(), t.get(), r.get(), rows.size()});
  };
  run({0, 0, 1}, {15, 16, 0}, {0, 1, 2, -1});
  run({0, 1}, {16, 17}, {0, 1, 0, 2});  // the first page is shared, and only read
  refused("page of block 1 of slot 0", [&] { run({0}, {16}, {0, -1, 2, -1}); });
  refused("page of block 0 of slot 0", [&] { run({0}, {16}, {3, 1, 2, -1}); });
  refused("block 0 of slot 1 has too", [&] { run({0, 1}, {3, 16}, {0, -1, 0, 1}); });
  refused("block 0 of slot 0 has too", [&] { run({0, 1}, {3, 4}, {0, -1, 0, 1}); });
  refused("block 0 of slot 0 has too", [&] { run({0}, {16}, {1, 1, 0, 1}); });
  refused("5 twice", [&] { run({1, 1}, {5, 5}, {0, 1, 2, -1}); });
  refused("tokens below 10", [&] { run({0}, {0}, {0, 1, 2, -1}, {0}, {10}); });
  refused("slots below 2", [&] { run({2}, {0}, {0, 1, 2, -1}); });
  refused("positions below 20", [&] { run({0}, {20}, {0, 1, 2, -1}); });
  refused("positions below 20", [&] { run({0}, {-1}, {0, 1, 2, -1}); });
  refused("rows below 1", [&] { run({0}, {0}, {0, 1, 2, -1}, {1}); });
  refused("tokens of one pass", [&] { run({0, 0, 0, 0}, {0, 1, 2, 3}, {0, 1, 2, -1}); });
  refused("tokens of one pass", [&] { run({}, {}, {0, 1, 2, -1}, {}); });
  run({0, 0, 1}, {15, 16, 0}, {0, 1, 2, -1});

  tulle::RecurrentStates states(2, 1, 5), none(2, 1, 0);
  states.of(1)[4] = 3;
  const std::int32_t slot = 1, position = 6;
  states.advance(&slot, &position, 1);
  refused("one that was saved", [&] { states.load(0, 0); });
  states.save(1, 0);
  states.of(1)[4] = 0;
  states.load(0, 0);
  if (states.of(0)[4] != 3) fail("any", "a snapshot", 0, 0);
  states.check_next(0, 7, nullptr);
  refused("expected 7 or a start", [&] { states.check_next(0, 6, nullptr); });
  refused("snapshots, fewer than", [&] { states.save(0, 1); });
  refused("slots, fewer than", [&] { states.load(0, 2); });
  refused("a model that has one", [&] { none.save(0, 0); });
}

}  // namespace

int main() {
  std::mt19937 rng(1);
  for (const tulle::Isa& isa : tulle::supported_isas()) {
    for (const CacheKind kind : {CacheKind::f32, CacheKind::bf16, CacheKind::u8, CacheKind::u4}) {
      for (const std::size_t d : {1, 2, 16, 20, 33, 48, 64, 80, 128}) {
        for (const std::size_t tokens : {1, 15, 16, 40, 129}) {
          for (const std::size_t window : {0, 1, 20}) attention_case(isa, kind, d, d, false, tokens, window, rng);
        }
      }
      for (const std::size_t d : {1, 16, 20, 33, 64, 80}) {
        for (const std::size_t tokens : {1, 16, 40}) {
          attention_case(isa, kind, 6, d, true, tokens, 0, rng);
          attention_case(isa, kind, 24, d, false, tokens, 20, rng);
        }
      }
    }
  }
  for (const CacheKind kind : {CacheKind::f32, CacheKind::bf16, CacheKind::u8, CacheKind::u4}) copies(kind);
  passes();
  if (failures == 0) std::printf("ok\n");
  return failures == 0 ? 0 : 1;
}
