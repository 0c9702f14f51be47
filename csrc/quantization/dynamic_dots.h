// A few rows of x, rounded to 8 bits, by a weight of integers: sums of products of codes are integers.
#pragma once

#include "code_units.h"
#include "few_rows.h"
#include "rounded_rows.h"

namespace pynlp {
namespace {

template <int BITS>
class DynamicDots {
 public:
  explicit DynamicDots(const DynamicLinear<Integers<BITS>>& in)
      : in_(in),
        columns_(in.weight.columns),
        groups_(in.weight.groups),
        x_(in),
        values_(in.weight),
        x_sums_(in.rows * groups_ * sizeof(float)),
        outliers_(in.rows * x_.outlier_count() * sizeof(float)) {
    if (in.weight.has_zeros() || in.weight.minimums) sum_x();
    if (x_.outlier_count() == 0) return;
    float* room = static_cast<float*>(thread_scratch(padded(columns_) * sizeof(float)));
    for (int64_t m = 0; m < in.rows; ++m) {
      const float* row = widened(in.x, m, columns_, room);
      for (int64_t i = 0; i < x_.outlier_count(); ++i) outliers_.floats()[i * in.rows + m] = row[x_.outliers()[i]];
    }
  }

  void run() { run_few<&DynamicDots::multiply>(in_, this); }

 private:
  // The sums of x's codes in each group of the weight, scaled where a row has several scales.
  void sum_x() {
    for (int64_t m = 0; m < in_.rows; ++m) {
      for (int64_t number = 0; number < groups_; ++number) {
        const int64_t first = number * in_.weight.group, end = smaller(first + in_.weight.group, columns_);
        double sum = 0;
        for (int64_t k = first; k < end;) {
          const int64_t number_of_x = in_.x_group ? k / in_.x_group : 0;
          const int64_t stop = in_.x_group ? smaller(end, (number_of_x + 1) * in_.x_group) : end;
          int64_t codes = 0;
          for (; k < stop; ++k) codes += x_.row(m)[k];
          sum += static_cast<double>(codes) * (in_.x_group ? x_.scale(m, number_of_x) : 1.0f);
        }
        x_sums_.floats()[m * groups_ + number] = static_cast<float>(sum);
      }
    }
  }

  void multiply(int64_t task) const {
    const int64_t first = task * FEW_TASK, count = smaller(FEW_TASK, in_.weight.rows - first);
    alignas(64) float results[MOST_FEW * FEW_TASK];
    Arena arena{static_cast<char*>(thread_scratch(4 * (2 * padded(groups_) + in_.rows * padded(units())) + 192))};
    Room room{arena.take<float>(padded(groups_)), arena.take<float>(padded(groups_)),
              arena.take<float>(in_.rows * padded(units()))};
    with_constant(in_.rows, [&](auto rows) {
      constexpr int ROWS = decltype(rows)::value;
      for (int64_t n = 0; n < count; ++n) dot<ROWS>(first + n, room, results + n);
    });
    write_few(in_, first, count, results);
  }

  struct Room {
    float *scales, *minimums;  // of a row's groups
    float* products;           // (rows, units): scales of the weight times those of x
  };

  int64_t units() const { return (columns_ + UNIT - 1) / UNIT; }

  template <int ROWS>
  PYNLP_INLINE void dot(int64_t n, const Room& room, float* results) const {
    const Integers<BITS>& weight = in_.weight;
    const float* scales = in_floats(weight.scales, weight.group_of(n, 0), room.scales);
    EightFloats sums[ROWS] = {};
    if (groups_ <= 1 && !in_.x_group) {
      add_row<ROWS>(n, scales, sums);
    } else if (weight.group % UNIT != 0 && weight.group < columns_) {
      add_halves<ROWS>(n, scales, sums);
    } else if (weight.group > UNIT && in_.x_group) {
      add_groups<ROWS, true>(n, scales, sums);
    } else if (weight.group > UNIT) {
      add_groups<ROWS, false>(n, scales, sums);
    } else {
      multiply_scales<ROWS>(scales, room.products);
      add_units<ROWS>(n, room.products, sums);
    }
    for (int m = 0; m < ROWS; ++m) {
      float result = 0;
      for (int i = 0; i < 8; ++i) result += sums[m][i];
      if (weight.has_zeros() || weight.minimums) result += offset(n, scales, room, x_sums_.floats() + m * groups_);
      if (!in_.x_group && x_.groups()) result *= x_.scale(m, 0);
      for (int64_t i = 0; i < x_.outlier_count(); ++i)
        result += values_.one(n, x_.outliers()[i]) * outliers_.floats()[i * in_.rows + m];
      results[m * FEW_TASK] = result;
    }
  }

