// The kernels of quantized weights for the target that the including file chose.
#pragma once

#include "four_bit_dots.h"
#include "int8_dots.h"
#include "int8_quantize.h"
#include "linear.h"
#include "four_bit_quantize.h"
#include "table.h"

namespace pynlp {
namespace {

// y of a weight that `Values` reads; of a few rows of x `Dots` computes it.
template <class Values, class Dots, class Weight>
void forward(const LinearForward<Weight>& problem) {
  if (problem.rows <= MOST_FEW) {
    if (problem.rows > 0) Dots(problem).run();
    return;
  }
#if PYNLP_BF16
  if (problem.x.dtype == Dtype::bfloat16) {
    Linear<Bf16, Values, Weight>(problem).run();
    return;
  }
#endif
  Linear<Fp32, Values, Weight>(problem).run();
}

template <class Values, class Weight>
void backward(const LinearBackward<Weight>& problem) {
#if PYNLP_BF16
  if (problem.grad.dtype == Dtype::bfloat16) {
    LinearGradient<Bf16, Values, Weight>(problem).run();
    return;
  }
#endif
  LinearGradient<Fp32, Values, Weight>(problem).run();
}

constexpr QuantizationKernels KERNELS = {
    [](const Quantize4bit& problem) { Quantize(problem).run(); },
    [](const Dequantize4bit& problem) { Dequantize(problem).run(); },
    forward<FourBitValues, FourBitDots, FourBit>,
    backward<FourBitValues, FourBit>,
    [](const QuantizeInt8& problem) { QuantizeToInt8(problem).run(); },
    [](const DequantizeInt8& problem) { DequantizeFromInt8(problem).run(); },
    forward<Int8Values, Int8Dots, Int8>,
    backward<Int8Values, Int8>,
};

}  // namespace
}  // namespace pynlp
