// Scores of a few queries against a tile of keys: channels in the lanes, each key read once for several heads.
#pragma once

#include "blocks.h"

namespace pynlp {
namespace {

constexpr int64_t TILE_KEYS = 64;
constexpr int64_t SCORES = TILE_KEYS + LANES;  // room for a row of scores
constexpr int64_t MOST_ROWS = 4;               // queries whose scores are computed at once

// LANES values from element i on, as fp32.
struct ReadFloat {
  static Float load(const char* row, int64_t i) { return pynlp::load(reinterpret_cast<const float*>(row) + i); }
};
struct ReadBf16 {
  static Float load(const char* row, int64_t i) { return load_bf16(reinterpret_cast<const uint16_t*>(row) + i); }
};
#if PYNLP_F16C
struct ReadHalf {
  static Float load(const char* row, int64_t i) { return load_half(reinterpret_cast<const uint16_t*>(row) + i); }
};
#endif

// The sums of the lanes of COUNT = LANES vectors: lane i is that of sums[i].
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

// Rows of a tile of keys or values of one head: row n starts `offset` bytes behind rows[n].
struct TileRows {
  const char* const* rows;
  int64_t offset;
  Dtype dtype;
  TileRows from(int64_t n) const { return {rows + n, offset, dtype}; }
};

// The keys, or the values, of all heads of a sequence, a tile at a time.
class HeadRows {
 public:
  HeadRows(Rows (*rows_of)(const AttentionInputs&, const Sequence&, int64_t), const View& view,
           const AttentionInputs& in, const Sequence& sequence)
      : rows_of_(rows_of),
        in_(in),
        sequence_(sequence),
        first_(rows_of(in, sequence, 0)),
        head_bytes_(view.head_stride * first_.value_size()),
        row_bytes_(first_.head_dim * first_.value_size()),
        in_place_(!first_.cos && first_.head_dim % LANES == 0 && (PYNLP_F16C || first_.dtype != Dtype::float16)) {}

  // Where the rows of the first head are; then the last one again, for whoever takes several at once.
  void locate(Range tile, const char** rows) const {
    for (int64_t j = tile.first; j < tile.last; ++j) *rows++ = first_.address(j);
    for (int n = 0; n < LANES; ++n) rows[n] = rows[-1];
  }

  // Brings rows to the second-level cache.
  void prefetch(const char* const* located, int64_t count, int64_t head) const {
    for (int64_t n = 0; n < count; ++n)
      for (int64_t byte = 0; byte < row_bytes_; byte += 64)
        __builtin_prefetch(located[n] + head * head_bytes_ + byte, 0, 2);
  }

  // A head's rows where they are, or turned, widened and padded in `room`.
  TileRows of(int64_t head, Range tile, const char* const* located, float* room, const char** room_rows) const {
    if (in_place_) return {located, head * head_bytes_, first_.dtype};
    const Rows rows = rows_of_(in_, sequence_, head);
    const int64_t size = round_up(rows.head_dim, LANES), count = tile.last - tile.first;
    for (int64_t n = 0; n < count + LANES; ++n) {
      float* row = room + smaller(n, count - 1) * size;
      room_rows[n] = reinterpret_cast<const char*>(row);
      if (n >= count) continue;
      rows.read(tile.first + n, row);
      for (int64_t d = rows.head_dim; d < size; ++d) row[d] = 0;
    }
    return {room_rows, 0, Dtype::float32};
  }

 private:
  Rows (*rows_of_)(const AttentionInputs&, const Sequence&, int64_t);
  const AttentionInputs& in_;
  const Sequence& sequence_;
  Rows first_;
  int64_t head_bytes_, row_bytes_;
  bool in_place_;
};

class Scorer {
 public:
  explicit Scorer(const AttentionInputs& in) : size(round_up(in.head_dim, LANES)), in_(in) {}

  // Query i of a head, turned and padded, to[0 .. size - 1].
  void read_query(const Sequence& sequence, int64_t head, int64_t i, float* to) const {
    queries_of(in_, sequence, head).read(i, to);
    for (int64_t d = in_.head_dim; d < size; ++d) to[d] = 0;
  }

