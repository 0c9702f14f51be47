// Codes of 4 bits, two a byte, a unit of 32 at a time: how they are spread over vectors, and the integers of 4 bits.
#pragma once

#include "vector.h"

namespace pynlp {
namespace {

constexpr int64_t UNIT = 32, UNIT_BYTES = UNIT / 2;
constexpr int UNIT_VECTORS = UNIT / LANES;

#if PYNLP_AVX512
// A code in the last 4 bits of each lane: every word has eight of them, and each lane moves its own down.
alignas(64) constexpr int32_t NIBBLE_SHIFTS[16] = {0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28};

PYNLP_INLINE __m512i sixteen_nibbles(const uint8_t* packed, const int32_t* shifts) {
  int32_t words[2];
  memcpy(words, packed, sizeof words);
  const __m512i both = _mm512_mask_set1_epi32(_mm512_set1_epi32(words[0]), 0xff00, words[1]);
  return _mm512_srlv_epi32(both, _mm512_load_si512(shifts));
}
#elif PYNLP_LANES == 8
// A code in each byte. Codes 8 n to 8 n + 3 come into the lower half of vector n, the next four into the upper one: the
// bytes of both are spread accordingly, each twice. `mask` keeps the lower four bits of a byte, `moved_mask` the upper
// ones of its copy.
PYNLP_INLINE __m256i spread_nibbles(const uint8_t* packed, __m256i moved_mask, __m256i mask) {
  const __m256i spread = _mm256_setr_epi8(0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13,  //
                                          2, 2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15);
  const __m256i bytes = _mm256_shuffle_epi8(
      _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed))), spread);
  return _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(bytes, 4), moved_mask), _mm256_and_si256(bytes, mask));
}

// The upper two bytes of code - zero in fp32, of each code, for each zero: the lower ones are 0.
struct NibblePlanes {
  uint8_t of[256][2][16];
  constexpr NibblePlanes() : of() {
    for (int zero = -128; zero < 128; ++zero) {
      for (int code = 0; code < 16; ++code) {
        const int value = code - zero, magnitude = value < 0 ? -value : value;
        int exponent = 0;  // of the magnitude's first bit
        while (magnitude >> exponent > 1) ++exponent;
        const int fraction = (magnitude << (7 - exponent)) & 127;
        const int bits = magnitude == 0 ? 0 : (value < 0) << 15 | (127 + exponent) << 7 | fraction;
        of[zero + 128][0][code] = static_cast<uint8_t>(bits & 255);
        of[zero + 128][1][code] = static_cast<uint8_t>(bits >> 8);
      }
    }
  }
};
alignas(16) constexpr NibblePlanes NIBBLE_PLANES;
#endif

// Integers of 4 bits, the first in the low half of a byte, less a zero point from -128 to 127.
class Nibbles {
 public:
  explicit PYNLP_INLINE Nibbles(int32_t zero) {
#if PYNLP_AVX512
    for (int lane = 0; lane < LANES; ++lane) table_[lane] = static_cast<float>(lane - zero);
#elif PYNLP_LANES == 8
    const auto& planes = NIBBLE_PLANES.of[zero + 128];
    for (int i = 0; i < 2; ++i)
      planes_[i] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(planes[i])));
#else
    zero_ = zero;
#endif
  }

  // The values of a unit's codes, in order.
  PYNLP_INLINE void read(const uint8_t* packed, Float (&to)[UNIT_VECTORS]) const {
#if PYNLP_AVX512
#pragma GCC unroll 2
    for (int v = 0; v < UNIT_VECTORS; ++v)
      to[v] = (Float)_mm512_permutexvar_ps(sixteen_nibbles(packed + 8 * v, NIBBLE_SHIFTS), (__m512)table_);
#elif PYNLP_LANES == 8
    const __m256i codes = spread_nibbles(packed, _mm256_set1_epi16(0x0f00), _mm256_set1_epi16(0x000f));
    const __m256i c = _mm256_shuffle_epi8(planes_[0], codes), d = _mm256_shuffle_epi8(planes_[1], codes);
    const __m256i low = _mm256_unpacklo_epi8(c, d), high = _mm256_unpackhi_epi8(c, d), none = _mm256_setzero_si256();
    to[0] = (Float)_mm256_unpacklo_epi16(none, low);
    to[1] = (Float)_mm256_unpackhi_epi16(none, low);
    to[2] = (Float)_mm256_unpacklo_epi16(none, high);
    to[3] = (Float)_mm256_unpackhi_epi16(none, high);
#else
    float values[UNIT];
    for (int i = 0; i < UNIT; ++i) values[i] = static_cast<float>((packed[i / 2] >> i % 2 * 4 & 15) - zero_);
    for (int v = 0; v < UNIT_VECTORS; ++v) to[v] = load(values + v * LANES);
#endif
  }

 private:
#if PYNLP_AVX512
  Float table_;
#elif PYNLP_LANES == 8
  __m256i planes_[2];
#else
  int32_t zero_;
#endif
};

}  // namespace
}  // namespace pynlp
