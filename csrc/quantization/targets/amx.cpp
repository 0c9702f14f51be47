#include "../table.h"
#if PYNLP_COMPILES_AMX_AND_AVX_VNNI
#include "../../targets/amx.h"

#include "../kernels.h"

const pynlp::QuantizationKernels pynlp::quantization_amx_bf16 = pynlp::BF16_PRODUCTS;
const pynlp::QuantizationKernels pynlp::quantization_amx_int8 = pynlp::INTEGER_PRODUCTS;
#endif
