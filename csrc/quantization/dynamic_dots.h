// A few rows of x, rounded to 8 bits, by a weight of integers: sums of products of codes are integers.
#pragma once

#include "../simd/bytes.h"
#include "few_rows.h"
#include "rounded_rows.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // of functions that are inlined
#endif

namespace pynlp {
namespace {

// A unit of codes, and the sums of products of four of them each: 32 bytes for every instruction set.
typedef uint8_t Unit __attribute__((vector_size(32)));
typedef int32_t Eight __attribute__((vector_size(32)));
typedef float EightFloats __attribute__((vector_size(32)));

PYNLP_INLINE Unit load_unit(const void* codes) {
  Unit unit;
  memcpy(&unit, codes, sizeof unit);
  return unit;
}

// 32 codes of 4 bits, in order.
PYNLP_INLINE Unit spread_unit(const uint8_t* codes) {
#if PYNLP_LANES >= 8
  const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  return (Unit)_mm256_and_si256(_mm256_or_si256(bytes, _mm256_slli_epi16(bytes, 4)), _mm256_set1_epi8(15));
#else
  Unit unit;
  for (int i = 0; i < 16; ++i) {
    unit[2 * i] = codes[i] & 15;
    unit[2 * i + 1] = codes[i] >> 4;
  }
  return unit;
#endif
}

// sum + products of codes without a sign, at most 128, and codes with one, at least -127.
PYNLP_INLINE Eight multiply_add(Eight sum, Unit plain, Unit with_sign) {
#if PYNLP_VNNI
  return add_byte_products(sum, plain, with_sign);
#elif PYNLP_LANES >= 8
  // No pair of products exceeds 16 bits: 2 * 128 * 127.
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)plain, (__m256i)with_sign);
  return sum + (Eight)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  for (int i = 0; i < 32; ++i) sum[i / 4] += plain[i] * static_cast<int8_t>(with_sign[i]);
  return sum;
#endif
}
PYNLP_INLINE Unit magnitude(Unit codes) {
#if PYNLP_LANES >= 8
  return (Unit)_mm256_abs_epi8((__m256i)codes);
#else
  for (int i = 0; i < 32; ++i) codes[i] = codes[i] < 128 ? codes[i] : -codes[i];
  return codes;
#endif
}
// x with the signs of codes.
PYNLP_INLINE Unit signs_moved(Unit x, Unit codes) {
#if PYNLP_LANES >= 8
  return (Unit)_mm256_sign_epi8((__m256i)x, (__m256i)codes);
#else
  for (int i = 0; i < 32; ++i) x[i] = codes[i] < 128 ? x[i] : -x[i];
  return x;
#endif
}
PYNLP_INLINE int32_t lane_sum(Eight x) {
  int32_t sum = 0;
  for (int i = 0; i < 8; ++i) sum += x[i];
  return sum;
}
PYNLP_INLINE EightFloats to_floats(Eight x) { return __builtin_convertvector(x, EightFloats); }

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

  int64_t units() const { return (columns_ + CODES_UNIT - 1) / CODES_UNIT; }

  template <int ROWS>
  PYNLP_INLINE void dot(int64_t n, const Room& room, float* results) const {
    const Integers<BITS>& weight = in_.weight;
    const float* scales = in_floats(weight.scales, weight.group_of(n, 0), room.scales);
    EightFloats sums[ROWS] = {};
    if (groups_ <= 1 && !in_.x_group) {
      add_row<ROWS>(n, scales, sums);
    } else if (weight.group % CODES_UNIT != 0 && weight.group < columns_) {
      add_halves<ROWS>(n, scales, sums);
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
    const int64_t whole = smaller(last, columns_ / CODES_UNIT);
    constexpr int64_t BYTES = CODES_UNIT * BITS / 8;
    int64_t unit = first;
    for (; unit + 2 <= whole; unit += 2) {
      const uint8_t* from = codes + unit * BYTES;
      __builtin_prefetch(from + FEW_AHEAD);
      work(unit_at(from), unit, Constant<0>{});
      work(unit_at(from + BYTES), unit + 1, Constant<1>{});
    }
    if (unit < whole) work(unit_at(codes + unit * BYTES), unit, Constant<0>{});
    if (whole < last) {
      uint8_t rest[CODES_UNIT] = {};
      const int64_t k = whole * CODES_UNIT;
      memcpy(rest, codes + k * BITS / 8, ((columns_ - k) * BITS + 7) / 8);
      work(unit_at(rest), whole, Constant<0>{});
    }
  }

  static PYNLP_INLINE Unit unit_at(const uint8_t* codes) { return BITS == 8 ? load_unit(codes) : spread_unit(codes); }

  // The sums of products of a unit's codes, and of those of row m of x.
  PYNLP_INLINE Eight multiplied(Unit codes, Unit plain, int64_t unit, int m, Eight sum = Eight{}) const {
    const Unit x = load_unit(x_.row(m) + unit * CODES_UNIT);
    return multiply_add(sum, plain, BITS == 8 ? signs_moved(x, codes) : x);
  }
  static PYNLP_INLINE Unit plain(Unit codes) { return BITS == 8 ? magnitude(codes) : codes; }

  // A row has one scale: its sums are integers to the end, and rounded once.
  template <int ROWS>
  PYNLP_INLINE void add_row(int64_t n, const float* scales, EightFloats (&sums)[ROWS]) const {
    constexpr int64_t MOST_UNITS = MOST_CODES / CODES_UNIT;
    for (int64_t first = 0; first < units(); first += MOST_UNITS) {
      Eight own[ROWS] = {};
      each_unit(n, first, smaller(units(), first + MOST_UNITS), [&](Unit codes, int64_t unit, auto) {
        const Unit positive = plain(codes);
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; ++m) own[m] = multiplied(codes, positive, unit, m, own[m]);
      });
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; ++m) sums[m][0] += static_cast<float>(lane_sum(own[m])) * scales[0];
    }
  }

  // products[m][unit]: the scale of a unit of the weight, times that of the unit of x.
  template <int ROWS>
  void multiply_scales(const float* scales, float* products) const {
    const int64_t count = units(), group_units = groups_ > 1 ? in_.weight.group / CODES_UNIT : count;
    const int64_t pitch = padded(count);
    for (int64_t group = 0, unit = 0; unit < count; ++group)
      for (const int64_t end = smaller(count, unit + group_units); unit < end; ++unit) products[unit] = scales[group];
    if (!in_.x_group) {
      for (int m = 1; m < ROWS; ++m) copy_row(products + m * pitch, products, pitch * sizeof(float));
      return;
    }
    for (int m = ROWS - 1; m >= 0; --m) {
      const float* of_x = x_.scales() + m * x_.groups();
      for (int64_t unit = 0; unit < count; ++unit) products[m * pitch + unit] = products[unit] * of_x[unit];
    }
  }

  // Each unit has a scale. A few rows have two sums: one would wait for its own last term.
  template <int ROWS>
  PYNLP_INLINE void add_units(int64_t n, const float* products, EightFloats (&sums)[ROWS]) const {
    const int64_t pitch = padded(units());
    EightFloats odd[ROWS] = {};
    each_unit(n, 0, units(), [&](Unit codes, int64_t unit, auto turn) {
      const Unit positive = plain(codes);
      auto& into = decltype(turn)::value && ROWS <= 4 ? odd : sums;
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; ++m)
        into[m] += to_floats(multiplied(codes, positive, unit, m)) * products[m * pitch + unit];
    });
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) sums[m] += odd[m];
  }

  // Each half of a unit has a scale of the weight.
  template <int ROWS>
  PYNLP_INLINE void add_halves(int64_t n, const float* scales, EightFloats (&sums)[ROWS]) const {
    const int64_t group = in_.weight.group;
    each_unit(n, 0, units(), [&](Unit codes, int64_t unit, auto) {
      const int64_t k = unit * CODES_UNIT;
      const float low = scales[k / group], high = scales[smaller((k + CODES_UNIT / 2) / group, groups_ - 1)];
      const EightFloats scale = {low, low, low, low, high, high, high, high};
      const Unit positive = plain(codes);
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; ++m)
        sums[m] += to_floats(multiplied(codes, positive, unit, m)) * (scale * (in_.x_group ? x_.scale(m, unit) : 1.0f));
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
