// The kernels of the layers, and the variants of them.
#pragma once

#include "layers.h"

namespace pynlp {

struct LayerKernels {
  void (*norm_forward)(const NormForward& problem);
  void (*norm_backward)(const NormBackward& problem);
  void (*activation_forward)(const ActivationForward& problem);
  void (*activation_backward)(const ActivationBackward& problem);
  void (*linear_forward)(const LinearForward& problem);
  void (*argmax_and_lse)(const ArgmaxAndLse& problem);
  void (*linear_cross_entropy)(const LinearCrossEntropy& problem);
};

extern const LayerKernels layers_portable;
#if defined(__x86_64__)
extern const LayerKernels layers_avx2;
extern const LayerKernels layers_avx512;
extern const LayerKernels layers_avx512_bf16;
#endif

}  // namespace pynlp
