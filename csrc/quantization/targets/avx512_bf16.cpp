#if defined(__x86_64__)
#include "../../targets/avx512_bf16.h"

#include "../kernels.h"

const pynlp::QuantizationKernels pynlp::quantization_avx512_bf16 = pynlp::KERNELS;
#endif
