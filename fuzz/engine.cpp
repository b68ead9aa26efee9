// Fuzz target (libFuzzer): whatever a file says of a model, check() refuses it or a pass over it stays inside its
// arrays.
//
//     make fuzz                  (or see fuzz/run.py)
//
// An input is a small model, described in a few bytes, and a list of damages. Arrays are made of random bytes, as long
// as the description says and in heap memory of exactly that size, so that the address sanitizer sees the first byte
// read beyond. A damage overwrites a field, overwrites bytes of an array, or makes an array shorter, longer or absent.
// What the bindings promise (lengths of biases, norms, tables) is kept: they compare it with the damaged sizes, so that
// such arrays are made afterwards.
//
//     byte 0      decoder, Scaling Transformer, or the masks and nibbles of the packed format
//     then        sizes, layouts, kinds: Bytes::next() in the order in which they are read below
//     then        damages, up to kDamages: what, where, value
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "tulle/check.hpp"
#include "tulle/dispatch.hpp"
#include "tulle/engine.hpp"
#include "tulle/scaling.hpp"

namespace {

using tulle::Layout;
using tulle::ScaleKind;
using tulle::WeightKind;

// Elements of an array that the target makes, at most. What asks for more would need a file as large.
constexpr std::size_t kMost = std::size_t{1} << 16;
constexpr std::size_t kDamages = 6;

// Would need a file larger than a run of the target is worth.
struct TooLarge {};

class Bytes {
 public:
  Bytes(const std::uint8_t* data, std::size_t size) : data_(data), left_(size) {}

  // Zero when there are no more.
  std::uint8_t next() {
    if (left_ == 0) return 0;
    --left_;
    return *data_++;
  }
  std::size_t below(std::size_t n) { return next() % n; }
  bool flag() { return next() & 1; }
  bool empty() const { return left_ == 0; }

  // Little and large numbers alike: up to 8 bytes, or a power of two and its neighbours.
  std::uint64_t number() {
    const std::uint8_t how = next();
    if (how < 64) return how;
    if (how < 128) return (std::uint64_t{1} << (how & 63)) + next() - 128;
    std::uint64_t value = 0;
    for (int i = 0; i < (how & 7) + 1; ++i) value = value << 8 | next();
    return value;
  }

 private:
  const std::uint8_t* data_;
  std::size_t left_;
};

// xorshift64
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15ull + 1) {}

  std::uint64_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_;
  }

 private:
  std::uint64_t state_;
};

// Heap memory of exactly its size, which may end at any byte that the type's alignment allows.
class Array {
 public:
  Array() = default;
  explicit Array(std::size_t bytes) : data_(new std::uint8_t[bytes]), bytes_(bytes) {}
  Array(std::size_t bytes, Random& random) : Array(bytes) {
    for (std::size_t i = 0; i < bytes; i += 8) {
      const std::uint64_t word = random.next();
      std::memcpy(data_.get() + i, &word, std::min<std::size_t>(8, bytes - i));
    }
  }
  // Numbers between −2 and 2.
  static Array floats(std::size_t count, Random& random) {
    if (count > kMost) throw TooLarge();
    Array made(4 * count);
    for (std::size_t i = 0; i < count; ++i) {
      const float value = static_cast<float>(static_cast<std::int32_t>(random.next() & 0xffff) - 0x8000) / 16384.0f;
      std::memcpy(made.data_.get() + 4 * i, &value, 4);
    }
    return made;
  }

  bool absent() const { return data_ == nullptr; }
  std::size_t bytes() const { return bytes_; }
  std::uint8_t* raw() const { return data_.get(); }
  template <typename T>
  const T* as() const {
    return reinterpret_cast<const T*>(data_.get());
  }
  void resize(std::size_t bytes) {
    Array made(bytes);
    std::memset(made.raw(), 0, bytes);
    if (data_ != nullptr) std::memcpy(made.raw(), raw(), std::min(bytes, bytes_));
    *this = std::move(made);
  }

 private:
  std::unique_ptr<std::uint8_t[]> data_;
  std::size_t bytes_ = 0;
};

// What may be damaged.
struct Places {
  std::vector<std::function<void(std::uint64_t)>> fields;
  struct Place {
    Array* array;
    std::size_t item;  // bytes of an element
  };
  std::vector<Place> arrays;

  template <typename T>
  void field(T& to) {
    fields.push_back([&to](std::uint64_t value) { to = static_cast<T>(value); });
  }
  void field(float& to) {
    fields.push_back([&to](std::uint64_t value) {
      const auto bits = static_cast<std::uint32_t>(value);
      std::memcpy(&to, &bits, 4);
    });
  }
  void field(bool& to) {
    fields.push_back([&to](std::uint64_t value) { to = value & 1; });
  }
  // Names that the bindings read: always one of them.
  template <typename Enum>
  void choice(Enum& to, std::uint64_t count) {
    fields.push_back([&to, count](std::uint64_t value) { to = static_cast<Enum>(value % count); });
  }
  // The bindings take sizes of at most 2^24.
  void size(std::size_t& to) {
    fields.push_back([&to](std::uint64_t value) { to = value % ((std::uint64_t{1} << 24) + 1); });
  }

