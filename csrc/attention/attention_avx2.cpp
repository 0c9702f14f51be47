// The kernels of attention for AVX2, FMA and F16C.
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
#include "backward.h"
#include "decode.h"
#include "forward.h"
#include "kernels.h"
#include "weights.h"

namespace pynlp {

const AttentionKernels attention_avx2 = {
    append,
    [](const AttentionForward& problem) {
      Forward<Fp32>(problem).run();
      Decode(problem).run();
    },
    [](const AttentionBackward& problem) { Backward<Fp32>(problem).run(); },
    [](const AttentionWeights& problem) { Weights(problem).run(); },
};

}  // namespace pynlp
#endif
