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

// The rows of a tile of keys or values: where they are, or turned, widened and padded in `room`.
class TileRows {
 public:
  TileRows(const Rows& from, Range tile, float* room, const char** addresses) : addresses_(addresses) {
    const bool in_place = !from.cos && from.head_dim % LANES == 0 && (PYNLP_F16C || from.dtype != Dtype::float16);
    const int64_t size = round_up(from.head_dim, LANES);
    dtype = in_place ? from.dtype : Dtype::float32;
    for (int64_t j = tile.first; j < tile.last; ++j) {
      float* row = room + (j - tile.first) * size;
      addresses[j - tile.first] = in_place ? from.address(j) : reinterpret_cast<const char*>(row);
      if (in_place) continue;
      from.read(j, row);
      for (int64_t d = from.head_dim; d < size; ++d) row[d] = 0;
    }
    // Whoever takes several rows at once may look a few further.
    for (int64_t n = tile.last - tile.first; n < tile.last - tile.first + LANES; ++n)
      addresses[n] = addresses[tile.last - tile.first - 1];
  }
  const char* const* from(int64_t n) const { return addresses_ + n; }
  Dtype dtype;

 private:
  const char** addresses_;
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
  // keys.first + n; -inf up to a whole vector. `rows` are the addresses of the keys, from keys.first on.
  template <int ROWS>
  void score(const Sequence& sequence, const Visibility& visible, int64_t i, int64_t head, Range keys,
             const char* const* rows, Dtype dtype, const float* queries, float* scores, float* line) const {
    const int64_t count = keys.last - keys.first;
    if (dtype == Dtype::float32)
      dots<ReadFloat, ROWS>(rows, count, queries, scores);
    else if (dtype == Dtype::bfloat16)
      dots<ReadBf16, ROWS>(rows, count, queries, scores);
#if PYNLP_F16C
    else
      dots<ReadHalf, ROWS>(rows, count, queries, scores);
#endif
    for (int r = 0; r < ROWS; ++r) {
      float* row = scores + r * SCORES;
      scale(sequence, visible, i, head + r, keys, row, line);
      for (int64_t n = count; n < round_up(count, LANES); ++n) row[n] = -__builtin_inff();
    }
  }

  const int64_t size;  // of a query's row

 private:
  // scores[r][key] = queries[r] . key. LANES products at once, which are then summed together.
  template <class Read, int ROWS>
  void dots(const char* const* keys, int64_t count, const float* queries, float* scores) const {
    constexpr int AT_ONCE = LANES / ROWS;
    for (int64_t j = 0; j < count; j += AT_ONCE) {
      Float sums[LANES];
#pragma GCC unroll 16
      for (int n = 0; n < AT_ONCE; ++n) {
        const char* key = keys[j + n];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) sums[r * AT_ONCE + n] = Float{};
        for (int64_t d = 0; d < size; d += LANES) {
          const Float x = Read::load(key, d);
#pragma GCC unroll 4
          for (int r = 0; r < ROWS; ++r) sums[r * AT_ONCE + n] += x * load(queries + r * size + d);
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