  void damage(Bytes& bytes) {
    for (std::size_t i = 0; i < kDamages && !bytes.empty(); ++i) {
      const std::uint8_t what = bytes.next();
      const std::size_t where = bytes.next() | std::size_t{bytes.next()} << 8;
      if (what < 128) {
        if (!fields.empty()) fields[where % fields.size()](bytes.number());
        continue;
      }
      if (arrays.empty()) continue;
      const Place place = arrays[where % arrays.size()];
      if (what < 192) {
        const std::uint64_t at = bytes.number();
        const std::size_t count = 1 + bytes.below(8);
        for (std::size_t k = 0; k < count; ++k) {
          const std::uint8_t value = bytes.next();
          if (place.array->bytes() > 0) place.array->raw()[(at + k) % place.array->bytes()] = value;
        }
      } else if (what < 250) {
        const std::uint64_t count = bytes.number();
        if (count > kMost) continue;
        place.array->resize(count * place.item);
      } else {
        *place.array = Array();
      }
    }
  }
};

// A linear with its arrays.
struct LinearParts {
  tulle::Linear linear;
  Array values, masks, offsets, starts, scales, zeros, minima, row_scales, bias, score;
  bool biased = false, scored = false;
};

std::uint64_t kept_bytes(const tulle::LinearView& w, const std::uint8_t* mask, std::size_t count) {
  const tulle::PackingKernels& kernels = *tulle::active_isa().packing;
  if (w.kind != WeightKind::codes4) {
    return kernels.count_bits(mask, count) * tulle::bits_of(w.kind) / 8;
  }
  std::uint64_t bytes = 0;
  for (std::size_t i = 0; i < count; i += tulle::kPairCodes, mask += tulle::kPairCodes / 8) {
    bytes += std::max(kernels.count_bits(mask, 64), kernels.count_bits(mask + 8, 64));
  }
  return bytes;
}

// Bits that are kept: none, few, half, most, all.
void thin(std::uint8_t* mask, std::size_t bytes, std::size_t density, Random& random) {
  for (std::size_t i = 0; i < bytes; ++i) {
    const auto other = static_cast<std::uint8_t>(random.next());
    if (density == 0) mask[i] = 0;
    if (density == 1) mask[i] &= other;
    if (density == 3) mask[i] |= other;
    if (density == 4) mask[i] = 255;
  }
}

// A linear that check() lets through: rows × columns, laid out as the bytes say; codes in dense tiles where it is a table.
void make(LinearParts& p, std::size_t rows, std::size_t columns, Bytes& bytes, Random& random, bool table = false) {
  tulle::LinearView& w = p.linear.weight;
  w = tulle::LinearView{};
  w.layout = table ? Layout::tiles : static_cast<Layout>(bytes.below(6));
  w.kind = static_cast<WeightKind>(bytes.below(table ? tulle::kWeightKinds - 2 : tulle::kWeightKinds));
  if (w.input_major() && !w.is_codes()) w.kind = WeightKind::codes8;
  if (w.is_codes() && w.layout != Layout::tiles) {
    const std::size_t bits = tulle::bits_of(w.kind);
    if (bits == 2 || bits == 3) w.kind = w.sparse() ? WeightKind::codes4 : WeightKind::codes2;
    if (bits == 5 || bits == 6) w.kind = WeightKind::codes8;
    if (w.input_major() && w.sparse()) w.kind = WeightKind::codes4;
    if (!w.input_major() && w.kind == WeightKind::codes2) w.kind = WeightKind::codes4;
  }
  w.rows = rows;
  w.columns = columns;
  // Scales that share the inputs evenly, in segments of one group of units, two, …
  const std::uint8_t cut = bytes.next();
  std::size_t scales = 1 + (cut & 3);
  while (columns % scales != 0) --scales;
  if (!w.is_codes()) scales = 1;
  const std::size_t width = columns / scales;
  const std::size_t step = w.segment_step();
  w.segment = std::min(step * (1 + (cut >> 2 & 7)), (width + step - 1) / step * step);
  w.segments_per_scale = (width + w.segment - 1) / w.segment;
  w.segments = scales * w.segments_per_scale;
  const std::uint8_t extra = bytes.next();
  w.scale_kind = static_cast<ScaleKind>(extra & 3);
  const bool scale_of_rows = w.scale_kind == ScaleKind::u8 && w.is_codes() && !w.input_major();
  if (w.scale_kind == ScaleKind::u8 && !scale_of_rows) w.scale_kind = ScaleKind::f32;
  w.zero = extra >> 4;
  const std::size_t tiles = w.tiles(), count = tiles * tulle::kTileRows * w.padded();
  if (count > 4 * kMost) throw TooLarge();
  if (w.is_codes()) {
    const std::size_t numbers = tiles * w.scales_per_row() * tulle::kTileRows;
    const std::size_t item = tulle::scale_bytes(w.scale_kind);
    p.scales = Array(numbers * item, random);
    // Not too large: products stay finite, so that what follows sees numbers.
    for (std::size_t i = item - 1; item > 1 && i < p.scales.bytes(); i += item) p.scales.raw()[i] = 0x3a;
    if (extra & 4) p.zeros = Array(numbers, random);
    if (scale_of_rows) p.row_scales = Array::floats(tiles * tulle::kTileRows, random);
    else if (extra & 8 && w.layout == Layout::tiles) p.minima = Array(numbers * item, random);
  }
  const std::uint8_t density = static_cast<std::uint8_t>(bytes.below(5));
  if (!w.sparse()) {
    p.values = Array(count * tulle::bits_of(w.kind) / 8 + tulle::kSlack, random);
    if (!w.is_codes()) {  // exponents of small numbers
      const std::size_t item = w.kind == WeightKind::bf16 ? 2 : 4;
      for (std::size_t i = item - 1; i < p.values.bytes(); i += item) p.values.raw()[i] = 0x3c;
    }
  } else if (!w.input_major()) {
    p.masks = Array(count / 8, random);
    thin(p.masks.raw(), p.masks.bytes(), density, random);
    std::vector<std::uint64_t> offsets = {0};
    const std::uint8_t* mask = p.masks.raw();
    for (std::size_t tile = 0; tile < tiles; ++tile) {
      for (std::size_t chunk = 0; chunk < w.chunks(); ++chunk) {
        const std::size_t weights = w.segments_of(chunk) * w.segment * tulle::kTileRows;
        offsets.push_back(offsets.back() + kept_bytes(w, mask, weights));
        mask += weights / 8;
      }
    }
    p.values = Array(offsets.back() + tulle::kSlack, random);
    p.offsets = Array(8 * offsets.size());
    std::memcpy(p.offsets.raw(), offsets.data(), p.offsets.bytes());
  } else {
    std::vector<std::uint8_t> values;
    std::vector<std::uint64_t> offsets = {0};
    std::vector<std::uint32_t> starts;
    for (std::size_t panel = 0; panel < w.panels(); ++panel) {
      const std::size_t masks = w.lines_of(panel) * w.line_mask_bytes();
      for (std::size_t c = 0; c < w.input_blocks(); ++c) {
        starts.push_back(static_cast<std::uint32_t>(values.size() - offsets.back()));
        Array mask(masks, random);
        thin(mask.raw(), masks, density, random);
        values.insert(values.end(), mask.raw(), mask.raw() + masks);
        values.resize(values.size() + kept_bytes(w, mask.raw(), 8 * masks), static_cast<std::uint8_t>(random.next()));
      }
      starts.push_back(static_cast<std::uint32_t>(values.size() - offsets.back()));
      offsets.push_back(values.size());
    }
    p.values = Array(values.size() + tulle::kSlack, random);
    std::copy(values.begin(), values.end(), p.values.raw());
    p.offsets = Array(8 * offsets.size());
    std::memcpy(p.offsets.raw(), offsets.data(), p.offsets.bytes());
    p.starts = Array(4 * starts.size());
    std::memcpy(p.starts.raw(), starts.data(), p.starts.bytes());
  }
  const std::uint8_t input = bytes.next();
  const int grids[] = {8, 16, 4, 2};
  p.linear.input = {w.is_codes() ? grids[input & 3] : (input & 1 ? 8 : 0), (input & 4) == 0, 1.0f};
  p.linear.engine_grid = input & 8;
  p.biased = input & 16;
  p.scored = input & 32;
  tulle::Selection& s = p.linear.selection;
  s.kind = static_cast<tulle::Selection::Kind>(input >> 6);
  s.unit = w.blocks4() && columns % 4 == 0 ? 4 : 1;
  s.block = columns;
  s.keep = std::max(s.unit, columns / 2 / s.unit * s.unit);
  s.norm = extra & 16;
  s.rescale = extra & 32;
  s.threshold = 0.2f;
}

