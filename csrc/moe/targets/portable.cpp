#include "../../targets/portable.h"

#include "../kernels.h"

const pynlp::MoeKernels pynlp::moe_portable = pynlp::KERNELS;
