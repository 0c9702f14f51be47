// Experts' layers, backward. With g = grad W_down, of a slot's weight w:
//
//   grad w = g . activation + grad . bias,   grad h = w g activation',   grad x = sum over slots of grad h W_gate_up
//
// so the results of forward's second product are not needed. A slot's numbers lie in a lane until they are written as
// panels for the three products that follow.
#pragma once

#include "mlp.h"
#include "weight_gradient.h"

namespace pynlp {
namespace {

// What becomes of g, block by block.
template <class E, class Weights>
class ActivationGradientSink {
 public:
  ActivationGradientSink(const MoeMlpBackward<Weights>& in, const Chunks& chunks)
      : order_(in.gate_up.outputs()),
        words(larger(LANES, row_words<E>(order_.count()))),
        values(round_up(order_.count(), LANES)),
        inner(round_up(order_.units, LANES)),
        in_(in),
        lanes_(chunks.panels * PANEL),
        blocks_((order_.units + BLOCK - 1) / BLOCK),
        grad_words_(lanes_ * words * 4),
        grad_values_(E::PAIR == 1 ? 0 : lanes_ * values * 2),
        activated_(lanes_ * inner * 4 / E::PAIR),
        shares_(lanes_ * blocks_ * sizeof(float)) {}

  static constexpr int64_t WIDTH = round_up(BLOCK, LANES);
  static constexpr int64_t ROOM = 4 * PANEL * WIDTH + 2 * WIDTH;

  const int32_t* grad_words() const { return static_cast<const int32_t*>(grad_words_.data); }
  ValuePanels grad_values() const {
    if (E::PAIR == 1) return {grad_words_.data, words, 4};
    return {grad_values_.data, values, 2};
  }
  ValuePanels activated() const { return {activated_.data, inner, 4 / E::PAIR}; }

  // g . activation of a row, which lies in a lane of all panels.
  float share(int64_t lane) const {
    float sum = 0;
    for (int64_t block = 0; block < blocks_; ++block) sum += shares_.floats()[block * lanes_ + lane];
    return sum;
  }

  void write(const Products& products, float* room) const {
    with_activation<E::PAIR == 2>(in_.activation, [&](auto activation) {
      for (int64_t m = 0; m < products.chunk.rows; m += PANEL) write_panel<decltype(activation)>(products, m, room);
    });
  }

 private:
  template <class A>
  PYNLP_INLINE void write_panel(const Products& products, int64_t m, float* room) const {
    const Chunk& chunk = products.chunk;
    const int64_t rows = smaller(PANEL, chunk.rows - m), panel = chunk.panel + m / PANEL;
    float *gates = room, *others = room + PANEL * WIDTH;  // [unit][row]
    alignas(64) float weights[PANEL] = {};
    for (int64_t i = 0; i < rows; ++i) weights[i] = in_.top_k_weights[in_.permutation[chunk.row + m + i]];
    read_pre_activation<A>(products, m, rows, gates, others, room + 2 * PANEL * WIDTH);
    for (int64_t lane = 0; lane < round_up(rows, LANES); lane += LANES) {
      const Float weight = load(weights + lane);
      Float share = Float{};
      for (int64_t i = 0; i < products.count; i += E::PAIR) {
        Float gate[E::PAIR], up[E::PAIR], value[E::PAIR];
        for (int j = 0; j < E::PAIR; ++j) {
          gate[j] = up[j] = value[j] = Float{};
          if (i + j >= products.count) continue;
          const Float g = load(products.values + (i + j) * PITCH + m + lane);
          const Slopes slopes = A::slopes(load(gates + (i + j) * PANEL + lane), load(others + (i + j) * PANEL + lane));
          share += g * slopes.value;
          gate[j] = weight * g * slopes.gate;
          up[j] = weight * g * slopes.up;
          value[j] = weight * slopes.value;
        }
        store_units<A::WAYS>(panel, products.first + i, lane, gate, up, value);
      }
      const int64_t block = products.first / BLOCK;
      store(shares_.floats() + block * lanes_ + panel * PANEL + lane, share);
    }
  }

