// Mamba-2's state space model. Included by ops.inl.
//
//   one token, 16 · kWide channels of a head   H[i][…] = decay · H[i][…] + b[i] · u[…], seen += c[i] · H[i][…]   all i
//
// Channels do not meet, so that a prompt's tokens run over a part of the state that stays in the first cache.

// Channels [at, at + 16 · kWide); of the last vector `count`.
template <std::size_t kWide>
static void state_channels(const StateSpaceTokens& x, std::size_t n, std::size_t row, std::size_t at,
                           std::size_t count, float* state) {
  for (std::size_t t = 0; t < x.count; ++t) {
    const std::size_t token = static_cast<std::size_t>(x.tokens[t]), offset = token * x.stride;
    const float *const b = x.b + offset, *const c = x.c + offset, *const from = x.x + offset + at;
    const float step = x.step[offset], decay = exponential(x.decay * step);
    const auto whole = [&](std::size_t w) { return w + 1 < kWide || count == kKeyBlock; };
    Lanes value[kWide], u[kWide] = {}, seen[kWide] = {};
    for (std::size_t w = 0; w < kWide; ++w) {
      value[w] = whole(w) ? lanes(from + w * kKeyBlock) : first_lanes(from + w * kKeyBlock, count);
      add_product(u[w], step, value[w]);
    }
    for (std::size_t i = 0; i < n; ++i) {
      float* const held = state + i * row + at;
      for (std::size_t w = 0; w < kWide; ++w) {
        const Lanes now = combined(decay, lanes(held + w * kKeyBlock), b[i], u[w]);
        store(now, held + w * kKeyBlock);
        add_product(seen[w], c[i], now);
      }
    }
    float* const out = x.out + token * x.out_stride + at;
    for (std::size_t w = 0; w < kWide; ++w) {
      add_product(seen[w], x.skip, value[w]);
      if (whole(w)) store(seen[w], out + w * kKeyBlock);
      else store_first(seen[w], count, out + w * kKeyBlock);
    }
  }
}

static void state_space(const StateSpaceTokens& x, std::size_t n, std::size_t head_dim, float* state) {
  const std::size_t row = (head_dim + kKeyBlock - 1) / kKeyBlock * kKeyBlock;
  std::size_t at = 0;
  for (; at + kStateWide * kKeyBlock <= head_dim; at += kStateWide * kKeyBlock) {
    state_channels<kStateWide>(x, n, row, at, kKeyBlock, state);
  }
  for (; at < head_dim; at += kKeyBlock) {
    state_channels<1>(x, n, row, at, head_dim - at < kKeyBlock ? head_dim - at : kKeyBlock, state);
  }
}
