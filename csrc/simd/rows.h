// How rows of fp32, bf16 and fp16 are read as fp32 and written back. Kernels compute with whole vectors: a row that is
// no such is widened in scratch, with zeros behind its last value.
#pragma once

#include "../common/rows.h"
#include "convert.h"

namespace pynlp {
namespace {

// LANES values from element i on, as fp32.
struct ReadFloat {
  static constexpr bool BF16 = false;
  static constexpr int64_t BYTES = 4;
  static Float load(const char* row, int64_t i) { return pynlp::load(reinterpret_cast<const float*>(row) + i); }
};
struct ReadBf16 {
  static constexpr bool BF16 = true;
  static constexpr int64_t BYTES = 2;
  static Float load(const char* row, int64_t i) { return load_bf16(reinterpret_cast<const uint16_t*>(row) + i); }
};
#if PYNLP_F16C
struct ReadHalf {
  static constexpr bool BF16 = false;
  static constexpr int64_t BYTES = 2;
  static Float load(const char* row, int64_t i) { return load_half(reinterpret_cast<const uint16_t*>(row) + i); }
};
#endif

// work(how rows of the dtype are read).
template <class Work>
PYNLP_INLINE void with_read(Dtype dtype, const Work& work) {
  if (dtype == Dtype::float32)
    work(ReadFloat{});
  else if (dtype == Dtype::bfloat16)
    work(ReadBf16{});
#if PYNLP_F16C
  else
    work(ReadHalf{});
#endif
}

inline void read_row(Dtype dtype, const void* from, int64_t count, float* to) {
  if (dtype == Dtype::float32)
    copy_row(to, from, 4 * count);
  else if (dtype == Dtype::bfloat16)
    bf16_to_float(static_cast<const uint16_t*>(from), count, to);
  else
    half_to_float(static_cast<const uint16_t*>(from), count, to);
}

// Writes `count` elements of `data`, from number `element` on.
inline void write_row(Dtype dtype, const float* from, int64_t count, void* data, int64_t element) {
  if (dtype == Dtype::float32)
    copy_row(static_cast<float*>(data) + element, from, 4 * count);
  else if (dtype == Dtype::bfloat16)
    float_to_bf16(from, count, static_cast<uint16_t*>(data) + element);
  else
    float_to_half(from, count, static_cast<uint16_t*>(data) + element);
}

inline int64_t padded(int64_t columns) { return round_up(columns, LANES); }

// Row i: where it is, or widened and padded in `room`.
inline const float* widened(const RowsIn& in, int64_t i, int64_t columns, float* room) {
  if (in.dtype == Dtype::float32 && columns % LANES == 0) return reinterpret_cast<const float*>(in.row(i));
  read_row(in.dtype, in.row(i), columns, room);
  for (int64_t d = columns; d < padded(columns); ++d) room[d] = 0;
  return room;
}

// work(how to read them, row i of a, row i of b), both of one dtype; b may have no data. Rows that are no whole vectors
// are widened in `room_a` and `room_b`.
template <class Work>
PYNLP_INLINE void with_rows(const RowsIn& a, const RowsIn& b, int64_t i, int64_t columns, float* room_a, float* room_b,
                            const Work& work) {
  if (columns % LANES == 0 && (PYNLP_F16C || a.dtype != Dtype::float16)) {
    with_read(a.dtype, [&](auto read) { work(read, a.row(i), b.data ? b.row(i) : nullptr); });
  } else {
    const float* second = b.data ? widened(b, i, columns, room_b) : nullptr;
    work(ReadFloat{}, reinterpret_cast<const char*>(widened(a, i, columns, room_a)),
         reinterpret_cast<const char*>(second));
  }
}

// Where row i of a result is computed: in place, or in `room`, from which `finish` writes it.
inline float* result_row(const RowsOut& out, int64_t i, int64_t columns, int64_t stride, float* room) {
  if (out.dtype == Dtype::float32 && columns % LANES == 0) return static_cast<float*>(out.data) + i * stride;
  return room;
}
inline void finish(const RowsOut& out, int64_t i, int64_t columns, int64_t stride, const float* room) {
  if (out.dtype == Dtype::float32 && columns % LANES == 0) return;
  write_row(out.dtype, room, columns, out.data, i * stride);
}

// A reader of such rows for gemm/pack.h.
struct FloatRows : RowsIn {
  int64_t columns;
  void read(int64_t i, float* to) const { read_row(dtype, row(i), columns, to); }
  const uint16_t* bf16(int64_t i) const {
    return dtype == Dtype::bfloat16 ? reinterpret_cast<const uint16_t*>(row(i)) : nullptr;
  }
  bool in_place(int pair) const {
    return dtype == (pair == 1 ? Dtype::float32 : Dtype::bfloat16) && columns % pair == 0 && stride % pair == 0;
  }
  const int32_t* words(int64_t i, int) const { return reinterpret_cast<const int32_t*>(row(i)); }
};

}  // namespace
}  // namespace pynlp
