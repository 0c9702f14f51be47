// The kernels of the layers for the target that the including file chose.
#pragma once

#include "activation.h"
#include "argmax_and_lse.h"
#include "linear.h"
#include "loss.h"
#include "norm.h"
#include "table.h"

namespace pynlp {
namespace {

constexpr LayerKernels KERNELS = {
    [](const NormForward& problem) { Norm(problem).run(); },
    [](const NormBackward& problem) { NormGradient(problem).run(); },
    [](const ActivationForward& problem) { Activate(problem).run(); },
    [](const ActivationBackward& problem) { ActivateGradient(problem).run(); },
    [](const LinearForward& problem) { Linear(problem).run(); },
    [](const ArgmaxAndLse& problem) { FindArgmaxAndLse(problem).run(); },
    [](const LinearCrossEntropy& problem) {
#if PYNLP_BF16
      if (problem.x.dtype == Dtype::bfloat16) {
        Loss<Bf16>(problem).run();
        return;
      }
#endif
      Loss<Fp32>(problem).run();
    },
};

}  // namespace
}  // namespace pynlp
