// A few rows of x by a weight in 8 bits.
#pragma once

#include "few_rows.h"
#include "int8.h"

namespace pynlp {
namespace {

class Int8Dots {
 public:
  explicit Int8Dots(const LinearForward<Int8>& in) : in_(in), columns_(in.weight.columns), x_(in) {}

  void run() { run_tasks<&Int8Dots::multiply>(x_.tasks(), x_.operations(), this); }

 private:
  void multiply(int64_t task) const {
    const int64_t first = task * FEW_TASK, count = smaller(FEW_TASK, in_.weight.rows - first);
    alignas(64) float results[MOST_FEW * FEW_TASK];
    with_constant(in_.rows, [&](auto rows) {
      constexpr int ROWS = decltype(rows)::value;
      for (int64_t n = 0; n < count; ++n) dot<ROWS>(first + n, results + n);
    });
    x_.write(first, count, results);
  }

  // results[m * FEW_TASK] = row n of the weight times row m of x. Few rows have several sums each: one would wait for
  // its own last term.
  template <int ROWS>
  PYNLP_INLINE void dot(int64_t n, float* results) const {
    constexpr int CHAINS = ROWS == 1 ? 4 : ROWS == 2 ? 2 : 1;
    const Int8& weight = in_.weight;
    const int8_t* codes = weight.codes + n * columns_;
    Float sums[ROWS];
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) sums[m] = Float{};
    for (int64_t number = 0, k = 0; k < columns_; ++number, k += weight.group) {
      const int64_t group = weight.group_of(n, number), end = smaller(k + weight.group, columns_);
      const Int zero = broadcast(static_cast<int32_t>(weight.zeros ? weight.zeros[group] : 0));
      Float own[CHAINS][ROWS];  // the group's
#pragma GCC unroll 8
      for (int i = 0; i < CHAINS * ROWS; ++i) own[i / ROWS][i % ROWS] = Float{};
      int64_t i = k;
      for (; i + CHAINS * LANES <= end; i += CHAINS * LANES) {
        __builtin_prefetch(codes + i + FEW_AHEAD);
#pragma GCC unroll 4
        for (int chain = 0; chain < CHAINS; ++chain)
          add<ROWS>(to_float(load_codes(codes + i + chain * LANES) - zero), i + chain * LANES, own[chain]);
      }
      for (; i < end; i += LANES) {
        int8_t some[LANES] = {};
        memcpy(some, codes + i, smaller(LANES, end - i));
        Float values = to_float(load_codes(some) - zero);
        for (int64_t lane = end - i; lane < LANES; ++lane) values[lane] = 0;
        add<ROWS>(values, i, own[0]);
      }
      const Float scale = broadcast(weight.scales[group]);
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 4
        for (int chain = 1; chain < CHAINS; ++chain) own[0][m] += own[chain][m];
        sums[m] += own[0][m] * scale;
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) results[m * FEW_TASK] = lane_sum(sums[m]);
  }

  template <int ROWS>
  PYNLP_INLINE void add(Float values, int64_t k, Float (&sums)[ROWS]) const {
    const float* x = x_.from(k);
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) sums[m] += values * load(x + m * LANES);
  }

  const LinearForward<Int8>& in_;
  const int64_t columns_;
  const FewRows<Int8> x_;
};

}  // namespace
}  // namespace pynlp
