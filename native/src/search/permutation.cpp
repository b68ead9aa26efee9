#include "tulle/permutation.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <thread>

namespace tulle {
namespace {

constexpr std::size_t kEpochs = 100;
constexpr std::size_t kStillEpochs = 10;  // of these, the last ones, which take no swap that loses
constexpr std::size_t kGroup = 64;        // stripes that are annealed together; groups run in parallel
constexpr std::size_t kSamples = 256;     // random swaps that set the unit of temperature

// SplitMix64 (Steele, Lea, Flood 2014).
struct Random {
  std::uint64_t state;
  std::uint64_t next() {
    std::uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  std::size_t below(std::size_t n) { return static_cast<std::size_t>(((next() >> 32) * n) >> 32); }
  double uniform() { return static_cast<double>((next() >> 11) + 1) * 0x1p-53; }  // (0, 1]
};

// Calls work(i) for i < count on up to `threads` threads.
template <typename Work>
void in_parallel(std::size_t count, std::size_t threads, const Work& work) {
  threads = std::min(threads, count);
  if (threads <= 1) {
    for (std::size_t i = 0; i < count; ++i) work(i);
    return;
  }
  std::atomic<std::size_t> next{0};
  std::vector<std::thread> pool;
  for (std::size_t t = 0; t < threads; ++t) {
    pool.emplace_back([&] {
      for (std::size_t i = next++; i < count; i = next++) work(i);
    });
  }
  for (std::thread& thread : pool) thread.join();
}

template <typename T>
class Search {
 public:
  Search(const ScoreKernels<T>& kernels, const T* scores, std::size_t columns, std::size_t stride,
         std::vector<std::int64_t> index, const Annealing& settings)
      : kernels_(kernels), scores_(scores), stride_(stride), index_(std::move(index)), settings_(settings),
        own_excess_(columns), storage_(columns * stride + kRowBlock) {
    std::size_t space = storage_.size() * sizeof(T);
    void* start = storage_.data();
    limits_ = static_cast<T*>(std::align(64, columns * stride * sizeof(T), start, space));
    in_parallel(stripes(), settings_.threads, [this](std::size_t s) { update(s); });
  }

  std::vector<std::int64_t> run(std::int64_t* gained) {
    const double unit = typical_gain();
    std::vector<std::int64_t> best = index_;
    std::int64_t total = 0, most = 0;
    std::vector<std::size_t> order(stripes());
    for (std::size_t s = 0; s < order.size(); ++s) order[s] = s;
    const std::size_t groups = (order.size() + kGroup - 1) / kGroup;
    std::vector<std::int64_t> gains(groups);
    for (std::size_t epoch = 0; epoch < kEpochs && unit > 0; ++epoch) {
      Random shuffle{settings_.seed * 0x9e3779b97f4a7c15u + epoch};
      if (groups > 1) {
        for (std::size_t i = order.size() - 1; i > 0; --i) std::swap(order[i], order[shuffle.below(i + 1)]);
      }
      const double progress = static_cast<double>(epoch) / (kEpochs - kStillEpochs - 1);
      const double temperature =
          epoch < kEpochs - kStillEpochs
              ? unit * settings_.start * std::pow(settings_.end / settings_.start, std::min(progress, 1.0))
              : 0.0;
      std::vector<std::uint64_t> seeds(groups);
      for (std::uint64_t& seed : seeds) seed = shuffle.next();
      in_parallel(groups, settings_.threads, [&](std::size_t g) {
        const std::size_t first = g * order.size() / groups, last = (g + 1) * order.size() / groups;
        const std::uint64_t share = settings_.proposals * (last - first) / (order.size() * kEpochs) + 1;
        gains[g] = anneal_group(order.data() + first, last - first, share, temperature, Random{seeds[g]});
      });
      for (std::int64_t gain : gains) total += gain;
      if (total > most) {
        most = total;
        best = index_;
      }
    }
    *gained = most;
    return best;
  }

