// How values in 4 bits are read: a unit of 32 codes, which has one scale, at a time.
#pragma once

#include "../simd/convert.h"
#include "../simd/nibbles.h"
#include "quantization.h"

namespace pynlp {
namespace {

constexpr int64_t NESTED_BLOCK = 256;

// The value of each code. A code of fp4 and mxfp4 is a sign and a magnitude.
alignas(64) constexpr float NF4[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};
#define PYNLP_WITH_SIGNS(a, b, c, d, e, f, g, h) {a, b, c, d, e, f, g, h, -a, -b, -c, -d, -e, -f, -g, -h}
alignas(64) constexpr float FP4[16] =
    PYNLP_WITH_SIGNS(0.0f, 0.0625f / 12, 8.0f / 12, 1.0f, 4.0f / 12, 6.0f / 12, 2.0f / 12, 3.0f / 12);
alignas(64) constexpr float E2M1[16] = PYNLP_WITH_SIGNS(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f);
#undef PYNLP_WITH_SIGNS

inline const float* codes_of(FourBitType type) {
  return type == FourBitType::nf4 ? NF4 : type == FourBitType::fp4 ? FP4 : E2M1;
}
inline bool first_is_high(FourBitType type) { return type != FourBitType::mxfp4; }

// 2^(code - 127), NaN for 255.
inline float e8m0_value(uint8_t code) {
  const uint32_t bits = code == 0 ? 0x00400000u : static_cast<uint32_t>(code) << 23;
  return float_of_bits(code == 255 ? 0x7fc00000u : bits);
}

// The values of a unit's codes, in order.
class Lookup {
 public:
  explicit Lookup(FourBitType type) {
    const float* codes = codes_of(type);
    const bool high = first_is_high(type);
#if PYNLP_AVX512
    // Eight codes lie in a word: each lane moves its own down to the last 4 bits, all that the permutation reads.
    table_ = _mm512_load_ps(codes);
    for (int lane = 0; lane < LANES; ++lane) shifts_[lane] = (lane % 8 ^ (high ? 1 : 0)) * 4;
#elif PYNLP_LANES == 8
    // A table of 16 bytes can be looked up 32 times at once: one for each byte of the values, which are put together.
    alignas(16) uint8_t planes[4][16];
    for (int code = 0; code < 16; ++code)
      for (int byte = 0; byte < 4; ++byte) planes[byte][code] = bits_of_float(codes[code]) >> 8 * byte;
    for (int byte = 0; byte < 4; ++byte)
      planes_[byte] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(planes[byte])));
    moved_mask_ = _mm256_set1_epi16(high ? 0x000f : 0x0f00);
    mask_ = _mm256_set1_epi16(high ? 0x0f00 : 0x000f);
#else
    codes_ = codes;
    shift_ = high ? 4 : 0;
#endif
  }

  PYNLP_INLINE void read(const uint8_t* packed, Float (&to)[UNIT_VECTORS]) const {
#if PYNLP_AVX512
#pragma GCC unroll 2
    for (int v = 0; v < UNIT_VECTORS; ++v)
      to[v] = (Float)_mm512_permutexvar_ps(sixteen_nibbles(packed + 8 * v, shifts_), table_);
#elif PYNLP_LANES == 8
    const __m256i codes = spread_nibbles(packed, moved_mask_, mask_);
    const __m256i a = _mm256_shuffle_epi8(planes_[0], codes), b = _mm256_shuffle_epi8(planes_[1], codes);
    const __m256i c = _mm256_shuffle_epi8(planes_[2], codes), d = _mm256_shuffle_epi8(planes_[3], codes);
    const __m256i low_a = _mm256_unpacklo_epi8(a, b), high_a = _mm256_unpackhi_epi8(a, b);
    const __m256i low_c = _mm256_unpacklo_epi8(c, d), high_c = _mm256_unpackhi_epi8(c, d);
    to[0] = (Float)_mm256_unpacklo_epi16(low_a, low_c);
    to[1] = (Float)_mm256_unpackhi_epi16(low_a, low_c);
    to[2] = (Float)_mm256_unpacklo_epi16(high_a, high_c);
    to[3] = (Float)_mm256_unpackhi_epi16(high_a, high_c);
#else
    float values[UNIT];
    for (int i = 0; i < UNIT_BYTES; ++i) {
      values[2 * i] = codes_[packed[i] >> shift_ & 15];
      values[2 * i + 1] = codes_[packed[i] >> (4 - shift_) & 15];
    }
    for (int v = 0; v < UNIT_VECTORS; ++v) to[v] = load(values + v * LANES);
#endif
  }

