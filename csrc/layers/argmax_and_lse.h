// The largest value of a row and the logarithm of its sum of exponentials: what becomes of logits in decoding, in one
// reading of the memory.
#pragma once

#include "../common/parallel.h"
#include "../simd/math.h"
#include "layers.h"

namespace pynlp {
namespace {

class FindArgmaxAndLse {
 public:
  explicit FindArgmaxAndLse(const ArgmaxAndLse& in) : in_(in) {}

  void run() { run_tasks<&FindArgmaxAndLse::find>(in_.rows, 16 * in_.rows * in_.columns, this); }

 private:
  static constexpr int64_t BLOCK = 16 * LANES;

  void find(int64_t i) const {
    const float* row = static_cast<const float*>(in_.x.data) + i * in_.x.stride;
    float best = -__builtin_inff();
    int64_t place = 0;
    for (int64_t start = 0; start < in_.columns; start += BLOCK) {
      const float top = largest(row + start, smaller(BLOCK, in_.columns - start));
      if (top > best) {
        best = top;
        place = start;
      }
    }
    while (row[place] != best && place + 1 < in_.columns) ++place;  // the first of equal ones
    in_.argmax[i] = place;
    in_.lse[i] = best == __builtin_inff() ? best : log_sum_exp(row, best == -__builtin_inff() ? 0.0f : best);
  }

  // NaN is passed over.
  static float largest(const float* x, int64_t count) {
    Float tops = broadcast(-__builtin_inff());
    int64_t n = 0;
    for (; n + LANES <= count; n += LANES) tops = maximum(load(x + n), tops);
    float top = tops[0];
    for (int lane = 1; lane < LANES; ++lane) top = tops[lane] > top ? tops[lane] : top;
    for (; n < count; ++n) top = x[n] > top ? x[n] : top;
    return top;
  }

  float log_sum_exp(const float* row, float pivot) const {
    Float sums = Float{};
    const auto add = [&](Float x) { sums += exp_of<6>(x - broadcast(pivot)); };
    int64_t n = 0;
    for (; n + LANES <= in_.columns; n += LANES) add(load(row + n));
    if (n < in_.columns) {
      float rest[LANES];
      for (int lane = 0; lane < LANES; ++lane) rest[lane] = n + lane < in_.columns ? row[n + lane] : -__builtin_inff();
      add(load(rest));
    }
    return pivot + __builtin_logf(lane_sum(sums));
  }

  const ArgmaxAndLse& in_;
};

}  // namespace
}  // namespace pynlp