void places(LinearParts& p, Places& to) {
  tulle::LinearView& w = p.linear.weight;
  to.choice(w.kind, tulle::kWeightKinds);
  to.choice(w.layout, 6);
  to.choice(w.scale_kind, tulle::kScaleKinds);
  for (std::size_t* n : {&w.rows, &w.columns, &w.segment, &w.segments, &w.segments_per_scale}) to.field(*n);
  to.field(w.zero);
  to.field(p.linear.input.bits);
  to.field(p.linear.input.symmetric);
  to.field(p.linear.input.clip);
  to.field(p.linear.engine_grid);
  tulle::Selection& s = p.linear.selection;
  to.choice(s.kind, 4);
  for (std::size_t* n : {&s.keep, &s.block, &s.unit}) to.field(*n);
  to.field(s.norm);
  to.field(s.threshold);
  to.field(s.rescale);
  to.field(p.biased);
  to.field(p.scored);
  to.arrays.push_back({&p.values, 1});
  to.arrays.push_back({&p.masks, 1});
  to.arrays.push_back({&p.offsets, 8});
  to.arrays.push_back({&p.starts, 4});
  to.arrays.push_back({&p.scales, 4});
  to.arrays.push_back({&p.zeros, 1});
  to.arrays.push_back({&p.minima, 4});
  to.arrays.push_back({&p.row_scales, 4});
}

// As bindings/engine.cpp does it: pointers, lengths, check().
void bind(LinearParts& p, Random& random) {
  tulle::LinearView& w = p.linear.weight;
  const std::size_t item = tulle::scale_bytes(w.scale_kind);
  w.values = p.values.raw();
  w.masks = p.masks.raw();
  w.offsets = p.offsets.as<std::uint64_t>();
  w.starts = p.starts.as<std::uint32_t>();
  w.scales = p.scales.raw();
  w.zeros = p.zeros.raw();
  w.minima = p.minima.raw();
  w.row_scales = p.row_scales.as<float>();
  tulle::check(w, {p.values.bytes(), p.masks.bytes(), p.offsets.bytes() / 8, p.starts.bytes() / 4,
                   p.scales.bytes() / item, p.zeros.bytes(), p.minima.bytes() / item,
                   p.row_scales.bytes() / 4});
  if (p.biased) p.bias = Array::floats(w.rows, random);
  if (p.scored) p.score = Array::floats(w.columns, random);
  p.linear.bias = p.bias.as<float>();
  p.linear.selection.score = p.score.as<float>();
}

