// The decoder's vector loops (see ops.inl) for AVX-512: 16 floats in a register.
#include <immintrin.h>

#include <cstring>

#include "cpu/tables.hpp"

namespace tulle {
namespace {

#include "decoder/ops.inl"

}  // namespace

const OpsKernels avx512_ops = ops::kernels;

}  // namespace tulle
