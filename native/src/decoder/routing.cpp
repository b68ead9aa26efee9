#include "decoder/routing.hpp"

#include <algorithm>
#include <cmath>

namespace tulle {
namespace {

constexpr float kNormaliser = 1e-20f;  // added to the sum that weights are divided by

// Marks and returns the largest of those without a mark, the first of equal ones. There is one.
std::size_t take_largest(const float* values, std::uint8_t* marks, std::size_t count) {
  std::size_t best = count;
  for (std::size_t i = 0; i < count; ++i) {
    if (marks[i] == 0 && (best == count || values[i] > values[best])) best = i;
  }
  marks[best] = 1;
  return best;
}

void softmax(float* x, std::size_t count) {
  float most = x[0], total = 0;
  for (std::size_t i = 1; i < count; ++i) most = std::max(most, x[i]);
  for (std::size_t i = 0; i < count; ++i) total += x[i] = std::exp(x[i] - most);
  for (std::size_t i = 0; i < count; ++i) x[i] /= total;
}

// Marks the experts of all groups but the best.
void mark_other_groups(const Router& r, const float* eligible, std::size_t count, std::uint8_t* marks, float* sums) {
  const std::size_t own = count / r.groups;
  std::uint8_t* const of_groups = marks + count;
  for (std::size_t g = 0; g < r.groups; ++g) {
    sums[g] = 0;
    for (std::size_t k = 0; k < r.group_best; ++k) {
      sums[g] += eligible[g * own + take_largest(eligible + g * own, marks + g * own, own)];
    }
  }
  std::fill_n(marks, count, std::uint8_t{1});
  std::fill_n(of_groups, r.groups, std::uint8_t{0});
  for (std::size_t k = 0; k < r.chosen_groups; ++k) {
    std::fill_n(marks + take_largest(sums, of_groups, r.groups) * own, own, std::uint8_t{0});
  }
}

}  // namespace

void choose_experts(const Router& r, float* scores, std::size_t count, std::uint32_t* experts, float* weights,
                    float* spare, std::uint8_t* marks) {
  if (r.score == Router::Score::softmax) softmax(scores, count);
  else
    for (std::size_t i = 0; i < count; ++i) scores[i] = 1.0f / (1.0f + std::exp(-scores[i]));
  const float* eligible = scores;
  if (r.correction != nullptr) {
    for (std::size_t i = 0; i < count; ++i) spare[i] = scores[i] + r.correction[i];
    eligible = spare;
  }
  std::fill_n(marks, count, std::uint8_t{0});
  if (r.groups > 1) mark_other_groups(r, eligible, count, marks, spare + count);
  for (std::size_t k = 0; k < r.chosen; ++k) {
    experts[k] = static_cast<std::uint32_t>(take_largest(eligible, marks, count));
  }
  std::sort(experts, experts + r.chosen);
  float total = kNormaliser;
  for (std::size_t k = 0; k < r.chosen; ++k) total += weights[k] = scores[experts[k]];
  const float factor = r.normalise ? r.scale / total : r.scale;
  for (std::size_t k = 0; k < r.chosen; ++k) {
    weights[k] *= factor;
    if (r.expert_scales != nullptr) weights[k] *= r.expert_scales[experts[k]];
  }
}

}  // namespace tulle
