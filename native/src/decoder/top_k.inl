// What a token keeps of its inputs: the threshold of Top-K, and the list of active inputs. Part of ops.inl.
//
//   threshold   bisection over the bits of |x| (floats >= 0 have the order of their bits): count those >= the middle
//   list        16 codes: vptestmb ─► mask ─► vpcompressd of their indices, vpcompressb of the codes

// Bits of floats >= 0 have their order.
static inline std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

static inline std::size_t count_from(const float* size, std::size_t n, std::uint32_t least) {
  std::uint32_t count = 0;
  for (std::size_t i = 0; i < n; ++i) count += bits_of(size[i]) >= least;
  return count;
}

// size[i] with low <= bits < high, to `to`; returns how many.
static std::size_t between(const float* size, std::size_t n, std::uint32_t low, std::uint32_t high, float* to) {
  std::size_t found = 0, i = 0;
#if defined(__AVX512F__)
  const __m512i from = _mm512_set1_epi32(static_cast<int>(low)),
                width = _mm512_set1_epi32(static_cast<int>(high - low));
  for (; i + 16 <= n; i += 16) {
    const __m512i bits = _mm512_loadu_si512(size + i);
    const __mmask16 inside = _mm512_cmplt_epu32_mask(_mm512_sub_epi32(bits, from), width);
    // Not straight to memory: Zen 4 does that in microcode.
    _mm512_storeu_si512(to + found, _mm512_maskz_compress_epi32(inside, bits));
    found += static_cast<std::size_t>(__builtin_popcount(inside));
  }
#endif
  for (; i < n; ++i) {
    const float value = size[i];
    to[found] = value;
    found += bits_of(value) - low < high - low;
  }
  return found;
}

// By bisection over the bits; where few are left between the bounds, over those alone.
static TopKThreshold top_k_threshold(const float* size, std::size_t n, std::size_t keep, float* spare) {
  constexpr std::size_t kFew = 64;
  std::uint32_t low = 0, most = 0;
  for (std::size_t i = 0; i < n; ++i) most = bits_of(size[i]) > most ? bits_of(size[i]) : most;
  std::uint32_t high = most + 1;
  std::size_t kept = n, above = 0;  // how many reach low, high
  // The cut is seldom more than 2^8 below the largest.
  constexpr std::uint32_t kOctaves = 8u << 23;
  if (most > kOctaves) {
    const std::size_t reach = count_from(size, n, most - kOctaves);
    if (reach >= keep) {
      low = most - kOctaves;
      kept = reach;
    } else {
      high = most - kOctaves;
      above = reach;
    }
  }
  const float* from = size;
  std::size_t left = n, outside = 0;  // those of `from`; those taken out because they reach an earlier high
  while (kept != keep && high - low > 1) {
    if (from == size && kept - above <= n / 8) {
      left = between(size, n, low, high, spare);
      from = spare;
      outside = above;
    }
    const std::uint32_t middle = low + (high - low) / 2;
    const std::size_t reach = outside + count_from(from, left, middle);
    if (reach >= keep) {
      low = middle;
      kept = reach;
    } else {
      high = middle;
      above = reach;
    }
    if (from == spare && kept - above > kFew && left > 2 * (kept - above)) {
      left = between(spare, left, low, high, spare);
      outside = above;
    }
  }
  float value;
  std::memcpy(&value, &low, sizeof value);
  return {value, kept};
}

static std::size_t nonzero(const std::int8_t* high, const std::int8_t* low, std::size_t n, std::uint32_t first,
                           std::uint32_t* indices, std::int8_t* kept_high, std::int8_t* kept_low) {
  std::size_t found = 0, i = 0;
#if defined(__AVX512VBMI2__)
  __m512i numbers = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(first)),
                                     _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  const __m512i sixteen = _mm512_set1_epi32(16);
  for (; i + 16 <= n; i += 16) {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(high + i));
    __m128i any = codes, lower = codes;
    if (low != nullptr) {
      lower = _mm_loadu_si128(reinterpret_cast<const __m128i*>(low + i));
      any = _mm_or_si128(codes, lower);
    }
    const __mmask16 here = _mm_test_epi8_mask(any, any);
    _mm512_storeu_si512(indices + found, _mm512_maskz_compress_epi32(here, numbers));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(kept_high + found), _mm_maskz_compress_epi8(here, codes));
    if (low != nullptr) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(kept_low + found), _mm_maskz_compress_epi8(here, lower));
    }
    found += static_cast<std::size_t>(__builtin_popcount(here));
    numbers = _mm512_add_epi32(numbers, sixteen);
  }
#endif
  for (; i < n; ++i) {
    indices[found] = first + static_cast<std::uint32_t>(i);
    kept_high[found] = high[i];
    if (low != nullptr) kept_low[found] = low[i];
    found += high[i] != 0 || (low != nullptr && low[i] != 0);
  }
  return found;
}

