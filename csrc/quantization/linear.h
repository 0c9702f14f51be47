// Linear layers of a quantized weight, of which a panel at a time is decoded in the cache and multiplied at full width.
//
// Forward, y^T = W x^T: rows of x are in the lanes, and a block of W's rows is decoded for all of them.
// Backward, dx = dy W: columns of W are in the lanes, of which a block is decoded for all rows of dy.
// A sum runs over the same pieces of at most DEPTH terms for any threads.
#pragma once

#include "../common/parallel.h"
#include "../gemm/pack.h"
#include "../simd/memory.h"
#include "quantization.h"

namespace pynlp {
namespace {

// Rows of x that are multiplied at once: their sums stay in the second-level cache.
constexpr int64_t CHUNK = 512;

// Rows of the weight whose codes are asked for before they are decoded.
constexpr int64_t AHEAD_ROWS = 16;

// Row n of a block of `rows` is read from a column on, `count` values: asks for those that are read AHEAD_ROWS rows
// later, of this block, or of the next columns.
template <class Values>
PYNLP_INLINE void ask_ahead(const Values& values, int64_t first, int64_t n, int64_t rows, int64_t column,
                            int64_t count) {
  const int64_t later = n + AHEAD_ROWS;
  if (later < rows)
    values.prefetch(first + later, column, count);
  else
    values.prefetch(first + later - rows, column + count, count);
}

// `count` values of a weight's row, from a column on, as words of E, then zeros up to `words` words.
template <class E, class Values>
PYNLP_INLINE void decode(const Values& values, int64_t row_number, int64_t column, int64_t count, int64_t words,
                         float* room, int32_t* to) {
  float* row = E::PAIR == 1 ? reinterpret_cast<float*>(to) : room;
  values.read(row_number, column, count, row);
  for (int64_t k = count; k < words * E::PAIR; ++k) row[k] = 0;
  if constexpr (E::PAIR == 2) float_to_bf16(row, words * 2, reinterpret_cast<uint16_t*>(to));
}

// Turns products (block, PANEL) and writes `rows` rows of them, columns first .. first + count - 1, with the bias.
// `room` takes (PANEL, block of whole vectors).
template <int64_t BLOCK, int64_t PANEL, class Weight>
void write_panel(const LinearForward<Weight>& in, const float* products, int64_t pitch, int64_t first, int64_t count,
                 int64_t row, int64_t rows, float* room) {
  constexpr int64_t WIDTH = round_up(BLOCK, LANES);
  transpose(reinterpret_cast<const int32_t*>(products), pitch, reinterpret_cast<int32_t*>(room), WIDTH,
            round_up(count, LANES), PANEL);
  for (int64_t m = 0; m < rows; ++m) {
    float* values = room + m * WIDTH;
    if (in.bias)
      for (int64_t n = 0; n < count; ++n) values[n] += in.bias[first + n];
    write_row(in.y.dtype, values, count, in.y.data, (row + m) * in.weight.rows + first);
  }
}

template <class E, class Values, class Weight>
class Linear {
 public:
  explicit Linear(const LinearForward<Weight>& in)
      : in_(in),
        outputs_(in.weight.rows),
        columns_(in.weight.columns),
        words_(larger(LANES, row_words<E>(columns_))),  // zeros, if there are no columns
        panels_((in.rows + PANEL - 1) / PANEL),
        block_(outputs_ >= 16 * BLOCK * thread_count() ? BLOCK : BLOCK / 2),
        blocks_((outputs_ + block_ - 1) / block_),
        values_(in.weight),
        x_(panels_ * PANEL * words_ * sizeof(int32_t)) {}

  void run() {
    run_tasks<&Linear::pack_x>(panels_, 4 * in_.rows * columns_, this);
    const int64_t chunks = (in_.rows + CHUNK - 1) / CHUNK;
    run_tasks<&Linear::multiply>(chunks * blocks_, in_.rows * columns_ * outputs_, this);
  }

