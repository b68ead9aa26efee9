// What this CPU, with the state that the operating system saves for it, can execute.
#pragma once

namespace tulle {

// True means: the CPU reports the instructions and XCR0 says that the operating system keeps their registers.
// (On Linux, AMX tiles additionally need a permission from the kernel before first use.)
struct CpuFeatures {
  bool popcnt, avx2, fma, f16c;
  bool avx512f, avx512bw, avx512vl, avx512vbmi, avx512vbmi2, avx512vnni, avx512bf16;
  bool amx_tile, amx_int8, amx_bf16;
};

// Probed once; all false on other architectures than x86-64.
const CpuFeatures& cpu_features();

}  // namespace tulle
