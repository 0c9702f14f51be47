// The kernels of norms, activations and the loss for AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // g++ 12 on its own _mm512_undefined_ps
#pragma GCC diagnostic ignored "-Wuninitialized"
#define PYNLP_LANES 16
#define PYNLP_F16C 1
#define PYNLP_AVX512 1
#define PYNLP_BF16 0
#include "activation.h"
#include "kernels.h"
#include "linear.h"
#include "loss.h"
#include "norm.h"
#include "peak.h"

namespace pynlp {

const LayerKernels layers_avx512 = {
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
