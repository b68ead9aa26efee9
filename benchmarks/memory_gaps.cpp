// What memory gives when pieces of a stream are left out, as tokens leave out columns of weights:
//
//     g++ -O2 -mavx512f -fopenmp benchmarks/memory_gaps.cpp -o build/memory_gaps && build/memory_gaps [THREADS]
//
// 480 MiB in huge pages; of consecutive pieces of so many bytes a random share is read, in order, without prefetching
// and with whole pieces fetched into the level-2 cache so many lines ahead. Best of four passes, GB/s of what is read.
#include <immintrin.h>
#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

int main(int count, char** arguments) {
  const std::size_t total = std::size_t{480} << 20, huge = std::size_t{2} << 20;
  const int threads = count > 1 ? std::atoi(arguments[1]) : 2;
  auto* const memory = static_cast<std::uint8_t*>(std::aligned_alloc(huge, total));
  madvise(memory, total, MADV_HUGEPAGE);
  for (std::size_t i = 0; i < total; i += 8) *reinterpret_cast<std::uint64_t*>(memory + i) = i * 0x9E3779B97F4A7C15u;
  std::printf("%6s %6s", "bytes", "share");
  const std::size_t distances[] = {0, 64, 256, 1024};
  for (std::size_t d : distances) std::printf("  %4zu ahead", d);
  std::puts("");
  for (std::size_t piece : {64, 256, 1024, 2048, 4096, 16384}) {
    for (double share : {1.0, 0.7, 0.5, 0.3}) {
      std::mt19937 rng(3);
      std::bernoulli_distribution kept(share);
      std::vector<std::size_t> places;
      for (std::size_t i = 0; i < total / piece; ++i) {
        if (kept(rng)) places.push_back(i * piece);
      }
      std::printf("%6zu %5.0f%%", piece, 100 * share);
      for (std::size_t lines : distances) {
        const std::size_t ahead = std::max<std::size_t>(lines * 64 / piece, lines > 0);
        double best = 1e9;
        std::uint64_t sink = 0;
        for (int pass = 0; pass < 4; ++pass) {
          const auto begun = std::chrono::steady_clock::now();
#pragma omp parallel num_threads(threads) reduction(+ : sink)
          {
            const std::size_t t = static_cast<std::size_t>(omp_get_thread_num()), n = places.size();
            __m512i sum = _mm512_setzero_si512();
            for (std::size_t i = n * t / threads; i < n * (t + 1) / threads; ++i) {
              const std::uint8_t* const later = memory + places[std::min(i + ahead, n - 1)];
              for (std::size_t b = 0; b < piece; b += 64) {
                if (ahead > 0) _mm_prefetch(reinterpret_cast<const char*>(later + b), _MM_HINT_T1);
              }
              for (std::size_t b = 0; b < piece; b += 64) {
                sum = _mm512_add_epi64(sum, _mm512_load_si512(memory + places[i] + b));
              }
            }
            sink += static_cast<std::uint64_t>(_mm512_reduce_add_epi64(sum));
          }
          const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begun;
          best = std::min(best, taken.count());
        }
        const volatile std::uint64_t used = sink;
        static_cast<void>(used);
        std::printf("  %10.1f", static_cast<double>(places.size() * piece) / best / 1e9);
      }
      std::puts("");
    }
  }
}
