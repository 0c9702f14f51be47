// The rows of a head in memory, and the angles that turn them: what forward, backward and decoding read.
#pragma once

#include "../gemm/pack.h"
#include "attention.h"

namespace pynlp {
namespace {

// The rows of one head of one tensor: a reader for gemm/pack.h.
struct Rows {
  Dtype dtype;
  const void* data;
  int64_t origin, stride, columns;  // in elements
  const float *cos, *sin;           // null: no rotation
  int64_t rotary_half;
  const int32_t* positions;  // null: the row's number
  int64_t position_offset;   // added to a row's number
  bool interleaved;
  const int32_t* pages;  // null: row r is `stride` after row r - 1; else it is in page pages[r / page_size]
  int64_t page_size, page_stride;

  // `first` is the tensor's row that counts as row 0.
  Rows(const AttentionInputs& in, const View& view, int64_t entry, int64_t first, int64_t head, int64_t columns)
      : dtype(in.dtype),
        data(view.data),
        origin(entry * view.batch_stride + first * view.row_stride + head * view.head_stride),
        stride(view.row_stride),
        columns(columns),
        cos(nullptr),
        pages(nullptr) {}

  // These rows as keys or values of a cache: those of sequence `number` are in the pages of its row of the block table.
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

  // These rows turned, as queries or keys are: row r stands at position r + shift.
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

  // Turns x by the angle of `row`; back where the direction is -1.
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
    read_row(dtype, address(row), columns, to);
    turn(to, row, 1.0f);
  }

  // One row as fp32 with the values that forward.h and backward.h multiply: products of bf16 round a turned row first.
  void read_factor(int64_t row, float* to) const {
    read(row, to);
#if PYNLP_BF16
    if (!cos || dtype != Dtype::bfloat16) return;
    for (int64_t i = 0; i < columns; ++i) to[i] = bf16_to_float(float_to_bf16(to[i]));
#endif
  }

  // Brings a row to the second-level cache: the rows of a head lie far apart, too far for the hardware to foresee.
  void prefetch(int64_t row) const {
    const char* start = address(row);
    for (int64_t byte = 0; byte < columns * value_size(); byte += 64) __builtin_prefetch(start + byte, 0, 2);
  }

  // Whether rows can be multiplied where they are, as words of `pair` values.
  bool in_place(int pair) const {
    return !cos && !pages && dtype == (pair == 1 ? Dtype::float32 : Dtype::bfloat16) && columns % pair == 0 &&
           stride % pair == 0 && origin % pair == 0;
  }
  const int32_t* words(int64_t row, int pair) const {
    return static_cast<const int32_t*>(data) + (origin + row * stride) / pair;
  }

  const uint16_t* halves(int64_t row) const { return reinterpret_cast<const uint16_t*>(address(row)); }
  const uint16_t* bf16(int64_t row) const { return cos || dtype != Dtype::bfloat16 ? nullptr : halves(row); }

  bool finite(int64_t row) const {
    uint32_t bad = 0;
    if (dtype == Dtype::float32) {
      const float* x = reinterpret_cast<const float*>(address(row));
      for (int64_t i = 0; i < columns; ++i) bad |= (bits_of_float(x[i]) & 0x7f800000u) == 0x7f800000u;
    } else {
      const uint32_t exponent = dtype == Dtype::bfloat16 ? 0x7f80u : 0x7c00u;
      const uint16_t* x = halves(row);
      for (int64_t i = 0; i < columns; ++i) bad |= (x[i] & exponent) == exponent;
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

}  // namespace
}  // namespace pynlp
