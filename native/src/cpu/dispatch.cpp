#include "tulle/dispatch.hpp"

#include <cstdlib>
#include <stdexcept>
#include <string>
#if defined(TULLE_HAVE_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/tables.hpp"
#include "linear/amx.hpp"
#include "search/tables.hpp"
#include "tulle/cpu.hpp"

namespace tulle {
namespace {

[[maybe_unused]] PackingKernels with_scalar_masks(PackingKernels kernels) {
  kernels.mask8 = scalar_packing.mask8;
  kernels.mask16 = scalar_packing.mask16;
  kernels.mask32 = scalar_packing.mask32;
  return kernels;
}

#if defined(TULLE_HAVE_AVX512)
// Of the CPUs that have the AVX-512 set, some also multiply bfloat16.
OpsKernels with_flash(OpsKernels kernels, [[maybe_unused]] const CpuFeatures& cpu) {
#if defined(TULLE_HAVE_AVX512BF16)
  if (cpu.avx512bf16) kernels.flash = avx512bf16_flash;
#endif
  return kernels;
}

SearchKernels with_outer(SearchKernels kernels, [[maybe_unused]] const CpuFeatures& cpu) {
#if defined(TULLE_HAVE_AVX512BF16)
  if (cpu.avx512bf16) kernels.outer = avx512bf16_outer;
#endif
  return kernels;
}
#endif

#if defined(TULLE_HAVE_AMX)
// Linux lends tiles to a process that asks (Documentation/arch/x86/xstate.rst).
bool ask_for_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

std::vector<Isa> probe() {
  std::vector<Isa> isas = {{"scalar", &scalar_packing, &scalar_permutation, &scalar_linear, &scalar_ops,
                            &scalar_sparse_train, &scalar_scaling, &scalar_search}};
  [[maybe_unused]] const CpuFeatures& cpu = cpu_features();
#if defined(TULLE_HAVE_AVX2)
  static const PackingKernels avx2 = with_scalar_masks(avx2_packing);
  const bool has_avx2 = cpu.popcnt && cpu.avx2 && cpu.fma && cpu.f16c;
  if (has_avx2) {
    isas.push_back({"avx2", &avx2, &avx2_permutation, &avx2_linear, &avx2_ops, &avx2_sparse_train, &avx2_scaling,
                    &avx2_search});
  }
#if defined(TULLE_HAVE_AVX512)
  // Ice Lake and Zen 4 onwards; Skylake-X lacks VBMI and VNNI and runs the AVX2 set.
  if (has_avx2 && cpu.avx512f && cpu.avx512bw && cpu.avx512vl && cpu.avx512vbmi && cpu.avx512vbmi2 &&
      cpu.avx512vnni) {
    static const SearchKernels search = with_outer(avx512_search, cpu);
    static const OpsKernels ops = with_flash(avx512_ops, cpu);
    isas.push_back({"avx512", &avx512_packing, &avx512_permutation, &avx512_linear, &ops, &avx512_sparse_train,
                    &avx512_scaling, &search});
#if defined(TULLE_HAVE_AMX)
    if (cpu.amx_tile && cpu.amx_int8 && ask_for_tiles() && amx_multiplies()) {
      Isa amx = isas.back();
      amx.name = "amx";
      amx.linear = &amx_linear;
      isas.push_back(amx);
    }
#endif
  }
#endif
#endif
  return isas;
}

const Isa& choose() {
  const std::vector<Isa>& isas = supported_isas();
  const char* wanted = std::getenv("TULLE_ISA");
  if (wanted == nullptr || *wanted == '\0') return isas.back();
  std::string names;
  for (const Isa& isa : isas) {
    if (std::string(isa.name) == wanted) return isa;
    names += (names.empty() ? "" : ", ") + std::string(isa.name);
  }
  throw std::invalid_argument("expected TULLE_ISA to be one of " + names +
                              " (what this build and CPU support), found '" + wanted + "'; unset it to use " +
                              isas.back().name);
}

}  // namespace

const std::vector<Isa>& supported_isas() {
  static const std::vector<Isa> isas = probe();
  return isas;
}

const Isa& active_isa() {
  static const Isa& isa = choose();
  return isa;
}

}  // namespace tulle
