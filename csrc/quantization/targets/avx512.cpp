#if defined(__x86_64__)
#include "../../targets/avx512.h"

#include "../kernels.h"

const pynlp::QuantizationKernels pynlp::quantization_avx512 = pynlp::KERNELS;
#endif
