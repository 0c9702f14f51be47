// exp, tanh and the normal distribution of vectors. Coefficients: minimax in relative error, by Remez' exchange.
#pragma once

#include "vector.h"

namespace pynlp {
namespace {

constexpr float LOG2_E = 1.44269504088896341f;

// 2^f for 0 <= f <= 1: relative error 1.9e-9 (degree 6) or 1.04e-4 (degree 3: a 19th of what rounding to bf16 loses).
// Degree 3 is exact at both ends: else the weights next to the largest one would all err to one side, and lse with
// them.
template <int DEGREE>
inline Float exp2_fraction(Float f) {
  if constexpr (DEGREE == 6) {
    Float p = broadcast(2.17022556805e-4f);
    p = p * f + broadcast(1.24396877471e-3f);
    p = p * f + broadcast(9.67884100704e-3f);
    p = p * f + broadcast(5.54833419777e-2f);
    p = p * f + broadcast(0.240229836276f);
    p = p * f + broadcast(0.69314698384f);
    return p * f + broadcast(1.0f);
  } else {
    static_assert(DEGREE == 3);
    Float p = broadcast(7.826797018e-2f);
    p = p * f + broadcast(0.2263076823f);
    p = p * f + broadcast(0.6954243475f);
    return p * f + broadcast(1.0f);
  }
}

// 2^x for x <= 127: exactly 0 at -inf, NaN for NaN. Results below 2^-126 may be flushed to 0.
template <int DEGREE>
inline Float exp2_of(Float x) {
#if PYNLP_AVX512
  const Float f = (Float)_mm512_reduce_ps((__m512)x, 1);                        // x - floor(x); 0 for an infinity
  return (Float)_mm512_scalef_ps((__m512)exp2_fraction<DEGREE>(f), (__m512)x);  // scales by 2^floor(x)
#else
  const Float low = broadcast(-126.5f);
  x = x < low ? low : x;
  const Float magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Float shifted = (x - broadcast(0.5f)) + magic;
  const Float f = x - (shifted - magic);
  const Int exponent = as_int(shifted) - as_int(magic) + broadcast(127);
  return exp2_fraction<DEGREE>(f) * as_float(exponent << 23);
#endif
}

// e^x for x <= 88, as exp2_of.
template <int DEGREE>
inline Float exp_of(Float x) {
  return exp2_of<DEGREE>(x * broadcast(LOG2_E));
}

// tanh(x): an odd polynomial below 0.625, (1 - e) / (1 + e) with e = exp(-2 |x|) above; relative error ~1e-7.
inline Float tanh_of(Float x) {
  const Float square = x * x;
  Float p = broadcast(-5.71704505936e-3f);
  p = p * square + broadcast(2.06505873e-2f);
  p = p * square + broadcast(-5.37434980819e-2f);
  p = p * square + broadcast(0.13331491287f);
  p = p * square + broadcast(-0.333332839253f);
  const Float small = x + x * square * p;
  const Float magnitude = as_float(as_int(x) & broadcast(0x7fffffff));
  const Float e = exp_of<6>(magnitude * broadcast(-2.0f));
  const Float one = broadcast(1.0f);
  const Float large = as_float(as_int((one - e) / (one + e)) | (as_int(x) & broadcast(INT32_MIN)));
  return magnitude < broadcast(0.625f) ? small : large;
}

// 1 / x; for bf16 to 14 bits.
template <bool BF16>
inline Float reciprocal(Float x) {
#if PYNLP_AVX512
  if constexpr (BF16) return (Float)_mm512_rcp14_ps((__m512)x);
#endif
  return broadcast(1.0f) / x;
}

// 1 / (1 + exp(-x)); for bf16 with the relative error of a short polynomial.
template <bool BF16>
inline Float sigmoid_of(Float x) {
  const Float exponent = -x, most = broadcast(88.0f);
  const Float share = reciprocal<BF16>(broadcast(1.0f) + exp_of<BF16 ? 3 : 6>(exponent > most ? most : exponent));
  return exponent > most ? Float{} : share;
}

// Phi(x), the share of a normal distribution below x, and exp(-x^2 / 2). For 0 <= z <= 14, Phi(-z) = exp(-z^2 / 2) t
// P(t) with t = 1 / (1 + 0.35 z), relative error 3.2e-8 and what rounding z^2 costs; for bf16 1 / (1 + 0.25 z) and
// 5.3e-5. NaN for NaN.
struct Normal {
  Float share, density;
};
template <bool BF16>
inline Normal normal_of(Float x) {
  const Float z = as_float(as_int(x) & broadcast(0x7fffffff));
  const Float t = reciprocal<BF16>(broadcast(1.0f) + broadcast(BF16 ? 0.25f : 0.35f) * z);
  Float p;
  if constexpr (BF16) {
    p = broadcast(0.240692961049f);
    p = p * t + broadcast(-0.101692105626f);
    p = p * t + broadcast(0.178523340408f);
    p = p * t + broadcast(0.0811849543612f);
    p = p * t + broadcast(0.101265678075f);
  } else {
    p = broadcast(-0.0291459155263f);
    p = p * t + broadcast(0.143971628273f);
    p = p * t + broadcast(-0.255714115879f);
    p = p * t + broadcast(0.159174008662f);
    p = p * t + broadcast(-0.0231097355142f);
    p = p * t + broadcast(0.105507964031f);
    p = p * t + broadcast(0.119832877212f);
    p = p * t + broadcast(0.13986186843f);
    p = p * t + broadcast(0.139621404365f);
  }
  const Float density = exp_of<BF16 ? 3 : 6>(z * z * broadcast(-0.5f));
  const Float tail = density * t * p;
  return {x < Float{} ? tail : broadcast(1.0f) - tail, density};
}

}  // namespace
}  // namespace pynlp
