// What forward and backward share: which keys a query sees, the bias of a distance, and how rows get into scratch.
#pragma once

#include "../simd/math.h"
#include "../gemm/tile.h"
#include "../simd/memory.h"
#include "../simd/rows.h"
#include "attention.h"

namespace pynlp {
namespace {

// The longest sequence's queries or keys.
inline int64_t most(const AttentionInputs& in, int64_t Sequence::* rows) {
  int64_t most = 0;
  for (int64_t b = 0; b < in.batch; ++b) most = larger(most, in.sequence(b).*rows);
  return most;
}

// With few queries the keys are read once for all, by decode.h; with more, blocks of queries go over them (forward.h).
// decode.h works on several heads that share keys at once, and so pays off longer.
inline bool few_queries(const AttentionInputs& in, const Sequence& sequence) {
  if (in.head_dim > 256 || in.head_dim_v > 256) return true;
  return sequence.queries <= (in.heads >= 4 * in.kv_heads ? 8 : 4) && !in.dropped;
}

// Keys or queries first .. last - 1.
struct Range {
  int64_t first, last;
  bool empty() const { return first >= last; }
};

// Which keys the queries of one batch entry see. Query i stands at key i + offset.
struct Visibility {
  int64_t offset, left, right, keys;

  Visibility(const AttentionInputs& in, const Sequence& sequence)
      : offset(sequence.keys - sequence.queries),
        left(in.window_left < 0 ? INT32_MAX : in.window_left),
        right(in.window_right < 0 ? INT32_MAX : in.window_right),
        keys(in.key_lengths ? in.key_lengths[sequence.number] : sequence.keys) {}

  // Keys that at least one, or every one, of the queries first .. last - 1 sees.
  Range of_any(int64_t first, int64_t last) const {
    return {larger(0, first + offset - left), smaller(keys, last + offset + right)};
  }
  Range of_all(int64_t first, int64_t last) const {
    return {larger(0, last - 1 + offset - left), smaller(keys, first + offset + right + 1)};
  }
  bool sees(int64_t query, int64_t key) const {
    const Range range = of_any(query, query + 1);
    return key >= range.first && key < range.last;
  }
};

// For each lane, the first and the last key it sees, counted from `origin`.
struct LaneLimits {
  Int first, last;
  LaneLimits(const Visibility& visible, int64_t query, int64_t origin) {
    for (int i = 0; i < LANES; ++i) {
      const Range range = visible.of_any(query + i, query + i + 1);
      first[i] = static_cast<int32_t>(range.first - origin);
      last[i] = static_cast<int32_t>(larger(range.last, 0) - 1 - origin);
    }
  }
  Int see(int32_t key) const { return (broadcast(key) >= first) & (broadcast(key) <= last); }
};

// The rows of one head of one tensor, with what turns them.
struct Rows {
  Dtype dtype;
  const void* data;
  int64_t origin, stride, head_dim;  // in elements
  const float *cos, *sin;            // null: no rotation
  int64_t rotary_half;
  const int32_t* positions;  // null: the row's number
  int64_t position_offset;   // added to a row's number
  bool interleaved;
  const int32_t* pages;  // null: row r is `stride` after row r - 1; else it is in page pages[r / page_size]
  int64_t page_size, page_stride;

  // `first` is the tensor's row that counts as row 0.
  Rows(const AttentionInputs& in, const View& view, int64_t entry, int64_t first, int64_t head, int64_t head_dim)
      : dtype(in.dtype),
        data(view.data),
        origin(entry * view.batch_stride + first * view.row_stride + head * view.head_stride),
        stride(view.row_stride),
        head_dim(head_dim),
        cos(nullptr),
        pages(nullptr) {}

  // As keys or values of a cache: those of sequence `number` are in the pages of its row of the block table.
  Rows cached(const AttentionInputs& in, const View& view, int64_t number, int64_t head) const {
    Rows rows = *this;
    if (!in.block_table) return rows;
    rows.origin = head * view.head_stride;
    rows.pages = in.block_table + number * in.table_pages;
    rows.page_size = in.page_size;
    rows.page_stride = view.batch_stride;
    return rows;
  }

