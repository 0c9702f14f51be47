// Rows of x, rounded to 8 bits, by a weight of integers, at full width: a panel of the weight at a time. Rows of x are
// in the lanes: y^T = W x^T, as in linear.h. Sums are exact: where the instruction would clip the products of a pair of
// codes, the excess is multiplied apart (`Pair`), or, if there are many, all codes are halved.
#pragma once

#include "../gemm/integers.h"
#include "linear.h"
#include "rounded_rows.h"

namespace pynlp {
namespace {

template <int BITS>
class DynamicIntegerLinear {
 public:
  explicit DynamicIntegerLinear(const DynamicLinear<Integers<BITS>>& in)
      : in_(in),
        outputs_(in.weight.rows),
        columns_(in.weight.columns),
        words_(row_words<E>(columns_)),
        panels_((in.rows + PANEL - 1) / PANEL),
        blocks_((outputs_ + BLOCK - 1) / BLOCK),
        runs_of_group_((smaller(in.weight.group, columns_) + MOST_CODES - 1) / MOST_CODES),
        runs_(in.weight.groups * runs_of_group_),
        sums_of_x_(in.weight.has_zeros() || in.weight.minimums),
        values_(in.weight),
        rounded_(in),
        x_(panels_ * PANEL * words_ * sizeof(int32_t)),
        x_sums_(sums_of_x_ ? panels_ * runs_ * PANEL * sizeof(int32_t) : 0),
        outliers_(panels_ * PANEL * larger(1, rounded_.outlier_count()) * sizeof(float)) {}

  void run() {
    run_tasks<&DynamicIntegerLinear::pack_x>(panels_, 4 * in_.rows * columns_, this);
    const int64_t chunks = (in_.rows + CHUNK - 1) / CHUNK;
    run_tasks<&DynamicIntegerLinear::multiply>(chunks * blocks_, in_.rows * columns_ * outputs_, this);
  }

 private:
  using E = Int8Quads;
  static constexpr int64_t PANEL = TILE_VECTORS * LANES;  // rows of x that lie in the lanes
  static constexpr int64_t BLOCK = 10 * TILE_ROWS;        // rows of the weight
  static constexpr int64_t DEPTH = 128;                   // words of a row that are multiplied at once
  static constexpr int64_t PITCH = CHUNK + LINE;          // no power of two, whose rows would share the cache's sets
  static constexpr int64_t MOST_PAIRS = BLOCK * DEPTH / 8;  // more take longer than a second product

  // A pair of codes whose sum is more than a narrow sum of products allows.
  struct Pair {
    int32_t row, column, rest;  // of the block; of the first code; what the second one must be less by
  };

  struct Scratch {
    int32_t *weight, *halves;  // (BLOCK, DEPTH): codes; what was split off from them
    Pair* pairs;               // MOST_PAIRS of them
    Eight* code_sums;          // of the block's rows, in a run
    float *sums, *products;    // (BLOCK, CHUNK): of codes, as integers; scaled
    float* outliers;           // the block's rows of such columns
    float* rows;               // (PANEL, block of whole vectors)
    Scratch(const DynamicIntegerLinear& linear, Arena& arena) {
      weight = arena.take<int32_t>(BLOCK * DEPTH);
      halves = arena.take<int32_t>(BLOCK * DEPTH);
      pairs = arena.take<Pair>(MOST_PAIRS);
      code_sums = arena.take<Eight>(BLOCK);
      sums = arena.take<float>(BLOCK * PITCH);
      products = arena.take<float>(round_up(BLOCK, LANES) * PITCH);
      outliers = arena.take<float>(BLOCK * linear.rounded_.outlier_count());
      rows = arena.take<float>(PANEL * round_up(BLOCK, LANES));
    }
  };

  // A group is cut into runs of at most MOST_CODES codes, whose sums of products stay in 32 bits: run r is part
  // r % runs_of_group_ of group r / runs_of_group_.
  int64_t run_start(int64_t run) const {
    return smaller(columns_, run / runs_of_group_ * in_.weight.group + run % runs_of_group_ * MOST_CODES);
  }
  int64_t run_end(int64_t run) const {
    return smaller(run_start(run) + MOST_CODES, smaller(columns_, (run / runs_of_group_ + 1) * in_.weight.group));
  }

