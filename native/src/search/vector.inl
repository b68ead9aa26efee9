// The search kernels on 16 floats at a time, `Vec`: one register of AVX-512 or two of AVX2. Lane by lane they compute
// what search_scalar.cpp says. Internal linkage only.
//
// clip: 16 rows a Vec; four ratios share what is loaded per column, each with an error sum.
//
//     column c:   w[c][0..15]  importance[c]
//                    |
//     4 ratios:   level = clamp(round(w/step)), d = w - level*step, error += importance*d*d
//
// sweep: 64 rows, four sums that share a broadcast. Column j needs the errors of the columns before it:
//
//                  rows 0..15  16..31  32..47  48..63
//     error i         d0         d1      d2      d3       for every i < j
//     value j      s0 += f*d0  s1 +=   s2 +=   s3 +=      f = feedback[j][i], broadcast
//
// descend: 16 columns of one row. Most codes stay, so all 16 are looked at together; at the first that changes, its
// row of H goes into the gradient, and the lanes behind it are looked at again.

static inline Vec clamp(Vec x, Vec low, Vec high) { return least(high, greatest(low, x)); }

static inline void steps(Vec low, Vec high, float ratio, const GridLevels& grid, float* step, float* zero) {
  low = times(low, all(ratio));
  high = times(high, all(ratio));
  const Vec top = all(grid.high);
  if (grid.symmetric) {
    store(step, over(greatest(absolute(low), absolute(high)), top));
    for (std::size_t l = 0; l < kLanes; ++l) step[l] = storable_step(step[l]);
    store(zero, all(0.0f));
    return;
  }
  low = least(low, all(0.0f));
  high = greatest(high, all(0.0f));
  store(step, over(minus(high, low), top));
  for (std::size_t l = 0; l < kLanes; ++l) step[l] = storable_step(step[l]);
  store(zero, clamp(whole(over(negative(low), load(step))), all(0.0f), top));
}

constexpr int kRatios = 4;

static void clip(const ClipTile& t) {
  const Vec low = load(t.least), high = load(t.largest);
  steps(low, high, t.ratios[0], t.grid, t.step, t.zero);
  Vec best = all(__builtin_inff());
  for (std::size_t first = 0; first < t.count; first += kRatios) {
    alignas(64) float step[kRatios][kLanes], zero[kRatios][kLanes];
    Vec inverse[kRatios], bottom[kRatios], top[kRatios], error[kRatios];
    for (int i = 0; i < kRatios; ++i) {
      const std::size_t ratio = first + i < t.count ? first + i : t.count - 1;  // the last again: never better
      steps(low, high, t.ratios[ratio], t.grid, step[i], zero[i]);
      inverse[i] = over(all(1.0f), load(step[i]));
      bottom[i] = minus(all(t.grid.low), load(zero[i]));
      top[i] = minus(all(t.grid.high), load(zero[i]));
      error[i] = all(0.0f);
    }
    for (std::size_t c = 0; c < t.columns; ++c) {
      const Vec w = load(t.weight + c * kClipRows), importance = all(t.importance[c]);
      for (int i = 0; i < kRatios; ++i) {
        const Vec level = clamp(whole(times(w, inverse[i])), bottom[i], top[i]);
        const Vec d = minus_fused(level, load(step[i]), w);
        error[i] = fused(times(importance, d), d, error[i]);
      }
    }
    for (int i = 0; i < kRatios; ++i) {
      const Mask better = less(error[i], best);
      best = choose(better, error[i], best);
      store(t.step, choose(better, load(step[i]), load(t.step)));
      store(t.zero, choose(better, load(zero[i]), load(t.zero)));
    }
  }
}

constexpr int kParts = kSweepRows / kLanes;

// sums += feedback of the errors of columns [from, to) to one column.
static inline void feed_back(const SweepTile& t, const float* feedback, std::size_t from, std::size_t to,
                             Vec (&sums)[kParts]) {
  for (std::size_t i = from; i < to; ++i) {
    const Vec f = all(feedback[i]);
    const float* const d = t.error + i * kSweepRows;
    for (int p = 0; p < kParts; ++p) sums[p] = fused(f, load(d + p * kLanes), sums[p]);
  }
}

static inline void load_all(const float* from, Vec (&to)[kParts]) {
  for (int p = 0; p < kParts; ++p) to[p] = load(from + p * kLanes);
}

static inline void store_all(float* to, const Vec (&from)[kParts]) {
  for (int p = 0; p < kParts; ++p) store(to + p * kLanes, from[p]);
}

static inline void keep_pattern(const SweepTile& t, std::size_t first) {
  for (int p = 0; p < kParts; ++p) {
    const auto place = [&](std::size_t i) { return (first + i) * kSweepRows + static_cast<std::size_t>(p) * kLanes; };
    const auto score = [&](std::size_t i) {
      const Vec x = times(load(t.value + place(i)), all(t.weighting[first + i]));
      return choose(load_mask(t.mask + place(i)), times(x, x), all(-1.0f));
    };
    Mask kept[256];
    for (std::size_t i = 0; i < t.m; ++i) {
      const Vec mine = score(i);
      Vec rank = all(0.0f);
      for (std::size_t j = 0; j < t.m; ++j) {
        if (j == i) continue;
        const Mask ahead = j < i ? not_less(score(j), mine) : less(mine, score(j));
        rank = plus(rank, choose(ahead, all(1.0f), all(0.0f)));
      }
      kept[i] = both(less(rank, all(static_cast<float>(t.n))), load_mask(t.mask + place(i)));
    }
    for (std::size_t i = 0; i < t.m; ++i) store_mask(t.mask + place(i), kept[i]);
  }
}

