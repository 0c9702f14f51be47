// Scores of a few queries against blocks of keys: channels in the lanes, each key read once for several heads.
#pragma once

#include "rows.h"
#include "visibility.h"

namespace pynlp {
namespace {

constexpr int64_t TILE_KEYS = 256;             // keys of a softmax
constexpr int64_t BLOCK_KEYS = 16;             // keys that are visited for one head after the other
constexpr int64_t SCORES = TILE_KEYS + LANES;  // room for a row of scores

// Rows are prefetched in the order in which they lie in memory, each one twice: when the work is FAR rows before it,
// and again at NEAR rows, as the processor drops some prefetches where memory is the bound.
constexpr int64_t NEAR = 20, FAR = 28;

// Lane i of the result is the sum of the lanes of sums[i], for i = 0 .. LANES - 1.
template <int STEP = LANES / 2>
inline Float add_lanes(Float* sums) {
  Int low, high;
  for (int i = 0; i < LANES; ++i) {
    const int group = i / (2 * STEP) * (2 * STEP), within = i % STEP, second = i / STEP % 2;
    low[i] = group + within + (second ? LANES : 0);
    high[i] = group + STEP + within + (second ? LANES : 0);
  }
  // Vectors n and n + STEP become one: groups of STEP lanes hold half-way sums of the first, then of the second.
#pragma GCC unroll 8
  for (int n = 0; n < STEP; ++n)
    sums[n] = __builtin_shuffle(sums[n], sums[n + STEP], low) + __builtin_shuffle(sums[n], sums[n + STEP], high);
  if constexpr (STEP > 1)
    return add_lanes<STEP / 2>(sums);
  else
    return sums[0];
}

// Rows of one head: row n starts `offset` bytes behind rows[n]. near[n] and far[n] are rows that are wanted later on.
struct BlockRows {
  const char *const *rows, *const *near, *const *far;
  int64_t offset;
  Dtype dtype;
  BlockRows from(int64_t n) const { return {rows + n, near + n, far + n, offset, dtype}; }

  // Brings bytes of later rows to the first-level cache, some with each row: all at once would hold up the work.
  PYNLP_INLINE void fetch(int64_t n, int64_t first, int64_t bytes) const {
    for (int64_t byte = first; byte < first + bytes; byte += 64) {
      __builtin_prefetch(near[n] + byte, 0, 3);
      __builtin_prefetch(far[n] + byte, 0, 3);
    }
  }
};

// How rows are read: by Rows::read, for the most precise weights, or by Rows::read_factor, for the weights that
// backward computes again.
using ReadRow = void (Rows::*)(int64_t row, float* to) const;

// The keys, or the values, of all heads of a sequence.
class HeadRows {
 public:
  HeadRows(ReadRow read, Rows (*rows_of)(const AttentionInputs&, const Sequence&, int64_t), const View& view,
           const AttentionInputs& in, const Sequence& sequence)
      : read_(read),
        rows_of_(rows_of),
        in_(in),
        sequence_(sequence),
        first_(rows_of(in, sequence, 0)),
        head_bytes_(view.head_stride * first_.value_size()),
        row_bytes_(view.row_stride * first_.value_size()),
        in_place_(!first_.cos && first_.columns % LANES == 0 && (PYNLP_F16C || first_.dtype != Dtype::float16)) {}

  // Where the rows of the first head are.
  const char** locate(Range keys, const char** rows) const {
    for (int64_t j = keys.first; j < keys.last;) {
      const char* row = first_.address(j);
      const int64_t last = first_.pages ? smaller(keys.last, j - j % first_.page_size + first_.page_size) : keys.last;
      for (; j < last; ++j, row += row_bytes_) *rows++ = row;
    }
    return rows;
  }

  // The rows of all heads in the order in which they lie in memory.
  void in_order(const char* const* located, int64_t count, const char** to) const {
    if (head_bytes_ <= row_bytes_) {
      for (int64_t n = 0; n < count; ++n)
        for (int64_t head = 0; head < in_.kv_heads; ++head) *to++ = located[n] + head * head_bytes_;
    } else {
      for (int64_t head = 0; head < in_.kv_heads; ++head)
        for (int64_t n = 0; n < count; ++n) *to++ = located[n] + head * head_bytes_;
    }
  }

  // A head's rows where they are, or turned, widened and padded in `room`.
  PYNLP_INLINE BlockRows of(int64_t head, Range block, const char* const* located, const char* const* near,
                            const char* const* far, float* room, const char** room_rows) const {
    const BlockRows rows{located, near, far, head * head_bytes_, first_.dtype};
    return in_place_ ? rows : widened(head, block, rows, room, room_rows);
  }

 private:
  BlockRows widened(int64_t head, Range block, const BlockRows& narrow, float* room, const char** room_rows) const {
    const Rows rows = rows_of_(in_, sequence_, head);
    const int64_t size = round_up(rows.columns, LANES);
    for (int64_t n = 0; n < block.last - block.first; ++n) {
      float* row = room + n * size;
      room_rows[n] = reinterpret_cast<const char*>(row);
      narrow.fetch(n, 0, rows.columns * rows.value_size());
      (rows.*read_)(block.first + n, row);
      for (int64_t d = rows.columns; d < size; ++d) row[d] = 0;
    }
    return {room_rows, room_rows, room_rows, 0, Dtype::float32};
  }