  // Where a row starts.
  int64_t element(int64_t row) const {
    if (!pages) return origin + row * stride;
    return origin + pages[row / page_size] * page_stride + row % page_size * stride;
  }
  int64_t value_size() const { return bytes_of(dtype); }
  const char* address(int64_t row) const { return static_cast<const char*>(data) + element(row) * value_size(); }

  // As queries or keys of `in`: row r stands at position r + shift.
  Rows rotated(const AttentionInputs& in, const Sequence& sequence, int64_t shift) const {
    Rows rows = *this;
    rows.cos = in.rotary_cos;
    rows.sin = in.rotary_sin;
    rows.rotary_half = in.rotary_half;
    rows.interleaved = in.rotary_interleaved;
    rows.positions = nullptr;
    if (in.rotary_positions)
      rows.positions = in.rotary_positions + sequence.entry * in.rows_k + sequence.first_key + shift;
    rows.position_offset = in.rotary_offset + shift;
    return rows;
  }

  // Turns x by the angle of `row`, or back.
  void turn(float* x, int64_t row, float direction) const {
    if (!cos) return;
    const int64_t position = positions ? positions[row] : row + position_offset;
    const float* c = cos + position * rotary_half;
    const float* s = sin + position * rotary_half;
    if (interleaved) {
      for (int64_t i = 0; i < rotary_half; ++i) {
        const float a = x[2 * i], b = x[2 * i + 1], turned = direction * s[i];
        x[2 * i] = a * c[i] - b * turned;
        x[2 * i + 1] = b * c[i] + a * turned;
      }
    } else {
      float* y = x + rotary_half;
      for (int64_t i = 0; i < rotary_half; ++i) {
        const float a = x[i], b = y[i], turned = direction * s[i];
        x[i] = a * c[i] - b * turned;
        y[i] = b * c[i] + a * turned;
      }
    }
  }

  // One row as fp32, turned.
  void read(int64_t row, float* to) const {
    read_row(dtype, address(row), head_dim, to);
    turn(to, row, 1.0f);
  }

  // One row as fp32, as forward.h and backward.h multiply it: where products are of bf16, a turned row was rounded to
  // it.
  void read_factor(int64_t row, float* to) const {
    read(row, to);
#if PYNLP_BF16
    if (!cos || dtype != Dtype::bfloat16) return;
    for (int64_t i = 0; i < head_dim; ++i) to[i] = bf16_to_float(float_to_bf16(to[i]));
#endif
  }

  // Brings a row to the second-level cache: the rows of a head lie far apart, too far for the hardware to foresee.
  void prefetch(int64_t row) const {
    const char* start = address(row);
    for (int64_t byte = 0; byte < head_dim * value_size(); byte += 64) __builtin_prefetch(start + byte, 0, 2);
  }

  // Whether rows can be read where they are, as words of PAIR values.
  bool in_place(int pair) const {
    return !cos && !pages && dtype == (pair == 1 ? Dtype::float32 : Dtype::bfloat16) && head_dim % pair == 0 &&
           stride % pair == 0 && origin % pair == 0;
  }
  const int32_t* words(int64_t row, int pair) const {
    return static_cast<const int32_t*>(data) + (origin + row * stride) / pair;
  }

  const uint16_t* halves(int64_t row) const { return reinterpret_cast<const uint16_t*>(address(row)); }

