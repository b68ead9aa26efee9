// Which set of kernels runs: the widest that this build contains and this CPU executes, or the one that the
// environment variable TULLE_ISA names.
#pragma once

#include <vector>

#include "tulle/linear.hpp"
#include "tulle/ops.hpp"
#include "tulle/packing.hpp"
#include "tulle/permutation.hpp"
#include "tulle/scaling.hpp"
#include "tulle/search.hpp"
#include "tulle/sparse_train.hpp"

namespace tulle {

struct Isa {
  const char* name;  // "scalar", "avx2", "avx512", "amx"
  const PackingKernels* packing;
  const PermutationKernels* permutation;
  const LinearKernels* linear;
  const OpsKernels* ops;
  const SparseTrainKernels* sparse_train;
  const ScalingKernels* scaling;
  const SearchKernels* search;
};

// Narrowest (scalar) first.
const std::vector<Isa>& supported_isas();

// Reads TULLE_ISA at the first call that succeeds. Throws std::invalid_argument, one line, if it names a set
// that is unknown or not supported here.
const Isa& active_isa();

}  // namespace tulle
