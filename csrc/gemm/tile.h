// The inner loop of all kernels: small matrix products whose right-hand side lies in the lanes.
//
//   c[r][lane] (+)= sum_k a[r][k] * b[k][lane]
//
// Rows of a are broadcast from memory as they are, so neither operand is repacked; nothing is summed across lanes.
// A word is one fp32, or two bf16 that follow each other along k (`Bf16`): then b holds pairs of rows, interleaved.
// Words of integers (gemm/integers.h) have sums of integers, whose bits c holds.
// Register tiles of TILE_ROWS x TILE_VECTORS accumulators reach 95-100 % of the FMA and dot peak from the first-level
// cache on Zen 4/5 and Intel cores.
#pragma once

#include "../simd/vector.h"
#if PYNLP_AMX
#include "amx.h"
#endif

namespace pynlp {
namespace {

#if PYNLP_AVX512
constexpr int TILE_ROWS = 8;  // 32 registers: 16 accumulators
#elif PYNLP_LANES == 8
constexpr int TILE_ROWS = 6;  // 16 registers: 12 accumulators
#else
constexpr int TILE_ROWS = 4;  // 16 registers, and a product and a sum instead of one instruction
#endif
constexpr int TILE_VECTORS = 2;
constexpr int LINE = 16;  // words of a cache line

// What the product does to c.
enum class Into { overwrite, add, scale_and_add };  // scale_and_add: c = c * lane_scale[lane] + product

struct Fp32 {
  static constexpr int PAIR = 1;  // values in a word
  static constexpr int EXP_DEGREE = 6;
  static Float multiply_add(Float sum, Int a, Int b) { return sum + as_float(a) * as_float(b); }
  static Float add(Float a, Float b) { return a + b; }
};

#if PYNLP_BF16
struct Bf16 {
  static constexpr int PAIR = 2;
  static constexpr int EXP_DEGREE = 3;
  static Float multiply_add(Float sum, Int a, Int b) {
    return (Float)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  static Float add(Float a, Float b) { return a + b; }
};
#endif

// `ahead`: rows of a that come after this tile, or null. They are fetched while it computes, a line of each at a time:
// all at once they would fill the buffers of the loads that the tile itself waits for.
template <class E, Into INTO, int ROWS, int VECTORS>
__attribute__((always_inline)) inline void matmul_tile(int64_t depth, const int32_t* a, int64_t a_row, int64_t a_depth,
                                                       const int32_t* b, int64_t b_depth, float* c, int64_t c_row,
                                                       const float* lane_scale, const int32_t* ahead = nullptr) {
  Float sum[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      sum[r][v] = Float{};
      if constexpr (INTO != Into::overwrite) __builtin_prefetch(c + r * c_row + v * LANES);
    }
  }
  for (int64_t line = 0; line < depth; line += LINE) {
    if (ahead) {
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) __builtin_prefetch(ahead + r * a_row + line);
    }
    const int64_t steps = smaller(LINE, depth - line);
    for (int64_t k = 0; k < steps; ++k) {
      Int lanes[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) lanes[v] = load(b + v * LANES);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        const Int value = broadcast(a[r * a_row]);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) sum[r][v] = E::multiply_add(sum[r][v], value, lanes[v]);
      }
      a += a_depth;
      b += b_depth;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      float* p = c + r * c_row + v * LANES;
      // c is added last: sums of sums lose less than one long sum.
      if constexpr (INTO == Into::add) sum[r][v] = E::add(sum[r][v], load(p));
      if constexpr (INTO == Into::scale_and_add) sum[r][v] += load(p) * load(lane_scale + v * LANES);
      store(p, sum[r][v]);
    }
  }
}

// The last rows, fewer than a full tile.
template <class E, Into INTO, int VECTORS, int ROWS = TILE_ROWS - 1>
__attribute__((always_inline)) inline void matmul_rest(int64_t rows, int64_t depth, const int32_t* a, int64_t a_row,
                                                       int64_t a_depth, const int32_t* b, int64_t b_depth, float* c,
                                                       int64_t c_row, const float* lane_scale) {
  if (rows == ROWS) {
    matmul_tile<E, INTO, ROWS, VECTORS>(depth, a, a_row, a_depth, b, b_depth, c, c_row, lane_scale);
  } else if constexpr (ROWS > 1) {
    matmul_rest<E, INTO, VECTORS, ROWS - 1>(rows, depth, a, a_row, a_depth, b, b_depth, c, c_row, lane_scale);
  }
}

