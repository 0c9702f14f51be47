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

// Values in 8 bits: (code - zero) * scale. Groups of values along a row share a scale and a zero, or all values do.
struct Int8 {
  int64_t rows, columns;
  int64_t group, groups;   // values of a group, and groups of a row
  int64_t scale_stride;    // from a row's scales to the next one's: groups, or 0 where all rows share them
  const int8_t* codes;     // contiguous
  const float* scales;
  const int8_t* zeros;     // or null: all 0

  int64_t group_of(int64_t row, int64_t number) const { return row * scale_stride + number; }
};

struct QuantizeInt8 {
  int64_t rows, columns, group;
  bool affine;
  RowsIn x;
  int8_t* codes;
  float* scales;  // (rows, groups)
  int8_t* zeros;  // where it is affine
};

struct DequantizeInt8 {
  Int8 values;
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

void quantize_4bit(const Quantize4bit& problem);
void dequantize_4bit(const Dequantize4bit& problem);
void linear_4bit(const LinearForward<FourBit>& problem);
void linear_4bit_backward(const LinearBackward<FourBit>& problem);
void quantize_int8(const QuantizeInt8& problem);
void dequantize_int8(const DequantizeInt8& problem);
void int8_linear(const LinearForward<Int8>& problem);
void int8_linear_backward(const LinearBackward<Int8>& problem);

}  // namespace pynlp