  ReadRow read_;
  Rows (*rows_of_)(const AttentionInputs&, const Sequence&, int64_t);
  const AttentionInputs& in_;
  const Sequence& sequence_;
  Rows first_;
  int64_t head_bytes_, row_bytes_;
  bool in_place_;
};

class Scorer {
 public:
  Scorer(ReadRow read, const AttentionInputs& in) : size(round_up(in.head_dim, LANES)), read_(read), in_(in) {}

  // Query i of a head, turned and padded, to[0 .. size - 1].
  void read_query(const Sequence& sequence, int64_t head, int64_t i, float* to) const {
    (queries_of(in_, sequence, head).*read_)(i, to);
    for (int64_t d = in_.head_dim; d < size; ++d) to[d] = 0;
  }

  // The products of a query of ROWS heads with `count` keys: products[r * SCORES + n]. Up to LANES more are
  // overwritten.
  template <int ROWS>
  PYNLP_INLINE void multiply(const BlockRows& keys, int64_t count, const float* queries, float* products) const {
    with_read(keys.dtype, [&](auto read) { dots_of<decltype(read), ROWS>(keys, count, queries, products); });
  }

  // Products of query i of a head with `keys` become scores; whole vectors are overwritten.
  void scale(const Sequence& sequence, const Visibility& visible, int64_t i, int64_t head, Range keys, float* scores,
             float* line) const {
    const int64_t count = keys.last - keys.first;
    if (in_.softcap > 0) {
      const Float inner = broadcast(in_.softmax_scale / in_.softcap), outer = broadcast(in_.softcap);
      for (int64_t n = 0; n < count; n += LANES) store(scores + n, tanh_of(load(scores + n) * inner) * outer);
    } else {
      const Float factor = broadcast(in_.softmax_scale);
      for (int64_t n = 0; n < count; n += LANES) store(scores + n, load(scores + n) * factor);
    }
    if (in_.biased()) {  // the line goes by rising query - key
      bias_line(in_, sequence.number, head, i + visible.offset - (keys.last - 1), count, line);
      for (int64_t n = 0; n < count; ++n) scores[n] += line[count - 1 - n];
    }
  }

  const int64_t size;  // of a query's row

 private:
  // The usual sizes of heads as constants: their loops take half of the time.
  template <class Read, int ROWS>
  void dots_of(const BlockRows& keys, int64_t count, const float* queries, float* products) const {
    if (size == 64)
      dots<Read, ROWS, 64>(keys, count, queries, products, 64);
    else if (size == 128)
      dots<Read, ROWS, 128>(keys, count, queries, products, 128);
    else
      dots<Read, ROWS, 0>(keys, count, queries, products, size);
  }

  template <class Read, int ROWS, int SIZE>
  __attribute__((noinline)) static void dots(const BlockRows& keys, int64_t count, const float* queries,
                                             float* products, int64_t size) {
    constexpr int AT_ONCE = LANES / ROWS;
    int64_t j = 0;
    for (; j + AT_ONCE <= count; j += AT_ONCE)
      dots_at_once<Read, ROWS, SIZE>(keys.from(j), queries, products + j, size);
    if (j == count) return;
    const char* rows[AT_ONCE];  // the last key again, for those that are missing
    for (int n = 0; n < AT_ONCE; ++n) rows[n] = keys.rows[smaller(j + n, count - 1)];
    dots_at_once<Read, ROWS, SIZE>({rows, rows, rows, keys.offset, keys.dtype}, queries, products + j, size);
  }

  // products[r][key] = queries[r] . key: LANES products, which are summed together.
  template <class Read, int ROWS, int SIZE>
  static PYNLP_INLINE void dots_at_once(const BlockRows& keys, const float* queries, float* products, int64_t size) {
    constexpr int AT_ONCE = LANES / ROWS;
    const int64_t channels = SIZE ? SIZE : size;
    Float sums[LANES];
#pragma GCC unroll 16
    for (int n = 0; n < AT_ONCE; ++n) {
      const char* key = keys.rows[n] + keys.offset;
      keys.fetch(n, 0, channels * Read::BYTES);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) sums[r * AT_ONCE + n] = Float{};
#pragma GCC unroll 8
      for (int64_t d = 0; d < channels; d += LANES) {
        const Float x = Read::load(key, d);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) sums[r * AT_ONCE + n] += x * load(queries + r * channels + d);
      }
    }
    float lanes[LANES];
    store(lanes, add_lanes(sums));
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) memcpy(products + r * SCORES, lanes + r * AT_ONCE, AT_ONCE * sizeof(float));
  }

  ReadRow read_;
  const AttentionInputs& in_;
};

}  // namespace
}  // namespace pynlp
