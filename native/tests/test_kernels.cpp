// Every supported instruction set against the scalar kernels, on exactly sized heap buffers: under the address
// sanitizer a read or write past an end aborts, and without it the guard bytes show a write.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "support.hpp"
#include "tulle/dispatch.hpp"

namespace {

constexpr std::uint8_t kPoison = 0xa5;
constexpr std::size_t kGuard = 64;

void check(bool ok, const char* isa, const char* what, std::size_t n) {
  if (ok) return;
  std::printf("FAILED %s %s n=%zu\n", isa, what, n);
  ++failures;
}

// A poisoned buffer of exactly `count` elements behind which guard bytes lie. Inputs use vectors without guards.
template <typename T>
struct Output {
  explicit Output(std::size_t count) : size(count * sizeof(T)), bytes(size + kGuard, kPoison) {}
  T* data() { return reinterpret_cast<T*>(bytes.data()); }
  bool guard_intact() const {
    for (std::size_t i = size; i < bytes.size(); ++i) {
      if (bytes[i] != kPoison) return false;
    }
    return true;
  }
  std::size_t size;
  std::vector<std::uint8_t> bytes;
};

template <typename T>
bool equal(Output<T>& a, Output<T>& b) {
  return a.guard_intact() && b.guard_intact() && std::memcmp(a.bytes.data(), b.bytes.data(), a.size) == 0;
}

void test_nibbles(const tulle::Isa& isa, const tulle::PackingKernels& reference, std::size_t n, std::mt19937& rng) {
  std::vector<std::uint8_t> codes(n);
  for (auto& code : codes) code = static_cast<std::uint8_t>(rng() & 15);
  const auto input = exact(codes);
  const std::size_t width = (n + 1) / 2;
  Output<std::uint8_t> expected(width), found(width);
  const auto seen_expected = reference.pack_nibbles(input.get(), n, expected.data());
  const auto seen_found = isa.packing->pack_nibbles(input.get(), n, found.data());
  check(equal(expected, found) && seen_expected == seen_found, isa.name, "pack_nibbles", n);

  const auto packed =
      exact(std::vector<std::uint8_t>(found.bytes.begin(), found.bytes.begin() + static_cast<long>(width)));
  Output<std::uint8_t> back(n);
  isa.packing->unpack_nibbles(packed.get(), n, back.data());
  check(back.guard_intact() && std::equal(codes.begin(), codes.end(), back.data()), isa.name, "unpack_nibbles", n);
}

template <typename T>
void test_masks(const tulle::Isa& isa, const tulle::PackingKernels& reference, std::size_t n, double density,
                std::mt19937& rng) {
  // Bits after the n-th are random: they must be ignored.
  std::vector<std::uint8_t> mask((n + 7) / 8);
  std::bernoulli_distribution set(density);
  for (std::size_t i = 0; i < 8 * mask.size(); ++i) mask[i / 8] |= static_cast<std::uint8_t>(set(rng) << (i % 8));
  std::vector<T> dense(n);
  for (auto& x : dense) x = static_cast<T>(rng());
  const auto bits = exact(mask);
  const auto from = exact(dense);

  const std::size_t count = reference.count_bits(bits.get(), n);
  check(isa.packing->count_bits(bits.get(), n) == count, isa.name, "count_bits", n);

  const auto& ours = isa.packing->mask_kernels<T>();
  const auto& theirs = reference.mask_kernels<T>();
  Output<T> expected(count), found(count);
  theirs.compress(bits.get(), n, from.get(), expected.data());
  const std::size_t written = ours.compress(bits.get(), n, from.get(), found.data());
  check(equal(expected, found) && written == count, isa.name, "compress", n);

  const auto values = exact(std::vector<T>(found.data(), found.data() + count));
  Output<T> dense_expected(n), dense_found(n);
  theirs.expand(bits.get(), n, values.get(), count, dense_expected.data());
  const std::size_t used = ours.expand(bits.get(), n, values.get(), count, dense_found.data());
  check(equal(dense_expected, dense_found) && used == count, isa.name, "expand", n);
}

}  // namespace

