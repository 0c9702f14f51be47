// A few rows for each expert: every line of its matrix is read once, for all of them, and nothing is packed.
#pragma once

#include "../quantization/few_rows.h"
#include "experts.h"

namespace pynlp {
namespace {

// Whether there are so few rows that this is the faster way.
inline bool are_few(const Groups& groups, const Experts& weight) {
  int64_t most = 0;
  for (int64_t expert = 0; expert < groups.experts; ++expert) most = larger(most, groups.count(expert));
  const bool is_read = PYNLP_F16C || weight.dtype != Dtype::float16;
  return most <= MOST_FEW && is_read && weight.outputs_are_lines;
}

class GroupedDots {
 public:
  // y (rows, outputs) of x (rows, pitch) in fp32, with zeros behind the last columns.
  GroupedDots(const Groups& groups, const Experts& weight, const float* x, int64_t pitch, const float* bias, float* y)
      : groups_(groups),
        in_(weight),
        lines_(weight.lines.count()),
        blocks_((lines_ + FEW_TASK - 1) / FEW_TASK),
        x_(x),
        pitch_(pitch),
        bias_(bias),
        y_(y),
        active_(groups.experts * sizeof(int32_t)) {
    for (int64_t expert = 0; expert < groups.experts; ++expert)
      if (groups.count(expert) > 0) static_cast<int32_t*>(active_.data)[count_++] = static_cast<int32_t>(expert);
  }

  void run() {
    run_tasks<&GroupedDots::multiply>(count_ * blocks_, groups_.rows() * lines_ * in_.columns.count(), this);
  }

 private:
  void multiply(int64_t task) const {
    const int64_t expert = static_cast<const int32_t*>(active_.data)[task / blocks_];
    const int64_t line = task % blocks_ * FEW_TASK, count = smaller(FEW_TASK, lines_ - line);
    const int64_t row = groups_.first(expert);
    with_constant(groups_.count(expert), [&](auto rows) {
      with_read(in_.dtype, [&](auto read) { dots<decltype(read), decltype(rows)::value>(expert, row, line, count); });
    });
  }

  template <class Read, int ROWS>
  void dots(int64_t expert, int64_t row, int64_t first, int64_t count) const {
    constexpr int APART = ROWS <= 2 ? 4 : ROWS <= 4 ? 2 : 1;
    const DenseValues values(in_);
    const int64_t columns = in_.columns.count(), whole = columns / LANES * LANES;
    const float* x = x_ + row * pitch_;
    for (int64_t n = first; n < first + count; ++n) {
      const char* line = values.at(expert, n, 0);
      // Several sums of each row: one that waits for itself would keep the memory waiting.
      Float sums[ROWS][APART];
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
        for (int i = 0; i < APART; ++i) sums[m][i] = Float{};
      int64_t k = 0;
      for (; k + APART * LANES <= whole; k += APART * LANES) {
#pragma GCC unroll 4
        for (int64_t byte = 0; byte < APART * LANES * Read::BYTES; byte += 64)
          __builtin_prefetch(line + k * Read::BYTES + FEW_AHEAD + byte);
#pragma GCC unroll 4
        for (int i = 0; i < APART; ++i) {
          const Float value = Read::load(line, k + i * LANES);
#pragma GCC unroll 8
          for (int m = 0; m < ROWS; ++m) sums[m][i] += value * load(x + m * pitch_ + k + i * LANES);
        }
      }
      for (; k < whole; k += LANES) {
        const Float value = Read::load(line, k);
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; ++m) sums[m][0] += value * load(x + m * pitch_ + k);
      }
      if (whole < columns) {
        alignas(64) float rest[LANES] = {};
        read_row(in_.dtype, line + whole * Read::BYTES, columns - whole, rest);
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; ++m) sums[m][0] += load(rest) * load(x + m * pitch_ + whole);
      }
      const float bias = bias_ ? bias_[expert * lines_ + n] : 0.0f;
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 4
        for (int i = 1; i < APART; ++i) sums[m][0] += sums[m][i];
        y_[(row + m) * lines_ + n] = lane_sum(sums[m][0]) + bias;
      }
    }
  }

  const Groups groups_;
  const Experts& in_;
  const int64_t lines_, blocks_;
  const float* x_;
  const int64_t pitch_;
  const float* bias_;
  float* y_;
  const Buffer active_;  // the experts that have rows
  int64_t count_ = 0;
};

}  // namespace
}  // namespace pynlp
