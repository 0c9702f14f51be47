// What the ops of quantized weights ask of the kernels.
#pragma once

#include "../common/rows.h"

namespace pynlp {

enum class FourBitType { nf4, fp4, mxfp4 };

// Values in 4 bits, as pynlp/reference/quantization/formats.py describes them. Blocks run over all rows.
struct FourBit {
  FourBitType type;
  int64_t rows, columns;
  int64_t blocksize;  // values that share a scale: a power of two, at least 32
  const uint8_t* packed;
  const float* scales;           // or null:
  const uint8_t* scale_codes;    // of mxfp4 exponents + 127, else places in nested_code
  const float* nested_code;      // 256 values
  const float* nested_absmax;    // one for NESTED_BLOCK scales
  const float* nested_offset;    // one value
};

// Integers of 8 bits, signed, or of 4, from 0 to 15, two a byte, the first in the low half. Values are
// (code - zero) * scale, or code * scale + minimum; groups of them along a row share these, or all values do.
template <int BITS>
struct Integers {
  int64_t rows, columns;
  int64_t group, groups;   // values of a group, and groups of a row
  int64_t scale_stride;    // from a row's scales to the next one's: groups, or 0 where all rows share them
  const uint8_t* codes;    // rows of whole bytes, contiguous
  Dtype scale_dtype;       // fp32 or fp16
  const void* scales;
  const int8_t* zeros;     // or null: all 0, of 4 bits 8
  const void* minimums;    // or null

  PYNLP_INLINE int64_t row_bytes() const { return BITS == 8 ? columns : (columns + 1) / 2; }
  PYNLP_INLINE int64_t group_of(int64_t row, int64_t number) const { return row * scale_stride + number; }
  PYNLP_INLINE int32_t zero(int64_t group) const { return zeros ? zeros[group] : BITS == 4 && !minimums ? 8 : 0; }
  PYNLP_INLINE bool has_zeros() const { return zeros || (BITS == 4 && !minimums); }
};
using Int8 = Integers<8>;
using Int4 = Integers<4>;

struct QuantizeIntegers {
  int bits;
  int64_t rows, columns, group;
  int64_t width;  // values of a row of codes: one row of x may be many of those
  bool affine;
  RowsIn x;
  uint8_t* codes;
  float* scales;  // (rows, groups)
  int8_t* zeros;  // where it is affine
};

template <int BITS>
struct DequantizeIntegers {
  Integers<BITS> values;
  RowsOut out;
};

struct Quantize4bit {
  FourBitType type;
  int64_t count, blocksize;
  RowsIn x;  // one row
  uint8_t* packed;
  float* scales;         // or null:
  uint8_t* scale_codes;  // of mxfp4
};

struct Dequantize4bit {
  FourBit values;  // one row
  RowsOut out;
};

// y = x weight' + bias.
template <class Weight>
struct LinearForward {
  int64_t rows;  // of x
  RowsIn x;
  Weight weight;
  const float* bias;  // or null
  RowsOut y;
};

// grad_x = grad weight.
template <class Weight>
struct LinearBackward {
  int64_t rows;  // of grad
  RowsIn grad;
  Weight weight;
  RowsOut grad_x;
};

// y = x weight' + bias, of x rounded to 8 bits.
template <class Weight>
struct DynamicLinear : LinearForward<Weight> {
  int64_t x_group;          // values along a row of x that share a scale: 32, or 0 for all of a row
  float outlier_threshold;  // columns of x with so large a magnitude are not rounded
};

void quantize_4bit(const Quantize4bit& problem);
void dequantize_4bit(const Dequantize4bit& problem);
void linear_4bit(const LinearForward<FourBit>& problem);
void linear_4bit_backward(const LinearBackward<FourBit>& problem);
void quantize_integers(const QuantizeIntegers& problem);
void dequantize_integers(const DequantizeIntegers<8>& problem);
void dequantize_integers(const DequantizeIntegers<4>& problem);
void integer_linear(const LinearForward<Int8>& problem);
void integer_linear(const LinearForward<Int4>& problem);
void integer_linear_backward(const LinearBackward<Int8>& problem);
void integer_linear_backward(const LinearBackward<Int4>& problem);
void dynamic_integer_linear(const DynamicLinear<Int8>& problem);
void dynamic_integer_linear(const DynamicLinear<Int4>& problem);

}  // namespace pynlp
