// Rows in the order of their experts, cut into chunks, and packed so that they lie in the lanes of a product.
#pragma once

#include "../common/parallel.h"
#include "../gemm/pack.h"
#include "../simd/memory.h"
#include "moe.h"

namespace pynlp {
namespace {

constexpr int64_t PANEL = TILE_VECTORS * LANES;  // rows that lie in the lanes
constexpr int64_t CHUNK = 512;                   // rows that are multiplied at once: their sums stay in the cache

constexpr int64_t PART_BYTES = 1 << 23;  // of a thread

// Rows of one expert. Its first row is the first of a panel.
struct Chunk {
  int64_t expert, row, rows, panel;
};

class Chunks {
 public:
  explicit Chunks(const Groups& groups)
      : groups(groups), chunks_((groups.experts - groups.begin + groups.rows() / CHUNK) * sizeof(Chunk)) {
    for (int64_t expert = groups.begin; expert < groups.experts; ++expert) {
      const int64_t rows = groups.count(expert), parts = (rows + CHUNK - 1) / CHUNK;
      const int64_t each = parts ? round_up((rows + parts - 1) / parts, PANEL) : 0;
      for (int64_t row = 0; row < rows; row += each) {
        const int64_t own = smaller(each, rows - row);
        list()[count++] = {expert, groups.first(expert) + row, own, panels};
        panels += (own + PANEL - 1) / PANEL;
      }
    }
  }

  const Chunk& at(int64_t i) const { return list()[i]; }

  const Groups groups;
  int64_t count = 0, panels = 0;

 private:
  Chunk* list() const { return static_cast<Chunk*>(chunks_.data); }
  const Buffer chunks_;
};

// Calls work for runs of whole experts, one after the other. A run has as many experts as keep its rows, of `bytes` each,
// within PART_BYTES a thread, and at least one.
template <class Work>
PYNLP_INLINE void part_by_part(const Groups& groups, int64_t bytes, const Work& work) {
  const int64_t most = larger(CHUNK, PART_BYTES * thread_count() / larger(1, bytes));
  for (int64_t begin = groups.begin, end = begin; begin < groups.experts; begin = end) {
    for (++end; end < groups.experts && groups.ends[end] - groups.first(begin) <= most;) ++end;
    work(Groups{end, groups.ends, begin});
  }
}

// A reader of rows for gemm/pack.h. Row i is the row of the token that slot permutation[i] belongs to; without a
// permutation it is row i.
struct GatheredRows : FloatRows {
  const int32_t* permutation;  // or null
  int64_t top_k;

  PYNLP_INLINE int64_t place(int64_t i) const { return permutation ? permutation[i] / top_k : i; }
  void read(int64_t i, float* to) const { FloatRows::read(place(i), to); }
  const uint16_t* bf16(int64_t i) const { return FloatRows::bf16(place(i)); }
  bool in_place(int pair) const { return !permutation && FloatRows::in_place(pair); }
};

// What lies in a panel of rows: words of E, for products that sum over a row's values; or values in fp32 or E's bf16, each
// those of PANEL rows that follow each other, for sums over rows. In fp32 both are the same.
enum class Layout { words, values };

template <class E, Layout LAYOUT>
class RowPanels {
 public:
  RowPanels(const Chunks& chunks, const GatheredRows& rows)
      : size(larger(LANES, LAYOUT == Layout::words ? row_words<E>(rows.columns) : row_words<Fp32>(rows.columns))),
        chunks_(chunks),
        rows_(rows),
        data_(chunks.panels * PANEL * size * BYTES) {
    run_tasks<&RowPanels::pack>(chunks.count, 4 * chunks.groups.rows() * rows.columns, this);
  }

  static constexpr int64_t BYTES = LAYOUT == Layout::words ? 4 : 4 / E::PAIR;

  char* panel(int64_t number) const { return static_cast<char*>(data_.data) + number * PANEL * size * BYTES; }
  const int32_t* words() const { return static_cast<const int32_t*>(data_.data); }

  const int64_t size;  // words or values of a row, and zeros

 private:
  void pack(int64_t task) const {
    const Chunk& chunk = chunks_.at(task);
    Arena arena{static_cast<char*>(thread_scratch(2 * PANEL * size * 4 + 128 + 4 * rows_.columns))};
    int32_t* packed = arena.take<int32_t>(PANEL * size);
    int32_t* turned = arena.take<int32_t>(PANEL * size);
    float* room = arena.take<float>(rows_.columns);
    for (int64_t i = 0; i < chunk.rows; i += PANEL) {
      const int64_t first = chunk.row + i, last = first + smaller(PANEL, chunk.rows - i);
      char* to = panel(chunk.panel + i / PANEL);
      if constexpr (BYTES == 4) {
        pack_columns<E>(rows_, first, last, PANEL, size, room, packed, reinterpret_cast<int32_t*>(to), PANEL);
      } else {
        pack_columns<Fp32>(rows_, first, last, PANEL, size, room, packed, turned, PANEL);
        float_to_bf16(reinterpret_cast<const float*>(turned), PANEL * size, reinterpret_cast<uint16_t*>(to));
      }
    }
  }

  const Chunks& chunks_;
  const GatheredRows rows_;
  const Buffer data_;
};

// Values that follow each other along a sum, as words of E.
template <class E>
PYNLP_INLINE Int pair_of(Float even, [[maybe_unused]] Float odd) {
#if PYNLP_BF16
  if constexpr (E::PAIR == 2) return bf16_pairs(even, odd);
#endif
  return as_int(even);
}

}  // namespace
}  // namespace pynlp
