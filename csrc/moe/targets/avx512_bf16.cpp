#if defined(__x86_64__)
#include "../../targets/avx512_bf16.h"

#include "../kernels.h"

const pynlp::MoeKernels pynlp::moe_avx512_bf16 = pynlp::KERNELS;
#endif
