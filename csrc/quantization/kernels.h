// The kernels of quantized weights for the target that the including file chose.
#pragma once

#include "dynamic_dots.h"
#include "dynamic_linear.h"
#include "four_bit_dots.h"
#include "four_bit_quantize.h"
#include "integer_dots.h"
#include "integer_quantize.h"
#include "linear.h"
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

// y of a weight of integers by rounded rows of x.
template <int BITS>
void dynamic(const DynamicLinear<Integers<BITS>>& problem) {
  if (problem.rows == 0) return;
  if (problem.rows <= MOST_FEW)
    DynamicDots<BITS>(problem).run();
  else if (problem.x_group)
    RoundedThenWidened<BITS>(problem).run();
  else
    DynamicIntegerLinear<BITS>(problem).run();
}

#if PYNLP_VNNI
// With VNNI only products of codes differ; `pick` takes all else from the next variant.
constexpr QuantizationKernels INTEGER_PRODUCTS = {.int8_dynamic_linear = dynamic<8>, .int4_dynamic_linear = dynamic<4>};
#if PYNLP_AMX
// With tiles products of bf16 differ, too.
constexpr QuantizationKernels BF16_PRODUCTS = {
    .linear_4bit = forward<FourBitValues, FourBitDots, FourBit>,
    .linear_4bit_backward = backward<FourBitValues, FourBit>,
    .int8_linear = forward<IntegerValues<8>, IntegerDots<8>, Int8>,
    .int4_linear = forward<IntegerValues<4>, IntegerDots<4>, Int4>,
    .int8_linear_backward = backward<IntegerValues<8>, Int8>,
    .int4_linear_backward = backward<IntegerValues<4>, Int4>,
};
#endif
#else
constexpr QuantizationKernels KERNELS = {
    [](const Quantize4bit& problem) { Quantize(problem).run(); },
    [](const Dequantize4bit& problem) { Dequantize(problem).run(); },
    forward<FourBitValues, FourBitDots, FourBit>,
    backward<FourBitValues, FourBit>,
    [](const QuantizeIntegers& problem) { QuantizeToIntegers(problem).run(); },
    [](const DequantizeIntegers<8>& problem) { DequantizeFromIntegers<8>(problem).run(); },
    [](const DequantizeIntegers<4>& problem) { DequantizeFromIntegers<4>(problem).run(); },
    forward<IntegerValues<8>, IntegerDots<8>, Int8>,
    forward<IntegerValues<4>, IntegerDots<4>, Int4>,
    backward<IntegerValues<8>, Int8>,
    backward<IntegerValues<4>, Int4>,
    dynamic<8>,
    dynamic<4>,
};
#endif

}  // namespace
}  // namespace pynlp
