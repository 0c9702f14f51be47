#include "../../targets/portable.h"

#include "../kernels.h"

const pynlp::QuantizationKernels pynlp::quantization_portable = pynlp::KERNELS;