 private:
  static constexpr int64_t PANEL = TILE_VECTORS * LANES;  // rows of x that lie in the lanes
  static constexpr int64_t BLOCK = 20 * TILE_ROWS;        // rows of the weight, at most
  static constexpr int64_t DEPTH = smaller(256, 4096 / PANEL);  // words of a row that are decoded at once
  static constexpr int64_t PITCH = CHUNK + LINE;          // no power of two, whose rows would share the cache's sets

  struct Scratch {
    int32_t* weight;         // (BLOCK, DEPTH)
    float *room, *products;  // one row; (BLOCK, CHUNK)
    float* rows;             // (PANEL, block of whole vectors)
    Scratch(const Linear&, Arena& arena) {
      weight = arena.take<int32_t>(BLOCK * DEPTH);
      room = arena.take<float>(DEPTH * E::PAIR);
      products = arena.take<float>(round_up(BLOCK, LANES) * PITCH);
      rows = arena.take<float>(PANEL * round_up(BLOCK, LANES));
    }
  };

  int32_t* panel_of_x(int64_t panel) const { return static_cast<int32_t*>(x_.data) + panel * PANEL * words_; }

  void pack_x(int64_t panel) const {
    const int64_t first = panel * PANEL, count = smaller(PANEL, in_.rows - first);
    const FloatRows rows{in_.x, columns_};
    Arena arena{static_cast<char*>(thread_scratch(PANEL * words_ * sizeof(int32_t) + 64 + 4 * columns_))};
    int32_t* turned = arena.take<int32_t>(PANEL * words_);
    float* room = arena.take<float>(columns_);
    pack_columns<E>(rows, first, first + count, PANEL, words_, room, turned, panel_of_x(panel), PANEL);
  }

  void multiply(int64_t task) const {
    const auto s = take_scratch<Scratch>(*this);
    const int64_t first = task % blocks_ * block_, count = smaller(block_, outputs_ - first);
    const int64_t first_row = task / blocks_ * CHUNK, rows = smaller(CHUNK, in_.rows - first_row);
    for (int64_t word = 0; word < words_; word += DEPTH) {
      const int64_t words = smaller(DEPTH, words_ - word), start = word * E::PAIR;
      const int64_t values = smaller(words * E::PAIR, columns_ - start);
      for (int64_t n = 0; n < count; ++n) {
        ask_ahead(values_, first, n, count, start, values);
        decode<E>(values_, first + n, start, values, words, s.room, s.weight + n * DEPTH);
      }
      for (int64_t m = 0; m < rows; m += PANEL) {
        const auto product = word == 0 ? matmul<E, Into::overwrite> : matmul<E, Into::add>;
        const int64_t lanes = round_up(smaller(PANEL, rows - m), LANES);
        product(count, lanes, words, s.weight, DEPTH, 1, panel_of_x((first_row + m) / PANEL) + word * PANEL, PANEL,
                s.products + m, PITCH, nullptr);
      }
    }
    for (int64_t m = 0; m < rows; m += PANEL)
      write_panel<BLOCK, PANEL>(in_, s.products + m, PITCH, first, count, first_row + m, smaller(PANEL, rows - m),
                                s.rows);
  }

  const LinearForward<Weight>& in_;
  const int64_t outputs_, columns_, words_, panels_;
  const int64_t block_, blocks_;  // rows of the weight of a task: fewer where threads would wait for the last tasks
  const Values values_;
  const Buffer x_;  // panels of (words_, PANEL)
};

template <class E, class Values, class Weight>
class LinearGradient {
 public:
  explicit LinearGradient(const LinearBackward<Weight>& in)
      : in_(in),
        outputs_(in.weight.rows),
        columns_(in.weight.columns),
        words_(larger(LANES, row_words<E>(outputs_))),
        pitch_(words_ + LINE),  // no power of two, whose rows would share the cache's sets
        blocks_((columns_ + BLOCK - 1) / BLOCK),
        values_(in.weight),
        grad_(in.rows * pitch_ * sizeof(int32_t)) {}

