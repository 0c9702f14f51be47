#if defined(__x86_64__)
#include "../../targets/avx512_vnni.h"

#include "../kernels.h"

const pynlp::QuantizationKernels pynlp::quantization_avx512_vnni = pynlp::INTEGER_PRODUCTS;
#endif