template <class E, Into INTO, int VECTORS>
__attribute__((always_inline)) inline void matmul_columns(int64_t rows, int64_t depth, const int32_t* a, int64_t a_row,
                                                          int64_t a_depth, const int32_t* b, int64_t b_depth, float* c,
                                                          int64_t c_row, const float* lane_scale) {
  int64_t r = 0;
  for (; r + TILE_ROWS <= rows; r += TILE_ROWS) {
    const bool more = a_depth == 1 && r + 2 * TILE_ROWS <= rows;
    matmul_tile<E, INTO, TILE_ROWS, VECTORS>(depth, a + r * a_row, a_row, a_depth, b, b_depth, c + r * c_row, c_row,
                                             lane_scale, more ? a + (r + TILE_ROWS) * a_row : nullptr);
  }
  if (r < rows)
    matmul_rest<E, INTO, VECTORS>(rows - r, depth, a + r * a_row, a_row, a_depth, b, b_depth, c + r * c_row, c_row,
                                  lane_scale);
}

// `columns` is a multiple of LANES, `depth` counts words. Element (r, k) of a is a[r * a_row + k * a_depth].
template <class E, Into INTO>
__attribute__((noinline)) void matmul(int64_t rows, int64_t columns, int64_t depth, const void* a, int64_t a_row,
                                      int64_t a_depth, const void* b, int64_t b_depth, float* c, int64_t c_row,
                                      const float* lane_scale = nullptr) {
  const int32_t* words_a = static_cast<const int32_t*>(a);
  const int32_t* words_b = static_cast<const int32_t*>(b);
#if PYNLP_AMX
  if constexpr (E::PAIR > 1 && INTO != Into::scale_and_add) {
    const int64_t whole = depth / SIDE * SIDE;
    if (whole > 0 && a_depth == 1) {
      matmul_in_tiles<E, INTO == Into::add>(rows, columns, whole, words_a, a_row, words_b, b_depth, c, c_row);
      if (whole < depth)
        matmul<E, Into::add>(rows, columns, depth - whole, words_a + whole, a_row, 1, words_b + whole * b_depth,
                             b_depth, c, c_row);
      return;
    }
  }
#endif
  int64_t column = 0;
  for (; column + TILE_VECTORS * LANES <= columns; column += TILE_VECTORS * LANES) {
    const float* scale = INTO == Into::scale_and_add ? lane_scale + column : nullptr;
    // A depth step of one word is the common case: as a constant it saves an address register a row.
    if (a_depth == 1)
      matmul_columns<E, INTO, TILE_VECTORS>(rows, depth, words_a, a_row, 1, words_b + column, b_depth, c + column,
                                            c_row, scale);
    else
      matmul_columns<E, INTO, TILE_VECTORS>(rows, depth, words_a, 1, a_depth, words_b + column, b_depth, c + column,
                                            c_row, scale);
  }
  for (; column < columns; column += LANES) {
    const float* scale = INTO == Into::scale_and_add ? lane_scale + column : nullptr;
    matmul_columns<E, INTO, 1>(rows, depth, words_a, a_row, a_depth, words_b + column, b_depth, c + column, c_row,
                               scale);
  }
}

// c = a * b, the terms of fp32 in sums of at most TERMS that are added up: that loses fewer digits than one long sum.
// Products in bf16 lose more than either.
template <class E, int64_t TERMS>
void matmul_in_sums(int64_t rows, int64_t columns, int64_t depth, const void* a, int64_t a_row, const void* b,
                    int64_t b_depth, float* c, int64_t c_row) {
  const int64_t most = E::PAIR == 1 ? TERMS : depth;
  for (int64_t k = 0; k < depth; k += most) {
    const auto product = k == 0 ? matmul<E, Into::overwrite> : matmul<E, Into::add>;
    product(rows, columns, smaller(most, depth - k), static_cast<const int32_t*>(a) + k, a_row, 1,
            static_cast<const int32_t*>(b) + k * b_depth, b_depth, c, c_row, nullptr);
  }
}

}  // namespace
}  // namespace pynlp
