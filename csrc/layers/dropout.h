// Which values dropout keeps: value (i, j) has the 16-bit number j % 8 of Philox(seed; j / 8, i's halves, 1).
#pragma once

#include "../simd/random.h"
#include "layers.h"

namespace pynlp {
namespace {

// to[2 i] = a[i], to[2 i + 1] = b[i]
inline void interleave(Int a, Int b, Int* to) {
  Int low, high;
  for (int i = 0; i < LANES; ++i) {
    low[i] = i / 2 + i % 2 * LANES;
    high[i] = LANES / 2 + i / 2 + i % 2 * LANES;
  }
  to[0] = __builtin_shuffle(a, b, low);
  to[1] = __builtin_shuffle(a, b, high);
}

// The random numbers of a row.
class Keeps {
 public:
  static int64_t size(int64_t columns) { return round_up(columns, 8 * LANES); }  // numbers

  Keeps(const RowDropout& dropout, uint16_t* numbers)
      : factor(65536.0f / static_cast<float>(65536 - dropout.dropped)),
        dropout_(dropout),
        numbers_(numbers),
        dropped_(broadcast(dropout.dropped)) {}

  void draw(int64_t row, int64_t columns) {
    Counters counters;
    counters.set(1, static_cast<uint32_t>(row));
    counters.set(2, static_cast<uint32_t>(row >> 32));
    counters.set(3, 1);
    for (int64_t group = 0; 8 * group < columns; group += LANES) {
      counters.count_from(0, static_cast<uint32_t>(group));
      Int words[4], evens[2], odds[2], numbers[4];
      philox(dropout_.seed, counters, words);  // word w of all lanes' draws: put in order, all words of one draw
      interleave(words[0], words[2], evens);
      interleave(words[1], words[3], odds);
      for (int half = 0; half < 2; ++half) interleave(evens[half], odds[half], numbers + 2 * half);
      memcpy(numbers_ + 8 * group, numbers, sizeof numbers);
    }
  }

  // x of the LANES columns from d on: 0 where it is dropped, else scaled by `factor`.
  Float apply(Float x, int64_t d) const {
    Halves numbers;
    memcpy(&numbers, numbers_ + d, sizeof numbers);
    return __builtin_convertvector(numbers, Int) >= dropped_ ? x * broadcast(factor) : Float{};
  }

  const float factor;  // 1 / the share that is kept

 private:
  const RowDropout& dropout_;
  uint16_t* numbers_;
  Int dropped_;
};

}  // namespace
}  // namespace pynlp
