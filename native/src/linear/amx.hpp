// The AMX linears: the AVX-512 ones with tiles for several tokens.
#pragma once

#include "tulle/linear.hpp"

namespace tulle {

extern const LinearKernels amx_linear;
// The same with tiles in plain loops, for tests; needs AVX-512.
extern const LinearKernels amx_emulated_linear;

// Whether the hardware's tiles give what the plain loops give. Call only where the CPU and the operating system offer
// AMX.
bool amx_multiplies();

}  // namespace tulle
