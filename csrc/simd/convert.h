// Rows of fp32, bf16 and fp16 to fp32 and back, rounding to nearest even.
#pragma once

#include "vector.h"

namespace pynlp {
namespace {

inline float float_of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t bits_of_float(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float bf16_to_float(uint16_t x) { return float_of_bits(static_cast<uint32_t>(x) << 16); }
inline uint16_t float_to_bf16(float x) {
  const uint32_t bits = bits_of_float(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(x == x ? rounded : (bits >> 16) | 0x40u);
}

inline float half_to_float(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16, magnitude = x & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Multiplying by 2^112 moves the exponent's bias; it is exact, also for subnormal halves.
  return float_of_bits(sign | bits_of_float(float_of_bits(magnitude << 13) * 0x1p112f));
}
inline uint16_t float_to_half(float x) {
  const uint32_t bits = bits_of_float(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);   // NaN
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to infinity
  if (magnitude < 0x38800000u) {  // subnormal half: adding 0.5 leaves its bits at the end of the significand
    const float shifted = float_of_bits(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bits_of_float(shifted) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
}

inline void bf16_to_float(const uint16_t* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = bf16_to_float(from[i]);
}
// LANES values as bf16.
inline void store_bf16(void* to, Float x) {
#if PYNLP_BF16
  const __m256i packed = (__m256i)_mm512_cvtneps_pbh((__m512)x);
#else
  typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
  const Words bits = (Words)x, nearest = bits + (0x7fffu + ((bits >> 16) & 1u));
  const Halves packed = __builtin_convertvector((x == x ? nearest : bits | 0x400000u) >> 16, Halves);
#endif
  memcpy(to, &packed, sizeof packed);
}
inline void float_to_bf16(const float* from, int64_t count, uint16_t* to) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store_bf16(to + i, load(from + i));
  for (; i < count; ++i) to[i] = float_to_bf16(from[i]);
}

inline void half_to_float(const uint16_t* from, int64_t count, float* to) {
  int64_t i = 0;
#if PYNLP_F16C
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
  for (; i < count; ++i) to[i] = half_to_float(from[i]);
}
inline void float_to_half(const float* from, int64_t count, uint16_t* to) {
  int64_t i = 0;
#if PYNLP_F16C
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
#endif
  for (; i < count; ++i) to[i] = float_to_half(from[i]);
}

// LANES bf16 as fp32.
inline Float load_bf16(const uint16_t* from) {
#if PYNLP_AVX512  // the compiler would widen the halves apart
  return as_float((Int)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))) << 16);
#else
  Halves halves;
  memcpy(&halves, from, sizeof halves);
  return as_float(__builtin_convertvector(halves, Int) << 16);
#endif
}
#if PYNLP_F16C
inline Float load_half(const uint16_t* from) {
#if PYNLP_AVX512
  return (Float)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
  return (Float)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#endif
}
#endif

#if PYNLP_BF16
// Two rows of fp32 as words of two bf16: `even` in the low half.
inline Int bf16_pairs(Float even, Float odd) {
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);  // 16 even ones, then 16 odd ones
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                              6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (Int)_mm512_permutexvar_epi16(interleave, halves);
}
#endif

}  // namespace
}  // namespace pynlp
