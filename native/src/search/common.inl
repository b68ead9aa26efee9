// What the kernels of every instruction set do the same way, one number at a time. Internal linkage only.

static inline std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

static inline float of_bits(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// The smallest step: tulle/core/grid.py:SMALLEST_STEP.
constexpr float kSmallestStep = 1e-30f;

// Nearest bfloat16, ties to even, not below the smallest step. x is finite.
static inline float storable_step(float x) {
  const std::uint32_t bits = bits_of(x > kSmallestStep ? x : kSmallestStep);
  return of_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u);
}

// The minimum of curvature·m² − 2·slope·m, m = how far the step moves, over the steps that bfloat16 holds; the step
// itself where none is lower.
static inline float best_step(float step, float slope, float curvature) {
  const float wanted = storable_step(curvature > 0.0f ? step + slope / curvature : step);
  const float move = wanted - step;
  return move * (move * curvature - 2.0f * slope) < 0.0f ? wanted : step;
}
