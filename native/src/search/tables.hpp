// The kernel tables of this folder, one per instruction set. What cpu/tables.hpp says of kernel files holds here.
#pragma once

#include "tulle/search.hpp"

namespace tulle {

extern const SearchKernels scalar_search;
extern const SearchKernels avx2_search;
extern const SearchKernels avx512_search;
extern const OuterKernel avx512bf16_outer;

}  // namespace tulle