  // Scores of query i of ROWS heads from `head` on with `keys`, in log2 units: scores[r * SCORES + n] is that of key
  // keys.first + n; -inf up to a whole vector. `rows` are those of the keys, from keys.first on.
  template <int ROWS>
  void score(const Sequence& sequence, const Visibility& visible, int64_t i, int64_t head, Range keys,
             const TileRows& rows, const float* queries, float* scores, float* line) const {
    const int64_t count = keys.last - keys.first;
    if (rows.dtype == Dtype::float32)
      dots_of<ReadFloat, ROWS>(rows, count, queries, scores);
    else if (rows.dtype == Dtype::bfloat16)
      dots_of<ReadBf16, ROWS>(rows, count, queries, scores);
#if PYNLP_F16C
    else
      dots_of<ReadHalf, ROWS>(rows, count, queries, scores);
#endif
    for (int r = 0; r < ROWS; ++r) {
      float* row = scores + r * SCORES;
      scale(sequence, visible, i, head + r, keys, row, line);
      for (int64_t n = count; n < round_up(count, LANES); ++n) row[n] = -__builtin_inff();
    }
  }

  const int64_t size;  // of a query's row

 private:
  // The usual sizes of heads as constants: their loops take half of the time.
  template <class Read, int ROWS>
  void dots_of(const TileRows& keys, int64_t count, const float* queries, float* scores) const {
    if (size == 64)
      dots<Read, ROWS, 64>(keys, count, queries, scores, 64);
    else if (size == 128)
      dots<Read, ROWS, 128>(keys, count, queries, scores, 128);
    else
      dots<Read, ROWS, 0>(keys, count, queries, scores, size);
  }

  // scores[r][key] = queries[r] . key. LANES products at once, which are then summed together.
  template <class Read, int ROWS, int SIZE>
  static void dots(const TileRows& keys, int64_t count, const float* queries, float* scores, int64_t size) {
    constexpr int AT_ONCE = LANES / ROWS;
    const int64_t channels = SIZE ? SIZE : size;
    for (int64_t j = 0; j < count; j += AT_ONCE) {
      Float sums[LANES];
#pragma GCC unroll 16
      for (int n = 0; n < AT_ONCE; ++n) {
        const char* key = keys.rows[j + n] + keys.offset;
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) sums[r * AT_ONCE + n] = Float{};
#pragma GCC unroll 8
        for (int64_t d = 0; d < channels; d += LANES) {
          const Float x = Read::load(key, d);
#pragma GCC unroll 4
          for (int r = 0; r < ROWS; ++r) sums[r * AT_ONCE + n] += x * load(queries + r * channels + d);
        }
      }
      const Float products = add_lanes(sums);
      float lanes[LANES];
      store(lanes, products);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) memcpy(scores + r * SCORES + j, lanes + r * AT_ONCE, AT_ONCE * sizeof(float));
    }
  }

  // Products become scores in log2 units.
  void scale(const Sequence& sequence, const Visibility& visible, int64_t i, int64_t head, Range keys, float* scores,
             float* line) const {
    const int64_t count = keys.last - keys.first;
    if (in_.softcap > 0) {
      const Float inner = broadcast(in_.softmax_scale / in_.softcap), outer = broadcast(in_.softcap * LOG2_E);
      for (int64_t n = 0; n < count; n += LANES) store(scores + n, tanh_of(load(scores + n) * inner) * outer);
    } else {
      const Float factor = broadcast(in_.softmax_scale * LOG2_E);
      for (int64_t n = 0; n < count; n += LANES) store(scores + n, load(scores + n) * factor);
    }
    if (in_.biased()) {  // the line goes by rising query - key
      bias_line(in_, sequence.number, head, i + visible.offset - (keys.last - 1), count, line);
      for (int64_t n = 0; n < count; ++n) scores[n] += line[count - 1 - n];
    }
  }

  const AttentionInputs& in_;
};

}  // namespace
}  // namespace pynlp
