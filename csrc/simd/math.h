// exp2 and tanh of vectors. Coefficients: minimax in relative error, by Remez' exchange.
#pragma once

#include "vector.h"

namespace pynlp {
namespace {

// 2^f for |f| <= 1/2: relative error 1.9e-9 (degree 6) or 2.6e-6 (degree 4, enough before rounding to bf16).
template <int DEGREE>
inline Float exp2_fraction(Float f) {
  if constexpr (DEGREE == 6) {
    Float p = broadcast(1.53458121587e-4f);
    p = p * f + broadcast(1.33999312095e-3f);
    p = p * f + broadcast(9.61848895652e-3f);
    p = p * f + broadcast(5.550328777e-2f);
    p = p * f + broadcast(0.240226468906f);
    p = p * f + broadcast(0.693147205737f);
    return p * f + broadcast(1.0f);
  } else {
    static_assert(DEGREE == 4);
    Float p = broadcast(9.57010201463e-3f);
    p = p * f + broadcast(5.59178603063e-2f);
    p = p * f + broadcast(0.24024744825f);
    p = p * f + broadcast(0.693121814743f);
    return p * f + broadcast(0.999999261447f);
  }
}

// 2^x for x <= 127: exactly 0 at -inf, NaN for NaN. Results below 2^-126 may be flushed to 0.
template <int DEGREE>
inline Float exp2_of(Float x) {
#if PYNLP_AVX512
  const Float f = (Float)_mm512_reduce_ps((__m512)x, 0);  // x - round(x); 0 for an infinity
  return (Float)_mm512_scalef_ps((__m512)exp2_fraction<DEGREE>(f), (__m512)(x - f));
#else
  const Float low = broadcast(-127.0f);
  x = x < low ? low : x;
  const Float magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Float shifted = x + magic;
  const Float f = x - (shifted - magic);
  const Int exponent = as_int(shifted) - as_int(magic) + broadcast(127);
  return exp2_fraction<DEGREE>(f) * as_float(exponent << 23);
#endif
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
  const Float e = exp2_of<6>(magnitude * broadcast(-2.8853900817779268f));
  const Float one = broadcast(1.0f);
  const Float large = as_float(as_int((one - e) / (one + e)) | (as_int(x) & broadcast(INT32_MIN)));
  return magnitude < broadcast(0.625f) ? small : large;
}

}  // namespace
}  // namespace pynlp
