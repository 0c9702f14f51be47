// Values to integers, scales and zeros, group by group, and back. Codes of the whole tensor are those of one row.
#pragma once

#include "../common/parallel.h"
#include "../simd/memory.h"
#include "../simd/rows.h"
#include "integers.h"

namespace pynlp {
namespace {

class QuantizeToIntegers {
 public:
  explicit QuantizeToIntegers(const QuantizeIntegers& in)
      : in_(in),
        groups_((in.columns + in.group - 1) / in.group),
        least_(in.bits == 8 ? -128 : 0),
        most_(in.bits == 8 ? 127 : 15),
        row_bytes_(in.bits == 8 ? in.width : (in.width + 1) / 2),
        step_(larger(1, TASK / larger(1, in.group))) {}

  void run() {
    const int64_t count = in_.rows * groups_;
    run_tasks<&QuantizeToIntegers::quantize>((count + step_ - 1) / step_, 8 * in_.rows * in_.columns, this);
  }

 private:
  static constexpr int64_t TASK = 1 << 14;  // values

  void quantize(int64_t task) const {
    const int64_t size = padded(in_.group);
    Arena arena{static_cast<char*>(thread_scratch(5 * size + 128))};
    float* room = arena.take<float>(size);
    int8_t* codes = arena.take<int8_t>(size);
    for (int64_t n = task * step_; n < smaller(in_.rows * groups_, (task + 1) * step_); ++n) {
      const int64_t row = n / groups_, column = n % groups_ * in_.group;
      const int64_t count = smaller(in_.group, in_.columns - column);
      const char* x = in_.x.row(row) + column * bytes_of(in_.x.dtype);
      read_row(in_.x.dtype, x, count, room);
      for (int64_t i = count; i < padded(count); ++i) room[i] = 0;
      float low, high;
      const bool sane = limits(room, padded(count), &low, &high);
      const float scale =
          in_.affine ? affine_scale(sane, low, high) : symmetric_scale(sane, low, high, (most_ - least_) / 2);
      const int32_t zero = in_.affine ? zero_of(low, scale) : in_.bits == 8 ? 0 : 8;
      in_.scales[n] = scale;
      if (in_.affine) in_.zeros[n] = static_cast<int8_t>(zero);
      to_codes(room, padded(count), scale, zero, least_ + (in_.affine ? 0 : 1), most_, codes);
      write(codes, count, in_.codes + row * row_bytes_ + column * in_.bits / 8);
    }
  }

  float affine_scale(bool sane, float low, float high) const {
    const float steps = most_ - least_;
    const float scale = rounded(high / steps) - rounded(low / steps);  // their difference may be infinite
    return !sane ? __builtin_nanf("") : scale == 0 && high > low ? SMALLEST : scale;
  }

  int32_t zero_of(float low, float scale) const {
    if (!(scale > 0)) return least_;
    const float least = least_, most = most_, zero = least - low / scale;
    return nearest(broadcast(zero < least ? least : zero > most ? most : zero))[0];
  }

  void write(const int8_t* codes, int64_t count, uint8_t* to) const {
    if (in_.bits == 8) {
      memcpy(to, codes, count);
      return;
    }
    for (int64_t start = 0; start < count; start += in_.width) {
      const int64_t end = smaller(count, start + in_.width);
      for (int64_t i = start; i < end; i += 2) *to++ = codes[i] | (i + 1 < end ? codes[i + 1] << 4 : 0);
    }
  }

  const QuantizeIntegers& in_;
  const int64_t groups_;
  const int32_t least_, most_;
  const int64_t row_bytes_, step_;
};

template <int BITS>
class DequantizeFromIntegers {
 public:
  explicit DequantizeFromIntegers(const DequantizeIntegers<BITS>& in) : in_(in), values_(in.values) {}

  void run() {
    run_tasks<&DequantizeFromIntegers::dequantize>(in_.values.rows, 2 * in_.values.rows * in_.values.columns, this);
  }

 private:
  static constexpr int64_t PIECE = 1024;

  void dequantize(int64_t row) const {
    alignas(64) float piece[PIECE];
    const int64_t columns = in_.values.columns;
    for (int64_t first = 0; first < columns; first += PIECE) {
      const int64_t count = smaller(PIECE, columns - first);
      values_.read(row, first, count, piece);
      write_row(in_.out.dtype, piece, count, in_.out.data, row * columns + first);
    }
  }

  const DequantizeIntegers<BITS>& in_;
  const IntegerValues<BITS> values_;
};

}  // namespace
}  // namespace pynlp
