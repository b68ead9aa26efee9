// Inputs of every layer's own: made of a token and its embedding before the first layer, used at the end of each.
#include <cmath>

#include "cpu/team.hpp"
#include "decoder/state.hpp"

namespace tulle {

// From the scaled embeddings, in the stream, to all layers' inputs of every token.
void Engine::State::prepare_layer_inputs(const Pass& pass) {
  const LayerInputs& own = model.layer_inputs;
  for (std::size_t t = pass.first; t < pass.last; ++t) {
    quantise_inputs(pass, own.projection, layer_inputs_plan, pass.hidden + t * model.hidden, t);
  }
  pass.publish();
  multiply(pass, own.projection, layer_inputs_plan, partial_sums.wide, pass.n, layer_inputs.data());
  for (std::size_t t = pass.first; t < pass.last && (!pass.replicated || pass.thread == 0); ++t) {
    finish_layer_inputs(pass, t);
  }
  wait();  // the next product's partial sums, and of one token all threads read what one has made
}

// p of token t, of P·h: (norm(P·h / √hidden) + √width · part) / √2.
void Engine::State::finish_layer_inputs(const Pass& pass, std::size_t t) {
  const LayerInputs& own = model.layer_inputs;
  const std::size_t all = layer_inputs_plan.outputs;
  float *const row = layer_inputs.data() + t * all, *const part = vector(pass, 0);
  reduce(pass, own.projection, layer_inputs_plan, partial_sums.wide, pass.n, layer_inputs.data(), t, 0, all, row);
  const float down = 1.0f / std::sqrt(static_cast<float>(model.hidden)), half = std::sqrt(0.5f);
  ops.scaled(row, down, all, row);
  const std::size_t layers = model.layers.size(), token = static_cast<std::size_t>(pass.tokens[t]);
  for (std::size_t index = 0; index < layers; ++index) {
    float* const input = row + index * own.width;
    own.norm.run(ops, input, own.width, input);
    own.table.copy_row(token * layers + index, own.width, part);
    ops.scaled(part, std::sqrt(static_cast<float>(own.width)), own.width, part);
    ops.add(input, part, own.width);
  }
  ops.scaled(row, half, all, row);
}

// The feed-forward's outputs added to the stream; then down(act(gate(x)) · p), which add_last adds.
void Engine::State::gate_input(const Pass& pass, std::size_t index) {
  const Layer& l = model.layers[index];
  const InputGate& own = l.input_gate;
  LayerPlans& plan = plans[index];
  const std::size_t n = pass.n, width = model.layer_inputs.width;
  for (std::size_t t = pass.first; t < pass.last; ++t) {
    add_feed_forward(pass, index, t);
    quantise_inputs(pass, own.gate, plan.input_gate, pass.hidden + t * model.hidden, t);
  }
  pass.publish();
  multiply(pass, own.gate, plan.input_gate, partial_sums.wide, n, wide.data());
  float *const spare = of_thread[pass.thread].outputs.data(), *const product = vector(pass, 0);
  for (std::size_t t = pass.first; t < pass.last; ++t) {
    const float* const gate =
        reduce(pass, own.gate, plan.input_gate, partial_sums.wide, n, wide.data(), t, 0, width, spare);
    const float* const input = layer_inputs.data() + t * layer_inputs_plan.outputs + index * width;
    ops.gate(model.gate, l.activation, gate, input, width, product);
    quantise_inputs(pass, own.down, plan.input_down, product, t);
  }
  pass.publish();
  multiply(pass, own.down, plan.input_down, partial_sums.back, n, back.data());
}

}  // namespace tulle