 private:
  std::size_t stripes() const { return index_.size() / settings_.m; }
  const T* column(std::int64_t c) const { return scores_ + static_cast<std::size_t>(c) * stride_; }
  T* limit(std::int64_t c) { return limits_ + static_cast<std::size_t>(c) * stride_; }

  // Limits and own excesses of a stripe's columns.
  void update(std::size_t stripe) {
    const T* columns[kMost];
    T* limits[kMost];
    const std::int64_t* members = index_.data() + stripe * settings_.m;
    for (std::size_t i = 0; i < settings_.m; ++i) {
      columns[i] = column(members[i]);
      limits[i] = limit(members[i]);
    }
    kernels_.limits(columns, settings_.m, settings_.kept, stride_, limits);
    for (std::size_t i = 0; i < settings_.m; ++i) {
      own_excess_[static_cast<std::size_t>(members[i])] =
          static_cast<std::int64_t>(kernels_.excess(columns[i], limits[i], stride_));
    }
  }

  std::int64_t gain(std::int64_t p, std::int64_t q) {
    return static_cast<std::int64_t>(kernels_.excess(column(q), limit(p), stride_)) +
           static_cast<std::int64_t>(kernels_.excess(column(p), limit(q), stride_)) -
           own_excess_[static_cast<std::size_t>(p)] - own_excess_[static_cast<std::size_t>(q)];
  }

  double typical_gain() {
    if (stripes() < 2) return 0;
    Random random{settings_.seed};
    double squares = 0;
    for (std::size_t i = 0; i < kSamples; ++i) {
      const std::size_t a = random.below(stripes()), b = (a + 1 + random.below(stripes() - 1)) % stripes();
      const double g = static_cast<double>(gain(index_[a * settings_.m + random.below(settings_.m)],
                                                index_[b * settings_.m + random.below(settings_.m)]));
      squares += g * g;
    }
    return std::sqrt(squares / kSamples);
  }

  std::int64_t anneal_group(const std::size_t* members, std::size_t count, std::uint64_t proposals, double temperature,
                            Random random) {
    std::int64_t total = 0;
    if (count < 2) return 0;
    for (std::uint64_t i = 0; i < proposals; ++i) {
      const std::size_t first = random.below(count), second = (first + 1 + random.below(count - 1)) % count;
      const std::size_t a = members[first], b = members[second];
      std::int64_t& p = index_[a * settings_.m + random.below(settings_.m)];
      std::int64_t& q = index_[b * settings_.m + random.below(settings_.m)];
      const std::int64_t found = gain(p, q);
      const bool taken = temperature > 0 ? static_cast<double>(found) > temperature * std::log(random.uniform())
                                         : found > 0;
      if (!taken) continue;
      std::swap(p, q);
      update(a);
      update(b);
      total += found;
    }
    return total;
  }

  static constexpr std::size_t kMost = 32;

  const ScoreKernels<T>& kernels_;
  const T* scores_;
  std::size_t stride_;
  std::vector<std::int64_t> index_;
  Annealing settings_;
  std::vector<std::int64_t> own_excess_;
  std::vector<T> storage_;
  T* limits_;
};

}  // namespace

template <typename T>
std::vector<std::int64_t> anneal(const PermutationKernels& kernels, const T* scores, std::size_t columns,
                                 std::size_t stride, std::vector<std::int64_t> index, const Annealing& settings,
                                 std::int64_t* gain) {
  return Search<T>(kernels.score_kernels<T>(), scores, columns, stride, std::move(index), settings).run(gain);
}

template std::vector<std::int64_t> anneal(const PermutationKernels&, const std::uint8_t*, std::size_t, std::size_t,
                                          std::vector<std::int64_t>, const Annealing&, std::int64_t*);
template std::vector<std::int64_t> anneal(const PermutationKernels&, const std::int16_t*, std::size_t, std::size_t,
                                          std::vector<std::int64_t>, const Annealing&, std::int64_t*);

}  // namespace tulle
