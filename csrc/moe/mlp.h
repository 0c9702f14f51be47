// Experts' layers, forward: two products of each expert's rows, what stands between them done where the first one's sums
// lie, and the weighted sum of a token's rows.
#pragma once

#include "activations.h"
#include "combine.h"
#include "grouped.h"
#include "grouped_dots.h"

namespace pynlp {
namespace {

// Applies the activation to products and writes it as panels for the next product; `pre_activation` may have no data.
template <class E, class Weights>
class ActivationSink {
 public:
  ActivationSink(const MoeMlp<Weights>& in, const RowsOut& pre_activation, int32_t* panels, int64_t words)
      : in_(in), rows_(pre_activation, in.gate_up.outputs(), nullptr), keeps_(pre_activation.data), panels_(panels),
        words_(words) {}

  static constexpr int64_t ROOM = RowsSink::ROOM;

  void write(const Products& products, float* room) const {
    products.add(in_.gate_up_bias, in_.gate_up.outputs());
    if (keeps_) rows_.write_rows(products, room);
    with_activation<E::PAIR == 2>(in_.activation, [&](auto activation) { activate<decltype(activation)>(products); });
  }

 private:
  template <class A>
  PYNLP_INLINE void activate(const Products& products) const {
    const Chunk& chunk = products.chunk;
    const int64_t units = products.count / A::WAYS, first = products.first / A::WAYS;
    for (int64_t m = 0; m < chunk.rows; m += PANEL) {
      const int64_t lanes = round_up(smaller(PANEL, chunk.rows - m), LANES);
      int32_t* panel = panels_ + ((chunk.panel + m / PANEL) * words_ + first / E::PAIR) * PANEL;
      for (int64_t i = 0; i < units; i += E::PAIR, panel += PANEL) {
        for (int64_t lane = 0; lane < lanes; lane += LANES) {
          const float* at = products.values + i * A::WAYS * PITCH + m + lane;
          const Float value = A::value(load(at), load(at + (A::WAYS - 1) * PITCH));
          Float second = Float{};
          if (E::PAIR == 2 && i + 1 < units)
            second = A::value(load(at + A::WAYS * PITCH), load(at + (2 * A::WAYS - 1) * PITCH));
          store(panel + lane, pair_of<E>(value, second));
        }
      }
    }
  }

  const MoeMlp<Weights>& in_;
  const RowsSink rows_;
  const bool keeps_;
  int32_t* panels_;
  const int64_t words_;
};

template <class E, class Weights>
void mlp_forward(const MoeMlpForward<Weights>& in) {
  using Values = ValuesOf<Weights>;
  const int64_t hidden = in.down.outputs().count(), inner = in.down.inputs().count(), words = row_words<E>(inner);
  const Values gate_up(in.gate_up), down(in.down);
  const Buffer results(in.groups.rows() * hidden * sizeof(float));
  part_by_part(in.groups, 4 * larger(words, in.gate_up.inputs().count()), [&](const Groups& part) {
    const Chunks chunks(part);
    const Buffer activated(chunks.panels * PANEL * words * sizeof(int32_t));
    int32_t* panels = static_cast<int32_t*>(activated.data);
    {
      const RowPanels<E, Layout::words> x(chunks, {{in.x, in.gate_up.inputs().count()}, in.permutation, in.top_k});
      const ActivationSink<E, Weights> sink(in, in.pre_activation, panels, words);
      Grouped<E, Values, ActivationSink<E, Weights>>(chunks, in.gate_up, gate_up, x.words(), x.size, sink).run();
    }
    const RowsSink sink({results.data, Dtype::float32}, in.down.outputs(), in.down_bias);
    Grouped<E, Values, RowsSink>(chunks, in.down, down, panels, words, sink).run();
  });
  Combine(in, results.floats(), hidden, in.top_k_weights, in.out).run();
}

// The activation of a row whose values lie as in memory, and zeros up to whole vectors.
inline void activate_row(MoeActivation activation, const Order& order, const float* from, float* to) {
  with_activation<false>(activation, [&](auto function) {
    for (int64_t k = 0; k < padded(order.units); k += LANES) {
      alignas(64) float gates[LANES] = {}, others[LANES] = {};
      for (int64_t lane = 0; lane < smaller(LANES, order.units - k); ++lane) {
        gates[lane] = from[order.at((k + lane) * order.ways)];
        others[lane] = from[order.at((k + lane) * order.ways + order.ways - 1)];
      }
      store(to + k, decltype(function)::value(load(gates), load(others)));
    }
  });
}

// The same of so few rows that to read the weights is all it costs.
template <class Weights>
void mlp_of_few_rows(const MoeMlpForward<Weights>& in) {
  using Dots = DotsOf<Weights>;
  const int64_t rows = in.groups.rows(), hidden = in.down.outputs().count(), inner = in.down.inputs().count();
  const Order& order = in.gate_up.outputs();
  const int64_t columns = in.gate_up.inputs().count(), pitch = padded(columns), inner_pitch = padded(inner);
  const Buffer x(rows * pitch * sizeof(float)), sums(rows * order.count() * sizeof(float));
  const Buffer activated(rows * inner_pitch * sizeof(float)), results(rows * hidden * sizeof(float));
  for (int64_t i = 0; i < rows; ++i) {
    float* row = x.floats() + i * pitch;
    read_row(in.x.dtype, in.x.row(in.permutation[i] / in.top_k), columns, row);
    for (int64_t k = columns; k < pitch; ++k) row[k] = 0;
  }
  Dots(in.groups, in.gate_up, x.floats(), pitch, in.gate_up_bias, sums.floats()).run();
  if (in.pre_activation.data)
    write_row(in.pre_activation.dtype, sums.floats(), rows * order.count(), in.pre_activation.data, 0);
  for (int64_t i = 0; i < rows; ++i)
    activate_row(in.activation, order, sums.floats() + i * order.count(), activated.floats() + i * inner_pitch);
  Dots(in.groups, in.down, activated.floats(), inner_pitch, in.down_bias, results.floats()).run();
  Combine(in, results.floats(), hidden, in.top_k_weights, in.out).run();
}

}  // namespace
}  // namespace pynlp