  // One unit, or in bf16 two.
  template <int WAYS>
  PYNLP_INLINE void store_units(int64_t panel, int64_t unit, int64_t lane, const Float (&gate)[E::PAIR],
                                const Float (&up)[E::PAIR], const Float (&value)[E::PAIR]) const {
    int32_t* to = static_cast<int32_t*>(grad_words_.data) + panel * words * PANEL + lane;
    if constexpr (E::PAIR == 1) {
      store(to + unit * WAYS * PANEL, as_int(gate[0]));
      if constexpr (WAYS == 2) store(to + (unit * WAYS + 1) * PANEL, as_int(up[0]));
      store(activated_.floats() + (panel * inner + unit) * PANEL + lane, value[0]);
    } else {
      uint16_t* grads = static_cast<uint16_t*>(grad_values_.data) + panel * values * PANEL + lane;
      uint16_t* activated = static_cast<uint16_t*>(activated_.data) + panel * inner * PANEL + lane;
      for (int j = 0; j < E::PAIR; ++j) {
        if (unit + j >= inner) break;
        store_bf16(activated + (unit + j) * PANEL, value[j]);
        if (unit + j >= order_.units) break;
        store_bf16(grads + (unit + j) * WAYS * PANEL, gate[j]);
        if constexpr (WAYS == 2) {
          store_bf16(grads + ((unit + j) * WAYS + 1) * PANEL, up[j]);
          store(to + (unit + j) * PANEL, pair_of<E>(gate[j], up[j]));
        }
      }
      if constexpr (WAYS == 1) store(to + unit / 2 * PANEL, pair_of<E>(gate[0], gate[1]));
    }
  }

  // Rows of the pre-activation, turned; 0 where there is none.
  template <class A>
  PYNLP_INLINE void read_pre_activation(const Products& products, int64_t m, int64_t rows, float* gates,
                                        float* others, float* room) const {
    const int64_t first = products.first, count = products.count, line = A::WAYS * WIDTH;
    float* pairs = room + PANEL * line;
    for (int64_t i = 0; i < PANEL; ++i) {
      float *gate = room + i * WIDTH, *up = room + (PANEL + i) * WIDTH;
      if (i >= rows) {
        memset(gate, 0, WIDTH * sizeof(float));
        if constexpr (A::WAYS == 2) memset(up, 0, WIDTH * sizeof(float));
        continue;
      }
      const char* from = in_.pre_activation.row(products.chunk.row + m + i);
      const int64_t bytes = bytes_of(in_.pre_activation.dtype);
      if constexpr (A::WAYS == 1) {
        read_row(in_.pre_activation.dtype, from + first * bytes, count, gate);
      } else if (order_.is_interleaved) {
        read_row(in_.pre_activation.dtype, from + 2 * first * bytes, 2 * count, pairs);
        for (int64_t n = 0; n < count; ++n) {
          gate[n] = pairs[2 * n];
          up[n] = pairs[2 * n + 1];
        }
      } else {
        read_row(in_.pre_activation.dtype, from + first * bytes, count, gate);
        read_row(in_.pre_activation.dtype, from + (order_.units + first) * bytes, count, up);
      }
    }
    const int64_t units = round_up(count, LANES);
    transpose(reinterpret_cast<const int32_t*>(room), WIDTH, reinterpret_cast<int32_t*>(gates), PANEL, PANEL, units);
    if constexpr (A::WAYS == 2)
      transpose(reinterpret_cast<const int32_t*>(room + PANEL * WIDTH), WIDTH, reinterpret_cast<int32_t*>(others),
                PANEL, PANEL, units);
  }

  const Order& order_;

 public:
  const int64_t words, values, inner;  // of a row: words and values of grad h, values of the activation

 private:
  const MoeMlpBackward<Weights>& in_;
  const int64_t lanes_, blocks_;
  const Buffer grad_words_, grad_values_, activated_;
  const Buffer shares_;  // (blocks, lanes)
};

// What is left: gradients of the slots' weights and of the second bias.
template <class Weights>
class SmallGradients {
 public:
  SmallGradients(const MoeMlpBackward<Weights>& in, const Chunks& chunks) : in_(in), chunks_(chunks) {}