  int32_t* panel_of_x(int64_t panel) const { return static_cast<int32_t*>(x_.data) + panel * PANEL * words_; }
  int32_t* sums_of_x(int64_t panel, int64_t run) const {
    return static_cast<int32_t*>(x_sums_.data) + (panel * runs_ + run) * PANEL;
  }
  float* outliers_of_x(int64_t panel) const { return outliers_.floats() + panel * PANEL * rounded_.outlier_count(); }

  void pack_x(int64_t panel) const {
    const int64_t first = panel * PANEL, count = smaller(PANEL, in_.rows - first);
    Arena arena{static_cast<char*>(thread_scratch((PANEL * words_ + padded(columns_)) * sizeof(int32_t) + 64))};
    int32_t* rows = arena.take<int32_t>(PANEL * words_);
    float* room = arena.take<float>(padded(columns_));
    for (int64_t m = 0; m < PANEL; ++m) {
      if (m >= count) {
        memset(rows + m * words_, 0, words_ * sizeof(int32_t));
        continue;
      }
      const int8_t* codes = rounded_.row(first + m);
      for (int64_t run = 0; sums_of_x_ && run < runs_; ++run) {
        int32_t sum = 0;
        for (int64_t k = run_start(run); k < run_end(run); ++k) sum += codes[k];
        sums_of_x(panel, run)[m] = sum;
      }
      uint8_t* to = reinterpret_cast<uint8_t*>(rows + m * words_);
      for (int64_t k = 0; k < columns_; ++k) to[k] = static_cast<uint8_t>(codes[k] + E::OFFSET);
      memset(to + columns_, 0, words_ * 4 - columns_);
      const float* row = rounded_.outlier_count() ? widened(in_.x, first + m, columns_, room) : nullptr;
      for (int64_t i = 0; i < rounded_.outlier_count(); ++i)
        outliers_of_x(panel)[i * PANEL + m] = row[rounded_.outliers()[i]];
    }
    for (int64_t m = count; m < PANEL; ++m) {
      for (int64_t run = 0; sums_of_x_ && run < runs_; ++run) sums_of_x(panel, run)[m] = 0;
      for (int64_t i = 0; i < rounded_.outlier_count(); ++i) outliers_of_x(panel)[i * PANEL + m] = 0;
    }
    transpose(rows, words_, panel_of_x(panel), PANEL, PANEL, words_);
  }

  // Codes k .. k + values - 1 of a block's rows as bytes with a sign, and their sums added to code_sums. Returns the
  // number of pairs that exceed the bound of narrow sums, of which MOST_PAIRS are written to s.pairs.
  int64_t read_codes(const Scratch& s, int64_t first, int64_t count, int64_t k, int64_t values) const {
    int64_t pairs = 0;
    for (int64_t n = 0; n < count; ++n) {
      ask_ahead(values_, first, n, count, k, values);
      const uint8_t* codes = in_.weight.codes + (first + n) * in_.weight.row_bytes() + k * BITS / 8;
      char* to = reinterpret_cast<char*>(s.weight + n * DEPTH);
      Eight sum = s.code_sums[n];
      for (int64_t i = 0; i < values; i += UNIT) {
        const Unit unit = unit_at<BITS>(codes + i * BITS / 8, smaller(UNIT, values - i));
        memcpy(to + i, &unit, sizeof unit);
        sum = multiply_add(sum, Unit{} + 1, unit);
        if constexpr (BITS == 8 && E::NARROW) {
          for (uint32_t bits = exceed_in_pairs(unit, E::MOST_OF_TWO); bits; bits &= bits - 1, bits &= bits - 1) {
            const int32_t place = __builtin_ctz(bits);
            const int32_t two = static_cast<int8_t>(unit[place]) + static_cast<int8_t>(unit[place + 1]);
            const int32_t rest = two > 0 ? two - E::MOST_OF_TWO : two + E::MOST_OF_TWO;
            if (pairs < MOST_PAIRS)
              s.pairs[pairs] = {static_cast<int32_t>(n), static_cast<int32_t>(i) + place, rest};
            ++pairs;
          }
        }
      }
      s.code_sums[n] = sum;
    }
    return pairs;
  }

