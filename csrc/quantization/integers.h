// How integers of 8 and 4 bits are read, and how values are rounded to them.
#pragma once

#include "../simd/convert.h"
#include "../simd/nibbles.h"
#include "quantization.h"

namespace pynlp {
namespace {

typedef int8_t Bytes __attribute__((vector_size(LANES)));

// LANES codes that lie in order from a byte on.
template <int BITS>
PYNLP_INLINE Int load_codes(const uint8_t* codes) {
  if constexpr (BITS == 8) {
#if PYNLP_AVX512
    return (Int)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
#elif PYNLP_LANES == 8
    return (Int)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
#else
    Bytes bytes;
    memcpy(&bytes, codes, sizeof bytes);
    return __builtin_convertvector(bytes, Int);
#endif
  } else {
    // Eight codes lie in a word: each lane moves its own down to the last 4 bits.
#if PYNLP_AVX512
    return (Int)_mm512_and_si512(sixteen_nibbles(codes, NIBBLE_SHIFTS), _mm512_set1_epi32(15));
#elif PYNLP_LANES == 8
    int32_t word;
    memcpy(&word, codes, sizeof word);
    const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    return (Int)_mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(word), shifts), _mm256_set1_epi32(15));
#else
    return Int{codes[0] & 15, codes[0] >> 4, codes[1] & 15, codes[1] >> 4};
#endif
  }
}
PYNLP_INLINE Float to_float(Int x) { return __builtin_convertvector(x, Float); }

// Integers of 8 bits less a zero point, as Nibbles are those of 4.
class SignedBytes {
 public:
  explicit PYNLP_INLINE SignedBytes(int32_t zero) : zero_(broadcast(zero)) {}

  PYNLP_INLINE void read(const uint8_t* codes, Float (&to)[UNIT_VECTORS]) const {
#pragma GCC unroll 8
    for (int v = 0; v < UNIT_VECTORS; ++v) to[v] = to_float(load_codes<8>(codes + v * LANES) - zero_);
  }

 private:
  Int zero_;
};
template <int BITS>
struct ReaderOf {
  using type = SignedBytes;
};
template <>
struct ReaderOf<4> {
  using type = Nibbles;
};

// The code of one value of a row.
template <int BITS>
PYNLP_INLINE int32_t code_of(const uint8_t* row, int64_t column) {
  if constexpr (BITS == 8) return static_cast<int8_t>(row[column]);
  return column % 2 ? row[column / 2] >> 4 : row[column / 2] & 15;
}

// Number i of fp32 or fp16 values.
PYNLP_INLINE float scale_at(const void* scales, Dtype dtype, int64_t i) {
  if (dtype == Dtype::float32) return static_cast<const float*>(scales)[i];
  return half_to_float(static_cast<const uint16_t*>(scales)[i]);
}

template <int BITS>
class IntegerValues {
 public:
  explicit IntegerValues(const Integers<BITS>& in) : in_(in) {}

  // Asks for the codes and scales of values that are read later.
  PYNLP_INLINE void prefetch(int64_t row, int64_t column, int64_t count) const {
    const uint8_t* codes = in_.codes + row * in_.row_bytes() + column * BITS / 8;
    for (int64_t byte = 0; byte < count * BITS / 8; byte += 64) __builtin_prefetch(codes + byte);
    const int64_t scale = in_.group_of(row, column / in_.group) * (in_.scale_dtype == Dtype::float32 ? 4 : 2);
    __builtin_prefetch(static_cast<const char*>(in_.scales) + scale);
  }

  // Values column .. column + count - 1 of a row; `column` is even.
  void read(int64_t row, int64_t column, int64_t count, float* to) const {
    const int64_t last = column + count;
    while (column < last) {
      const int64_t number = column / in_.group, end = smaller(last, (number + 1) * in_.group);
      read_group(in_.codes + row * in_.row_bytes() + column * BITS / 8, end - column, in_.group_of(row, number), to);
      to += end - column;
      column = end;
    }
  }

  float one(int64_t row, int64_t column) const {
    const int64_t group = in_.group_of(row, column / in_.group);
    const float value = static_cast<float>(code_of<BITS>(in_.codes + row * in_.row_bytes(), column) - in_.zero(group)) *
                        scale_at(in_.scales, in_.scale_dtype, group);
    return in_.minimums ? rounded(value) + scale_at(in_.minimums, in_.scale_dtype, group) : value;
  }

