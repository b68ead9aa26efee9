// dW of the kernel files of held masks on x86, included behind what they define: Vector (kParts of them hold 16
// tokens), Lanes, load, dot, reduce, and the first few of four values.
//
//   row[0 … 3]   dY of one row, 64 tokens
//   step (four entries): dot(row, panel[column]) of each gives 16 lanes; a 4 × 16 transposing sum gives four values

template <int kVectors, bool kAdd>
void correlate_vectors(const SparseBlock& block, const float* panel, const float* gradients, float* values) {
  const std::uint16_t* offsets = block.offsets;
  for (std::size_t i = 0; i < block.run_count; ++i) {
    const float* const from = gradients + (block.runs[i] >> 8) * kPanelTokens;
    Vector row[kParts * kVectors];
    for (int h = 0; h < kParts * kVectors; ++h) row[h] = load(from + 16 / kParts * h);
    std::size_t left = block.runs[i] & 255;
    for (; left >= 4; left -= 4, offsets += 4, values += 4) {
      const std::uint64_t four = load4(offsets);
      const __m128 sum = reduce(dot<0>(row, panel, four), dot<1>(row, panel, four), dot<2>(row, panel, four),
                                dot<3>(row, panel, four));
      _mm_storeu_ps(values, kAdd ? _mm_add_ps(_mm_loadu_ps(values), sum) : sum);
    }
    if (left > 0) {
      const std::uint64_t four = load4(offsets);
      const auto mask = lanes(left);
      const Lanes zero = no_lanes();
      const __m128 sum = reduce(dot<0>(row, panel, four), left > 1 ? dot<1>(row, panel, four) : zero,
                                left > 2 ? dot<2>(row, panel, four) : zero, zero);
      store_first(values, mask, kAdd ? _mm_add_ps(load_first(values, mask), sum) : sum);
      offsets += left;
      values += left;
    }
  }
}

template <int kVectors>
void correlate_vectors(const SparseBlock& block, const float* panel, const float* gradients, bool add, float* values) {
  if (add) return correlate_vectors<kVectors, true>(block, panel, gradients, values);
  return correlate_vectors<kVectors, false>(block, panel, gradients, values);
}

void correlate(const SparseBlock& block, const float* panel, const float* gradients, std::size_t tokens, bool add,
               float* values) {
  TULLE_BY_VECTORS(correlate_vectors, tokens, block, panel, gradients, add, values)
}
