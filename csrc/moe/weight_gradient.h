// The gradient of each expert's matrix: sums over its rows of one side's values times the other's.
//
// A sum runs over the same pieces of DEPTH rows for any threads. An expert without rows gets 0.
#pragma once

#include "grouped.h"

namespace pynlp {
namespace {

// Panels in the layout `values`: value `number` of the rows of a panel is at(panel, number).
struct ValuePanels {
  const void* data;
  int64_t size, bytes;  // values of a row, and bytes of each

  PYNLP_INLINE const char* at(int64_t panel, int64_t value) const {
    return static_cast<const char*>(data) + (panel * size + value) * PANEL * bytes;
  }
};

template <class E>
class WeightGradient {
 public:
  // Values of the outputs lie in panels, those of the inputs are `rows`. bias: sums of the outputs' values, or null.
  WeightGradient(const Chunks& chunks, const ValuePanels& panels, const GatheredRows& rows, const ExpertsOut& out,
                 float* bias)
      : chunks_(chunks),
        panels_(panels),
        rows_(rows),
        out_(out),
        own_(out.outputs_are_lines ? out.lines : out.columns),
        own_blocks_((own_.count() + BLOCK - 1) / BLOCK),
        other_blocks_(larger(1, (rows.columns + WIDTH - 1) / WIDTH)),
        bias_(bias),
        experts_(chunks.groups.experts - chunks.groups.begin),
        first_chunks_((experts_ + 1) * sizeof(int64_t)) {
    int64_t chunk = 0;
    for (int64_t i = 0; i <= experts_; ++i) {
      while (chunk < chunks.count && chunks.at(chunk).expert < chunks.groups.begin + i) ++chunk;
      first_chunk(i) = chunk;
    }
  }

  void run() {
    const int64_t operations = (chunks_.groups.rows() + experts_) * own_.count() * rows_.columns;
    run_tasks<&WeightGradient::sum>(experts_ * own_blocks_ * other_blocks_, operations, this);
  }

 private:
  static constexpr int64_t WIDTH = 256;  // values of rows
  static constexpr int64_t ROWS = 192;   // that are summed at once
  static constexpr int64_t WORDS = ROWS / E::PAIR;
  static constexpr int64_t SUMS = WIDTH + LINE;
  static_assert(WIDTH % PANEL == 0 && ROWS % PANEL == 0);

  struct Scratch {
    int32_t *own, *other;         // (BLOCK, WORDS); panels of (WORDS, PANEL)
    float *room, *sums, *turned;  // a row; (BLOCK, SUMS); (WIDTH, BLOCK of whole vectors)
    uint16_t* pair;
    Scratch(const WeightGradient& g, Arena& arena) {
      own = arena.take<int32_t>(BLOCK * WORDS);
      other = arena.take<int32_t>(WORDS * WIDTH);
      room = arena.take<float>(WIDTH);
      sums = arena.take<float>(round_up(BLOCK, LANES) * SUMS);
      turned = arena.take<float>(WIDTH * round_up(BLOCK, LANES));
      pair = arena.take<uint16_t>(2 * WIDTH);
    }
  };

  // Of an expert, counted from the first one of the groups.
  int64_t& first_chunk(int64_t number) const { return static_cast<int64_t*>(first_chunks_.data)[number]; }

  void sum(int64_t task) const {
    const auto s = take_scratch<Scratch>(*this);
    const int64_t number = task / other_blocks_ / own_blocks_, expert = chunks_.groups.begin + number;
    const int64_t own = task / other_blocks_ % own_blocks_ * BLOCK, count = smaller(BLOCK, own_.count() - own);
    const int64_t other = task % other_blocks_ * WIDTH, width = smaller(WIDTH, rows_.columns - other);
    const bool has_bias = bias_ && other == 0;
    float sums_of_rows[BLOCK] = {};
    bool is_empty = true;
    for (int64_t c = first_chunk(number); c < first_chunk(number + 1); ++c) {
      const Chunk& chunk = chunks_.at(c);
      for (int64_t row = 0; row < chunk.rows; row += ROWS, is_empty = false) {
        const int64_t rows = smaller(ROWS, chunk.rows - row);
        pack_own(chunk.panel + row / PANEL, rows, own, count, s.own);
        if (has_bias) add_rows(chunk.panel + row / PANEL, rows, own, count, sums_of_rows);
        if (!out_.data) continue;
        pack_other(chunk.row + row, rows, other, width, s);
        const auto product = is_empty ? matmul<E, Into::overwrite> : matmul<E, Into::add>;
        const int64_t words = (rows + E::PAIR - 1) / E::PAIR;
        for (int64_t column = 0; column < width; column += PANEL)
          product(count, PANEL, words, s.own, WORDS, 1, s.other + column * WORDS, PANEL, s.sums + column, SUMS,
                  nullptr);
      }
    }
    if (is_empty)
      for (int64_t n = 0; n < count; ++n) memset(s.sums + n * SUMS, 0, WIDTH * sizeof(float));
    if (has_bias)
      for (int64_t n = 0; n < count; ++n) bias_[expert * own_.count() + own_.at(own + n)] = sums_of_rows[n];
    if (out_.data) write(expert, own, count, other, width, s);
  }

