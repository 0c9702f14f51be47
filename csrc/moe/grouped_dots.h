// A few rows for each expert: every line of its matrix is read once, for all of them, and nothing is packed.
#pragma once

#include "../quantization/few_rows.h"
#include "../quantization/four_bit_dots.h"
#include "../quantization/integer_dots.h"
#include "experts.h"

namespace pynlp {
namespace {

// Whether there are so few rows that this is the faster way.
inline bool are_few(const Groups& groups) {
  int64_t most = 0;
  for (int64_t expert = 0; expert < groups.experts; ++expert) most = larger(most, groups.count(expert));
  return most <= MOST_FEW;
}

inline bool has_dots(const Experts& weight) {
  return weight.outputs_are_lines && (PYNLP_F16C || weight.dtype != Dtype::float16);
}
template <class Weight>
bool has_dots(const QuantizedExperts<Weight>& weight) {
  return weight.outputs_are_lines;
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

// The same of quantized matrices, by `Dots`, which multiplies rows by lines of one weight.
template <class Dots, class Weight>
class QuantizedDots {
 public:
  QuantizedDots(const Groups& groups, const QuantizedExperts<Weight>& weight, const float* x, int64_t pitch,
                const float* bias, float* y)
      : lines_(weight.lines.count()),
        blocks_((lines_ + FEW_TASK - 1) / FEW_TASK),
        operations_(groups.rows() * lines_ * weight.columns.count()),
        problems_(groups.experts * sizeof(Problem)),
        dots_(groups.experts * sizeof(Dots)) {
    for (int64_t expert = 0; expert < groups.experts; ++expert) {
      const int64_t rows = groups.count(expert), first = groups.first(expert), line = expert * lines_;
      if (rows == 0) continue;
      // Results and the bias count from the line of the first expert.
      Problem* problem = new (problem_at(count_)) Problem{};
      problem->expert = expert;
      problem->forward = {rows, {x + first * pitch, pitch, Dtype::float32}, weight.weight,
                          bias ? bias + line : nullptr, {y + first * lines_, Dtype::float32}};
      new (dots_at(count_)) Dots(problem->forward);
      ++count_;
    }
  }
  ~QuantizedDots() {
    for (int64_t i = 0; i < count_; ++i) dots_at(i)->~Dots();
  }

  void run() { run_tasks<&QuantizedDots::multiply>(count_ * blocks_, operations_, this); }

 private:
  struct Problem {
    LinearForward<Weight> forward;
    int64_t expert;
  };

  Problem* problem_at(int64_t i) const { return static_cast<Problem*>(problems_.data) + i; }
  Dots* dots_at(int64_t i) const { return static_cast<Dots*>(dots_.data) + i; }

  void multiply(int64_t task) const {
    const Problem& problem = *problem_at(task / blocks_);
    const int64_t line = task % blocks_ * FEW_TASK, count = smaller(FEW_TASK, lines_ - line);
    alignas(64) float results[MOST_FEW * FEW_TASK];
    dots_at(task / blocks_)->multiply_lines(problem.expert * lines_ + line, count, results);
    const LinearForward<Weight>& in = problem.forward;
    for (int64_t m = 0; m < in.rows; ++m) {
      float* row = results + m * FEW_TASK;
      if (in.bias)
        for (int64_t n = 0; n < count; ++n) row[n] += in.bias[line + n];
      copy_row(static_cast<float*>(in.y.data) + m * lines_ + line, row, count * sizeof(float));
    }
  }

  const int64_t lines_, blocks_, operations_;
  const Buffer problems_, dots_;  // of the experts that have rows
  int64_t count_ = 0;
};

template <class Weights>
struct DotsFor {
  using type = GroupedDots;
};
template <>
struct DotsFor<FourBitExperts> {
  using type = QuantizedDots<FourBitDots, FourBit>;
};
template <>
struct DotsFor<Int8Experts> {
  using type = QuantizedDots<IntegerDots<8>, Int8>;
};
template <class Weights>
using DotsOf = typename DotsFor<Weights>::type;

}  // namespace
}  // namespace pynlp
