// The kernels of mixtures of experts for the target that the including file chose.
#pragma once

#include "mlp.h"
#include "mlp_backward.h"
#include "table.h"
#include "weight_gradient.h"

namespace pynlp {
namespace {

// work(the words of products of this dtype).
template <class Work>
void with_words([[maybe_unused]] Dtype dtype, const Work& work) {
#if PYNLP_BF16
  if (dtype == Dtype::bfloat16) {
    work(Bf16{});
    return;
  }
#endif
  work(Fp32{});
}

// Makes rows first .. last - 1 zero.
inline void clear(const RowsOut& rows, int64_t first, int64_t last, int64_t columns) {
  const int64_t bytes = columns * bytes_of(rows.dtype);
  memset(static_cast<char*>(rows.data) + first * bytes, 0, (last - first) * bytes);
}

void run_grouped_mm(const GroupedForward& in) {
  const Order& outputs = in.weight.outputs();
  clear(in.y, in.groups.rows(), in.rows, outputs.count());
  with_words(in.x.dtype, [&](auto words) {
    using E = decltype(words);
    const DenseValues values(in.weight);
    const RowsSink sink(in.y, outputs, in.bias);
    part_by_part(in.groups, 4 * in.weight.inputs().count(), [&](const Groups& part) {
      const Chunks chunks(part);
      const RowPanels<E, Layout::words> x(chunks, {{in.x, in.weight.inputs().count()}, nullptr, 1});
      Grouped<E, DenseValues, RowsSink>(chunks, in.weight, values, x.words(), x.size, sink).run();
    });
  });
}

void run_grouped_mm_weight_backward(const GroupedWeightGradient& in) {
  with_words(in.x.dtype, [&](auto words) {
    using E = decltype(words);
    const ExpertsOut& out = in.grad_weight;
    const int64_t outputs = (out.outputs_are_lines ? out.lines : out.columns).count();
    const int64_t inputs = (out.outputs_are_lines ? out.columns : out.lines).count();
    using Panels = RowPanels<E, Layout::values>;
    part_by_part(in.groups, 4 * outputs, [&](const Groups& part) {
      const Chunks chunks(part);
      const Panels grads(chunks, {{in.grad_y, outputs}, nullptr, 1});
      const ValuePanels values{grads.words(), grads.size, Panels::BYTES};
      WeightGradient<E>(chunks, values, {{in.x, inputs}, nullptr, 1}, out, in.grad_bias).run();
    });
  });
}

template <class Weights>
void run_moe_mlp_forward(const MoeMlpForward<Weights>& in) {
  if (in.pre_activation.data)
    clear(in.pre_activation, in.groups.rows(), in.tokens * in.top_k, in.gate_up.outputs().count());
  if (are_few(in.groups) && has_dots(in.gate_up) && has_dots(in.down)) {
    mlp_of_few_rows(in);
    return;
  }
  with_words(in.x.dtype, [&](auto words) { mlp_forward<decltype(words)>(in); });
}

template <class Weights>
void run_moe_mlp_backward(const MoeMlpBackward<Weights>& in) {
  with_words(in.x.dtype, [&](auto words) { mlp_backward<decltype(words)>(in); });
}

constexpr MoeKernels KERNELS = {
    run_grouped_mm,
    run_grouped_mm_weight_backward,
    run_moe_mlp_forward<Experts>,
    run_moe_mlp_backward<Experts>,
    run_moe_mlp_forward<FourBitExperts>,
    run_moe_mlp_backward<FourBitExperts>,
    run_moe_mlp_forward<Int8Experts>,
    run_moe_mlp_backward<Int8Experts>,
};

}  // namespace
}  // namespace pynlp
