// The decoder's vector loops (see ops.inl) for AVX2: 8 floats in a register.
#include <immintrin.h>

#include <cstring>

#include "cpu/tables.hpp"

namespace tulle {
namespace {

#include "decoder/ops.inl"

}  // namespace

const OpsKernels avx2_ops = ops::kernels;

}  // namespace tulle