  // Values own .. own + count - 1 of rows, a word after the other.
  void pack_own(int64_t panel, int64_t rows, int64_t own, int64_t count, int32_t* to) const {
    for (int64_t m = 0; m < rows; m += PANEL, ++panel)
      for (int64_t n = 0; n < count; ++n) {
        const int32_t* from = reinterpret_cast<const int32_t*>(panels_.at(panel, own + n));
#pragma GCC unroll 2
        for (int64_t i = 0; i < PANEL / E::PAIR; i += LANES) store(to + n * WORDS + m / E::PAIR + i, load(from + i));
      }
  }

  void add_rows(int64_t panel, int64_t rows, int64_t own, int64_t count, float* sums) const {
    for (int64_t m = 0; m < rows; m += PANEL, ++panel) {
      const int64_t lanes = smaller(PANEL, rows - m);
      for (int64_t n = 0; n < count; ++n) {
        const char* values = panels_.at(panel, own + n);
        for (int64_t i = 0; i < lanes; ++i) {
          if constexpr (E::PAIR == 1)
            sums[n] += reinterpret_cast<const float*>(values)[i];
          else
            sums[n] += bf16_to_float(reinterpret_cast<const uint16_t*>(values)[i]);
        }
      }
    }
  }

  // Values other .. other + width - 1 of rows, as panels of PANEL columns.
  void pack_other(int64_t first, int64_t rows, int64_t other, int64_t width, const Scratch& s) const {
    const int64_t columns = round_up(width, PANEL);
    for (int64_t i = 0; i < rows; i += E::PAIR) {
      int32_t* to = s.other + i / E::PAIR * PANEL;
      if constexpr (E::PAIR == 1) {
        if (i + AHEAD_LINES < rows) prefetch(first + i + AHEAD_LINES, other, width);
        const float* row = row_piece(first + i, other, width, s.room);
        for (int64_t n = 0; n < columns; n += PANEL, to += WORDS * PANEL)
#pragma GCC unroll 2
          for (int64_t lane = 0; lane < PANEL; lane += LANES) store(to + lane, as_int(load(row + n + lane)));
      } else {
        half_piece(first + i, other, width, s.room, s.pair);
        if (i + 1 < rows)
          half_piece(first + i + 1, other, width, s.room, s.pair + WIDTH);
        else
          memset(s.pair + WIDTH, 0, WIDTH * sizeof(uint16_t));
        for (int64_t n = 0; n < columns; n += PANEL)
          pack_pair(s.pair + n, s.pair + WIDTH + n, PANEL, PANEL, to + n * WORDS);
      }
    }
  }

  PYNLP_INLINE void prefetch(int64_t i, int64_t first, int64_t count) const {
    const char* from = rows_.row(rows_.place(i)) + first * bytes_of(rows_.dtype);
    for (int64_t byte = 0; byte < count * bytes_of(rows_.dtype); byte += 64) __builtin_prefetch(from + byte);
  }

  // A piece of row i as (whole panels of) fp32: in place, or in `room` with zeros behind it.
  PYNLP_INLINE const float* row_piece(int64_t i, int64_t first, int64_t count, float* room) const {
    const char* from = rows_.row(rows_.place(i)) + first * bytes_of(rows_.dtype);
    if (rows_.dtype == Dtype::float32 && count % PANEL == 0) return reinterpret_cast<const float*>(from);
    read_row(rows_.dtype, from, count, room);
    for (int64_t n = count; n < round_up(count, PANEL); ++n) room[n] = 0;
    return room;
  }

  PYNLP_INLINE void half_piece(int64_t i, int64_t first, int64_t count, float* room, uint16_t* to) const {
    const char* from = rows_.row(rows_.place(i)) + first * bytes_of(rows_.dtype);
    if (rows_.dtype == Dtype::bfloat16) {
      copy_row(to, from, 2 * count);
    } else {
      read_row(rows_.dtype, from, count, room);
      float_to_bf16(room, count, to);
    }
    for (int64_t n = count; n < round_up(count, PANEL); ++n) to[n] = 0;
  }

  // Sums (count, width) as a piece of the matrix.
  void write(int64_t expert, int64_t own, int64_t count, int64_t other, int64_t width, const Scratch& s) const {
    const int64_t columns = out_.columns.count(), matrix = expert * out_.lines.count() * columns;
    if (out_.outputs_are_lines) {
      for (int64_t n = 0; n < count; ++n)
        write_row(out_.dtype, s.sums + n * SUMS, width, out_.data, matrix + own_.at(own + n) * columns + other);
      return;
    }
    constexpr int64_t PADDED = round_up(BLOCK, LANES);
    transpose(reinterpret_cast<const int32_t*>(s.sums), SUMS, reinterpret_cast<int32_t*>(s.turned), PADDED,
              round_up(count, LANES), round_up(width, LANES));
    for (int64_t w = 0; w < width; ++w)
      write_in_order<BLOCK>(own_, out_.dtype, s.turned + w * PADDED, own, count, out_.data,
                            matrix + (other + w) * columns);
  }

  const Chunks& chunks_;
  const ValuePanels panels_;
  const GatheredRows rows_;
  const ExpertsOut out_;
  const Order own_;
  const int64_t own_blocks_, other_blocks_;
  float* bias_;
  const int64_t experts_;
  const Buffer first_chunks_;
};

}  // namespace
}  // namespace pynlp