  // The numbers of a row's groups, from number `first` on: where they are, or in `to`.
  PYNLP_INLINE const float* in_floats(const void* numbers, int64_t first, float* to) const {
    if (in_.weight.scale_dtype == Dtype::float32) return static_cast<const float*>(numbers) + first;
    half_to_float(static_cast<const uint16_t*>(numbers) + first, groups_, to);
    return to;
  }

  // work(a unit of a row's codes, its number, a constant that is 0 and 1 in turns), with zeros behind the last code.
  template <class Work>
  PYNLP_INLINE void each_unit(int64_t n, int64_t first, int64_t last, const Work& work) const {
    const uint8_t* codes = in_.weight.codes + n * in_.weight.row_bytes();
    const int64_t whole = smaller(last, columns_ / UNIT);
    constexpr int64_t BYTES = UNIT * BITS / 8;
    int64_t unit = first;
    for (; unit + 2 <= whole; unit += 2) {
      const uint8_t* from = codes + unit * BYTES;
      __builtin_prefetch(from + FEW_AHEAD);
      work(unit_at<BITS>(from), unit, Constant<0>{});
      work(unit_at<BITS>(from + BYTES), unit + 1, Constant<1>{});
    }
    if (unit < whole) work(unit_at<BITS>(codes + unit * BYTES), unit, Constant<0>{});
    if (whole < last)
      work(unit_at<BITS>(codes + whole * BYTES, columns_ - whole * UNIT), whole, Constant<0>{});
  }

  // The sums of products of a unit's codes, whose magnitudes are given, too, and of those of row m of x. One factor of
  // the instruction has no sign: w x = |w| (x with the sign of w).
  PYNLP_INLINE Eight multiplied(Unit codes, Unit magnitudes, int64_t unit, int m, Eight sum = Eight{}) const {
    const Unit x = load_unit(x_.row(m) + unit * UNIT);
    return multiply_add(sum, magnitudes, BITS == 8 ? signs_moved(x, codes) : x);
  }
  static PYNLP_INLINE Unit magnitudes_of(Unit codes) { return BITS == 8 ? magnitude(codes) : codes; }

  // A row has one scale: its sums are integers to the end, and rounded once.
  template <int ROWS>
  PYNLP_INLINE void add_row(int64_t n, const float* scales, EightFloats (&sums)[ROWS]) const {
    constexpr int64_t MOST_UNITS = MOST_CODES / UNIT;
    for (int64_t first = 0; first < units(); first += MOST_UNITS) {
      Eight own[ROWS] = {};
      each_unit(n, first, smaller(units(), first + MOST_UNITS), [&](Unit codes, int64_t unit, auto) {
        const Unit magnitudes = magnitudes_of(codes);
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; ++m) own[m] = multiplied(codes, magnitudes, unit, m, own[m]);
      });
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; ++m) sums[m][0] += static_cast<float>(lane_sum(own[m])) * scales[0];
    }
  }

