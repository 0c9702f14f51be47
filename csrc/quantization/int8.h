// How values in 8 bits are read.
#pragma once

#include "../simd/vector.h"
#include "quantization.h"

namespace pynlp {
namespace {

typedef int8_t Bytes __attribute__((vector_size(LANES)));

// LANES codes as integers.
PYNLP_INLINE Int load_codes(const int8_t* codes) {
#if PYNLP_AVX512
  return (Int)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
#elif PYNLP_LANES == 8
  return (Int)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
#else
  Bytes bytes;
  memcpy(&bytes, codes, sizeof bytes);
  return __builtin_convertvector(bytes, Int);
#endif
}
PYNLP_INLINE Float to_float(Int x) { return __builtin_convertvector(x, Float); }

class Int8Values {
 public:
  explicit Int8Values(const Int8& in) : in_(in) {}

  // Asks for the codes of values that are read later.
  PYNLP_INLINE void prefetch(int64_t row, int64_t column, int64_t count) const {
    const int8_t* codes = in_.codes + row * in_.columns + column;
    for (int64_t byte = 0; byte < count; byte += 64) __builtin_prefetch(codes + byte);
  }

  // Values column .. column + count - 1 of a row.
  void read(int64_t row, int64_t column, int64_t count, float* to) const {
    const int64_t last = column + count;
    while (column < last) {
      const int64_t number = column / in_.group, end = smaller(last, (number + 1) * in_.group);
      read_group(in_.codes + row * in_.columns + column, end - column, in_.group_of(row, number), to);
      to += end - column;
      column = end;
    }
  }

 private:
  PYNLP_INLINE void read_group(const int8_t* codes, int64_t count, int64_t group, float* to) const {
    const float scale = in_.scales[group];
    const int32_t zero = in_.zeros ? in_.zeros[group] : 0;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
      store(to + i, to_float(load_codes(codes + i) - broadcast(zero)) * broadcast(scale));
    for (; i < count; ++i) to[i] = static_cast<float>(codes[i] - zero) * scale;
  }

  const Int8& in_;
};

}  // namespace
}  // namespace pynlp