static std::size_t nonzero_blocks4(const std::int8_t* high, const std::int8_t* low, std::size_t n, std::uint32_t first,
                                 std::uint32_t* indices, std::int8_t* kept_high, std::int8_t* kept_low) {
  std::size_t found = 0, i = 0;
#if defined(__AVX512VBMI2__)
  __m512i numbers = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(first)),
                                     _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  for (; i < n; i += 16) {
    const __mmask16 real = static_cast<__mmask16>(n - i < 16 ? (1u << (n - i)) - 1 : 0xffff);
    const __m512i codes = _mm512_maskz_loadu_epi32(real, high + 4 * i);
    const __m512i lower = low == nullptr ? codes : _mm512_maskz_loadu_epi32(real, low + 4 * i);
    const __m512i any = _mm512_or_si512(codes, lower);
    const __mmask16 here = _mm512_test_epi32_mask(any, any);
    const std::size_t count = static_cast<std::size_t>(__builtin_popcount(here));
    // As many as are left fit in any case: whole registers are stored faster.
    const bool whole = n - i >= 16;
    const auto store = [&](void* to, __m512i these) {
      const __m512i kept = _mm512_maskz_compress_epi32(here, these);
      if (whole) _mm512_storeu_si512(to, kept);
      else _mm512_mask_storeu_epi32(to, static_cast<__mmask16>((1u << count) - 1), kept);
    };
    store(indices + found, numbers);
    store(kept_high + 4 * found, codes);
    if (low != nullptr) store(kept_low + 4 * found, lower);
    found += count;
    numbers = _mm512_add_epi32(numbers, _mm512_set1_epi32(16));
  }
#endif
  for (; i < n; ++i) {
    std::uint32_t four, below = 0;
    __builtin_memcpy(&four, high + 4 * i, 4);
    if (low != nullptr) __builtin_memcpy(&below, low + 4 * i, 4);
    if ((four | below) == 0) continue;
    indices[found] = first + static_cast<std::uint32_t>(i);
    __builtin_memcpy(kept_high + 4 * found, &four, 4);
    if (low != nullptr) __builtin_memcpy(kept_low + 4 * found, &below, 4);
    ++found;
  }
  return found;
}

static void absolute(const float* x, std::size_t n, float* y) {
  for (std::size_t i = 0; i < n; ++i) y[i] = __builtin_fabsf(x[i]);  // of -0.0 too
}

static void drop_below(float* x, const float* size, std::size_t n, float least) {
  for (std::size_t i = 0; i < n; ++i) x[i] = size[i] >= least ? x[i] : 0.0f;
}

template <bool kNorm>
static float unit_size(const float* size, std::size_t unit) {
  float value = 0;
  for (std::size_t j = 0; j < unit; ++j) {
    const float one = size[j];
    // Fused on every instruction set, so that the same units are kept.
    value = kNorm ? __builtin_fmaf(one, one, value) : one > value ? one : value;
  }
  return value;
}

// A constant unit is unrolled.
static void unit_sizes(const float* size, std::size_t n, std::size_t unit, bool norm, float* to) {
  const auto all = [&](auto of, std::size_t step) {
    for (std::size_t i = 0; i < n; ++i) to[i] = of(size + i * step, step);
  };
  if (unit == 4 && norm) return all([](const float* s, std::size_t) { return unit_size<true>(s, 4); }, 4);
  if (unit == 4) return all([](const float* s, std::size_t) { return unit_size<false>(s, 4); }, 4);
  if (norm) return all(unit_size<true>, unit);
  all(unit_size<false>, unit);
}

static void drop_units_below(float* x, const float* size, std::size_t n, std::size_t unit, float least) {
  const auto drop = [&](std::size_t step) {
    for (std::size_t i = 0; i < n; ++i) {
      const bool kept = size[i] >= least;
      for (std::size_t j = 0; j < step; ++j) x[i * step + j] = kept ? x[i * step + j] : 0.0f;
    }
  };
#if defined(__AVX512F__)
  if (unit == 4 && n % 4 == 0) {
    const __m512i each = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    for (std::size_t i = 0; i < n; i += 4) {
      const __m512 four = _mm512_permutexvar_ps(each, _mm512_castps128_ps512(_mm_loadu_ps(size + i)));
      const __mmask16 kept = _mm512_cmp_ps_mask(four, _mm512_set1_ps(least), _CMP_GE_OQ);
      _mm512_storeu_ps(x + 4 * i, _mm512_maskz_loadu_ps(kept, x + 4 * i));
    }
    return;
  }
#endif
  if (unit == 4) drop(4);
  else drop(unit);
}