void make(tulle::Transform& t, std::size_t channels, Bytes& bytes, Random& random) {
  using Kind = tulle::Transform::Kind;
  t.kind = static_cast<Kind>(bytes.below(5));
  t.channels = channels;
  std::size_t power = 1;
  while (channels % (2 * power) == 0 && power < 16) power *= 2;
  t.block = power;
  t.base = 1;
  t.shared = bytes.flag();
  t.left = power;
  t.right = channels / power;
  std::size_t numbers = 0;
  if (t.kind == Kind::diagonal) numbers = channels;
  if (t.kind == Kind::hadamard && t.shared && channels / power > 1 && channels / power < 64) {
    t.base = channels / power;
    t.block = channels;
    numbers = t.base * t.base;
  }
  if (t.kind == Kind::block_matrix) numbers = t.block * (t.shared ? t.block : channels);
  if (t.kind == Kind::kronecker) numbers = t.left * t.left + t.right * t.right;
  const Array made = Array::floats(numbers, random);
  t.numbers.assign(made.as<float>(), made.as<float>() + numbers);
  if (t.kind != Kind::permutation) return;
  for (std::size_t i = 0; i < channels; ++i) t.index.push_back(static_cast<std::int32_t>(random.next() % channels));
}

void places(tulle::Transform& t, Places& to) {
  to.choice(t.kind, 5);
  for (std::size_t* n : {&t.channels, &t.left, &t.right}) to.size(*n);
  for (std::size_t* n : {&t.block, &t.base}) to.field(*n);
  to.field(t.shared);
  to.fields.push_back([&t](std::uint64_t value) { t.numbers.resize(value % 4096); });
  to.fields.push_back([&t](std::uint64_t value) { t.index.resize(value % 128); });
  to.fields.push_back([&t](std::uint64_t value) {
    if (!t.index.empty()) t.index[value % t.index.size()] = static_cast<std::int32_t>(value >> 8);
  });
}

struct GroupParts {
  std::vector<tulle::Transform> transforms;
  std::vector<std::unique_ptr<LinearParts>> linears;

  tulle::Group bind(Random& random) {
    tulle::Group group;
    for (const tulle::Transform& t : transforms) {
      tulle::check(t);
      group.transforms.push_back(t);
    }
    for (const auto& linear : linears) {
      ::bind(*linear, random);
      group.linears.push_back(linear->linear);
    }
    return group;
  }
};

GroupParts make_group(std::size_t columns, std::vector<std::size_t> rows, Bytes& bytes, Random& random) {
  GroupParts group;
  const std::uint8_t how = bytes.next();
  for (int i = 0; i < (how & 3) - 1; ++i) make(group.transforms.emplace_back(), columns, bytes, random);
  if (how & 4) {  // fused
    std::size_t all = 0;
    for (std::size_t r : rows) all += r;
    rows = {all};
  }
  // Often all linears of a group are packed alike.
  const Bytes before = bytes;
  for (std::size_t r : rows) {
    if (how & 8) bytes = before;
    group.linears.push_back(std::make_unique<LinearParts>());
    make(*group.linears.back(), r, columns, bytes, random);
  }
  return group;
}

void places(GroupParts& group, Places& to) {
  for (tulle::Transform& t : group.transforms) places(t, to);
  for (auto& linear : group.linears) places(*linear, to);
}

void places(tulle::Grid& grid, Places& to) {
  to.field(grid.bits);
  to.field(grid.symmetric);
  to.field(grid.clip);
}

constexpr std::size_t kBatch = 5, kContext = 20, kBlocks = (kContext + tulle::kKeyBlock - 1) / tulle::kKeyBlock;
constexpr std::size_t kSlots = 2, kPages = 3, kSnapshots = 2;

tulle::EngineSizes sizes_of(tulle::CacheKind cache, std::size_t threads) {
  return {kPages, kSlots, kContext, kBatch, cache, threads, kSnapshots};
}

// Passes that the check lets through, and some that it refuses: any page tables, slots and positions.
template <typename Engine>
void any_passes(Engine& engine, Bytes& bytes, std::size_t vocabulary, float* outputs) {
  std::vector<std::int32_t> tables(kSlots * kBlocks);
  for (std::int32_t& page : tables) page = static_cast<std::int32_t>(bytes.below(kPages + 2)) - 1;
  for (std::size_t number = 0; number < 4 && !bytes.empty(); ++number) {
    const std::size_t n = 1 + bytes.below(kBatch + 1);
    std::vector<std::int32_t> tokens, slots, positions, rows;
    for (std::size_t i = 0; i < n; ++i) {
      tokens.push_back(static_cast<std::int32_t>(bytes.below(vocabulary)));
      slots.push_back(static_cast<std::int32_t>(bytes.below(kSlots)));
      positions.push_back(static_cast<std::int32_t>(bytes.below(kContext + 1)));
      if (bytes.flag()) rows.push_back(static_cast<std::int32_t>(i));
    }
    const tulle::PassInput pass{tokens.data(), slots.data(), positions.data(), n,
                                tables.data(), rows.data(),  rows.size()};
    try {
      if (bytes.flag()) engine.forward(pass, outputs);
      else engine.embed(pass, outputs);
      engine.copy_page(bytes.below(kPages + 1), bytes.below(kPages + 1));
      engine.save_state(bytes.below(kSlots + 1), bytes.below(kSnapshots + 1));
      engine.load_state(bytes.below(kSnapshots + 1), bytes.below(kSlots + 1));
    } catch (const std::invalid_argument& error) {
      if (std::strchr(error.what(), '\n') != nullptr) __builtin_trap();
    }
  }
}

