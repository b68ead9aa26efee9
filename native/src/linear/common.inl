// What the kernel files of linears share, each compiling it with its own flags. Internal linkage only: see
// cpu/tables.hpp.

static inline float from_bf16(std::uint16_t bits) {
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// IEEE half precision.
static inline float from_f16(std::uint16_t bits) {
  const std::uint32_t sign = (bits & 0x8000u) << 16, exponent = (bits >> 10) & 31u, fraction = bits & 1023u;
  std::uint32_t wide;
  if (exponent == 0) {  // a whole number of 2^-24
    const float value = static_cast<float>(fraction) * 0x1p-24f;
    std::memcpy(&wide, &value, sizeof wide);
  } else {
    wide = (exponent == 31 ? 255u : exponent + 112u) << 23 | fraction << 13;
  }
  wide |= sign;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// Number `at` of scales or minima.
static inline float scale_value(const void* from, ScaleKind kind, std::size_t at) {
  if (kind == ScaleKind::u8) return static_cast<float>(static_cast<const std::uint8_t*>(from)[at]);
  if (kind == ScaleKind::f32) {
    float value;
    std::memcpy(&value, static_cast<const float*>(from) + at, sizeof value);
    return value;
  }
  std::uint16_t bits;
  std::memcpy(&bits, static_cast<const std::uint16_t*>(from) + at, sizeof bits);
  return kind == ScaleKind::f16 ? from_f16(bits) : from_bf16(bits);
}

// Σ x of a segment: what minima are multiplied with, before a token's step.
static inline float input_sum(const Inputs& x, std::size_t token, std::size_t segment) {
  float whole = 0;
  for (std::size_t p = 0; p < x.planes; ++p) {
    whole = whole * 256 + static_cast<float>(x.sums[p][token * x.sum_stride + segment]);
  }
  return whole;
}

// A number that a template takes from an argument.
template <int kValue>
struct Int {
  static constexpr int value = kValue;
};

static inline std::size_t least(std::size_t a, std::size_t b) { return a < b ? a : b; }

// What a row's sum is multiplied with before a token's step.
static inline float row_scaled(const LinearView& w, std::size_t row, float sum) {
  return w.row_scales ? sum * w.row_scales[row] : sum;
}

// Outputs of a tile that exist.
static inline std::size_t rows_of(const LinearView& w, std::size_t tile) {
  const std::size_t left = w.rows - tile * kTileRows;
  return left < kTileRows ? left : kTileRows;
}
