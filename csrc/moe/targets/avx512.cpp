#if defined(__x86_64__)
#include "../../targets/avx512.h"

#include "../kernels.h"

const pynlp::MoeKernels pynlp::moe_avx512 = pynlp::KERNELS;
#endif