template <typename Engine>
void pass(Engine& engine, Bytes& bytes, std::size_t vocabulary, std::size_t batch) {
  const std::size_t n = 1 + bytes.below(batch);
  std::vector<std::int32_t> tokens, slots, positions, rows;
  for (std::size_t i = 0; i < n; ++i) {
    tokens.push_back(static_cast<std::int32_t>(bytes.below(vocabulary)));
    slots.push_back(0);
    positions.push_back(static_cast<std::int32_t>(i));
    rows.push_back(static_cast<std::int32_t>(i));
  }
  if (n * vocabulary > 4 * kMost) throw TooLarge();
  const std::unique_ptr<float[]> logits(new float[n * vocabulary]), hidden(new float[n * engine.hidden()]);
  // The last page first.
  const std::int32_t tables[kSlots * kBlocks] = {2, 0, -1, 1};
  engine.forward({tokens.data(), slots.data(), positions.data(), n, tables, rows.data(), n}, logits.get());
  engine.embed({tokens.data(), slots.data(), positions.data(), n, tables, rows.data(), n}, hidden.get());
  const std::int32_t next = static_cast<std::int32_t>(n), slot = 0, row = 0;
  engine.forward({tokens.data(), &slot, &next, 1, tables, &row, 1}, logits.get());
  const std::size_t most = std::max(vocabulary, engine.hidden());
  const std::unique_ptr<float[]> outputs(new float[(kBatch + 1) * most]);
  any_passes(engine, bytes, vocabulary, outputs.get());
  engine.take_reads();
  engine.weight_bytes();
  engine.work_bytes();
}

struct FeedForwardParts {
  std::size_t intermediate = 0;
  GroupParts gate_up, down;

  tulle::FeedForward bind(Random& random) { return {intermediate, gate_up.bind(random), down.bind(random)}; }
};

FeedForwardParts make_feed_forward(std::size_t hidden, std::size_t intermediate, Bytes& bytes, Random& random) {
  GroupParts gate_up = make_group(hidden, {intermediate, intermediate}, bytes, random);
  return {intermediate, std::move(gate_up), make_group(intermediate, {hidden}, bytes, random)};
}

void places(FeedForwardParts& parts, Places& to) {
  to.size(parts.intermediate);
  for (GroupParts* group : {&parts.gate_up, &parts.down}) places(*group, to);
}

// Experts with their router; none: a feed-forward.
struct MixtureParts {
  std::vector<FeedForwardParts> experts;
  GroupParts scores;
  tulle::Router router;
  Array correction;
  bool shared = false, shared_gate = false, corrected = false;

  tulle::Mixture bind(Random& random) {
    tulle::Mixture found;
    for (FeedForwardParts& one : experts) found.experts.push_back(one.bind(random));
    found.router = router;
    found.router.group = scores.bind(random);
    found.shared = shared;
    found.shared_gate = shared_gate;
    if (corrected) correction = Array::floats(experts.size() - (shared ? 1 : 0), random);
    found.router.correction = correction.as<float>();
    return found;
  }
};

void make(MixtureParts& parts, std::size_t hidden, std::size_t intermediate, Bytes& bytes, Random& random) {
  const std::uint8_t how = bytes.next();
  const std::size_t routed = 2 * (1 + (how & 1)), narrow = how & 2 ? 8 : 0;
  parts.shared = how & 4;
  parts.shared_gate = (how & 12) == 12;
  parts.corrected = how & 16;
  if (how & 32) parts.router.groups = 2;
  parts.router.score = static_cast<tulle::Router::Score>(how >> 6 & 1);
  parts.router.normalise = how & 128;
  parts.router.chosen = 1 + bytes.below(routed / parts.router.groups);
  parts.scores = parts.shared_gate ? make_group(hidden, {routed, 1}, bytes, random)
                                   : make_group(hidden, {routed}, bytes, random);
  for (std::size_t i = 0; i < routed + (parts.shared ? 1 : 0); ++i) {
    const std::size_t width = i == routed ? intermediate + narrow : intermediate;
    parts.experts.push_back(make_feed_forward(hidden, width, bytes, random));
  }
}

void places(MixtureParts& parts, Places& to) {
  places(parts.scores, to);
  tulle::Router& r = parts.router;
  for (std::size_t* n : {&r.chosen, &r.groups, &r.chosen_groups, &r.group_best}) to.size(*n);
  to.field(r.scale);
  for (FeedForwardParts& one : parts.experts) places(one, to);
}

struct LayerParts {
  GroupParts qkv, o;
  FeedForwardParts feed_forward;
  MixtureParts mixture;
  Array sinks;
  std::size_t window = 0;
  bool head_norms = false, sunk = false;
};

