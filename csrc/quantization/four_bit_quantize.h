// Values to codes of 4 bits and scales, block by block, and back.
#pragma once

#include "../common/parallel.h"
#include "../simd/memory.h"
#include "../simd/rows.h"
#include "four_bit.h"

namespace pynlp {
namespace {

constexpr int64_t QUANTIZE_TASK = 1 << 14;  // values: whole blocks

// The codes of a type by rising value, and what a value must exceed to get the next one: the middle, or the fp32 value
// before, where a value in the middle is rounded up.
class Ranks {
 public:
  explicit Ranks(FourBitType type) {
    const float* values = codes_of(type);
    for (int i = 0; i < 16; ++i) order[i] = static_cast<uint8_t>(type == FourBitType::nf4 ? i : rising(type, i));
    for (int i = 0; i < 15; ++i) {
      const float middle = (values[order[i]] + values[order[i + 1]]) / 2;
      thresholds[i] = is_up(type, order[i + 1]) ? before(middle) : middle;
    }
  }
  uint8_t order[16];
  float thresholds[15];

 private:
  // Number i of the codes with a sign: magnitudes fall to -0, then rise from 0.
  static int rising(FourBitType type, int i) {
    constexpr int FP4_MAGNITUDES[8] = {0, 1, 6, 7, 4, 5, 2, 3};
    const int magnitude = i < 8 ? 7 - i : i - 8;
    return (type == FourBitType::fp4 ? FP4_MAGNITUDES[magnitude] : magnitude) + (i < 8 ? 8 : 0);
  }

  // Whether the middle below a code is rounded up to it: mxfp4 rounds to even codes, fp4 to small magnitudes; what is
  // not negative is not -0.
  static bool is_up(FourBitType type, int code) {
    if (type == FourBitType::nf4) return false;
    return type == FourBitType::mxfp4 ? code % 2 == 0 : code >= 8 || code == 0;
  }

  static float before(float x) {
    if (x == 0) return -0x1p-149f;
    const uint32_t bits = bits_of_float(x);
    return float_of_bits(x > 0 ? bits - 1 : bits + 1);
  }
};

class Quantize {
 public:
  explicit Quantize(const Quantize4bit& in)
      : in_(in), ranks_(in.type), step_(larger(QUANTIZE_TASK, in.blocksize)), is_high_(first_is_high(in.type)) {}

  void run() {
    // A value takes some 20 operations.
    run_tasks<&Quantize::quantize>((in_.count + step_ - 1) / step_, 20 * in_.count, this);
  }

 private:
  void quantize(int64_t task) const {
    float* values = static_cast<float*>(thread_scratch(in_.blocksize * (sizeof(float) + sizeof(int32_t))));
    int32_t* codes = reinterpret_cast<int32_t*>(values + in_.blocksize);
    for (int64_t first = task * step_; first < smaller(in_.count, (task + 1) * step_); first += in_.blocksize) {
      const int64_t count = smaller(in_.blocksize, in_.count - first);
      read_row(in_.x.dtype, in_.x.row(0) + first * bytes_of(in_.x.dtype), count, values);
      for (int64_t i = count; i < in_.blocksize; ++i) values[i] = 0;
      scale(values, first / in_.blocksize);
      find_codes(values, codes);
      pack(codes, count, in_.packed + first / 2);
    }
  }

  // Writes a block's scale, by which its values are divided.
  void scale(float* values, int64_t block) const {
    const Int magnitude = broadcast(0x7fffffff);
    Int bits = Int{};  // magnitudes of floats rise with their bits; NaN is above all
    for (int64_t i = 0; i < in_.blocksize; i += LANES) {
      const Int x = as_int(load(values + i)) & magnitude;
      bits = x > bits ? x : bits;
    }
    int32_t most = bits[0];
    for (int lane = 1; lane < LANES; ++lane) most = bits[lane] > most ? bits[lane] : most;
    const float largest = float_of_bits(most);
    if (in_.type == FourBitType::mxfp4) {
      in_.scale_codes[block] = mx_scale(largest);
      const float scale = e8m0_value(in_.scale_codes[block]);  // a power of two, which divides exactly
      for (int64_t i = 0; i < in_.blocksize; i += LANES) store(values + i, load(values + i) / broadcast(scale));
      return;
    }
    in_.scales[block] = largest;
    const float inverse = 1 / largest;
    for (int64_t i = 0; i < in_.blocksize; i += LANES) {
      const Float x = load(values + i);
      if (largest == 0)
        store(values + i, Float{});
      else if (inverse == __builtin_inff())  // of a subnormal value
        store(values + i, x / broadcast(largest));
      else
        store(values + i, x * broadcast(inverse));
    }
  }

  // floor(log2(largest)) - 2, as the largest code is 1.5 * 2^2, + 127.
  static uint8_t mx_scale(float largest) {
    if (largest == 0) return 0;
    const int exponent = static_cast<int>(bits_of_float(largest) >> 23);  // of subnormal values 0: the scale is 0, too
    return static_cast<uint8_t>(larger(0, smaller(254, exponent - 2)));
  }

  void find_codes(const float* values, int32_t* codes) const {
    for (int64_t i = 0; i < in_.blocksize; i += LANES) {
      const Float x = load(values + i);
      Int rank = Int{};
#pragma GCC unroll 15
      for (int n = 0; n < 15; ++n) rank -= x > broadcast(ranks_.thresholds[n]);
      store(codes + i, rank);
    }
    if (in_.type != FourBitType::nf4)
      for (int64_t i = 0; i < in_.blocksize; ++i) codes[i] = ranks_.order[codes[i]];
  }

  // Two codes a byte; beside the last of an odd number lies that of 0.
  void pack(const int32_t* codes, int64_t count, uint8_t* to) const {
    const int first = is_high_ ? 4 : 0, second = 4 - first;
    for (int64_t i = 0; i < (count + 1) / 2; ++i)
      to[i] = static_cast<uint8_t>(codes[2 * i] << first | codes[2 * i + 1] << second);
  }

  const Quantize4bit& in_;
  const Ranks ranks_;
  const int64_t step_;
  const bool is_high_;
};

class Dequantize {
 public:
  explicit Dequantize(const Dequantize4bit& in) : in_(in), values_(in.values) {}

  void run() {
    const int64_t count = in_.values.columns;
    run_tasks<&Dequantize::dequantize>((count + QUANTIZE_TASK - 1) / QUANTIZE_TASK, 2 * count, this);
  }

 private:
  static constexpr int64_t PIECE = 1024;

  void dequantize(int64_t task) const {
    alignas(64) float piece[PIECE];
    for (int64_t first = task * QUANTIZE_TASK; first < smaller(in_.values.columns, (task + 1) * QUANTIZE_TASK);
         first += PIECE) {
      const int64_t count = smaller(PIECE, in_.values.columns - first);
      if (in_.out.dtype == Dtype::float32) {
        values_.read(0, first, count, static_cast<float*>(in_.out.data) + first);
      } else {
        values_.read(0, first, count, piece);
        write_row(in_.out.dtype, piece, count, in_.out.data, first);
      }
    }
  }

  const Dequantize4bit& in_;
  const FourBitValues values_;
};

}  // namespace
}  // namespace pynlp
