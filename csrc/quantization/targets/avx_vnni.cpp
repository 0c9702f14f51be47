#include "../table.h"
#if PYNLP_COMPILES_AMX_AND_AVX_VNNI
#include "../../targets/avx_vnni.h"

#include "../kernels.h"

const pynlp::QuantizationKernels pynlp::quantization_avx_vnni = pynlp::INTEGER_PRODUCTS;
#endif
