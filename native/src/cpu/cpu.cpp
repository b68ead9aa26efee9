#include "tulle/cpu.hpp"

#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)
#define TULLE_X86 1
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

namespace tulle {
namespace {

#if defined(TULLE_X86)

struct Registers {
  std::uint32_t a = 0, b = 0, c = 0, d = 0;
};

// All zero where the CPU has no such leaf.
Registers cpuid(std::uint32_t leaf, std::uint32_t subleaf) {
  Registers r;
#if defined(_MSC_VER)
  int highest[4], out[4];
  __cpuid(highest, 0);
  if (leaf > static_cast<std::uint32_t>(highest[0])) return r;
  __cpuidex(out, static_cast<int>(leaf), static_cast<int>(subleaf));
  r = {static_cast<std::uint32_t>(out[0]), static_cast<std::uint32_t>(out[1]),
       static_cast<std::uint32_t>(out[2]), static_cast<std::uint32_t>(out[3])};
#else
  __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);
#endif
  return r;
}

std::uint64_t xcr0() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  // The intrinsic would need this file compiled with -mxsave.
  std::uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
#endif
}

constexpr bool bit(std::uint64_t word, int index) { return (word >> index) & 1; }
constexpr bool all(std::uint64_t word, std::uint64_t mask) { return (word & mask) == mask; }

CpuFeatures probe() {
  CpuFeatures f{};
  const Registers leaf1 = cpuid(1, 0);
  f.popcnt = bit(leaf1.c, 23);
  const bool osxsave = bit(leaf1.c, 27);
  const std::uint64_t state = osxsave ? xcr0() : 0;
  const bool ymm = all(state, 0x6);             // SSE and AVX registers
  const bool zmm = ymm && all(state, 0xe0);     // mask registers, upper halves, zmm16..31
  const bool tiles = all(state, 0x60000);       // tile configuration and data

  const Registers leaf7 = cpuid(7, 0);
  const Registers leaf7_1 = leaf7.a >= 1 ? cpuid(7, 1) : Registers{};
  f.fma = ymm && bit(leaf1.c, 12);
  f.f16c = ymm && bit(leaf1.c, 29);
  f.avx2 = ymm && bit(leaf7.b, 5);
  f.avx512f = zmm && bit(leaf7.b, 16);
  f.avx512bw = zmm && bit(leaf7.b, 30);
  f.avx512vl = zmm && bit(leaf7.b, 31);
  f.avx512vbmi = zmm && bit(leaf7.c, 1);
  f.avx512vbmi2 = zmm && bit(leaf7.c, 6);
  f.avx512vnni = zmm && bit(leaf7.c, 11);
  f.avx512bf16 = zmm && bit(leaf7_1.a, 5);
  f.amx_bf16 = tiles && bit(leaf7.d, 22);
  f.amx_tile = tiles && bit(leaf7.d, 24);
  f.amx_int8 = tiles && bit(leaf7.d, 25);
  return f;
}

#else

CpuFeatures probe() { return CpuFeatures{}; }

#endif

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = probe();
  return features;
}

}  // namespace tulle
