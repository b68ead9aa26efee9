#include <cstring>

#include "tables.hpp"

namespace tulle {
namespace {

#include "ops.inl"

}  // namespace

const OpsKernels avx2_ops = ops::kernels;

}  // namespace tulle