  // Takes from each pair what it exceeds the bound by.
  static void shorten(const Scratch& s, int64_t pairs) {
    for (int64_t i = 0; i < pairs; ++i) {
      const Pair& pair = s.pairs[i];
      int8_t* second = reinterpret_cast<int8_t*>(s.weight + pair.row * DEPTH) + pair.column + 1;
      *second = static_cast<int8_t>(*second - pair.rest);
    }
  }

  // Adds the products of what was taken from pairs by a panel of x.
  static void add_rests(const Scratch& s, int64_t pairs, const int32_t* x, float* sums) {
    for (int64_t i = 0; i < pairs; ++i) {
      const Pair& pair = s.pairs[i];
      const int32_t column = pair.column + 1;
      for (int64_t m = 0; m < PANEL; m += LANES) {
        float* to = sums + pair.row * PITCH + m;
        const Int bytes = load(x + column / 4 * PANEL + m) >> column % 4 * 8 & 255;
        store(to, (Float)((Int)load(to) + bytes * pair.rest));
      }
    }
  }

  // Splits the codes of whole rows in two halves, of which no two exceed the bound.
  static void halve(const Scratch& s, int64_t count) {
    int8_t *codes = reinterpret_cast<int8_t*>(s.weight), *halves = reinterpret_cast<int8_t*>(s.halves);
    for (int64_t i = 0; i < count * DEPTH * 4; ++i) {
      halves[i] = static_cast<int8_t>(codes[i] >> 1);
      codes[i] = static_cast<int8_t>(codes[i] - halves[i]);
    }
  }

  void multiply(int64_t task) const {
    const auto s = take_scratch<Scratch>(*this);
    const int64_t first = task % blocks_ * BLOCK, count = smaller(BLOCK, outputs_ - first);
    const int64_t first_row = task / blocks_ * CHUNK, rows = smaller(CHUNK, in_.rows - first_row);
    if (runs_ == 0)
      for (int64_t n = 0; n < count; ++n) memset(s.products + n * PITCH, 0, rows * sizeof(float));
    for (int64_t run = 0; run < runs_; ++run) {
      const int64_t start = run_start(run), end = run_end(run);
      if (start == end) continue;  // the last group is shorter by whole runs
      for (int64_t n = 0; n < count; ++n) s.code_sums[n] = Eight{};
      for (int64_t k = start; k < end; k += DEPTH * E::PAIR) {
        const int64_t values = smaller(DEPTH * E::PAIR, end - k), words = (values + E::PAIR - 1) / E::PAIR;
        const int64_t pairs = read_codes(s, first, count, k, values);
        if (pairs > MOST_PAIRS)
          halve(s, count);
        else
          shorten(s, pairs);
        for (int64_t m = 0; m < rows; m += PANEL) {
          const auto product = k == start ? matmul<E, Into::overwrite> : matmul<E, Into::add>;
          const int64_t lanes = round_up(smaller(PANEL, rows - m), LANES);
          const int32_t* x = panel_of_x((first_row + m) / PANEL) + k / E::PAIR * PANEL;
          product(count, lanes, words, s.weight, DEPTH, 1, x, PANEL, s.sums + m, PITCH, nullptr);
          if (pairs > MOST_PAIRS)
            matmul<E, Into::add>(count, lanes, words, s.halves, DEPTH, 1, x, PANEL, s.sums + m, PITCH, nullptr);
          else
            add_rests(s, pairs, x, s.sums + m);
        }
      }
      for (int64_t n = 0; n < count; ++n) scale(s, first, n, run, first_row, rows);
    }
    const int64_t outliers = rounded_.outlier_count();
    for (int64_t n = 0; n < count; ++n)
      for (int64_t i = 0; i < outliers; ++i)
        s.outliers[n * outliers + i] = values_.one(first + n, rounded_.outliers()[i]);
    for (int64_t m = 0; m < rows; m += PANEL) write(s, first, count, first_row + m, smaller(PANEL, rows - m), m);
  }

