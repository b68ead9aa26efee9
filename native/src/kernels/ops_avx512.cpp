#include <immintrin.h>

#include <cstring>

#include "tables.hpp"

namespace tulle {
namespace {

#include "ops.inl"

}  // namespace

const OpsKernels avx512_ops = ops::kernels;

}  // namespace tulle
