// A row as the kernels compute with it: fp32, whole vectors with zeros behind the last value, and what dropout keeps.
#pragma once

#include "../simd/random.h"
#include "../simd/rows.h"
#include "layers.h"

namespace pynlp {
namespace {

constexpr int64_t TASK_ROWS = 16;

inline int64_t padded(int64_t columns) { return round_up(columns, LANES); }

inline const char* row_of(const RowsIn& in, int64_t i) {
  return static_cast<const char*>(in.data) + i * in.stride * bytes_of(in.dtype);
}

// Row i: where it is, or widened and padded in `room`.
inline const float* widened(const RowsIn& in, int64_t i, int64_t columns, float* room) {
  if (in.dtype == Dtype::float32 && columns % LANES == 0) return reinterpret_cast<const float*>(row_of(in, i));
  read_row(in.dtype, row_of(in, i), columns, room);
  for (int64_t d = columns; d < padded(columns); ++d) room[d] = 0;
  return room;
}

// work(how to read them, row i of a, row i of b), of one dtype; b may have no data. Rows that are no whole vectors are
// widened in `room_a` and `room_b`.
template <class Work>
PYNLP_INLINE void with_rows(const RowsIn& a, const RowsIn& b, int64_t i, int64_t columns, float* room_a, float* room_b,
                            const Work& work) {
  if (columns % LANES == 0 && (PYNLP_F16C || a.dtype != Dtype::float16)) {
    with_read(a.dtype, [&](auto read) { work(read, row_of(a, i), b.data ? row_of(b, i) : nullptr); });
  } else {
    const float* second = b.data ? widened(b, i, columns, room_b) : nullptr;
    work(ReadFloat{}, reinterpret_cast<const char*>(widened(a, i, columns, room_a)),
         reinterpret_cast<const char*>(second));
  }
}

// Where row i of a result is computed: in place, or in `room`, from where `finish` brings it.
inline float* result_row(const RowsOut& out, int64_t i, int64_t columns, int64_t stride, float* room) {
  if (out.dtype == Dtype::float32 && columns % LANES == 0) return static_cast<float*>(out.data) + i * stride;
  return room;
}
inline void finish(const RowsOut& out, int64_t i, int64_t columns, int64_t stride, const float* room) {
  if (out.dtype == Dtype::float32 && columns % LANES == 0) return;
  write_row(out.dtype, room, columns, out.data, i * stride);
}

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
      philox(dropout_.seed, counters, words);  // a draw a lane: now its words one after the other
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
