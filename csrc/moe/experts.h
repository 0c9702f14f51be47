// Experts' matrices, and blocks of them as the left-hand side of a product.
#pragma once

#include "../gemm/pack.h"
#include "../quantization/four_bit.h"
#include "../quantization/integers.h"
#include "moe.h"

namespace pynlp {
namespace {

// Lines whose values are asked for before they are read.
constexpr int64_t AHEAD_LINES = 16;

// Reads lines of matrices in fp32, bf16 or fp16, as they lie in memory.
class DenseValues {
 public:
  explicit DenseValues(const Experts& in) : in_(in) {}

  PYNLP_INLINE const char* at(int64_t expert, int64_t line, int64_t column) const {
    const int64_t element = expert * in_.expert_stride + line * in_.line_stride + column;
    return static_cast<const char*>(in_.data) + element * bytes_of(in_.dtype);
  }
  PYNLP_INLINE void read(int64_t expert, int64_t line, int64_t column, int64_t count, float* to) const {
    read_row(in_.dtype, at(expert, line, column), count, to);
  }
  // The values as they are stored, if that is as bf16, else null.
  PYNLP_INLINE const uint16_t* bf16(int64_t expert, int64_t line, int64_t column) const {
    return in_.dtype == Dtype::bfloat16 ? reinterpret_cast<const uint16_t*>(at(expert, line, column)) : nullptr;
  }
  PYNLP_INLINE void prefetch(int64_t expert, int64_t line, int64_t column, int64_t count) const {
    const char* from = at(expert, line, column);
    for (int64_t byte = 0; byte < count * bytes_of(in_.dtype); byte += 64) __builtin_prefetch(from + byte);
  }

 private:
  const Experts& in_;
};

// The same of quantized matrices, by `Values`, which reads the rows of all of them.
template <class Values, class Weight>
class QuantizedValues {
 public:
  explicit QuantizedValues(const QuantizedExperts<Weight>& in) : lines_(in.lines.count()), values_(in.weight) {}

  PYNLP_INLINE void read(int64_t expert, int64_t line, int64_t column, int64_t count, float* to) const {
    values_.read(expert * lines_ + line, column, count, to);
  }
  PYNLP_INLINE const uint16_t* bf16(int64_t, int64_t, int64_t) const { return nullptr; }
  PYNLP_INLINE void prefetch(int64_t expert, int64_t line, int64_t column, int64_t count) const {
    values_.prefetch(expert * lines_ + line, column, count);
  }

 private:
  const int64_t lines_;
  const Values values_;
};

template <class Weights>
struct ValuesFor {
  using type = DenseValues;
};
template <>
struct ValuesFor<FourBitExperts> {
  using type = QuantizedValues<FourBitValues, FourBit>;
};
template <>
struct ValuesFor<Int8Experts> {
  using type = QuantizedValues<IntegerValues<8>, Int8>;
};
template <class Weights>
using ValuesOf = typename ValuesFor<Weights>::type;

// Writes values first .. first + count - 1 of a line, which begins at element `start`. In memory gates may come before
// what they gate; then `first` is even, and count at most MOST.
template <int64_t MOST>
PYNLP_INLINE void write_in_order(const Order& order, Dtype dtype, const float* values, int64_t first, int64_t count,
                                 void* data, int64_t start) {
  if (order.as_in_memory()) {
    write_row(dtype, values, count, data, start + first);
    return;
  }
  alignas(64) float gates[MOST / 2 + 1], others[MOST / 2 + 1];
  for (int64_t i = 0; i < count / 2; ++i) gates[i] = values[2 * i];
  for (int64_t i = 0; i < count / 2; ++i) others[i] = values[2 * i + 1];
  write_row(dtype, gates, count / 2, data, start + first / 2);
  write_row(dtype, others, count / 2, data, start + order.units + first / 2);
}

// A block of outputs as the left-hand side of a product that sums over inputs. Word `k` of output `n` is
// to[n * row + k * depth].
template <class E, class Values, int64_t BLOCK, int64_t DEPTH>
class WeightBlocks {
 public:
  WeightBlocks(const Matrices& weight, const Values& values) : in_(weight), values_(values) {}

