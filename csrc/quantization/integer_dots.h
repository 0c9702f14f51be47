// A few rows of x by a weight of integers.
#pragma once

#include "few_rows.h"
#include "integers.h"

namespace pynlp {
namespace {

template <int BITS>
class IntegerDots {
 public:
  explicit IntegerDots(const LinearForward<Integers<BITS>>& in) : in_(in), columns_(in.weight.columns), x_(in) {}

  void run() { run_few<&IntegerDots::multiply>(in_, this); }

  // results[m * FEW_TASK + n], row m of x times row first + n of the weight.
  void multiply_lines(int64_t first, int64_t count, float* results) const {
    with_constant(in_.rows, [&](auto rows) {
      constexpr int ROWS = decltype(rows)::value;
      for (int64_t n = 0; n < count; ++n) {
        if (in_.weight.minimums)
          dot<ROWS, true>(first + n, results + n);
        else
          dot<ROWS, false>(first + n, results + n);
      }
    });
  }

 private:
  void multiply(int64_t task) const {
    const int64_t first = task * FEW_TASK, count = smaller(FEW_TASK, in_.weight.rows - first);
    alignas(64) float results[MOST_FEW * FEW_TASK];
    multiply_lines(first, count, results);
    write_few(in_, first, count, results);
  }

  // results[m * FEW_TASK] = row n of the weight times row m of x. Few rows have several sums each: one would wait for
  // its own last term. Values with a minimum are computed one by one, others are scaled as a sum.
  template <int ROWS, bool MINIMUM>
  PYNLP_INLINE void dot(int64_t n, float* results) const {
    constexpr int CHAINS = ROWS == 1 ? 4 : ROWS == 2 ? 2 : 1;
    const Integers<BITS>& weight = in_.weight;
    const uint8_t* codes = weight.codes + n * weight.row_bytes();
    Float sums[ROWS];
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) sums[m] = Float{};
    for (int64_t number = 0, k = 0; k < columns_; ++number, k += weight.group) {
      const int64_t group = weight.group_of(n, number), end = smaller(k + weight.group, columns_);
      const Float scale = broadcast(scale_at(weight.scales, weight.scale_dtype, group));
      const Float minimum = broadcast(MINIMUM ? scale_at(weight.minimums, weight.scale_dtype, group) : 0.0f);
      const Int zero = broadcast(weight.zero(group));
      const auto value_of = [&](const uint8_t* from) {
        if constexpr (MINIMUM) return to_float(load_codes<BITS>(from)) * scale + minimum;
        return to_float(load_codes<BITS>(from) - zero);
      };
      Float own[CHAINS][ROWS];  // the group's
#pragma GCC unroll 8
      for (int i = 0; i < CHAINS * ROWS; ++i) own[i / ROWS][i % ROWS] = Float{};
      int64_t i = k;
      const typename ReaderOf<BITS>::type reader(zero[0]);
      constexpr int UNITS = CHAINS > UNIT_VECTORS ? CHAINS / UNIT_VECTORS : 1;  // at once, a vector for each sum
      for (; i + UNITS * UNIT <= end; i += UNITS * UNIT) {
        __builtin_prefetch(codes + i * BITS / 8 + FEW_AHEAD);
#pragma GCC unroll 2
        for (int u = 0; u < UNITS; ++u) {
          const int64_t first = i + u * UNIT;
          Float values[UNIT_VECTORS];
          reader.read(codes + first * BITS / 8, values);
#pragma GCC unroll 8
          for (int v = 0; v < UNIT_VECTORS; ++v)
            add<ROWS>(MINIMUM ? values[v] * scale + minimum : values[v], first + v * LANES,
                      own[(u * UNIT_VECTORS + v) % CHAINS]);
        }
      }
      for (; i < end; i += LANES) {
        uint8_t some[LANES] = {};
        memcpy(some, codes + i * BITS / 8, (smaller(LANES, end - i) * BITS + 7) / 8);
        Float values = value_of(some);
        for (int64_t lane = end - i; lane < LANES; ++lane) values[lane] = 0;
        add<ROWS>(values, i, own[0]);
      }
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 4
        for (int chain = 1; chain < CHAINS; ++chain) own[0][m] += own[chain][m];
        sums[m] += MINIMUM ? own[0][m] : own[0][m] * scale;
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

  const LinearForward<Integers<BITS>>& in_;
  const int64_t columns_;
  const FewRows<Integers<BITS>> x_;
};

}  // namespace
}  // namespace pynlp
