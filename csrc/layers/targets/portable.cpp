#include "../../targets/portable.h"

#include "../kernels.h"

const pynlp::LayerKernels pynlp::layers_portable = pynlp::KERNELS;
