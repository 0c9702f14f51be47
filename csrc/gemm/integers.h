// Words of integers for the products of tile.h. A sum is an int32, whose bits are kept as those of a float.
#pragma once

#include "../simd/bytes.h"
#include "tile.h"

namespace pynlp {
namespace {

alignas(64) constexpr int16_t ONES[32] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                                          1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

// Four bytes a word: in the lanes without a sign, which hold values plus OFFSET, and in rows with one.
struct Int8Quads {
  static constexpr int PAIR = 4;
  static constexpr int32_t OFFSET = 128;
  // Without VNNI the instruction clips the sum of a word's first two products, and of its last two, at 16 bits. 255 times
  // 128 fits: two neighbours of a row that have one sign may add up to 128, and those of two signs always fit.
  static constexpr bool NARROW = PYNLP_LANES >= 8 && !PYNLP_VNNI;
  static constexpr int32_t MOST_OF_TWO = 128;

  static Float multiply_add(Float sum, Int a, Int b) {
#if PYNLP_VNNI
    return add_byte_products(sum, b, a);
#elif PYNLP_LANES >= 8
    // One statement: the compiler would compute all products of a tile before it adds the first one, and run out of
    // registers.
    Int product;
    asm("vpmaddubsw %3, %2, %1\n\tvpmaddwd %4, %1, %1\n\tvpaddd %1, %0, %0"
        : "+v"(sum), "=&v"(product)
        : "v"(b), "v"(a), "m"(ONES));
    return sum;
#else
    Int total = (Int)sum;
#pragma GCC unroll 4
    for (int byte = 0; byte < 4; ++byte) total += (b >> 8 * byte & 255) * ((a << (24 - 8 * byte)) >> 24);
    return (Float)total;
#endif
  }
  static Float add(Float a, Float b) { return (Float)((Int)a + (Int)b); }
};

}  // namespace
}  // namespace pynlp
