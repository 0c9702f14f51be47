// Operands packed for the products of tile.h: rows as words of E; rows as columns, which lie in the lanes; and rows as
// the right-hand side of a sum over them.
//
// What a row holds is up to a reader, so that a format is decoded while it is packed:
//
//   int64_t columns                                    values of a row
//   void read(int64_t i, float* to) const              row i as fp32
//   const uint16_t* bf16(int64_t i) const              row i as it is stored, if that is as bf16, else null
//   bool in_place(int pair) const                      whether rows are read where they lie, as words of `pair` values:
//   const int32_t* words(int64_t i, int pair) const    row i as words
//   int64_t stride                                     values from one row to the next
#pragma once

#include "../simd/rows.h"
#include "tile.h"

namespace pynlp {
namespace {

// Words that a row of so many values takes: whole vectors.
template <class E>
int64_t row_words(int64_t columns) {
  return round_up((columns + E::PAIR - 1) / E::PAIR, LANES);
}

// Row i as `words` words, with zeros behind its last value. `room` takes a row of fp32, where bf16 is made of one.
template <class E, class Reader>
void pack_row(const Reader& rows, int64_t i, int64_t words, float* room, int32_t* to) {
  if constexpr (E::PAIR == 1) {
    rows.read(i, reinterpret_cast<float*>(to));
  } else if (const uint16_t* stored = rows.bf16(i)) {
    copy_row(to, stored, 2 * rows.columns);
  } else {
    rows.read(i, room);
    float_to_bf16(room, rows.columns, reinterpret_cast<uint16_t*>(to));
  }
  const int64_t bytes = 4 / E::PAIR * rows.columns;
  if (4 * words > bytes) memset(reinterpret_cast<char*>(to) + bytes, 0, 4 * words - bytes);
}

// Rows first .. last - 1 as words, to[(i - first) * words], then zero rows: `count` rows in all.
template <class E, class Reader>
void pack_rows(const Reader& rows, int64_t first, int64_t last, int64_t count, int64_t words, float* room,
               int32_t* to) {
  for (int64_t i = first; i < last; ++i, to += words) pack_row<E>(rows, i, words, room, to);
  memset(to, 0, 4 * words * (count - (last - first)));
}

// Rows first .. last - 1 as columns, to[word * to_word + i - first], then zero columns: `count` columns in all. `count`
// and `words` are multiples of LANES. `rows_room` takes as many words, for rows that must be packed before they are
// turned.
template <class E, class Reader>
void pack_columns(const Reader& rows, int64_t first, int64_t last, int64_t count, int64_t words, float* room,
                  int32_t* rows_room, int32_t* to, int64_t to_word) {
  if (last - first == count && rows.columns == words * E::PAIR && rows.in_place(E::PAIR)) {
    transpose(rows.words(first, E::PAIR), rows.stride / E::PAIR, to, to_word, count, words);
  } else {
    pack_rows<E>(rows, first, last, count, words, room, rows_room);
    transpose(rows_room, words, to, to_word, count, words);
  }
}

// Two rows of bf16 as words: each value of the even row beside that of the odd one, then zeros up to `words` words.
PYNLP_INLINE void pack_pair(const uint16_t* even, const uint16_t* odd, int64_t columns, int64_t words, int32_t* to) {
  for (int64_t i = 0; i < columns; ++i) to[i] = even[i] | static_cast<uint32_t>(odd[i]) << 16;
  if (words > columns) memset(to + columns, 0, 4 * (words - columns));
}

// Packed rows, `words` words each, as the right-hand side of a sum over them: panels of `panel` columns one after the
// other, and in each a row of words for every PAIR rows. `count` is a multiple of PAIR, `columns` one of `panel`.
template <class E>
PYNLP_INLINE void pack_panels(const int32_t* rows, int64_t words, int64_t count, int64_t columns, int64_t panel,
                              int32_t* to) {
  for (int64_t column = 0; column < columns; column += panel) {
    for (int64_t row = 0; row < count; row += E::PAIR, to += panel) {
      if constexpr (E::PAIR == 1) {
        for (int64_t n = 0; n < panel; n += LANES) store(to + n, load(rows + row * words + column + n));
      } else {
        const uint16_t* even = reinterpret_cast<const uint16_t*>(rows + row * words) + column;
        pack_pair(even, even + 2 * words, panel, panel, to);
      }
    }
  }
}

}  // namespace
}  // namespace pynlp