  // products = or += the values of sums of a run's codes, for row first + n of the weight.
  void scale(const Scratch& s, int64_t first, int64_t n, int64_t run, int64_t first_row, int64_t rows) const {
    const Integers<BITS>& weight = in_.weight;
    const int64_t group = weight.group_of(first + n, run / runs_of_group_);
    const Float scale = broadcast(scale_at(weight.scales, weight.scale_dtype, group));
    const Float minimum = broadcast(weight.minimums ? scale_at(weight.minimums, weight.scale_dtype, group) : 0.0f);
    const Int zero = broadcast(weight.zero(group)), offset = broadcast(E::OFFSET * lane_sum(s.code_sums[n]));
    const float* sums = s.sums + n * PITCH;
    float* products = s.products + n * PITCH;
    for (int64_t m = 0; m < rows; m += LANES) {
      const Int sum = (Int)load(sums + m) - offset;
      Float value = to_float(sum) * scale;
      if (sums_of_x_) {
        const Int x_sum = load(sums_of_x((first_row + m) / PANEL, run) + m % PANEL);
        value = to_float(sum - zero * x_sum) * scale + minimum * to_float(x_sum);
      }
      store(products + m, run == 0 ? value : load(products + m) + value);
    }
  }

  // Scales the products of a panel, adds those of columns that were not rounded, and writes them.
  void write(const Scratch& s, int64_t first, int64_t count, int64_t row, int64_t rows, int64_t place) const {
    const int64_t outliers = rounded_.outlier_count();
    float scales[PANEL] = {};
    for (int64_t m = 0; m < rows; ++m) scales[m] = rounded_.groups() ? rounded_.scale(row + m, 0) : 0;
    for (int64_t n = 0; n < count; ++n) {
      float* products = s.products + n * PITCH + place;
      for (int64_t m = 0; m < PANEL; m += LANES) store(products + m, load(products + m) * load(scales + m));
    }
    if (outliers)
      matmul<Fp32, Into::add>(count, PANEL, outliers, s.outliers, outliers, 1, outliers_of_x(row / PANEL), PANEL,
                              s.products + place, PITCH, nullptr);
    write_panel<BLOCK, PANEL>(in_, s.products + place, PITCH, first, count, row, rows, s.rows);
  }

  const DynamicLinear<Integers<BITS>>& in_;
  const int64_t outputs_, columns_, words_, panels_, blocks_, runs_of_group_, runs_;
  const bool sums_of_x_;  // whether the weight's zeros or minimums need them
  const IntegerValues<BITS> values_;
  const RoundedRows<Integers<BITS>> rounded_;
  const Buffer x_;         // panels of (words_, PANEL)
  const Buffer x_sums_;    // of codes: panels of (runs, PANEL)
  const Buffer outliers_;  // columns of x: panels of (outliers, PANEL)
};

// x rounded, and widened again: the product with floats then.
template <int BITS>
class RoundedThenWidened {
 public:
  explicit RoundedThenWidened(const DynamicLinear<Integers<BITS>>& in)
      : in_(in), columns_(in.weight.columns), rounded_(in), x_(in.rows * columns_ * sizeof(float)) {}

  void run() {
    run_tasks<&RoundedThenWidened::widen>(in_.rows, in_.rows * columns_, this);
    LinearForward<Integers<BITS>> near = in_;
    near.x = {x_.data, columns_, Dtype::float32};
    Linear<Fp32, IntegerValues<BITS>, Integers<BITS>>(near).run();
  }

 private:
  void widen(int64_t row) const {
    for (int64_t number = 0, k = 0; k < columns_; ++number) {
      const float scale = rounded_.scale(row, number);
      for (const int64_t end = smaller(columns_, k + in_.x_group); k < end; ++k)
        x_.floats()[row * columns_ + k] = static_cast<float>(rounded_.row(row)[k]) * scale;
    }
  }

  const DynamicLinear<Integers<BITS>>& in_;
  const int64_t columns_;
  const RoundedRows<Integers<BITS>> rounded_;
  const Buffer x_;  // (rows, columns)
};

}  // namespace
}  // namespace pynlp