void decoder(Bytes& bytes) {
  Random random(bytes.next());
  tulle::Model m;
  const std::size_t dims[] = {8, 16, 24, 32, 40, 48, 64, 96};
  m.hidden = dims[bytes.below(8)];
  const std::size_t intermediate = dims[bytes.below(8)] + bytes.below(2) * 4;
  m.kv_heads = 1 + bytes.below(2);
  m.heads = m.kv_heads * (1 + bytes.below(3));
  m.head_dim = 2 * (1 + bytes.below(12));
  m.vocabulary = 1 + bytes.below(200);
  const std::uint8_t flags = bytes.next(), grids = bytes.next();
  const std::uint8_t more = bytes.next();
  m.gate = more & 1 ? tulle::Gate::quick_gelu : static_cast<tulle::Gate>(flags & 3);
  if (more & 2) m.gate_limit = m.up_offset = 1;
  m.embedding.kind = flags & 4 ? WeightKind::bf16 : WeightKind::f32;
  m.exact_head.kind = flags & 8 ? WeightKind::bf16 : WeightKind::f32;
  bool exact = flags & 16;
  const bool coded = flags & 128, exact_coded = coded && exact && flags & 8;
  std::size_t threads = 1 + (flags >> 5 & 3);
  if (grids & 1) m.query = {8, true, 1.0f};
  if (grids & 2) m.key = {4, false, 1.0f};
  if (grids & 4) m.value = {4, false, 0.9f};
  const std::size_t layers = grids >> 7 ? 2 : 1;
  tulle::Transform rotation;
  if (grids & 8) make(rotation, m.head_dim, bytes, random);
  // The second layer attends to the first one's keys, or keys are the values.
  const bool shares = layers == 2 && (more & 16), same = more & 32;
  auto cache = static_cast<tulle::CacheKind>(grids >> 4 & 3);
  const std::size_t q = m.heads * m.head_dim, kv = m.kv_heads * m.head_dim;
  std::vector<LayerParts> parts(layers);
  for (LayerParts& layer : parts) {
    layer.window = bytes.below(4);
    layer.head_norms = grids & 64;
    if (shares && &layer != parts.data()) layer.qkv = make_group(m.hidden, {q}, bytes, random);
    else if (same) layer.qkv = make_group(m.hidden, {q, kv}, bytes, random);
    else layer.qkv = make_group(m.hidden, {q, kv, kv}, bytes, random);
    layer.o = make_group(q, {m.hidden}, bytes, random);
    layer.sunk = more & 4;
    if (more & 8) make(layer.mixture, m.hidden, intermediate, bytes, random);
    else layer.feed_forward = make_feed_forward(m.hidden, intermediate, bytes, random);
  }
  GroupParts head = make_group(m.hidden, {m.vocabulary}, bytes, random);
  LinearParts coded_embedding, coded_head;
  if (coded) make(coded_embedding, m.vocabulary, m.hidden, bytes, random, true);
  if (exact_coded) make(coded_head, m.vocabulary, m.hidden, bytes, random, true);
  std::size_t frequencies = m.head_dim / 2;

  Places to;
  for (std::size_t* n : {&m.hidden, &m.heads, &m.kv_heads, &m.head_dim, &m.vocabulary}) to.size(*n);
  to.fields.push_back([&](std::uint64_t value) { frequencies = value % 64; });
  float eps = 1e-6f, rope_scale = 1;
  to.field(eps);
  to.field(rope_scale);
  for (tulle::Grid* grid : {&m.query, &m.key, &m.value}) places(*grid, to);
  places(rotation, to);
  for (LayerParts& layer : parts) {
    to.field(layer.window);
    for (GroupParts* group : {&layer.qkv, &layer.o}) places(*group, to);
    if (layer.mixture.experts.empty()) places(layer.feed_forward, to);
    else places(layer.mixture, to);
  }
  places(head, to);
  if (coded) places(coded_embedding, to);
  if (exact_coded) places(coded_head, to);
  Bytes tokens = bytes;
  to.damage(bytes);

  // As bindings/engine.cpp makes a model.
  if (rotation.channels) {
    tulle::check(rotation);
    m.head_rotations.push_back(rotation);
  }
  m.rotary.push_back({std::vector<float>(frequencies, 0.5f), rope_scale, false});
  for (LayerParts& of : parts) {
    tulle::Layer layer;
    layer.window = of.window;
    layer.kv_heads = m.kv_heads;
    layer.head_dim = m.head_dim;
    if (shares && !m.layers.empty()) layer.kv_from = 0;
    else layer.value_is_key = same;
    layer.qkv = of.qkv.bind(random);
    layer.o = of.o.bind(random);
    if (of.sunk) of.sinks = Array::floats(m.heads, random);
    layer.sinks = of.sinks.as<float>();
    if (of.mixture.experts.empty()) layer.feed_forward = of.feed_forward.bind(random);
    else layer.mixture = of.mixture.bind(random);
    m.layers.push_back(layer);
  }
  m.head = head.bind(random);
  if (m.vocabulary > kMost || m.hidden > kMost || m.heads > kMost || m.head_dim > kMost || m.vocabulary * m.hidden > 4 * kMost) {
    throw TooLarge();
  }
  const std::size_t numbers = m.vocabulary * m.hidden;
  const auto table = [&](WeightKind kind) {
    Array made(numbers * (kind == WeightKind::bf16 ? 2 : 4), random);
    for (std::size_t i = kind == WeightKind::bf16 ? 1 : 3; i < made.bytes(); i += kind == WeightKind::bf16 ? 2 : 4) {
      made.raw()[i] = 0x3d;
    }
    return made;
  };
  const Array embedding = coded ? Array() : table(m.embedding.kind);
  const Array exact_head = exact && !exact_coded ? table(m.exact_head.kind) : Array();
  const Array norm = Array::floats(m.hidden, random), head_norm = Array::floats(m.head_dim, random);
  m.embedding.numbers = embedding.raw();
  m.exact_head.numbers = exact_head.raw();
  if (coded) {
    bind(coded_embedding, random);
    m.embedding.codes = coded_embedding.linear.weight;
  }
  if (exact_coded) {
    bind(coded_head, random);
    m.exact_head.codes = coded_head.linear.weight;
  }
  m.norm = {norm.as<float>(), nullptr, eps, false};
  for (std::size_t i = 0; i < layers; ++i) {
    m.layers[i].input_norm = m.layers[i].post_norm = m.norm;
    if (parts[i].head_norms) {
      m.layers[i].query_norm = m.layers[i].key_norm = {head_norm.as<float>(), nullptr, eps, false};
    }
  }
  const std::size_t vocabulary = m.vocabulary;
  tulle::Engine engine(std::move(m), sizes_of(cache, threads));
  pass(engine, tokens, vocabulary, kBatch);
}

