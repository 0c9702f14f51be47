// The kernels of mixtures of experts, and the variants of them.
#pragma once

#include "moe.h"

namespace pynlp {

struct MoeKernels {
  void (*grouped_mm)(const GroupedForward& problem);
  void (*grouped_mm_weight_backward)(const GroupedWeightGradient& problem);
  void (*moe_mlp_forward)(const MoeMlpForward<Experts>& problem);
  void (*moe_mlp_backward)(const MoeMlpBackward<Experts>& problem);
  void (*moe_mlp_4bit_forward)(const MoeMlpForward<FourBitExperts>& problem);
  void (*moe_mlp_4bit_backward)(const MoeMlpBackward<FourBitExperts>& problem);
  void (*moe_mlp_int8_forward)(const MoeMlpForward<Int8Experts>& problem);
  void (*moe_mlp_int8_backward)(const MoeMlpBackward<Int8Experts>& problem);
};

extern const MoeKernels moe_portable;
#if defined(__x86_64__)
extern const MoeKernels moe_avx2;
extern const MoeKernels moe_avx512;
extern const MoeKernels moe_avx512_bf16;
#endif

}  // namespace pynlp
