#include "layers.h"

#include "../common/isa.h"
#include "table.h"

namespace pynlp {
namespace {

constexpr Variant<LayerKernels> VARIANTS[] = {
#if defined(__x86_64__)
    {&layers_avx512_bf16, &Features::avx512_bf16},
    {&layers_avx512, &Features::avx512},
    {&layers_avx2, &Features::avx2},
#endif
    {&layers_portable},
};

// The second half of rows of 2 * columns values.
RowsIn second_half(RowsIn rows, int64_t columns) {
  rows.data = static_cast<const char*>(rows.data) + columns * bytes_of(rows.dtype);
  return rows;
}
RowsOut second_half(RowsOut rows, int64_t columns) {
  rows.data = static_cast<char*>(rows.data) + columns * bytes_of(rows.dtype);
  return rows;
}

}  // namespace

void norm_forward(const NormForward& problem) { pick(VARIANTS, &LayerKernels::norm_forward)(problem); }
void norm_backward(const NormBackward& problem) { pick(VARIANTS, &LayerKernels::norm_backward)(problem); }
void activation_forward(const ActivationForward& problem) {
  ActivationForward apart = problem;
  if (problem.is_packed) apart.up = second_half(problem.x, problem.columns);
  pick(VARIANTS, &LayerKernels::activation_forward)(apart);
}
void activation_backward(const ActivationBackward& problem) {
  ActivationBackward apart = problem;
  if (problem.is_packed) {
    apart.up = second_half(problem.x, problem.columns);
    apart.grad_up = second_half(problem.grad_x, problem.columns);
  }
  pick(VARIANTS, &LayerKernels::activation_backward)(apart);
}
void linear_forward(const LinearForward& problem) { pick(VARIANTS, &LayerKernels::linear_forward)(problem); }
void argmax_and_lse(const ArgmaxAndLse& problem) { pick(VARIANTS, &LayerKernels::argmax_and_lse)(problem); }
void linear_cross_entropy(const LinearCrossEntropy& problem) {
  pick(VARIANTS, &LayerKernels::linear_cross_entropy)(problem);
}

}  // namespace pynlp