struct MatrixParts {
  tulle::Matrix view;
  Array values, scales;

  void make(std::size_t rows, std::size_t columns, std::size_t kind) {
    view.kind = kind == 0 ? WeightKind::f32 : kind == 1 ? WeightKind::bf16 : WeightKind::codes8;
    view.rows = rows;
    view.columns = columns;
  }
  void places(Places& to) {
    to.fields.push_back([this](std::uint64_t value) {
      view.kind = value % 3 == 0 ? WeightKind::f32 : value % 3 == 1 ? WeightKind::bf16 : WeightKind::codes8;
    });
    to.size(view.rows);
    to.size(view.columns);
  }
  void bind(Random& random) {
    if (view.rows > kMost || view.columns > kMost || view.rows * view.columns > kMost) throw TooLarge();
    values = Array(view.rows * view.row_bytes(), random);
    if (view.kind == WeightKind::codes8) scales = Array::floats(view.rows, random);
    const std::size_t item = view.kind == WeightKind::f32 ? 4 : 2;
    if (view.kind != WeightKind::codes8) {
      for (std::size_t i = item - 1; i < values.bytes(); i += item) values.raw()[i] = 0x3d;
    }
    view.values = values.raw();
    view.scales = scales.as<float>();
  }
};

struct PanelParts {
  tulle::Panels view;
  Array values;

  void make(std::size_t inputs, std::size_t outputs, bool half) {
    view.kind = half ? WeightKind::bf16 : WeightKind::f32;
    view.inputs = inputs;
    view.outputs = outputs;
  }
  void places(Places& to) {
    to.fields.push_back([this](std::uint64_t value) { view.kind = value & 1 ? WeightKind::bf16 : WeightKind::f32; });
    to.size(view.inputs);
    to.size(view.outputs);
  }
  void bind(Random& random) {
    if (view.inputs > kMost || view.outputs > kMost || view.panels() * view.inputs * tulle::kPanel > kMost) {
      throw TooLarge();
    }
    const std::size_t item = view.kind == WeightKind::f32 ? 4 : 2;
    values = Array(view.panels() * view.inputs * tulle::kPanel * item, random);
    for (std::size_t i = item - 1; i < values.bytes(); i += item) values.raw()[i] = 0x3c;
    view.values = values.raw();
  }
};

