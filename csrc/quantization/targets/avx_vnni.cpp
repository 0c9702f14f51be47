#if defined(__x86_64__)
#include "../../targets/avx_vnni.h"

#include "../kernels.h"

const pynlp::QuantizationKernels pynlp::quantization_avx_vnni = pynlp::KERNELS;
#endif
