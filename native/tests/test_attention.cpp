// Flash attention against sums in double, on heap buffers of exactly its size: under the address sanitizer a read or
// write past an end aborts.
#include <cmath>
#include <cstring>
#include <random>

#include "support.hpp"
#include "tulle/dispatch.hpp"
#include "tulle/flash_attention.hpp"

namespace {

using Bits = std::vector<std::uint16_t>;

double value(std::uint16_t x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
  float found;
  std::memcpy(&found, &bits, sizeof found);
  return static_cast<double>(found);
}

Bits normal(std::size_t n, std::mt19937& rng) {
  std::normal_distribution<float> draw;
  Bits found(n);
  for (std::uint16_t& x : found) {
    const float number = draw(rng);
    std::uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    x = static_cast<std::uint16_t>(bits >> 16);
  }
  return found;
}

void test(tulle::FlashKernel kernel, const char* isa, std::size_t tokens, std::size_t d, std::size_t window,
          std::mt19937& rng) {
  constexpr std::size_t kBatch = 2, kHeads = 4, kKvHeads = 2;
  const Bits q = normal(kBatch * tokens * kHeads * d, rng), k = normal(kBatch * tokens * kKvHeads * d, rng);
  const Bits v = normal(k.size(), rng);
  const auto queries = exact(q), keys = exact(k), values = exact(v);
  // Tokens first, as projections give them.
  const auto of = [&](auto* data, std::size_t heads) {
    return tulle::Sequences<std::remove_pointer_t<decltype(data)>>{data, tokens * heads * d, d, heads * d};
  };
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));
  Bits first;
  for (std::size_t threads = 1; threads <= 3; ++threads) {
    const auto out = exact(Bits(q.size()));
    const std::uint16_t *const from = queries.get(), *const key = keys.get(), *const val = values.get();
    tulle::flash_attention(kernel,
                           {kBatch, kHeads, kKvHeads, tokens, d, window, scale, of(from, kHeads), of(key, kKvHeads),
                            of(val, kKvHeads), of(out.get(), kHeads)},
                           threads);
    const Bits found(out.get(), out.get() + q.size());
    if (first.empty()) first = found;
    if (found != first) ++failures, std::printf("FAILED %s threads differ, %zu tokens\n", isa, tokens);
  }
  for (std::size_t b = 0; b < kBatch; ++b) {
    for (std::size_t h = 0; h < kHeads; ++h) {
      for (std::size_t t = 0; t < tokens; ++t) {
        const std::size_t begin = t + 1 > window ? t + 1 - window : 0, row = ((b * tokens + t) * kHeads + h) * d;
        const auto at = [&](std::size_t s) { return ((b * tokens + s) * kKvHeads + h / 2) * d; };
        std::vector<double> p(t + 1);
        double total = 0;
        for (std::size_t s = begin; s <= t; ++s) {
          double score = 0;
          for (std::size_t i = 0; i < d; ++i) score += value(q[row + i]) * value(k[at(s) + i]);
          p[s] = std::exp(score * static_cast<double>(scale));
          total += p[s];
        }
        for (std::size_t i = 0; i < d; ++i) {
          double sum = 0, size = 0;
          for (std::size_t s = begin; s <= t; ++s) {
            sum += p[s] / total * value(v[at(s) + i]);
            size += p[s] / total * std::abs(value(v[at(s) + i]));
          }
          // Probabilities and outputs are rounded to 8 bits: 2^-8 of each at most.
          if (std::abs(value(first[row + i]) - sum) > 0x1p-8 * (size + std::abs(sum)) + 2e-5 * size) {
            std::printf("FAILED %s %zu tokens, head_dim %zu, window %zu: token %zu\n", isa, tokens, d, window, t);
            ++failures;
            return;
          }
        }
      }
    }
  }
}

}  // namespace

int main() {
  std::mt19937 rng(1);
  std::size_t kernels = 0;
  for (const tulle::Isa& isa : tulle::supported_isas()) {
    if (isa.ops->flash == nullptr) continue;
    ++kernels;
    for (std::size_t tokens : {1, 6, 7, 48, 65, 128, 129, 200}) {
      for (std::size_t d : {16, 64, 80, 256}) {
        for (std::size_t window : {std::size_t{1}, std::size_t{30}, std::size_t{128}, std::max<std::size_t>(tokens, 1)}) {
          test(isa.ops->flash, isa.name, tokens, d, window, rng);
        }
      }
    }
  }
  std::printf("attention: %zu kernels, %d failures\n", kernels, failures);
  return failures == 0 ? 0 : 1;
}
