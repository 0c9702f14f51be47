// The kernels of mixtures of experts, and the variants of them.
#pragma once

#include "moe.h"

namespace pynlp {

struct MoeKernels {
  void (*grouped_mm)(const GroupedForward& problem);
  void (*grouped_mm_weight_backward)(const GroupedWeightGradient& problem);
  void (*moe_mlp_forward)(const MoeMlpForward& problem);
  void (*moe_mlp_backward)(const MoeMlpBackward& problem);
};

extern const MoeKernels moe_portable;
#if defined(__x86_64__)
extern const MoeKernels moe_avx2;
extern const MoeKernels moe_avx512;
extern const MoeKernels moe_avx512_bf16;
#endif

}  // namespace pynlp
