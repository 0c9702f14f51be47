// Words of integers for the products of tile.h. A sum is an int32, whose bits are kept as those of a float.
#pragma once

#include "../simd/bytes.h"
#include "tile.h"

namespace pynlp {
namespace {

// Two int16 a word: AVX2 and AVX-512 without VNNI multiply pairs of them, and no sum of two products overflows.
#if PYNLP_LANES >= 8 && !PYNLP_VNNI
struct Int16Pairs {
  static constexpr int PAIR = 2;
  static constexpr int32_t OFFSET = 0;  // what is added to values in the lanes
  // The compiler would compute all products of a tile before it adds the first one, and run out of registers.
  static Float multiply_add(Float sum, Int a, Int b) {
    Int product;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+v"(sum), "=&v"(product) : "v"(a), "v"(b));
    return sum;
  }
  static Float add(Float a, Float b) { return (Float)((Int)a + (Int)b); }
};
using IntegerWords = Int16Pairs;
#else

// Four int8 a word. VNNI multiplies bytes without a sign, those in the lanes, by bytes with one.
struct Int8Quads {
  static constexpr int PAIR = 4;
  static constexpr int32_t OFFSET = 128;  // what is added to values in the lanes, so that they have no sign
  static Float multiply_add(Float sum, Int a, Int b) {
#if PYNLP_VNNI
    return add_byte_products(sum, b, a);
#else
    Int total = (Int)sum;
#pragma GCC unroll 4
    for (int byte = 0; byte < 4; ++byte) total += (b >> 8 * byte & 255) * ((a << (24 - 8 * byte)) >> 24);
    return (Float)total;
#endif
  }
  static Float add(Float a, Float b) { return (Float)((Int)a + (Int)b); }
};
using IntegerWords = Int8Quads;
#endif

}  // namespace
}  // namespace pynlp
