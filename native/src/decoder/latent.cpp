// Latent attention, from its first linears to what o reads.
//
//   first linears ─ norm ─ query_up ─────────────────────► queries
//        │                                                    │ absorbed: W_kᵀ of each head
//        └─ norm ─ as kv_up reads it ─► cache, as value       ▼
//        └─ rotary ───────────────────► cache, as key ───► attend ─ W_v of each head ─► o
//
// Absorbed, a token is kept as one latent and one short key for all heads, and nothing is made of the past again.
// Expanded, kv_up makes every head's key and value, which are kept as other attention keeps them.
#include <algorithm>
#include <cstring>

#include "cpu/team.hpp"
#include "decoder/state.hpp"

namespace tulle {

void Engine::State::attend_latents(const Pass& pass, std::size_t index) {
  const Layer& l = model.layers[index];
  const LatentAttention& own = l.latent;
  const std::size_t heads = model.heads, all = pass.n * heads;
  for (std::size_t t = pass.first; t < pass.last; ++t) narrow(pass, index, t);
  if (own.query_rank > 0) {
    pass.publish();
    multiply(pass, own.query_up, plans[index].query_up, partial_sums.back, pass.n, latent.queries.data());
  } else {
    wait();
  }
  if (!own.absorbed()) return expand(pass, index);
  for (std::size_t i = pass.thread; i < all; i += pass.team) absorb_query(pass, index, i % heads, i / heads);
  wait();
  multiply_pieces(pass, own.keys, latent.keys, heads * own.parts, latent.products.data());
  const std::vector<QueryBlock>& blocks = attention[plans[index].attention].blocks();
  for (std::size_t i = pass.thread; i < blocks.size(); i += pass.team) attend_absorbed(pass, index, blocks[i]);
  wait();
  multiply_pieces(pass, own.values, latent.values, heads, attended.data());
}

// Token t: its queries, or the input of what they come of; and what is kept of it.
void Engine::State::narrow(const Pass& pass, std::size_t index, std::size_t t) {
  const Layer& l = model.layers[index];
  const LatentAttention& own = l.latent;
  const Plan& plan = plans[index].qkv;
  const bool keeps = !pass.replicated || pass.thread == 0;
  const std::size_t queries = plan.outputs - own.rank - own.rotary;
  float* const row = of_thread[pass.thread].outputs.data();
  const float* const found =
      reduce(pass, l.qkv, plan, partial_sums.wide, pass.n, wide.data(), t, 0, plan.outputs, row);
  if (found != row) std::memcpy(row, found, plan.outputs * sizeof(float));
  if (own.query_rank > 0) {
    own.query_norm.run(ops, row, own.query_rank, vector(pass, 0));
    quantise_inputs(pass, own.query_up, plans[index].query_up, vector(pass, 0), t);
  } else if (keeps) {
    std::memcpy(latent.queries.data() + t * queries, row, queries * sizeof(float));
  }
  if (!keeps) return;
  float *const narrow = row + queries, *const rotated = narrow + own.rank;
  own.norm.run(ops, narrow, own.rank, narrow);
  if (l.rotary >= 0) rotary[static_cast<std::size_t>(l.rotary)].rotate(ops, t, rotated);
  if (own.absorbed()) return keep_latent(pass, index, narrow, rotated, t);
  std::memcpy(latent.kept.data() + t * (own.rank + own.rotary), narrow, (own.rank + own.rotary) * sizeof(float));
}

// To the cache, as kv_up would read it.
void Engine::State::keep_latent(const Pass& pass, std::size_t index, float* narrow, float* rotated, std::size_t t) {
  const LatentAttention& own = model.layers[index].latent;
  const float* const x = transformed(pass, own.transforms, narrow);
  if (x != narrow) std::memcpy(narrow, x, own.rank * sizeof(float));
  Grid grid = own.grid;
  if (own.selection.kind != Selection::Kind::none) {
    if (grid.bits > 0) ops.fake_quantise(narrow, own.rank, ops.range(narrow, own.rank, grid));
    grid.bits = 0;
    const float ratio = own.selection.run(ops, narrow, own.rank, vector(pass, 4));
    if (ratio != 1.0f) ops.scaled(narrow, ratio, own.rank, narrow);
  }
  cache.append(ops, view(pass, index, 0, static_cast<std::size_t>(pass.slots[t])),
               static_cast<std::size_t>(pass.positions[t]), rotated, narrow, model.key, grid);
}

// A query gets its position, and its plain channels become inputs of the absorbed keys.
void Engine::State::absorb_query(const Pass& pass, std::size_t index, std::size_t head, std::size_t t) {
  const Layer& l = model.layers[index];
  const LatentAttention& own = l.latent;
  const std::size_t width = model.heads * own.query(), first = head * own.query();
  float* const query = latent.queries.data() + t * width + first;
  if (own.query_rank > 0) {
    reduce(pass, own.query_up, plans[index].query_up, partial_sums.back, pass.n, latent.queries.data(), t, first,
           first + own.query(), query);
  }
  if (l.rotary >= 0) rotary[static_cast<std::size_t>(l.rotary)].rotate(ops, t, query + own.plain);
  for (std::size_t part = 0; part < own.parts; ++part) {
    const std::size_t piece = head * own.parts + part;
    const float* x = query;
    if (own.factors != nullptr) {
      ops.scale(query, own.factors + piece * own.plain, own.plain, vector(pass, 0));
      x = vector(pass, 0);
    }
    latent.keys[0].set(ops, own.keys, x, {piece * pass.n, t}, vector(pass, 4), vector(pass, 5));
  }
}

// Of a block of query rows: from the cache to inputs of the absorbed values.
void Engine::State::attend_absorbed(const Pass& pass, std::size_t index, const QueryBlock& block) {
  const LatentAttention& own = model.layers[index].latent;
  const std::size_t heads = model.heads, part = own.rank / own.parts;
  float* const room = of_thread[pass.thread].latents.data();
  const float *queries[kQueries], *latents[kQueries];
  float* to[kQueries];
  std::size_t begin[kQueries] = {}, end[kQueries];
  for (std::size_t r = 0; r < block.count; ++r) {
    const std::size_t t = (block.first + r) / heads, head = (block.first + r) % heads;
    const float* const products = latent.products.data() + t * own.keys.weight.rows;
    queries[r] = latent.queries.data() + (t * heads + head) * own.query() + own.plain;
    for (std::size_t p = 0; p < own.parts; ++p) {
      std::memcpy(room + r * own.rank + p * part, products + (head * own.parts + p) * own.tiled_part(),
                  part * sizeof(float));
    }
    latents[r] = room + r * own.rank;
    to[r] = room + (kQueries + r) * own.rank;
    end[r] = static_cast<std::size_t>(pass.positions[t]) + 1;
  }
  const std::size_t slot = attention[plans[index].attention].slot_of(block, pass.slots);
  ops.attend(view(pass, index, 0, slot), block.count, queries, latents, begin, end,
             model.attention_scale, 0, nullptr, to, of_thread[pass.thread].scores.data());
  for (std::size_t r = 0; r < block.count; ++r) {
    const std::size_t t = (block.first + r) / heads, head = (block.first + r) % heads;
    latent.values[0].set(ops, own.values, to[r], {head * pass.n, t}, vector(pass, 4), vector(pass, 5));
  }
}

// A linear whose rows are `pieces` equal runs of tiles, each with inputs of its own; all threads are done when it
// returns.
void Engine::State::multiply_pieces(const Pass& pass, const Linear& l, const GroupInputs& x, std::size_t pieces,
                                    float* y) {
  if (pass.replicated && pass.thread == 0) reads.bytes += static_cast<double>(l.bytes());
  const std::size_t tiles = l.weight.tiles() / pieces;
  for (std::size_t i = pass.thread; i < pieces; i += pass.team) {
    linear.run(l.weight, x[0].view(l, {i * pass.n, 0}, pass.n), i * tiles, (i + 1) * tiles, y, l.weight.rows,
               of_thread[pass.thread].kernel_scratch.data());
  }
  wait();
}

// From latents in memory to the heads' keys and values in the cache, and to `attended`.
void Engine::State::expand(const Pass& pass, std::size_t index) {
  const Layer& l = model.layers[index];
  const LatentAttention& own = l.latent;
  const Plan& plan = plans[index].query_up;
  const std::size_t heads = model.heads, width = heads * own.query();
  for (std::size_t t = pass.first; t < pass.last; ++t) {
    if (own.query_rank > 0 && (!pass.replicated || pass.thread == 0)) {
      // While the steps of their inputs are there.
      reduce(pass, own.query_up, plan, partial_sums.back, pass.n, latent.queries.data(), t, 0, width,
             latent.queries.data() + t * width);
    }
    quantise_inputs(pass, own.kv_up, plans[index].kv_up, latent.kept.data() + t * (own.rank + own.rotary), t);
  }
  pass.publish();
  multiply(pass, own.kv_up, plans[index].kv_up, partial_sums.wide, pass.n, latent.products.data());
  for (std::size_t i = pass.thread; i < pass.n * heads; i += pass.team) {
    append_expanded(pass, index, i % heads, i / heads);
  }
  wait();
  const Vectors queries{latent.queries.data(), width, own.query()};
  const Vectors outputs{attended.data(), heads * own.tiled_value(), own.tiled_value()};
  const Attention& attends = attention[plans[index].attention];
  const std::vector<QueryBlock>& blocks = attends.blocks();
  for (std::size_t i = pass.thread; i < blocks.size() * heads; i += pass.team) {
    const QueryBlock& block = blocks[i % blocks.size()];
    const std::size_t head = i / blocks.size();
    attends.run(ops, view(pass, index, head, attends.slot_of(block, pass.slots)), head, block, pass.positions, 0,
                  queries, outputs, nullptr, of_thread[pass.thread].scores.data());
  }
  wait();
}

// A head's query gets its position and is quantised; its key and value are appended to the cache.
void Engine::State::append_expanded(const Pass& pass, std::size_t index, std::size_t head, std::size_t t) {
  const Layer& l = model.layers[index];
  const LatentAttention& own = l.latent;
  const Plan& plan = plans[index].kv_up;
  float* const query = latent.queries.data() + (t * model.heads + head) * own.query();
  if (l.rotary >= 0) rotary[static_cast<std::size_t>(l.rotary)].rotate(ops, t, query + own.plain);
  if (const Transform* rotation = model.head_rotation(own.query())) rotate_head(pass, *rotation, query);
  if (model.query.bits > 0) ops.fake_quantise(query, own.query(), ops.range(query, own.query(), model.query));
  const std::size_t both = own.plain + own.value, first = head * both;
  float* const row = latent.products.data() + t * plan.outputs + first;
  reduce(pass, own.kv_up, plan, partial_sums.wide, pass.n, latent.products.data(), t, first, first + both, row);
  float* const key = vector(pass, 2);
  std::memcpy(key, row, own.plain * sizeof(float));
  std::memcpy(key + own.plain, latent.kept.data() + t * (own.rank + own.rotary) + own.rank,
              own.rotary * sizeof(float));
  if (const Transform* rotation = model.head_rotation(own.query())) rotate_head(pass, *rotation, key);
  cache.append(ops, view(pass, index, head, static_cast<std::size_t>(pass.slots[t])),
               static_cast<std::size_t>(pass.positions[t]), key, row + own.plain, model.key, model.value);
}

// What o reads of token t: the heads' outputs side by side.
const float* Engine::State::latent_output(const Pass& pass, std::size_t index, std::size_t t) {
  const LatentAttention& own = model.layers[index].latent;
  const float* const row = attended.data() + t * model.heads * own.tiled_value();
  if (own.tiled_value() == own.value) return row;
  float* const found = vector(pass, 0);
  for (std::size_t head = 0; head < model.heads; ++head) {
    std::memcpy(found + head * own.value, row + head * own.tiled_value(), own.value * sizeof(float));
  }
  return found;
}

}  // namespace tulle
