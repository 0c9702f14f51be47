// Rows of x rounded to 8 bits: symmetric codes with a scale for each group of values, but for columns of outliers.
#pragma once

#include "../common/parallel.h"
#include "../simd/memory.h"
#include "../simd/rows.h"
#include "code_units.h"
#include "integers.h"

namespace pynlp {
namespace {

constexpr int64_t MOST_CODES = 1 << 15;  // products of so many codes of 8 bits are summed in 32 bits

template <class Weight>
class RoundedRows {
 public:
  explicit RoundedRows(const DynamicLinear<Weight>& in)
      : in_(in),
        columns_(in.weight.columns),
        group_(in.x_group ? in.x_group : larger(1, columns_)),
        groups_((columns_ + group_ - 1) / group_),
        pitch_(round_up(columns_, UNIT)),
        codes_(in.rows * pitch_),
        scales_(in.rows * groups_ * sizeof(float)),
        outliers_(columns_ * sizeof(int32_t)) {
    if (in.outlier_threshold < __builtin_inff()) find_outliers();
    run_tasks<&RoundedRows::round>((in_.rows + STEP - 1) / STEP, 8 * in_.rows * columns_, this);
  }

  // Codes of row m, then zeros up to whole units.
  PYNLP_INLINE const int8_t* row(int64_t m) const { return static_cast<const int8_t*>(codes_.data) + m * pitch_; }
  PYNLP_INLINE float scale(int64_t m, int64_t group) const { return scales_.floats()[m * groups_ + group]; }
  const float* scales() const { return scales_.floats(); }  // (rows, groups())
  int64_t groups() const { return groups_; }

  // Columns that are not rounded; their codes are 0.
  int64_t outlier_count() const { return outlier_count_; }
  const int32_t* outliers() const { return static_cast<const int32_t*>(outliers_.data); }

 private:
  static constexpr int64_t STEP = 4;  // rows of a task

  void find_outliers() {
    const Buffer largest(padded(columns_) * sizeof(float));
    float* most = largest.floats();
    for (int64_t k = 0; k < padded(columns_); ++k) most[k] = 0;
    float* room = static_cast<float*>(thread_scratch(padded(columns_) * sizeof(float)));
    for (int64_t m = 0; m < in_.rows; ++m) {
      const float* x = widened(in_.x, m, columns_, room);
      for (int64_t k = 0; k < padded(columns_); k += LANES) {
        const Float value = load(x + k), magnitude = value < 0 ? -value : value;
        store(most + k, magnitude > load(most + k) ? magnitude : load(most + k));
      }
    }
    int32_t* to = static_cast<int32_t*>(outliers_.data);
    for (int64_t k = 0; k < columns_; ++k)
      if (most[k] >= in_.outlier_threshold) to[outlier_count_++] = static_cast<int32_t>(k);
  }

  void round(int64_t task) const {
    float* room = static_cast<float*>(thread_scratch(pitch_ * sizeof(float)));
    for (int64_t m = task * STEP; m < smaller(in_.rows, (task + 1) * STEP); ++m) {
      read_row(in_.x.dtype, in_.x.row(m), columns_, room);
      for (int64_t i = 0; i < outlier_count_; ++i) room[outliers()[i]] = 0;
      for (int64_t k = columns_; k < pitch_; ++k) room[k] = 0;
      int8_t* codes = static_cast<int8_t*>(codes_.data) + m * pitch_;
      for (int64_t number = 0; number < groups_; ++number) {
        const int64_t first = number * group_, count = smaller(pitch_ - first, round_up(group_, UNIT));
        float low, high;
        const bool sane = limits(room + first, count, &low, &high);
        const float scale = symmetric_scale(sane, low, high, 127);
        scales_.floats()[m * groups_ + number] = scale - scale == 0 ? scale : __builtin_nanf("");
        to_codes(room + first, count, scale, 0, -127, 127, codes + first);
      }
    }
  }

  const DynamicLinear<Weight>& in_;
  const int64_t columns_, group_, groups_, pitch_;
  const Buffer codes_, scales_, outliers_;
  int64_t outlier_count_ = 0;
};

}  // namespace
}  // namespace pynlp
