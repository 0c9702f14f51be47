// The kernels of norms, activations and the loss for AVX2, FMA and F16C.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

#pragma GCC target("avx2,fma,f16c")
#define PYNLP_LANES 8
#define PYNLP_F16C 1
#define PYNLP_AVX512 0
#define PYNLP_BF16 0
#include "activation.h"
#include "kernels.h"
#include "linear.h"
#include "loss.h"
#include "norm.h"
#include "peak.h"

namespace pynlp {

const LayerKernels layers_avx2 = {
    [](const NormForward& problem) { Norm(problem).run(); },
    [](const NormBackward& problem) { NormGradient(problem).run(); },
    [](const ActivationForward& problem) { Activate(problem).run(); },
    [](const ActivationBackward& problem) { ActivateGradient(problem).run(); },
    [](const LinearForward& problem) { Linear(problem).run(); },
    [](const RowPeaks& problem) { Peaks(problem).run(); },
    [](const LinearCrossEntropy& problem) { Loss<Fp32>(problem).run(); },
};

}  // namespace pynlp
#endif