void scaling(Bytes& bytes) {
  Random random(bytes.next());
  tulle::ScalingModel m;
  const std::uint8_t flags = bytes.next();
  m.heads = 1 + bytes.below(3);
  m.hidden = m.heads * 2 * (1 + bytes.below(8));
  std::size_t modules = 1 + bytes.below(4);
  while (m.hidden % modules != 0) --modules;
  m.modules = flags & 1 ? modules : 0;
  const std::size_t block = 1 + bytes.below(8);
  m.block = flags & 2 ? block : 0;
  m.intermediate = block * (1 + bytes.below(12));
  const std::size_t loss = 1 + bytes.below(4);
  m.loss_modules = flags & 4 ? loss : 0;
  m.vocabulary = loss * (1 + bytes.below(30));
  m.eps = 1e-6f;
  m.embedding_kind = flags & 8 ? WeightKind::bf16 : WeightKind::f32;
  std::size_t frequencies = flags & 16 ? m.hidden / m.heads / 2 : 0;
  const bool exact = flags & 32, biased = flags & 64;
  const auto cache = static_cast<tulle::CacheKind>(bytes.below(4));
  const std::size_t d = m.hidden, f = m.intermediate, size = d / modules, rank = 1 + bytes.below(8);
  const std::uint8_t kinds = bytes.next();

  MatrixParts head, exact_head, q, k, v, o, w1, w2, c1, multiplicative, loss_d;
  PanelParts e, loss_e, q_conv, k_conv, v_conv, c2;
  for (MatrixParts* p : {&q, &k, &v, &o}) p->make(d, d, (kinds & 3) % 3);
  w1.make(f, d, (kinds >> 2 & 3) % 3);
  if (m.block > 0) w2.make(f, d, (kinds >> 4 & 3) % 3);
  else w2.make(d, f, (kinds >> 4 & 3) % 3);
  c1.make(rank, d, (kinds >> 6 & 3) % 3);
  c2.make(rank, f, kinds & 1);
  multiplicative.make(modules, d, kinds & 1);
  e.make(d, size, kinds & 2);
  q_conv.make(tulle::kTaps * 3 * size, size, kinds & 4);
  k_conv.make(tulle::kTaps * 3 * size, size, kinds & 8);
  v_conv.make(tulle::kTaps * size, size, kinds & 16);
  head.make(m.vocabulary, d, (kinds >> 5 & 3) % 3);
  exact_head.make(m.vocabulary, d, kinds & 1);
  loss_d.make(loss, d, kinds & 1);
  loss_e.make(d, m.vocabulary / loss, kinds & 2);

  Places to;
  for (std::size_t* n :
       {&m.hidden, &m.intermediate, &m.heads, &m.vocabulary, &m.modules, &m.block, &m.loss_modules}) {
    to.size(*n);
  }
  to.field(m.eps);
  to.fields.push_back([&](std::uint64_t value) { frequencies = value % 64; });
  std::vector<MatrixParts*> matrices = {&w1, &w2};
  std::vector<PanelParts*> panels;
  if (m.modules == 0) matrices.insert(matrices.end(), {&q, &k, &v, &o});
  else matrices.push_back(&multiplicative), panels.insert(panels.end(), {&e, &q_conv, &k_conv, &v_conv});
  if (m.block > 0) matrices.push_back(&c1), panels.push_back(&c2);
  if (m.loss_modules > 0) matrices.push_back(&loss_d), panels.push_back(&loss_e);
  else matrices.push_back(&head);
  if (exact) matrices.push_back(&exact_head);
  for (MatrixParts* p : matrices) p->places(to);
  for (PanelParts* p : panels) p->places(to);
  Bytes tokens = bytes;
  to.damage(bytes);

  // As bindings/scaling.cpp makes a model: what the damaged sizes do not ask for is not there.
  for (MatrixParts* p : matrices) p->bind(random);
  for (PanelParts* p : panels) p->bind(random);
  if (m.hidden > kMost || m.vocabulary > kMost || m.hidden * m.vocabulary > kMost) throw TooLarge();
  std::vector<Array> kept;
  const auto floats = [&](std::size_t count) {
    kept.push_back(Array::floats(count, random));
    return kept.back().as<float>();
  };
  const auto bias = [&](std::size_t count) { return biased ? floats(count) : nullptr; };
  m.inverse_frequencies.assign(frequencies, 0.5f);
  const Array embedding = Array::floats(m.vocabulary * m.hidden, random);
  Array half;
  if (m.embedding_kind == WeightKind::bf16) half = Array(2 * m.vocabulary * m.hidden, random);
  m.embedding = m.embedding_kind == WeightKind::bf16 ? half.raw() : embedding.raw();
  m.norm = floats(m.hidden);
  tulle::ScalingLayer l;
  l.input_norm = floats(m.hidden);
  l.post_norm = floats(m.hidden);
  const auto projection = [&](const MatrixParts& p) { return tulle::Projection{p.view, bias(p.view.rows)}; };
  const auto convolution = [&](const PanelParts& p) { return tulle::Convolution{p.view, bias(p.view.outputs)}; };
  if (m.modules == 0) {
    l.q = projection(q);
    l.k = projection(k);
    l.v = projection(v);
    l.o = projection(o);
  } else {
    l.multiplicative = {multiplicative.view, e.view, bias(multiplicative.view.rows * e.view.outputs)};
    l.q_conv = convolution(q_conv);
    l.k_conv = convolution(k_conv);
    l.v_conv = convolution(v_conv);
  }
  l.w1 = projection(w1);
  l.w2 = {w2.view, bias(m.block == 0 ? w2.view.rows : w2.view.columns)};
  if (m.block > 0) {
    l.c1 = c1.view;
    l.c2 = c2.view;
    l.c2_bias = floats(c2.view.outputs);
  }
  m.layers.push_back(l);
  if (m.loss_modules > 0) m.loss = {loss_d.view, loss_e.view, bias(loss_d.view.rows * loss_e.view.outputs)};
  else m.head = head.view;
  if (exact) m.exact_head = exact_head.view;
  const std::size_t vocabulary = m.vocabulary;
  tulle::ScalingEngine engine(std::move(m), sizes_of(cache, 1));
  pass(engine, tokens, vocabulary, kBatch);
}

// Masks and nibbles of the packed format, as bindings/module.cpp unpacks them.
template <typename T>
void masks(Bytes& bytes) {
  Random random(bytes.next());
  const tulle::PackingKernels& kernels = *tulle::active_isa().packing;
  const std::size_t n = 1 + bytes.next() + 256 * bytes.below(4), density = bytes.below(5);
  Array mask((n + 7) / 8, random);
  thin(mask.raw(), mask.bytes(), density, random);
  Places to;
  to.arrays.push_back({&mask, 1});
  to.damage(bytes);
  if (mask.bytes() != (n + 7) / 8) throw std::invalid_argument("bytes per row of mask");
  const std::size_t kept = kernels.count_bits(mask.raw(), n);
  const Array values(kept * sizeof(T), random), dense(n * sizeof(T)), again(kept * sizeof(T));
  const auto& of = kernels.mask_kernels<T>();
  of.expand(mask.raw(), n, values.as<T>(), kept, reinterpret_cast<T*>(dense.raw()));
  of.compress(mask.raw(), n, dense.as<T>(), reinterpret_cast<T*>(again.raw()));
  if (kept > 0 && std::memcmp(values.raw(), again.raw(), values.bytes()) != 0) __builtin_trap();
  const Array packed((n + 1) / 2, random), codes(n);
  kernels.unpack_nibbles(packed.raw(), n, codes.raw());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Bytes bytes(data, size);
  try {
    switch (bytes.below(8)) {
      case 5:
      case 6: scaling(bytes); break;
      case 7:
        switch (bytes.below(3)) {
          case 0: masks<std::uint8_t>(bytes); break;
          case 1: masks<std::uint16_t>(bytes); break;
          default: masks<std::uint32_t>(bytes);
        }
        break;
      default: decoder(bytes);
    }
  } catch (const std::invalid_argument& error) {
    // What was refused is said in one line.
    if (std::strchr(error.what(), '\n') != nullptr) __builtin_trap();
  } catch (const TooLarge&) {
  }
  return 0;
}