  int64_t row() const { return in_.outputs_are_lines ? DEPTH : 1; }
  int64_t depth() const { return in_.outputs_are_lines ? 1 : BLOCK; }

  static constexpr int64_t ROOM = 2 * larger(BLOCK, DEPTH * E::PAIR) + 4 * LINE;  // floats

  // Outputs first .. first + count - 1, words start .. start + words - 1.
  void read(int64_t expert, int64_t first, int64_t count, int64_t start, int64_t words, float* room,
            int32_t* to) const {
    const int64_t values = smaller(words * E::PAIR, in_.inputs().count() - start * E::PAIR);
    if (in_.outputs_are_lines)
      read_lines(expert, first, count, start * E::PAIR, values, words, room, to);
    else
      read_across(expert, first, count, start * E::PAIR, values, words, room, to);
  }

 private:
  void read_lines(int64_t expert, int64_t first, int64_t count, int64_t column, int64_t values, int64_t words,
                  float* room, int32_t* to) const {
    for (int64_t n = 0; n < count; ++n, to += DEPTH) {
      const int64_t line = in_.lines.at(first + n);
      if (n + AHEAD_LINES < count && in_.columns.as_in_memory())
        values_.prefetch(expert, in_.lines.at(first + n + AHEAD_LINES), column, values);
      if constexpr (E::PAIR == 1) {
        read_columns(expert, line, column, values, room, reinterpret_cast<float*>(to));
      } else {
        halves(expert, line, column, values, room, reinterpret_cast<uint16_t*>(to));
        if (values < 2 * words) reinterpret_cast<uint16_t*>(to)[values] = 0;
      }
    }
  }

  void read_across(int64_t expert, int64_t first, int64_t count, int64_t line, int64_t values, int64_t words,
                   float* room, int32_t* to) const {
    for (int64_t word = 0; word < words; ++word, line += E::PAIR, values -= E::PAIR, to += BLOCK) {
      if (values > AHEAD_LINES && in_.columns.as_in_memory())
        values_.prefetch(expert, in_.lines.at(line + AHEAD_LINES), first, count);
      if constexpr (E::PAIR == 1) {
        read_columns(expert, in_.lines.at(line), first, count, room, reinterpret_cast<float*>(to));
      } else {
        alignas(64) uint16_t pair[2][BLOCK];
        halves(expert, in_.lines.at(line), first, count, room, pair[0]);
        if (values > 1)
          halves(expert, in_.lines.at(line + 1), first, count, room, pair[1]);
        else
          memset(pair[1], 0, sizeof pair[1]);
        pack_pair(pair[0], pair[1], count, count, to);
      }
    }
  }

  // Columns in their order, which in memory may be gates first.
  PYNLP_INLINE void read_columns(int64_t expert, int64_t line, int64_t first, int64_t count, float* room,
                                 float* to) const {
    if (in_.columns.as_in_memory()) {
      values_.read(expert, line, first, count, to);
      return;
    }
    const int64_t unit = first / 2, units = (first + count + 1) / 2 - unit;
    float* other = room + round_up(units, LINE);
    values_.read(expert, line, unit, units, room);
    values_.read(expert, line, in_.columns.units + unit, units, other);
    const int64_t skipped = first % 2;
    for (int64_t i = 0; i < count; ++i) to[i] = ((i + skipped) % 2 ? other : room)[(i + skipped) / 2];
  }

  PYNLP_INLINE void halves(int64_t expert, int64_t line, int64_t first, int64_t count, float* room,
                           uint16_t* to) const {
    const uint16_t* stored = in_.columns.as_in_memory() ? values_.bf16(expert, line, first) : nullptr;
    if (stored) {
      copy_row(to, stored, 2 * count);
      return;
    }
    float* row = room + round_up(count, LINE) + 2 * LINE;
    read_columns(expert, line, first, count, room, row);
    float_to_bf16(row, count, to);
  }

  const Matrices& in_;
  const Values& values_;
};

}  // namespace
}  // namespace pynlp
