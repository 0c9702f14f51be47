#include "../../targets/portable.h"

#include "../kernels.h"

const pynlp::AttentionKernels pynlp::attention_portable = pynlp::KERNELS;
