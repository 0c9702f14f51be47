// Values to codes of 8 bits, scales and zeros, group by group, and back. Codes of the whole tensor are those of one row.
#pragma once

#include "../common/parallel.h"
#include "../simd/memory.h"
#include "../simd/rows.h"
#include "int8.h"

namespace pynlp {
namespace {

constexpr float SMALLEST = 0x1p-149f;

// Rounds to the nearest integer, to the even one of two, for magnitudes below 2^22.
PYNLP_INLINE Int nearest(Float x) {
  const Float magic = broadcast(12582912.0f);  // 1.5 * 2^23
  return as_int(rounded(x + magic)) - as_int(magic);
}

class QuantizeToInt8 {
 public:
  explicit QuantizeToInt8(const QuantizeInt8& in)
      : in_(in), groups_((in.columns + in.group - 1) / in.group), step_(larger(1, TASK / larger(1, in.group))) {}

  void run() {
    const int64_t count = in_.rows * groups_;
    run_tasks<&QuantizeToInt8::quantize>((count + step_ - 1) / step_, 8 * in_.rows * in_.columns, this);
  }

 private:
  static constexpr int64_t TASK = 1 << 14;  // values

  void quantize(int64_t task) const {
    float* room = static_cast<float*>(thread_scratch(padded(in_.group) * sizeof(float)));
    for (int64_t n = task * step_; n < smaller(in_.rows * groups_, (task + 1) * step_); ++n) {
      const int64_t row = n / groups_, column = n % groups_ * in_.group;
      const int64_t count = smaller(in_.group, in_.columns - column);
      const char* x = in_.x.row(row) + column * bytes_of(in_.x.dtype);
      read_row(in_.x.dtype, x, count, room);
      for (int64_t i = count; i < padded(count); ++i) room[i] = 0;
      float low = 0, high = 0;
      if (!limits(room, count, &low, &high)) low = high = __builtin_nanf("");
      const float scale = scale_of(low, high);
      const int32_t zero = in_.affine ? zero_of(low, scale) : 0;
      in_.scales[n] = scale;
      if (in_.affine) in_.zeros[n] = static_cast<int8_t>(zero);
      write(room, count, scale, zero, in_.codes + row * in_.columns + column);
    }
  }

  // The smallest and the largest value, 0 among them; false if there is a NaN.
  static bool limits(const float* x, int64_t count, float* low, float* high) {
    Float least = Float{}, most = Float{};
    Int sane = broadcast(-1);
    for (int64_t i = 0; i < count; i += LANES) {
      const Float value = load(x + i);
      sane &= value == value;
      least = value < least ? value : least;
      most = value > most ? value : most;
    }
    bool all = true;
    for (int lane = 0; lane < LANES; ++lane) {
      *low = least[lane] < *low ? least[lane] : *low;
      *high = most[lane] > *high ? most[lane] : *high;
      all &= sane[lane] != 0;
    }
    return all;
  }

  float scale_of(float low, float high) const {
    const float largest = -low > high ? -low : high;
    // Halves, as the difference may be infinite.
    const float scale = in_.affine ? (rounded(high / 255) - rounded(low / 255)) : largest / 127;
    return scale == 0 && largest > 0 ? SMALLEST : low != low ? low : scale;
  }

  static int32_t zero_of(float low, float scale) {
    if (!(scale > 0)) return 0;
    const float zero = -128 - low / scale;
    return nearest(broadcast(zero < -128 ? -128.0f : zero > 127 ? 127.0f : zero))[0];
  }

  void write(const float* x, int64_t count, float scale, int32_t zero, int8_t* to) const {
    const int32_t least = in_.affine ? -128 : -127;
    for (int64_t i = 0; i < count; i += LANES) {
      Int codes = Int{};
      if (scale > 0) {
        Float value = load(x + i) / broadcast(scale);
        value = value < broadcast(-256.0f) ? broadcast(-256.0f) : value;
        value = value > broadcast(256.0f) ? broadcast(256.0f) : value;
        codes = nearest(value) + broadcast(zero);
        codes = codes < broadcast(least) ? broadcast(least) : codes;
        codes = codes > broadcast(127) ? broadcast(127) : codes;
      } else {
        codes = broadcast(zero);
      }
      const Bytes bytes = __builtin_convertvector(codes, Bytes);
      if (i + LANES <= count)
        memcpy(to + i, &bytes, LANES);
      else
        memcpy(to + i, &bytes, count - i);
    }
  }

  const QuantizeInt8& in_;
  const int64_t groups_, step_;
};

class DequantizeFromInt8 {
 public:
  explicit DequantizeFromInt8(const DequantizeInt8& in) : in_(in), values_(in.values) {}

  void run() {
    run_tasks<&DequantizeFromInt8::dequantize>(in_.values.rows, 2 * in_.values.rows * in_.values.columns, this);
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

  const DequantizeInt8& in_;
  const Int8Values values_;
};

}  // namespace
}  // namespace pynlp
