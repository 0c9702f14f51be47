#if defined(__x86_64__)
#include "../../targets/avx2.h"

#include "../kernels.h"

const pynlp::MoeKernels pynlp::moe_avx2 = pynlp::KERNELS;
#endif