 private:
  PYNLP_INLINE void read_group(const uint8_t* codes, int64_t count, int64_t group, float* to) const {
    const Float scale = broadcast(scale_at(in_.scales, in_.scale_dtype, group));
    const Int zero = broadcast(in_.zero(group));
    const typename ReaderOf<BITS>::type reader(zero[0]);
    int64_t i = 0;
    if (in_.minimums) {
      const Float minimum = broadcast(scale_at(in_.minimums, in_.scale_dtype, group));
      for (; i + UNIT <= count; i += UNIT) {
        Float values[UNIT_VECTORS];
        reader.read(codes + i * BITS / 8, values);
        for (int v = 0; v < UNIT_VECTORS; ++v) store(to + i + v * LANES, rounded(values[v] * scale) + minimum);
      }
      for (; i + LANES <= count; i += LANES)
        store(to + i, rounded(to_float(load_codes<BITS>(codes + i * BITS / 8)) * scale) + minimum);
      for (; i < count; ++i)
        to[i] = rounded(static_cast<float>(code_of<BITS>(codes, i)) * scale[0]) + minimum[0];
    } else {
      for (; i + UNIT <= count; i += UNIT) {
        Float values[UNIT_VECTORS];
        reader.read(codes + i * BITS / 8, values);
        for (int v = 0; v < UNIT_VECTORS; ++v) store(to + i + v * LANES, values[v] * scale);
      }
      for (; i + LANES <= count; i += LANES)
        store(to + i, to_float(load_codes<BITS>(codes + i * BITS / 8) - zero) * scale);
      for (; i < count; ++i) to[i] = static_cast<float>(code_of<BITS>(codes, i) - zero[0]) * scale[0];
    }
  }

  const Integers<BITS>& in_;
};

constexpr float SMALLEST = 0x1p-149f;

// Rounds to the nearest integer, to the even one of two, for magnitudes below 2^22.
PYNLP_INLINE Int nearest(Float x) {
  const Float magic = broadcast(12582912.0f);  // 1.5 * 2^23
  return as_int(rounded(x + magic)) - as_int(magic);
}

// The smallest and the largest of whole vectors of values, 0 among them; false if there is a NaN.
inline bool limits(const float* x, int64_t count, float* low, float* high) {
  Float least = Float{}, most = Float{};
  Int sane = broadcast(-1);
  for (int64_t i = 0; i < count; i += LANES) {
    const Float value = load(x + i);
    sane &= value == value;
    least = value < least ? value : least;
    most = value > most ? value : most;
  }
  bool all = true;
  *low = *high = 0;
  for (int lane = 0; lane < LANES; ++lane) {
    *low = least[lane] < *low ? least[lane] : *low;
    *high = most[lane] > *high ? most[lane] : *high;
    all &= sane[lane] != 0;
  }
  return all;
}

// The scale of symmetric codes up to `most`; NaN if a value is.
inline float symmetric_scale(bool sane, float low, float high, float most) {
  const float largest = -low > high ? -low : high, scale = largest / most;
  return !sane ? __builtin_nanf("") : scale == 0 && largest > 0 ? SMALLEST : scale;
}

// Codes of values in whole vectors.
inline void to_codes(const float* x, int64_t count, float scale, int32_t zero, int32_t least, int32_t most,
                     int8_t* to) {
  for (int64_t i = 0; i < count; i += LANES) {
    Int codes = broadcast(zero);
    if (scale > 0) {
      Float value = load(x + i) / broadcast(scale);
      value = value < broadcast(-256.0f) ? broadcast(-256.0f) : value;
      value = value > broadcast(256.0f) ? broadcast(256.0f) : value;
      codes = nearest(value) + broadcast(zero);
      codes = codes < broadcast(least) ? broadcast(least) : codes;
      codes = codes > broadcast(most) ? broadcast(most) : codes;
    }
    const Bytes bytes = __builtin_convertvector(codes, Bytes);
    memcpy(to + i, &bytes, smaller(LANES, count - i));
  }
}

}  // namespace
}  // namespace pynlp
