// Products of words in AMX's tile registers, of 16 rows x 16 words each: for tile.h, where a target has them.
#pragma once

#include "../simd/vector.h"

namespace pynlp {
namespace {

constexpr int64_t SIDE = 16;  // rows of a tile, words of its rows, and columns of sums

// Sums in tiles 0 to 3, two rows of two, rows in 4 and 5, columns in 6 and 7. Of 32 rows the first `rows` are there.
inline void configure_tiles(int64_t rows) {
  struct alignas(64) {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } tiles = {};
  tiles.palette = 1;
  const int64_t upper = smaller(rows, SIDE), lower = larger(1, rows - SIDE);
  const int64_t counts[8] = {upper, upper, lower, lower, upper, lower, SIDE, SIDE};
  for (int tile = 0; tile < 8; ++tile) {
    tiles.row_bytes[tile] = 4 * SIDE;
    tiles.rows[tile] = static_cast<uint8_t>(counts[tile]);
  }
  asm volatile("ldtilecfg %0" ::"m"(tiles));  // g++ 12's own function tells the compiler of 8 of the 64 bytes
}

// The names of tiles are part of instructions: they cannot be arguments.
#define PYNLP_ADD_PRODUCTS(sum, a, b) \
  if constexpr (E::PAIR == 2)         \
    _tile_dpbf16ps(sum, a, b);        \
  else                                \
    _tile_dpbsud(sum, a, b)

// One or two tiles of rows by one or two of columns. `depth` is a multiple of SIDE.
template <class E, bool ADD, bool TWO_ROWS, bool TWO_COLUMNS>
PYNLP_INLINE void multiply_tiles(int64_t depth, const int32_t* a, int64_t a_row, const int32_t* b, int64_t b_depth,
                                 float* c, int64_t c_row) {
  float* lower = c + SIDE * c_row;
  if constexpr (ADD) {  // the sum goes on from c: bf16 loses more than that
    _tile_loadd(0, c, 4 * c_row);
    if constexpr (TWO_COLUMNS) _tile_loadd(1, c + SIDE, 4 * c_row);
    if constexpr (TWO_ROWS) _tile_loadd(2, lower, 4 * c_row);
    if constexpr (TWO_ROWS && TWO_COLUMNS) _tile_loadd(3, lower + SIDE, 4 * c_row);
  } else {
    _tile_zero(0);
    if constexpr (TWO_COLUMNS) _tile_zero(1);
    if constexpr (TWO_ROWS) _tile_zero(2);
    if constexpr (TWO_ROWS && TWO_COLUMNS) _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += SIDE) {
    _tile_loadd(4, a + k, 4 * a_row);
    _tile_loadd(6, b + k * b_depth, 4 * b_depth);
    PYNLP_ADD_PRODUCTS(0, 4, 6);
    if constexpr (TWO_COLUMNS) {
      _tile_loadd(7, b + k * b_depth + SIDE, 4 * b_depth);
      PYNLP_ADD_PRODUCTS(1, 4, 7);
    }
    if constexpr (TWO_ROWS) {
      _tile_loadd(5, a + SIDE * a_row + k, 4 * a_row);
      PYNLP_ADD_PRODUCTS(2, 5, 6);
      if constexpr (TWO_COLUMNS) {
        PYNLP_ADD_PRODUCTS(3, 5, 7);
      }
    }
  }
  _tile_stored(0, c, 4 * c_row);
  if constexpr (TWO_COLUMNS) _tile_stored(1, c + SIDE, 4 * c_row);
  if constexpr (TWO_ROWS) _tile_stored(2, lower, 4 * c_row);
  if constexpr (TWO_ROWS && TWO_COLUMNS) _tile_stored(3, lower + SIDE, 4 * c_row);
}

template <class E, bool ADD, bool TWO_ROWS>
PYNLP_INLINE void multiply_row_of_tiles(int64_t columns, int64_t depth, const int32_t* a, int64_t a_row,
                                        const int32_t* b, int64_t b_depth, float* c, int64_t c_row) {
  int64_t column = 0;
  for (; column + 2 * SIDE <= columns; column += 2 * SIDE)
    multiply_tiles<E, ADD, TWO_ROWS, true>(depth, a, a_row, b + column, b_depth, c + column, c_row);
  if (column < columns)
    multiply_tiles<E, ADD, TWO_ROWS, false>(depth, a, a_row, b + column, b_depth, c + column, c_row);
}

// c = or += a * b as in tile.h. `columns` and `depth` are multiples of SIDE.
template <class E, bool ADD>
void matmul_in_tiles(int64_t rows, int64_t columns, int64_t depth, const int32_t* a, int64_t a_row, const int32_t* b,
                     int64_t b_depth, float* c, int64_t c_row) {
  asm volatile("" ::: "memory");  // the functions that load a tile do not say that they read memory
  for (int64_t row = 0; row < rows; row += 2 * SIDE, a += 2 * SIDE * a_row, c += 2 * SIDE * c_row) {
    const int64_t left = smaller(2 * SIDE, rows - row);
    if (row == 0 || left < 2 * SIDE) configure_tiles(left);
    if (left > SIDE)
      multiply_row_of_tiles<E, ADD, true>(columns, depth, a, a_row, b, b_depth, c, c_row);
    else
      multiply_row_of_tiles<E, ADD, false>(columns, depth, a, a_row, b, b_depth, c, c_row);
  }
  _tile_release();
}

#undef PYNLP_ADD_PRODUCTS

}  // namespace
}  // namespace pynlp
