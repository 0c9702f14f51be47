// The kernels of attention for any CPU: 16-byte vectors.
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

#define PYNLP_LANES 4
#define PYNLP_F16C 0
#define PYNLP_AVX512 0
#define PYNLP_BF16 0
#include "backward.h"
#include "decode.h"
#include "forward.h"
#include "kernels.h"
#include "weights.h"

namespace pynlp {

const AttentionKernels attention_portable = {
    append,
    [](const AttentionForward& problem) {
      Forward<Fp32>(problem).run();
      Decode(problem).run();
    },
    [](const AttentionBackward& problem) { Backward<Fp32>(problem).run(); },
    [](const AttentionWeights& problem) { Weights(problem).run(); },
};

}  // namespace pynlp
