// Vectors of float and int32 of the target's width: one source for SSE2, NEON, AVX2 and AVX-512.
//
// Each <family>/targets/*.cpp includes one of csrc/targets/ first. All of this lies in an anonymous namespace and uses
// no standard templates: the linker must not merge code for one instruction set with code for another.
#pragma once

#include "../common/inline.h"

namespace pynlp {
namespace {

constexpr int LANES = PYNLP_LANES;

typedef float Float __attribute__((vector_size(4 * LANES)));
typedef int32_t Int __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

inline Float load(const float* p) {
  Float x;
  memcpy(&x, p, sizeof x);
  return x;
}
inline Int load(const int32_t* p) {
  Int x;
  memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, Float x) { memcpy(p, &x, sizeof x); }
inline void store(int32_t* p, Int x) { memcpy(p, &x, sizeof x); }
inline Float broadcast(float x) { return x - Float{}; }
inline Int broadcast(int32_t x) { return x + Int{}; }
inline Float maximum(Float a, Float b) {  // b where one is NaN
#if PYNLP_AVX512
  return (Float)_mm512_max_ps((__m512)a, (__m512)b);
#elif PYNLP_LANES == 8
  return (Float)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
// x as it is: the compiler would fuse a product with the sum that it goes into, which does not round it.
template <class T>
PYNLP_INLINE T rounded(T x) {
#if defined(__x86_64__)
  asm("" : "+x"(x));
#else
  asm("" : "+w"(x));
#endif
  return x;
}
// The sum of the lanes, by halves.
inline float lane_sum(Float x) {
#if PYNLP_AVX512
  return _mm512_reduce_add_ps((__m512)x);
#elif PYNLP_LANES == 8
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
#else
#pragma GCC unroll 3
  for (int half = LANES / 2; half > 0; half /= 2) {
    Int moved;
    for (int i = 0; i < LANES; ++i) moved[i] = (i + half) % LANES;
    x += __builtin_shuffle(x, moved);
  }
  return x[0];
#endif
}
inline Float as_float(Int x) { return (Float)x; }
inline Int as_int(Float x) { return (Int)x; }

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// memcpy for rows: of a size unknown to the compiler that one is a call, as long as the copy of a short row.
inline void copy_row(void* to, const void* from, int64_t bytes) {
  constexpr int64_t STEP = 4 * LANES;
  char* target = static_cast<char*>(to);
  const char* source = static_cast<const char*>(from);
  int64_t i = 0;
  for (; i + STEP <= bytes; i += STEP) memcpy(target + i, source + i, STEP);
  if (i < bytes) memcpy(target + i, source + i, bytes - i);
}

// Transposes LANES x LANES words: at each step, rows `step` apart swap the halves of their 2 * step wide groups.
template <int STEP>
inline void transpose_steps(Int (&rows)[LANES]) {
  Int low, high;
  for (int i = 0; i < LANES; ++i) {
    const bool upper = i & STEP;
    low[i] = upper ? LANES + i - STEP : i;
    high[i] = upper ? LANES + i : i + STEP;
  }
#pragma GCC unroll 16
  for (int r = 0; r < LANES; ++r) {
    if (r & STEP) continue;
    const Int a = rows[r], b = rows[r + STEP];
    rows[r] = __builtin_shuffle(a, b, low);
    rows[r + STEP] = __builtin_shuffle(a, b, high);
  }
  if constexpr (STEP > 1) transpose_steps<STEP / 2>(rows);
}

// to[c][r] = from[r][c] for `rows` x `columns` words, both multiples of LANES.
inline void transpose(const int32_t* from, int64_t from_row, int32_t* to, int64_t to_row, int64_t rows,
                      int64_t columns) {
  for (int64_t r = 0; r < rows; r += LANES) {
    for (int64_t c = 0; c < columns; c += LANES) {
      Int block[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) block[i] = load(from + (r + i) * from_row + c);
      transpose_steps<LANES / 2>(block);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) store(to + (c + i) * to_row + r, block[i]);
    }
  }
}

}  // namespace
}  // namespace pynlp
