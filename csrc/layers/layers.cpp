// Picks the kernels by the CPU's features.
#include "layers.h"

#include "../common/isa.h"
#include "kernels.h"

namespace pynlp {
namespace {

const LayerKernels& kernels() {
#if defined(__x86_64__)
  const Features f = features();
  if (f.avx512_bf16) return layers_avx512_bf16;
  if (f.avx512) return layers_avx512;
  if (f.avx2) return layers_avx2;
#endif
  return layers_portable;
}

}  // namespace

void norm_forward(const NormForward& problem) { kernels().norm_forward(problem); }
void norm_backward(const NormBackward& problem) { kernels().norm_backward(problem); }
void activation_forward(const ActivationForward& problem) { kernels().activation_forward(problem); }
void activation_backward(const ActivationBackward& problem) { kernels().activation_backward(problem); }
void linear_forward(const LinearForward& problem) { kernels().linear_forward(problem); }
void row_peaks(const RowPeaks& problem) { kernels().row_peaks(problem); }
void linear_cross_entropy(const LinearCrossEntropy& problem) { kernels().linear_cross_entropy(problem); }

}  // namespace pynlp