  // A group of the weight is several units, each of which has a scale in x, if SCALED.
  template <int ROWS, bool SCALED>
  PYNLP_INLINE void add_groups(int64_t n, const float* scales, EightFloats (&sums)[ROWS]) const {
    const int64_t group_units = groups_ > 1 ? in_.weight.group / UNIT : units();
    const uint8_t* codes = in_.weight.codes + n * in_.weight.row_bytes();
    const float* x_scales = x_.scales();
    const int64_t x_groups = x_.groups();
    for (int64_t group = 0, unit = 0; unit < units(); ++group, unit += group_units) {
      const int64_t end = smaller(units(), unit + group_units);
      EightFloats own[ROWS] = {};
      const auto add = [&](Unit codes, int64_t number, auto) {
        const Unit magnitudes = magnitudes_of(codes);
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; ++m) {
          const EightFloats some = to_floats(multiplied(codes, magnitudes, number, m));
          own[m] += SCALED ? some * x_scales[m * x_groups + number] : some;
        }
      };
      if (group_units == 4 && (unit + 4) * UNIT <= columns_) {  // groups of 128, the usual ones
        __builtin_prefetch(codes + unit * UNIT * BITS / 8 + FEW_AHEAD);
        if (BITS == 8) __builtin_prefetch(codes + unit * UNIT + 64 + FEW_AHEAD);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
          add(unit_at<BITS>(codes + (unit + i) * UNIT * BITS / 8), unit + i, Constant<0>{});
      } else {
        each_unit(n, unit, end, add);
      }
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; ++m) sums[m] += own[m] * scales[group];
    }
  }

  // products[m][unit]: the scale of a unit of the weight, times that of the unit of x.
  template <int ROWS>
  void multiply_scales(const float* scales, float* products) const {
    for (int m = 0; m < ROWS; ++m) {
      const float* of_x = x_.scales() + m * x_.groups();
      float* to = products + m * padded(units());
      for (int64_t unit = 0; unit < units(); ++unit) to[unit] = in_.x_group ? scales[unit] * of_x[unit] : scales[unit];
    }
  }

  // Each unit has a scale. A few rows have two sums: one would wait for its own last term.
  template <int ROWS>
  PYNLP_INLINE void add_units(int64_t n, const float* products, EightFloats (&sums)[ROWS]) const {
    const int64_t pitch = padded(units());
    EightFloats odd[ROWS] = {};
    each_unit(n, 0, units(), [&](Unit codes, int64_t unit, auto turn) {
      const Unit magnitudes = magnitudes_of(codes);
      auto& into = decltype(turn)::value && ROWS <= 4 ? odd : sums;
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; ++m)
        into[m] += to_floats(multiplied(codes, magnitudes, unit, m)) * products[m * pitch + unit];
    });
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) sums[m] += odd[m];
  }

  // Each half of a unit has a scale of the weight.
  template <int ROWS>
  PYNLP_INLINE void add_halves(int64_t n, const float* scales, EightFloats (&sums)[ROWS]) const {
    const int64_t group = in_.weight.group;
    each_unit(n, 0, units(), [&](Unit codes, int64_t unit, auto) {
      const int64_t k = unit * UNIT;
      const float low = scales[k / group], high = scales[smaller((k + UNIT / 2) / group, groups_ - 1)];
      const EightFloats scale = {low, low, low, low, high, high, high, high};
      const Unit magnitudes = magnitudes_of(codes);
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; ++m)
        sums[m] +=
            to_floats(multiplied(codes, magnitudes, unit, m)) * (scale * (in_.x_group ? x_.scale(m, unit) : 1.0f));
    });
  }

  // The sum over groups of what is added to a code, times the sum of x's codes.
  PYNLP_INLINE float offset(int64_t n, const float* scales, const Room& room, const float* x_sums) const {
    const Integers<BITS>& weight = in_.weight;
    const int64_t first = weight.group_of(n, 0);
    Float sums = Float{};
    float sum = 0;
    int64_t i = 0;
    if (weight.minimums) {
      const float* minimums = in_floats(weight.minimums, first, room.minimums);
      for (; i + LANES <= groups_; i += LANES) sums += load(minimums + i) * load(x_sums + i);
      for (; i < groups_; ++i) sum += minimums[i] * x_sums[i];
    } else if (weight.zeros) {
      const uint8_t* zeros = reinterpret_cast<const uint8_t*>(weight.zeros) + first;
      for (; i + LANES <= groups_; i += LANES)
        sums -= load(scales + i) * to_float(load_codes<8>(zeros + i)) * load(x_sums + i);
      for (; i < groups_; ++i) sum -= scales[i] * weight.zeros[first + i] * x_sums[i];
    } else {
      for (; i + LANES <= groups_; i += LANES) sums -= load(scales + i) * 8.0f * load(x_sums + i);
      for (; i < groups_; ++i) sum -= scales[i] * 8.0f * x_sums[i];
    }
    return sum + lane_sum(sums);
  }

  const DynamicLinear<Integers<BITS>>& in_;
  const int64_t columns_, groups_;
  const RoundedRows<Integers<BITS>> x_;
  const IntegerValues<BITS> values_;
  const Buffer x_sums_;    // (rows, groups)
  const Buffer outliers_;  // (outliers, rows)
};

}  // namespace
}  // namespace pynlp
