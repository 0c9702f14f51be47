// Units of 32 codes as bytes, for every instruction set, and what is computed with them.
#pragma once

#include "../simd/bytes.h"
#include "../simd/nibbles.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // of functions that are inlined
#endif

namespace pynlp {
namespace {

// A unit of codes, and sums of four products of codes each.
typedef uint8_t Unit __attribute__((vector_size(32)));
typedef int32_t Eight __attribute__((vector_size(32)));
typedef float EightFloats __attribute__((vector_size(32)));

PYNLP_INLINE Unit load_unit(const void* codes) {
  Unit unit;
  memcpy(&unit, codes, sizeof unit);
  return unit;
}

// 32 codes of 4 bits, in order.
PYNLP_INLINE Unit spread_unit(const uint8_t* codes) {
#if PYNLP_LANES >= 8
  const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  return (Unit)_mm256_and_si256(_mm256_or_si256(bytes, _mm256_slli_epi16(bytes, 4)), _mm256_set1_epi8(15));
#else
  Unit unit;
  for (int i = 0; i < 16; ++i) {
    unit[2 * i] = codes[i] & 15;
    unit[2 * i + 1] = codes[i] >> 4;
  }
  return unit;
#endif
}

// The 32 codes from a byte on, or `count` of them, then zeros.
template <int BITS>
PYNLP_INLINE Unit unit_at(const uint8_t* codes) {
  if constexpr (BITS == 8) return load_unit(codes);
  return spread_unit(codes);
}
template <int BITS>
PYNLP_INLINE Unit unit_at(const uint8_t* codes, int64_t count) {
  if (count >= UNIT) return unit_at<BITS>(codes);
  uint8_t some[UNIT] = {};
  memcpy(some, codes, (count * BITS + 7) / 8);
  if (BITS == 4 && count % 2) some[count / 2] &= 15;
  return unit_at<BITS>(some);
}

// Whether two codes with a sign that follow each other, the first in an even place, add up to more than `most` or less
// than -most: in two bits for each.
PYNLP_INLINE uint32_t exceed_in_pairs(Unit codes, int most) {
#if PYNLP_LANES >= 8
  const __m256i pairs = _mm256_abs_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), (__m256i)codes));
  return _mm256_movemask_epi8(_mm256_cmpgt_epi16(pairs, _mm256_set1_epi16(static_cast<int16_t>(most))));
#else
  uint32_t bits = 0;
  for (int i = 0; i < 32; i += 2) {
    const int sum = static_cast<int8_t>(codes[i]) + static_cast<int8_t>(codes[i + 1]);
    if (sum > most || sum < -most) bits |= 3u << i;
  }
  return bits;
#endif
}

// sum + products of codes without a sign and codes with one. No sum of two products may leave 16 bits: the codes are at
// most 128 and 127 in magnitude, or those without a sign are 1.
PYNLP_INLINE Eight multiply_add(Eight sum, Unit plain, Unit with_sign) {
#if PYNLP_VNNI
  return add_byte_products(sum, plain, with_sign);
#elif PYNLP_LANES >= 8
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)plain, (__m256i)with_sign);
  return sum + (Eight)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  for (int i = 0; i < 32; ++i) sum[i / 4] += plain[i] * static_cast<int8_t>(with_sign[i]);
  return sum;
#endif
}
PYNLP_INLINE Unit magnitude(Unit codes) {
#if PYNLP_LANES >= 8
  return (Unit)_mm256_abs_epi8((__m256i)codes);
#else
  for (int i = 0; i < 32; ++i) codes[i] = codes[i] < 128 ? codes[i] : -codes[i];
  return codes;
#endif
}
// x with the signs of codes.
PYNLP_INLINE Unit signs_moved(Unit x, Unit codes) {
#if PYNLP_LANES >= 8
  return (Unit)_mm256_sign_epi8((__m256i)x, (__m256i)codes);
#else
  for (int i = 0; i < 32; ++i) x[i] = codes[i] < 128 ? x[i] : -x[i];
  return x;
#endif
}
PYNLP_INLINE int32_t lane_sum(Eight x) {
  int32_t sum = 0;
  for (int i = 0; i < 8; ++i) sum += x[i];
  return sum;
}
PYNLP_INLINE EightFloats to_floats(Eight x) { return __builtin_convertvector(x, EightFloats); }

}  // namespace
}  // namespace pynlp