  template <class E>
  void of_weights(const ActivationGradientSink<E, Weights>& sink) {
    const int64_t hidden = in_.down.outputs().count();
    const Buffer room(hidden * sizeof(float));
    for (int64_t c = 0; c < chunks_.count; ++c) {
      const Chunk& chunk = chunks_.at(c);
      for (int64_t i = 0; i < chunk.rows; ++i) {
        const int64_t slot = in_.permutation[chunk.row + i];
        float sum = sink.share(chunk.panel * PANEL + i);
        if (in_.down_bias) {
          read_row(in_.grad.dtype, in_.grad.row(slot / in_.top_k), hidden, room.floats());
          const float* bias = in_.down_bias + chunk.expert * hidden;
          float product = 0;
          for (int64_t d = 0; d < hidden; ++d) product += room.floats()[d] * bias[d];
          sum += product;
        }
        in_.grad_top_k_weights[slot] = sum;
      }
    }
  }

  void of_down_bias() {
    const Groups& groups = chunks_.groups;
    run_tasks<&SmallGradients::sum_bias>(groups.experts - groups.begin, groups.rows() * in_.down.outputs().count(), this);
  }

 private:
  void sum_bias(int64_t task) const {
    const int64_t expert = chunks_.groups.begin + task, hidden = in_.down.outputs().count();
    float* row = static_cast<float*>(thread_scratch(hidden * sizeof(float)));
    float* sum = in_.grad_down_bias + expert * hidden;
    memset(sum, 0, hidden * sizeof(float));
    for (int64_t i = in_.groups.first(expert); i < in_.groups.ends[expert]; ++i) {
      const int64_t slot = in_.permutation[i];
      read_row(in_.grad.dtype, in_.grad.row(slot / in_.top_k), hidden, row);
      const float weight = in_.top_k_weights[slot];
      for (int64_t d = 0; d < hidden; ++d) sum[d] += weight * row[d];
    }
  }

  const MoeMlpBackward<Weights>& in_;
  const Chunks& chunks_;
};

// The same matrices from outputs to inputs.
template <class Weights>
Weights turned(const Weights& weight) {
  Weights result = weight;
  result.outputs_are_lines = !weight.outputs_are_lines;
  return result;
}

template <class E, class Weights>
void mlp_backward(const MoeMlpBackward<Weights>& in) {
  using Values = ValuesOf<Weights>;
  using Sink = ActivationGradientSink<E, Weights>;
  const int64_t hidden = in.down.outputs().count(), columns = in.gate_up.inputs().count();
  const Weights gate_up = turned(in.gate_up), down = turned(in.down);
  const Values gate_up_values(gate_up), down_values(down);
  const GatheredRows x{{in.x, columns}, in.permutation, in.top_k}, grad{{in.grad, hidden}, in.permutation, in.top_k};
  const Buffer results(in.grad_x.data ? in.groups.rows() * columns * sizeof(float) : 0);
  memset(in.grad_top_k_weights, 0, in.tokens * in.top_k * sizeof(float));
  part_by_part(in.groups, 4 * larger(in.gate_up.outputs().count(), hidden), [&](const Groups& part) {
    const Chunks chunks(part);
    Sink sink(in, chunks);
    {
      const RowPanels<E, Layout::words> panels(chunks, grad);
      Grouped<E, Values, Sink>(chunks, down, down_values, panels.words(), panels.size, sink).run();
    }
    SmallGradients small(in, chunks);
    small.of_weights(sink);
    if (in.grad_down_bias) small.of_down_bias();
    if (in.grad_gate_up.data || in.grad_gate_up_bias)
      WeightGradient<E>(chunks, sink.grad_values(), x, in.grad_gate_up, in.grad_gate_up_bias).run();
    if (in.grad_down.data) {  // the panels have its inputs, not its outputs
      ExpertsOut out = in.grad_down;
      out.outputs_are_lines = !out.outputs_are_lines;
      WeightGradient<E>(chunks, sink.activated(), grad, out, nullptr).run();
    }
    if (in.grad_x.data) {
      const RowsSink rows({results.data, Dtype::float32}, gate_up.outputs(), nullptr);
      Grouped<E, Values, RowsSink>(chunks, gate_up, gate_up_values, sink.grad_words(), sink.words, rows).run();
    }
  });
  if (in.grad_x.data) Combine(in, results.floats(), columns, nullptr, in.grad_x).run();
}

}  // namespace
}  // namespace pynlp
