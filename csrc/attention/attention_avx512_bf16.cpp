// The kernels of attention for AVX-512 with BF16: dot products of bf16 pairs.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // g++ 12 on its own _mm512_undefined_ps
#pragma GCC diagnostic ignored "-Wuninitialized"
#define PYNLP_LANES 16
#define PYNLP_F16C 1
#define PYNLP_AVX512 1
#define PYNLP_BF16 1
#include "backward.h"
#include "decode.h"
#include "forward.h"
#include "kernels.h"
#include "weights.h"

namespace pynlp {

const AttentionKernels attention_avx512_bf16 = {
    append,
    [](const AttentionForward& problem) {
      Forward<Bf16>(problem).run();
      Decode(problem).run();
    },
    [](const AttentionBackward& problem) { Backward<Bf16>(problem).run(); },
    [](const AttentionWeights& problem) { Weights(problem).run(); },
};

}  // namespace pynlp
#endif
