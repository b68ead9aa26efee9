// Python's view of the kernels: checks every length, allocates, releases the GIL, forwards.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

#include "attention.hpp"
#include "engine.hpp"
#include "scaling.hpp"
#include "search.hpp"
#include "sparse_train.hpp"
#include "tulle/cpu.hpp"
#include "tulle/dispatch.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <typename T>
using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <typename T>
using NewArray = nb::ndarray<nb::numpy, T, nb::c_contig, nb::device::cpu>;
using Bytes = Matrix<const std::uint8_t>;

void require(std::size_t found, std::size_t expected, const char* what) {
  if (found == expected) return;
  throw std::invalid_argument(std::string(what) + ": expected " + std::to_string(expected) + ", found " +
                              std::to_string(found));
}

std::size_t bytes_for(std::size_t count, std::size_t per_byte) {
  return count / per_byte + (count % per_byte != 0);
}

// A new, uninitialised array, or the caller's after a check of its shape.
template <typename T>
NewArray<T> allocate(const std::optional<NewArray<T>>& out, std::initializer_list<std::size_t> shape) {
  if (out) {
    require(out->ndim(), shape.size(), "dimensions of out");
    std::size_t axis = 0;
    for (std::size_t size : shape) require(out->shape(axis++), size, "size of out");
    return *out;
  }
  std::size_t count = 1;
  for (std::size_t size : shape) count *= size;
  std::unique_ptr<T[]> data(new T[count]);
  nb::capsule owner(data.get(), [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return NewArray<T>(data.release(), shape, owner);
}

NewArray<std::uint8_t> pack_nibbles(Bytes codes, std::optional<NewArray<std::uint8_t>> out) {
  const std::size_t rows = codes.shape(0), n = codes.shape(1), width = bytes_for(n, 2);
  const tulle::PackingKernels& kernels = *tulle::active_isa().packing;
  auto packed = allocate(out, {rows, width});
  const std::uint8_t* from = codes.data();
  std::uint8_t* to = packed.data();
  std::uint8_t seen = 0;
  {
    nb::gil_scoped_release release;
    for (std::size_t r = 0; r < rows; ++r) seen |= kernels.pack_nibbles(from + r * n, n, to + r * width);
  }
  if (seen > 15) throw std::invalid_argument("codes: expected values up to 15, found larger ones");
  return packed;
}

NewArray<std::uint8_t> unpack_nibbles(Bytes packed, std::size_t n, std::optional<NewArray<std::uint8_t>> out) {
  const std::size_t rows = packed.shape(0), width = packed.shape(1);
  require(width, bytes_for(n, 2), "bytes per row of packed");
  const tulle::PackingKernels& kernels = *tulle::active_isa().packing;
  auto codes = allocate(out, {rows, n});
  const std::uint8_t* from = packed.data();
  std::uint8_t* to = codes.data();
  nb::gil_scoped_release release;
  for (std::size_t r = 0; r < rows; ++r) kernels.unpack_nibbles(from + r * width, n, to + r * n);
  return codes;
}

// Number of set bits, after a check of the row width.
std::size_t count_rows(const Bytes& mask, std::size_t columns) {
  const std::size_t rows = mask.shape(0), width = mask.shape(1);
  require(width, bytes_for(columns, 8), "bytes per row of mask");
  const tulle::PackingKernels& kernels = *tulle::active_isa().packing;
  const std::uint8_t* bits = mask.data();
  nb::gil_scoped_release release;
  std::size_t count = 0;
  for (std::size_t r = 0; r < rows; ++r) count += kernels.count_bits(bits + r * width, columns);
  return count;
}

std::size_t count_mask(Bytes mask, std::size_t columns) { return count_rows(mask, columns); }

template <typename T>
NewArray<T> expand(Bytes mask, Vector<const T> values, std::size_t columns, std::optional<NewArray<T>> out) {
  const std::size_t rows = mask.shape(0), width = mask.shape(1), available = values.shape(0);
  require(available, count_rows(mask, columns), "values, one per set bit of mask");
  const tulle::MaskKernels<T>& kernels = tulle::active_isa().packing->mask_kernels<T>();
  auto dense = allocate(out, {rows, columns});
  const std::uint8_t* bits = mask.data();
  const T* from = values.data();
  T* to = dense.data();
  nb::gil_scoped_release release;
  std::size_t used = 0;
  for (std::size_t r = 0; r < rows; ++r) {
    used += kernels.expand(bits + r * width, columns, from + used, available - used, to + r * columns);
  }
  return dense;
}

template <typename T>
NewArray<T> compress(Bytes mask, Matrix<const T> dense, std::optional<NewArray<T>> out) {
  const std::size_t rows = mask.shape(0), width = mask.shape(1), columns = dense.shape(1);
  require(dense.shape(0), rows, "rows of dense, as many as of mask");
  const std::size_t count = count_rows(mask, columns);
  const tulle::MaskKernels<T>& kernels = tulle::active_isa().packing->mask_kernels<T>();
  auto values = allocate(out, {count});
  const std::uint8_t* bits = mask.data();
  const T* from = dense.data();
  T* to = values.data();
  nb::gil_scoped_release release;
  std::size_t written = 0;
  for (std::size_t r = 0; r < rows; ++r) {
    written += kernels.compress(bits + r * width, columns, from + r * columns, to + written);
  }
  return values;
}

template <typename T>
void define_mask_functions(nb::module_& m) {
  m.def("expand", &expand<T>, "mask"_a.noconvert(), "values"_a.noconvert(), "columns"_a,
        "out"_a.noconvert() = nb::none());
  m.def("compress", &compress<T>, "mask"_a.noconvert(), "dense"_a.noconvert(), "out"_a.noconvert() = nb::none());
}

template <typename T>
nb::tuple anneal(Matrix<const T> scores, std::vector<std::int64_t> index, std::size_t kept, std::size_t m,
                 std::uint64_t proposals, double start, double end, std::uint64_t seed, std::size_t threads) {
  const std::size_t columns = scores.shape(0), stride = scores.shape(1);
  require(index.size(), columns, "entries of index, one per column");
  require(stride % tulle::kRowBlock, 0, "rows beyond whole blocks of 64");
  require(reinterpret_cast<std::uintptr_t>(scores.data()) % 64, 0, "bytes of scores beyond a 64-byte boundary");
  if (kept < 1 || kept >= m || m > 32 || columns % m != 0) {
    throw std::invalid_argument("pattern: expected 1 <= N < M <= 32 and whole stripes, found " + std::to_string(kept) +
                                ":" + std::to_string(m) + " of " + std::to_string(columns) + " columns");
  }
  std::vector<bool> seen(columns);
  for (std::int64_t c : index) {
    if (c < 0 || static_cast<std::size_t>(c) >= columns || seen[static_cast<std::size_t>(c)]) {
      throw std::invalid_argument("index: expected every column once, found " + std::to_string(c) + " wrong or twice");
    }
    seen[static_cast<std::size_t>(c)] = true;
  }
  std::int64_t gain = 0;
  std::vector<std::int64_t> found;
  {
    nb::gil_scoped_release release;
    found = tulle::anneal<T>(*tulle::active_isa().permutation, scores.data(), columns, stride, std::move(index),
                             {kept, m, proposals, start, end, seed, threads}, &gain);
  }
  return nb::make_tuple(found, gain);
}

template <typename T>
void define_anneal(nb::module_& m) {
  m.def("anneal", &anneal<T>, "scores"_a.noconvert(), "index"_a, "kept"_a, "m"_a, "proposals"_a, "start"_a, "end"_a,
        "seed"_a, "threads"_a);
}

nb::dict cpu_features() {
  const tulle::CpuFeatures& f = tulle::cpu_features();
  nb::dict d;
  d["popcnt"] = f.popcnt;
  d["avx2"] = f.avx2;
  d["fma"] = f.fma;
  d["f16c"] = f.f16c;
  d["avx512f"] = f.avx512f;
  d["avx512bw"] = f.avx512bw;
  d["avx512vl"] = f.avx512vl;
  d["avx512vbmi"] = f.avx512vbmi;
  d["avx512vbmi2"] = f.avx512vbmi2;
  d["avx512vnni"] = f.avx512vnni;
  d["avx512bf16"] = f.avx512bf16;
  d["amx_tile"] = f.amx_tile;
  d["amx_int8"] = f.amx_int8;
  d["amx_bf16"] = f.amx_bf16;
  return d;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const tulle::Isa& isa : tulle::supported_isas()) names.emplace_back(isa.name);
  return names;
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Compiled kernels. Use them through tulle.native, which documents them.";
  m.def("cpu_features", &cpu_features);
  m.def("supported_isas", &supported_isas);
  m.def("active_isa", [] { return std::string(tulle::active_isa().name); });
  m.def("pack_nibbles", &pack_nibbles, "codes"_a.noconvert(), "out"_a.noconvert() = nb::none());
  m.def("unpack_nibbles", &unpack_nibbles, "packed"_a.noconvert(), "n"_a, "out"_a.noconvert() = nb::none());
  m.def("count_mask", &count_mask, "mask"_a.noconvert(), "columns"_a);
  define_mask_functions<std::uint8_t>(m);
  define_mask_functions<std::uint16_t>(m);
  define_mask_functions<std::uint32_t>(m);
  define_anneal<std::uint8_t>(m);
  define_anneal<std::int16_t>(m);
  define_attention(m);
  define_engine(m);
  define_scaling(m);
  define_search(m);
  define_sparse_train(m);
}
