// Rows of x, rounded to 8 bits, by a weight of integers: products at full width, of integers, a panel of the weight at a
// time. y^T = W x^T, as in linear.h: rows of x are in the lanes.
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
        group_runs_((smaller(in.weight.group, columns_) + MOST_CODES - 1) / MOST_CODES),
        runs_(in.weight.groups * group_runs_),
        offsets_(in.weight.has_zeros() || in.weight.minimums || E::OFFSET != 0),
        values_(in.weight),
        rounded_(in),
        x_(panels_ * PANEL * words_ * sizeof(int32_t)),
        x_sums_(offsets_ ? panels_ * runs_ * PANEL * sizeof(int32_t) : 0),
        outliers_(panels_ * PANEL * larger(1, rounded_.outlier_count()) * sizeof(float)) {}

  void run() {
    run_tasks<&DynamicIntegerLinear::pack_x>(panels_, 4 * in_.rows * columns_, this);
    const int64_t chunks = (in_.rows + CHUNK - 1) / CHUNK;
    run_tasks<&DynamicIntegerLinear::multiply>(chunks * blocks_, in_.rows * columns_ * outputs_, this);
  }

 private:
  using E = IntegerWords;
  static constexpr int64_t PANEL = TILE_VECTORS * LANES;  // rows of x that lie in the lanes
  static constexpr int64_t BLOCK = 10 * TILE_ROWS;        // rows of the weight
  static constexpr int64_t DEPTH = 128;                   // words of a row that are multiplied at once
  static constexpr int64_t PITCH = CHUNK + LINE;          // no power of two, whose rows would share the cache's sets

  struct Scratch {
    int32_t* weight;   // (BLOCK, DEPTH)
    int32_t* code_sums;  // of the block's rows, in a run
    float *sums, *products;  // (BLOCK, CHUNK): of codes, as integers; scaled
    float *outliers;   // the block's rows of such columns
    float* rows;       // (PANEL, block of whole vectors)
    Scratch(const DynamicIntegerLinear& linear, Arena& arena) {
      weight = arena.take<int32_t>(BLOCK * DEPTH);
      code_sums = arena.take<int32_t>(BLOCK);
      sums = arena.take<float>(BLOCK * PITCH);
      products = arena.take<float>(round_up(BLOCK, LANES) * PITCH);
      outliers = arena.take<float>(BLOCK * linear.rounded_.outlier_count());
      rows = arena.take<float>(PANEL * round_up(BLOCK, LANES));
    }
  };

  // A run: columns of one group, so few that sums of products of codes stay in 32 bits.
  int64_t run_start(int64_t run) const {
    return smaller(columns_, run / group_runs_ * in_.weight.group + run % group_runs_ * MOST_CODES);
  }
  int64_t run_end(int64_t run) const {
    return smaller(run_start(run) + MOST_CODES, smaller(columns_, (run / group_runs_ + 1) * in_.weight.group));
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
      for (int64_t run = 0; offsets_ && run < runs_; ++run) {
        int32_t sum = 0;
        for (int64_t k = run_start(run); k < run_end(run); ++k) sum += codes[k];
        sums_of_x(panel, run)[m] = sum;
      }
      pack_codes<8>(reinterpret_cast<const uint8_t*>(codes), columns_, words_, E::OFFSET, rows + m * words_);
      const float* row = rounded_.outlier_count() ? widened(in_.x, first + m, columns_, room) : nullptr;
      for (int64_t i = 0; i < rounded_.outlier_count(); ++i)
        outliers_of_x(panel)[i * PANEL + m] = row[rounded_.outliers()[i]];
    }
    for (int64_t m = count; m < PANEL; ++m) {
      for (int64_t run = 0; offsets_ && run < runs_; ++run) sums_of_x(panel, run)[m] = 0;
      for (int64_t i = 0; i < rounded_.outlier_count(); ++i) outliers_of_x(panel)[i * PANEL + m] = 0;
    }
    transpose(rows, words_, panel_of_x(panel), PANEL, PANEL, words_);
  }

  // Codes as words of E, with `offset` added, then zeros up to `words` words. Returns the codes' sum, if E asks for it.
  template <int CODE_BITS>
  static int32_t pack_codes(const uint8_t* codes, int64_t count, int64_t words, int32_t offset, int32_t* to) {
    int32_t sum = 0;
    int64_t k = 0;
    if constexpr (E::PAIR == 2) {
      int16_t* target = reinterpret_cast<int16_t*>(to);
#if PYNLP_LANES >= 8
      for (; k + 16 <= count; k += 16) {
        __m256i pairs;
        if constexpr (CODE_BITS == 8) {
          pairs = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + k)));
        } else {
          const __m128i bytes = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + k / 2)));
          const __m128i both = _mm_and_si128(_mm_or_si128(bytes, _mm_slli_epi16(bytes, 4)), _mm_set1_epi8(15));
          pairs = _mm256_cvtepu8_epi16(both);
        }
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + k), pairs);
      }
