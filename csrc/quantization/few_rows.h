// A few rows of x by a quantized weight: what its formats share. Each byte of the weight is read once, for all rows.
#pragma once

#include "../common/parallel.h"
#include "../simd/memory.h"
#include "../simd/rows.h"
#include "quantization.h"

namespace pynlp {
namespace {

constexpr int MOST_FEW = 8;           // rows of x
constexpr int64_t FEW_TASK = 64;      // rows of the weight
constexpr int64_t FEW_AHEAD = 4096;   // bytes of the weight that are asked for before they are read, at least

template <int VALUE>
struct Constant {
  static constexpr int value = VALUE;
};

// work(the number as a Constant), 1 <= rows <= MOST_FEW.
template <int ROWS = 1, class Work>
PYNLP_INLINE void with_constant(int64_t rows, const Work& work) {
  if constexpr (ROWS < MOST_FEW) {
    if (rows > ROWS) {
      with_constant<ROWS + 1>(rows, work);
      return;
    }
  }
  work(Constant<ROWS>{});
}

// kernel->multiply(task) for all rows of the weight, FEW_TASK a task.
template <auto multiply, class Weight, class Kernel>
void run_few(const LinearForward<Weight>& in, Kernel* kernel) {
  const int64_t tasks = (in.weight.rows + FEW_TASK - 1) / FEW_TASK;
  run_tasks<multiply>(tasks, in.rows * in.weight.rows * in.weight.columns, kernel);
}

// Writes results[m * FEW_TASK + n], row m of x times row first + n of the weight, with the bias.
template <class Weight>
void write_few(const LinearForward<Weight>& in, int64_t first, int64_t count, float* results) {
  for (int64_t m = 0; m < in.rows; ++m) {
    float* row = results + m * FEW_TASK;
    if (in.bias)
      for (int64_t n = 0; n < count; ++n) row[n] += in.bias[first + n];
    write_row(in.y.dtype, row, count, in.y.data, m * in.weight.rows + first);
  }
}

// The rows of x, vectors of all of them side by side, and zeros behind them.
template <class Weight>
class FewRows {
 public:
  explicit FewRows(const LinearForward<Weight>& in)
      : in_(in), padded_(padded(in.weight.columns)), x_(in.rows * padded_ * sizeof(float)) {
    for (int64_t m = 0; m < in_.rows; ++m) {
      float* row = static_cast<float*>(thread_scratch(padded_ * sizeof(float)));
      read_row(in_.x.dtype, in_.x.row(m), in_.weight.columns, row);
      for (int64_t k = in_.weight.columns; k < padded_; ++k) row[k] = 0;
      for (int64_t k = 0; k < padded_; k += LANES) store(x_.floats() + k * in_.rows + m * LANES, load(row + k));
    }
  }

  // Columns k .. k + LANES - 1 of row m are the vector at from(k) + m * LANES.
  PYNLP_INLINE const float* from(int64_t k) const { return x_.floats() + k * in_.rows; }

 private:
  const LinearForward<Weight>& in_;
  const int64_t padded_;
  const Buffer x_;
};

}  // namespace
}  // namespace pynlp
