// A few rows of x by a weight in 4 bits, which is decoded in registers.
// What bounds it is the memory, or without AVX-512 the look-ups.
#pragma once

#include "few_rows.h"
#include "four_bit.h"

namespace pynlp {
namespace {

class FourBitDots {
 public:
  explicit FourBitDots(const LinearForward<FourBit>& in)
      : in_(in),
        columns_(in.weight.columns),
        shift_(__builtin_ctzll(in.weight.blocksize)),
        lookup_(in.weight.type),
        scales_(in.weight),
        values_(in.weight),
        x_(in) {}

  void run() { run_few<&FourBitDots::multiply>(in_, this); }

  // results[m * FEW_TASK + n], row m of x times row first + n of the weight.
  void multiply_lines(int64_t first, int64_t count, float* results) const {
    with_constant(in_.rows, [&](auto rows) {
      constexpr int ROWS = decltype(rows)::value;
      if (columns_ % UNIT == 0)
        dots<ROWS>(first, count, results);
      else
        dots_of_odd_rows<ROWS>(first, count, results);
    });
  }

 private:
  static constexpr int64_t CACHED = 4096;  // values of x

  void multiply(int64_t task) const {
    const int64_t first = task * FEW_TASK, count = smaller(FEW_TASK, in_.weight.rows - first);
    alignas(64) float results[MOST_FEW * FEW_TASK];
    multiply_lines(first, count, results);
    write_few(in_, first, count, results);
  }

  // results[m][n] of rows that are whole units: a piece of them at a time, for which x is in the first-level cache.
  template <int ROWS>
  void dots(int64_t first, int64_t count, float* results) const {
    constexpr int64_t PIECE = larger(UNIT, CACHED / ROWS / UNIT * UNIT);
    const int64_t bytes = (FEW_TASK * ROWS + 1) * sizeof(Float) + (PIECE / UNIT + 2) * 4 + 128;
    Arena arena{static_cast<char*>(thread_scratch(bytes))};
    Float* sums = arena.take<Float>(FEW_TASK * ROWS);
    float* room = arena.take<float>(PIECE / UNIT + 2);
    for (int64_t i = 0; i < count * ROWS; ++i) sums[i] = Float{};
    const Lookup lookup = lookup_;
    for (int64_t k = 0; k < columns_; k += PIECE) {
      const int64_t size = smaller(PIECE, columns_ - k);
      const int64_t ahead = (FEW_AHEAD / (size / 2) + 1) * (columns_ / 2);  // the same piece of a later row
      for (int64_t n = 0; n < count; ++n) {
        const int64_t start = (first + n) * columns_ + k;
        scales_.prefetch((start + 2 * ahead) >> shift_);
        add_piece<ROWS>(lookup, start, size, x_.from(k), ahead, room, sums + n * ROWS);
      }
    }
    for (int64_t n = 0; n < count; ++n)
      for (int m = 0; m < ROWS; ++m) results[m * FEW_TASK + n] = lane_sum(sums[n * ROWS + m]);
  }

  // sums[m] += values start .. start + size - 1 times row m of x.
  template <int ROWS>
  PYNLP_INLINE void add_piece(const Lookup& lookup, int64_t start, int64_t size, const float* x, int64_t ahead,
                              float* room, Float* all) const {
    const int64_t block = start >> shift_, blocks = ((start + size - 1) >> shift_) - block + 1;
    const float* scale = scales_.of(block, blocks, room);
    const uint8_t* packed = in_.weight.packed + start / 2;
    Float sums[ROWS];
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) sums[m] = all[m];
    const int64_t block_units = in_.weight.blocksize / UNIT;
    int64_t left = size / UNIT;
    for (int64_t units = block_units - start / UNIT % block_units; left > 0; units = block_units, ++scale) {
      units = smaller(units, left);
      left -= units;
      if constexpr (ROWS == 1)
        sums[0] += dot_of_block(lookup, packed, units, x, ahead) * broadcast(*scale);
      else
        add_block<ROWS>(lookup, packed, units, x, ahead, *scale, sums);
      packed += units * UNIT_BYTES;
      x += units * UNIT * ROWS;
    }
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) all[m] = sums[m];
  }

  // Codes' values times x: the scale is not needed for each of them.
  static PYNLP_INLINE Float dot_of_block(const Lookup& lookup, const uint8_t* packed, int64_t units, const float* x,
                                         int64_t ahead) {
    Float even = Float{}, odd = Float{};
    for (int64_t unit = 0; unit < units; ++unit, packed += UNIT_BYTES, x += UNIT) {
      if (unit % 4 == 0) __builtin_prefetch(packed + ahead);
      Float values[UNIT_VECTORS];
      lookup.read(packed, values);
#pragma GCC unroll 8
      for (int v = 0; v < UNIT_VECTORS; v += 2) {
        even += values[v] * load(x + v * LANES);
        odd += values[v + 1] * load(x + (v + 1) * LANES);
      }
    }
    return even + odd;
  }

  template <int ROWS>
  static PYNLP_INLINE void add_block(const Lookup& lookup, const uint8_t* packed, int64_t units, const float* x,
                                     int64_t ahead, float scale, Float (&sums)[ROWS]) {
    for (int64_t unit = 0; unit < units; ++unit, packed += UNIT_BYTES, x += UNIT * ROWS) {
      if (unit % 4 == 0) __builtin_prefetch(packed + ahead);
      Float values[UNIT_VECTORS];
      lookup.read(packed, values);
#pragma GCC unroll 8
      for (int v = 0; v < UNIT_VECTORS; ++v) {
        values[v] *= broadcast(scale);
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; ++m) sums[m] += values[v] * load(x + (v * ROWS + m) * LANES);
      }
    }
  }

  template <int ROWS>
  void dots_of_odd_rows(int64_t first, int64_t count, float* results) const {
    const int64_t size = padded(columns_);
    float* row = static_cast<float*>(thread_scratch(size * sizeof(float)));
    for (int64_t n = 0; n < count; ++n) {
      values_.read(first + n, 0, columns_, row);
      for (int64_t k = columns_; k < size; ++k) row[k] = 0;
      Float sums[ROWS];
      for (int m = 0; m < ROWS; ++m) sums[m] = Float{};
      for (int64_t k = 0; k < size; k += LANES) {
        const Float value = load(row + k);
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; ++m) sums[m] += value * load(x_.from(k) + m * LANES);
      }
      for (int m = 0; m < ROWS; ++m) results[m * FEW_TASK + n] = lane_sum(sums[m]);
    }
  }

  const LinearForward<FourBit>& in_;
  const int64_t columns_;
  const int shift_;
  const Lookup lookup_;
  const Scales scales_;
  const FourBitValues values_;
  const FewRows<FourBit> x_;
};

}  // namespace
}  // namespace pynlp
