#include <cstring>

#include "tables.hpp"

namespace tulle {
namespace {

#include "ops.inl"

}  // namespace

const OpsKernels scalar_ops = ops::kernels;

}  // namespace tulle