 private:
#if PYNLP_AVX512
  __m512 table_;
  alignas(64) int32_t shifts_[LANES];
#elif PYNLP_LANES == 8
  __m256i planes_[4], moved_mask_, mask_;
#else
  const float* codes_;
  int shift_;
#endif
};

// The scales of blocks in fp32.
class Scales {
 public:
  explicit Scales(const FourBit& in) : in_(in) {}

  PYNLP_INLINE float of(int64_t block) const {
    if (in_.scales) return in_.scales[block];
    const uint8_t code = in_.scale_codes[block];
    if (in_.type == FourBitType::mxfp4) return e8m0_value(code);
    return rounded(in_.nested_code[code] * in_.nested_absmax[block / NESTED_BLOCK]) + *in_.nested_offset;
  }

  PYNLP_INLINE void prefetch(int64_t block) const {
    __builtin_prefetch(in_.scales ? static_cast<const void*>(in_.scales + block) : in_.scale_codes + block);
  }

  // Those of `count` blocks: where they are, or in `room`.
  PYNLP_INLINE const float* of(int64_t first, int64_t count, float* room) const {
    if (in_.scales) return in_.scales + first;
    if (in_.type == FourBitType::mxfp4) {
      for (int64_t i = 0; i < count; ++i) room[i] = e8m0_value(in_.scale_codes[first + i]);
    } else {
      for (int64_t i = 0; i < count; ++i) room[i] = of(first + i);
    }
    return room;
  }

 private:
  const FourBit& in_;
};

// Reads values in order, wherever they begin: rows of an odd number of them, and blocks that straddle rows.
class FourBitValues {
 public:
  explicit FourBitValues(const FourBit& in)
      : in_(in), lookup_(in.type), scales_(in), shift_(__builtin_ctzll(in.blocksize)), count_(in.rows * in.columns) {}

  // Asks for codes and scales of values that are read later: the processor does not foresee them where rows are apart.
  PYNLP_INLINE void prefetch(int64_t row, int64_t column, int64_t count) const {
    const uint8_t* packed = in_.packed + (row * in_.columns + column) / 2;
    for (int64_t byte = 0; byte < count / 2; byte += 64) __builtin_prefetch(packed + byte);
    scales_.prefetch((row * in_.columns + column) >> shift_);
  }

  // Values column .. column + count - 1 of a row.
  void read(int64_t row, int64_t column, int64_t count, float* to) const {
    const int64_t first = row * in_.columns + column, last = first + count;
    for (int64_t start = first & -UNIT; start < last; start += UNIT) {
      if (start >= first && start + UNIT <= last) {
        read_unit(start, to + (start - first));
      } else {
        float unit[UNIT];
        read_unit(start, unit);
        const int64_t from = larger(start, first), end = smaller(start + UNIT, last);
        memcpy(to + (from - first), unit + (from - start), (end - from) * sizeof(float));
      }
    }
  }

 private:
  PYNLP_INLINE void read_unit(int64_t start, float* to) const {
    const uint8_t* packed = in_.packed + start / 2;
    uint8_t rest[UNIT_BYTES] = {};
    if (start + UNIT > count_) {
      memcpy(rest, packed, (count_ - start + 1) / 2);
      packed = rest;
    }
    Float values[UNIT_VECTORS];
    lookup_.read(packed, values);
    const Float scale = broadcast(scales_.of(start >> shift_));
    for (int v = 0; v < UNIT_VECTORS; ++v) store(to + v * LANES, values[v] * scale);
  }

  const FourBit& in_;
  const Lookup lookup_;
  const Scales scales_;
  const int shift_;
  const int64_t count_;
};

}  // namespace
}  // namespace pynlp