  bool finite(int64_t row) const {
    uint32_t bad = 0;
    if (dtype == Dtype::float32) {
      const float* x = reinterpret_cast<const float*>(address(row));
      for (int64_t i = 0; i < head_dim; ++i) bad |= (bits_of_float(x[i]) & 0x7f800000u) == 0x7f800000u;
    } else {
      const uint32_t exponent = dtype == Dtype::bfloat16 ? 0x7f80u : 0x7c00u;
      const uint16_t* x = halves(row);
      for (int64_t i = 0; i < head_dim; ++i) bad |= (x[i] & exponent) == exponent;
    }
    return !bad;
  }
};

inline Rows queries_of(const AttentionInputs& in, const Sequence& s, int64_t head) {
  return Rows(in, in.q, s.entry, s.first_query, head, in.head_dim).rotated(in, s, s.keys - s.queries);
}
inline Rows keys_of(const AttentionInputs& in, const Sequence& s, int64_t kv_head) {
  const Rows rows = Rows(in, in.k, s.entry, s.first_key, kv_head, in.head_dim).cached(in, in.k, s.number, kv_head);
  return in.cache_lengths ? rows : rows.rotated(in, s, 0);
}
inline Rows values_of(const AttentionInputs& in, const Sequence& s, int64_t kv_head) {
  return Rows(in, in.v, s.entry, s.first_key, kv_head, in.head_dim_v).cached(in, in.v, s.number, kv_head);
}

// Words that a row of `head_dim` values takes: whole vectors, zero-padded.
template <class E>
int64_t row_words(int64_t head_dim) {
  return round_up((head_dim + E::PAIR - 1) / E::PAIR, LANES);
}

// Rows first .. last - 1 as words to[row - first][word], and zero rows up to `padded` rows.
template <class E>
void pack_rows(const Rows& rows, int64_t first, int64_t last, int64_t padded, int32_t* to) {
  const int64_t words = row_words<E>(rows.head_dim), head_dim = rows.head_dim;
  for (int64_t row = first; row < last; ++row, to += words) {
    if constexpr (E::PAIR == 1) {
      float* values = reinterpret_cast<float*>(to);
      rows.read(row, values);
      if (words > head_dim) memset(values + head_dim, 0, 4 * (words - head_dim));
    } else {
      uint16_t* values = reinterpret_cast<uint16_t*>(to);
      if (rows.cos) {
        float turned[256];
        rows.read(row, turned);
        float_to_bf16(turned, head_dim, values);
      } else {
        copy_row(values, rows.halves(row), 2 * head_dim);
      }
      if (2 * words > head_dim) memset(values + head_dim, 0, 2 * (2 * words - head_dim));
    }
  }
  memset(to, 0, 4 * words * (padded - (last - first)));
}

// Two rows of bf16 as words: each value of the even row beside that of the odd one, then zeros up to `columns`.
inline void pair_row(const uint16_t* even, const uint16_t* odd, int64_t count, int64_t columns, int32_t* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = even[i] | static_cast<uint32_t>(odd[i]) << 16;
  if (columns > count) memset(to + count, 0, 4 * (columns - count));
}

// Packed rows as the right-hand side of a sum over rows: fp32 as they are, bf16 as pairs of rows. `count` is even; a
// result row holds round_up(head_dim, LANES) words.
template <class E>
void pair_rows(const int32_t* rows, int64_t head_dim, int64_t count, int32_t* to) {
  const int64_t words = row_words<E>(head_dim), columns = round_up(head_dim, LANES);
  for (int64_t pair = 0; pair < count / 2; ++pair) {
    const uint16_t* even = reinterpret_cast<const uint16_t*>(rows + 2 * pair * words);
    pair_row(even, even + 2 * words, head_dim, columns, to + pair * columns);
  }
}

// The bias of each distance query - key, times log2(e), for distances first .. first + count - 1.
inline void bias_line(const AttentionInputs& in, int64_t batch, int64_t head, int64_t first, int64_t count,
                      float* line) {
  const float slope = in.alibi_slopes ? in.alibi_slopes[batch * in.alibi_batch_stride + head] * LOG2_E : 0.0f;
  const int64_t farthest = in.max_distance;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t distance = first + i;
    float bias = -slope * static_cast<float>(distance < 0 ? -distance : distance);
    if (in.relative_bias) {
      const int64_t clamped = larger(-farthest, smaller(farthest, -distance)) + farthest;
      bias += in.relative_bias[in.relative_buckets[clamped] * in.heads + head] * LOG2_E;
    }
    line[i] = bias;
  }
}

}  // namespace
}  // namespace pynlp
