// The kernels of attention for the target that the including file chose.
#pragma once

#include "backward.h"
#include "decode.h"
#include "forward.h"
#include "table.h"
#include "weights.h"

namespace pynlp {
namespace {

#if PYNLP_BF16
using Factor = Bf16;
#else
using Factor = Fp32;
#endif

constexpr AttentionKernels KERNELS = {
    append,
    [](const AttentionForward& problem) {
      Forward<Factor>(problem).run();
      Decode(problem).run();
    },
    [](const AttentionBackward& problem) { Backward<Factor>(problem).run(); },
    [](const AttentionWeights& problem) { Weights(problem).run(); },
};

}  // namespace
}  // namespace pynlp