// Exactly `count` elements on a 64-byte boundary, so that the sanitizer sees the end.
template <typename T>
struct Aligned {
  explicit Aligned(std::size_t count) : data(static_cast<T*>(std::aligned_alloc(64, count * sizeof(T))), std::free) {}
  std::unique_ptr<T, decltype(&std::free)> data;
};

template <typename T>
void test_scores(const tulle::Isa& isa, const tulle::PermutationKernels& plain, std::size_t rows, std::mt19937& rng) {
  constexpr std::size_t kColumns = 16;
  const int top = sizeof(T) == 1 ? 255 : 32767;
  std::uniform_int_distribution<int> any(0, top), few(0, 3);
  const auto& kernels = isa.permutation->score_kernels<T>();
  const auto& reference = plain.score_kernels<T>();
  for (bool ties : {false, true}) {
    Aligned<T> scores(kColumns * rows), limits(kColumns * rows), expected(kColumns * rows);
    for (std::size_t i = 0; i < kColumns * rows; ++i) {
      scores.data.get()[i] = static_cast<T>(ties ? few(rng) * (top / 3) : any(rng));
    }
    for (std::size_t m : {std::size_t{2}, std::size_t{4}, kColumns}) {
      for (std::size_t kept = 1; kept < m; ++kept) {
        const T* columns[kColumns];
        T *found[kColumns], *wanted[kColumns];
        for (std::size_t c = 0; c < m; ++c) {
          columns[c] = scores.data.get() + c * rows;
          found[c] = limits.data.get() + c * rows;
          wanted[c] = expected.data.get() + c * rows;
        }
        kernels.limits(columns, m, kept, rows, found);
        reference.limits(columns, m, kept, rows, wanted);
        check(std::memcmp(found[0], wanted[0], m * rows * sizeof(T)) == 0, isa.name, "limits", rows);
        for (std::size_t c = 0; c < m; ++c) {
          const T* other = columns[(c + 1) % m];
          check(kernels.excess(other, found[c], rows) == reference.excess(other, found[c], rows), isa.name, "excess",
                rows);
        }
      }
    }
    std::vector<std::int64_t> order(kColumns);
    for (std::size_t c = 0; c < kColumns; ++c) order[c] = static_cast<std::int64_t>(c);
    std::int64_t gain = 0, same = 0;
    const tulle::Annealing settings = {2, 4, 2000, 0.3, 0.05, 7, 2};
    const auto a = tulle::anneal<T>(*isa.permutation, scores.data.get(), kColumns, rows, order, settings, &gain);
    const auto b = tulle::anneal<T>(plain, scores.data.get(), kColumns, rows, order, settings, &same);
    check(a == b && gain == same && gain >= 0, isa.name, "anneal", rows);
  }
}

int main() {
  std::mt19937 rng(1);
  const auto& isas = tulle::supported_isas();
  const tulle::PackingKernels& reference = *isas.front().packing;
  for (const tulle::Isa& isa : isas) {
    for (std::size_t n = 0; n <= 260; ++n) {
      test_nibbles(isa, reference, n, rng);
      for (double density : {0.0, 0.05, 0.5, 0.95, 1.0}) {
        test_masks<std::uint8_t>(isa, reference, n, density, rng);
        test_masks<std::uint16_t>(isa, reference, n, density, rng);
        test_masks<std::uint32_t>(isa, reference, n, density, rng);
      }
    }
    for (std::size_t rows : {64, 128, 192, 1024}) {
      test_scores<std::uint8_t>(isa, *isas.front().permutation, rows, rng);
      test_scores<std::int16_t>(isa, *isas.front().permutation, rows, rng);
    }
    std::printf("%s: lengths 0 to 260 compared with scalar\n", isa.name);
  }
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
