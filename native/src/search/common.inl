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

// The nearest of 1 to 255 times the row's scale: what a step of 8 bits can be.
static inline float byte_step(float x, float row_scale) {
  const float level = std::nearbyint(x / row_scale);
  return (level > 1.0f ? (level < 255.0f ? level : 255.0f) : 1.0f) * row_scale;
}

// The minimum of curvature·m² − 2·slope·m, m = how far the step moves, over the steps that can be stored (row_scale 0:
// in bfloat16); the step itself where none is lower.
static inline float best_step(float step, float slope, float curvature, float row_scale) {
  const float best = curvature > 0.0f ? step + slope / curvature : step;
  const float wanted = row_scale > 0.0f ? byte_step(best, row_scale) : storable_step(best);
  const float move = wanted - step;
  return move * (move * curvature - 2.0f * slope) < 0.0f ? wanted : step;
}