#endif
      for (; k < count; ++k) target[k] = static_cast<int16_t>(code_of<CODE_BITS>(codes, k));
    } else {
      uint8_t* target = reinterpret_cast<uint8_t*>(to);
      for (; k < count; ++k) {
        const int32_t code = code_of<CODE_BITS>(codes, k);
        sum += code;
        target[k] = static_cast<uint8_t>(code + offset);
      }
    }
    memset(reinterpret_cast<char*>(to) + k * 4 / E::PAIR, 0, words * 4 - k * 4 / E::PAIR);
    return sum;
  }

  void multiply(int64_t task) const {
    const auto s = take_scratch<Scratch>(*this);
    const int64_t first = task % blocks_ * BLOCK, count = smaller(BLOCK, outputs_ - first);
    const int64_t first_row = task / blocks_ * CHUNK, rows = smaller(CHUNK, in_.rows - first_row);
    if (runs_ == 0)
      for (int64_t n = 0; n < count; ++n) memset(s.products + n * PITCH, 0, rows * sizeof(float));
    for (int64_t run = 0; run < runs_; ++run) {
      const int64_t start = run_start(run), end = run_end(run);
      for (int64_t n = 0; n < count; ++n) s.code_sums[n] = 0;
      for (int64_t k = start; k < end; k += DEPTH * E::PAIR) {
        const int64_t values = smaller(DEPTH * E::PAIR, end - k), words = (values + E::PAIR - 1) / E::PAIR;
        for (int64_t n = 0; n < count; ++n) {
          values_.prefetch(first + n + AHEAD_ROWS, k, values);
          const uint8_t* codes = in_.weight.codes + (first + n) * in_.weight.row_bytes() + k * BITS / 8;
          s.code_sums[n] += pack_codes<BITS>(codes, values, words, 0, s.weight + n * DEPTH);
        }
        for (int64_t m = 0; m < rows; m += PANEL) {
          const auto product = k == start ? matmul<E, Into::overwrite> : matmul<E, Into::add>;
          const int64_t lanes = round_up(smaller(PANEL, rows - m), LANES);
          product(count, lanes, words, s.weight, DEPTH, 1, panel_of_x((first_row + m) / PANEL) + k / E::PAIR * PANEL,
                  PANEL, s.sums + m, PITCH, nullptr);
        }
      }
      for (int64_t n = 0; n < count; ++n) scale(s, first, n, run, first_row, rows);
    }
    for (int64_t m = 0; m < rows; m += PANEL) write(s, first, count, first_row + m, smaller(PANEL, rows - m), m);
  }

  // products = or += the values of sums of a run's codes, for row first + n of the weight.
  void scale(const Scratch& s, int64_t first, int64_t n, int64_t run, int64_t first_row, int64_t rows) const {
    const Integers<BITS>& weight = in_.weight;
    const int64_t group = weight.group_of(first + n, run / group_runs_);
    const Float scale = broadcast(scale_at(weight.scales, weight.scale_dtype, group));
    const Float minimum = broadcast(weight.minimums ? scale_at(weight.minimums, weight.scale_dtype, group) : 0.0f);
    const Int zero = broadcast(weight.zero(group)), offset = broadcast(E::OFFSET * s.code_sums[n]);
    const float* sums = s.sums + n * PITCH;
    float* products = s.products + n * PITCH;
    for (int64_t m = 0; m < rows; m += LANES) {
      Int sum = (Int)load(sums + m);
      Float value;
      if (offsets_) {
        const Int x_sum = load(sums_of_x((first_row + m) / PANEL, run) + m % PANEL);
        value = to_float(sum - offset - zero * x_sum) * scale + minimum * to_float(x_sum);
      } else {
        value = to_float(sum) * scale;
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
    if (outliers) {
      for (int64_t n = 0; n < count; ++n)
        for (int64_t i = 0; i < outliers; ++i)
          s.outliers[n * outliers + i] = values_.one(first + n, rounded_.outliers()[i]);
      matmul<Fp32, Into::add>(count, PANEL, outliers, s.outliers, outliers, 1, outliers_of_x(row / PANEL), PANEL,
                              s.products + place, PITCH, nullptr);
    }
    write_panel<BLOCK, PANEL>(in_, s.products + place, PITCH, first, count, row, rows, s.rows);
  }

  const DynamicLinear<Integers<BITS>>& in_;
  const int64_t outputs_, columns_, words_, panels_, blocks_, group_runs_, runs_;
  const bool offsets_;  // whether products of codes are not yet those of the values, but for a scale
  const IntegerValues<BITS> values_;
  const RoundedRows<Integers<BITS>> rounded_;
  const Buffer x_;         // panels of (words_, PANEL)
  const Buffer x_sums_;    // of codes: panels of (runs, PANEL)
  const Buffer outliers_;  // columns of x: panels of (outliers, PANEL)
};

// x rounded, and widened again: the product with floats then.
template <int BITS>
void linear_of_rounded(const DynamicLinear<Integers<BITS>>& problem) {
  const RoundedRows<Integers<BITS>> rounded(problem);
  const int64_t columns = problem.weight.columns;
  const Buffer x(problem.rows * columns * sizeof(float));
  for (int64_t m = 0; m < problem.rows; ++m) {
    for (int64_t number = 0, k = 0; k < columns; ++number) {
      const float scale = rounded.scale(m, number);
      for (const int64_t end = smaller(columns, k + problem.x_group); k < end; ++k)
        x.floats()[m * columns + k] = static_cast<float>(rounded.row(m)[k]) * scale;
    }
  }
  LinearForward<Integers<BITS>> near = problem;
  near.x = {x.data, columns, Dtype::float32};
  Linear<Fp32, IntegerValues<BITS>, Integers<BITS>>(near).run();
}

}  // namespace
}  // namespace pynlp