static void sweep(const SweepTile& t) {
  const std::size_t stripe = t.m == 0 ? 1 : t.m;
  const Vec low = all(t.grid.low), high = all(t.grid.high);
  Vec sums[kParts];
  for (std::size_t first = 0; first < t.columns; first += stripe) {
    for (std::size_t j = first; j < first + stripe; ++j) {
      load_all(t.value + j * kSweepRows, sums);
      feed_back(t, t.feedback + j * t.columns, 0, first, sums);
      store_all(t.value + j * kSweepRows, sums);
    }
    if (t.m != 0) keep_pattern(t, first);
    for (std::size_t j = first; j < first + stripe; ++j) {
      if (j > first) {
        load_all(t.value + j * kSweepRows, sums);
        feed_back(t, t.feedback + j * t.columns, first, j, sums);
        store_all(t.value + j * kSweepRows, sums);
      } else if (stripe > 1) {
        load_all(t.value + j * kSweepRows, sums);
      }
      for (int p = 0; p < kParts; ++p) {
        const std::size_t at = j * kSweepRows + static_cast<std::size_t>(p) * kLanes;
        Vec kept = sums[p];
        if (t.step != nullptr) {
          const Vec step = load(t.step[j] + p * kLanes), zero = load(t.zero[j] + p * kLanes);
          const Vec code = clamp(plus(whole(over(kept, step)), zero), low, high);
          store(t.code + at, code);
          kept = times(minus(code, zero), step);
        }
        if (t.mask != nullptr) kept = choose(load_mask(t.mask + at), kept, all(0.0f));
        store(t.error + at, minus(t.weight == nullptr ? sums[p] : load(t.weight + at), kept));
      }
    }
  }
}

static float dot(const float* a, const float* b, std::size_t n) {
  Vec sum = all(0.0f);
  std::size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum = fused(load(a + i), load(b + i), sum);
  if (i < n) sum = fused(load_first(a + i, n - i), load_first(b + i, n - i), sum);
  return tree(sum);
}

// y += factor·x.
static inline void add(Vec factor, const float* x, float* y, std::size_t n) {
  std::size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, fused(factor, load(x + i), load(y + i)));
  if (i < n) store_first(y + i, n - i, fused(factor, load_first(x + i, n - i), load_first(y + i, n - i)));
}

// y += a·x, z += b·x.
static inline void add_both(Vec a, Vec b, const float* x, float* y, float* z, std::size_t n) {
  std::size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec v = load(x + i);
    store(y + i, fused(a, v, load(y + i)));
    store(z + i, fused(b, v, load(z + i)));
  }
  if (i < n) {
    const Vec v = load_first(x + i, n - i);
    store_first(y + i, n - i, fused(a, v, load_first(y + i, n - i)));
    store_first(z + i, n - i, fused(b, v, load_first(z + i, n - i)));
  }
}

static bool move_step(const DescentRow& d, std::size_t group) {
  const std::size_t first = group * d.width;
  float* const product = d.product + group * d.stride;
  const float slope = dot(d.level + first, d.gradient + first, d.width);
  const float curvature = dot(d.level + first, product + first, d.width);
  const float step = best_step(d.step[group], slope, curvature, d.row_scale), move = step - d.step[group];
  if (move == 0.0f) return false;
  d.step[group] = step;
  add(all(-move), product, d.gradient, d.columns);
  return true;
}

static bool move_codes(const DescentRow& d, std::size_t group) {
  bool moved = false;
  const float step = d.step[group];
  const Vec inverse = all(1.0f / step);
  const Vec low = all(d.grid.low - d.zero[group]), high = all(d.grid.high - d.zero[group]);
  const std::size_t end = (group + 1) * d.width;
  for (std::size_t j = group * d.width; j < end; j += kLanes) {
    const std::size_t n = end - j < kLanes ? end - j : kLanes;
    unsigned open = (1u << n) - 1;  // lanes not yet passed
    while (open != 0) {
      const Vec level = load_first(d.level + j, n);
      const Vec slope = times(load_first(d.gradient + j, n), load_first(d.inverse + j, n));
      const Vec change = minus(clamp(whole(fused(slope, inverse, level)), low, high), level);
      open &= not_zero(change);
      if (open == 0) break;
      const unsigned lane = static_cast<unsigned>(__builtin_ctz(open));
      alignas(64) float changes[kLanes];
      store(changes, change);
      d.level[j + lane] += changes[lane];
      add_both(all(-(changes[lane] * step)), all(changes[lane]), d.hessian + (j + lane) * d.columns, d.gradient,
               d.product + group * d.stride, d.columns);
      moved = true;
      // Lanes behind this one may change now that did not before.
      open = ((1u << n) - 1) & ~((2u << lane) - 1);
    }
  }
  return moved;
}

static void descend(const DescentRow& d) {
  const std::size_t groups = d.columns / d.width;
  for (std::size_t sweep = 0; sweep < d.sweeps; ++sweep) {
    bool moved = false;
    if (d.steps_first) {
      for (std::size_t g = 0; g < groups; ++g) moved |= move_step(d, g);
    }
    for (std::size_t g = 0; g < groups; ++g) {
      if (!d.steps_first) moved |= move_step(d, g);
      moved |= move_codes(d, g);
    }
    if (!moved) return;
  }
}