  void run() {
    run_tasks<&LinearGradient::pack_grad>(in_.rows, 4 * in_.rows * outputs_, this);
    const int64_t chunks = (in_.rows + CHUNK - 1) / CHUNK;
    run_tasks<&LinearGradient::multiply>(chunks * blocks_, in_.rows * columns_ * outputs_, this);
  }

 private:
  static constexpr int64_t PANEL = TILE_VECTORS * LANES;  // columns of the weight that lie in the lanes
  static constexpr int64_t BLOCK = 128;                   // columns of the weight: a row of them is a line of the cache
  static constexpr int64_t DEPTH = 128;                   // pairs of rows, or rows, that are decoded at once

  struct Scratch {
    int32_t *rows, *weight;  // one row, or two; panels of (DEPTH, PANEL)
    float *room, *products;  // one row; (CHUNK, BLOCK)
    Scratch(const LinearGradient&, Arena& arena) {
      rows = arena.take<int32_t>(BLOCK);
      weight = arena.take<int32_t>(DEPTH * BLOCK);
      room = arena.take<float>(BLOCK);
      products = arena.take<float>(CHUNK * BLOCK);
    }
  };

  int32_t* row_of_grad(int64_t row) const { return static_cast<int32_t*>(grad_.data) + row * pitch_; }

  void pack_grad(int64_t row) const {
    float* room = static_cast<float*>(thread_scratch(4 * outputs_ + 64));
    pack_row<E>(FloatRows{in_.grad, outputs_}, row, pitch_, room, row_of_grad(row));
  }

  void multiply(int64_t task) const {
    const auto s = take_scratch<Scratch>(*this);
    const int64_t first = task % blocks_ * BLOCK, count = smaller(BLOCK, columns_ - first);
    const int64_t first_row = task / blocks_ * CHUNK, rows = smaller(CHUNK, in_.rows - first_row);
    const int64_t columns = round_up(count, PANEL);
    for (int64_t word = 0; word < words_; word += DEPTH) {
      const int64_t depth = smaller(DEPTH, words_ - word);
      decode_rows(s, word * E::PAIR, depth, first, count, columns);
      for (int64_t column = 0; column < columns; column += PANEL) {
        const auto product = word == 0 ? matmul<E, Into::overwrite> : matmul<E, Into::add>;
        product(rows, PANEL, depth, row_of_grad(first_row) + word, pitch_, 1, s.weight + column * DEPTH, PANEL,
                s.products + column, BLOCK, nullptr);
      }
    }
    for (int64_t m = 0; m < rows; ++m)
      write_row(in_.grad_x.dtype, s.products + m * BLOCK, count, in_.grad_x.data, (first_row + m) * columns_ + first);
  }

  // Rows of the weight from row `start` on, `count` of their columns, as panels of PANEL columns.
  void decode_rows(const Scratch& s, int64_t start, int64_t depth, int64_t first, int64_t count,
                   int64_t columns) const {
    for (int64_t word = 0; word < depth; ++word) {
      const int64_t row = start + word * E::PAIR, half = BLOCK / 2;
      for (int64_t i = 0; i < E::PAIR; ++i) {
        int32_t* to = s.rows + i * half;
        if (row + i >= outputs_) {
          memset(to, 0, 4 * columns / E::PAIR);
          continue;
        }
        values_.prefetch(row + i + AHEAD_ROWS, first, count);
        decode<E>(values_, row + i, first, count, columns / E::PAIR, s.room, to);
      }
      for (int64_t column = 0; column < columns; column += PANEL) {
        int32_t* to = s.weight + column * DEPTH + word * PANEL;
        if constexpr (E::PAIR == 1) {
          for (int64_t n = 0; n < PANEL; n += LANES) store(to + n, load(s.rows + column + n));
        } else {
          const uint16_t* even = reinterpret_cast<const uint16_t*>(s.rows) + column;
          pack_pair(even, even + 2 * half, PANEL, PANEL, to);
        }
      }
    }
  }

  const LinearBackward<Weight>& in_;
  const int64_t outputs_, columns_, words_, pitch_, blocks_;
  const Values values_;
  const Buffer grad_;  // (rows, pitch_)
};

}  // namespace
}  // namespace pynlp
