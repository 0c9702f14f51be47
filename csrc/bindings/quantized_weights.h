// Quantized weights as the kernels take them, from the tensors that hold them.
#pragma once

#include "../quantization/quantization.h"
#include "tensors.h"

namespace {

inline pynlp::FourBitType type_of(int64_t quant_type) {
  STD_TORCH_CHECK(quant_type >= 0 && quant_type <= 2, "pynlp: quant_type: expected 0 to 2, got ", quant_type);
  return static_cast<pynlp::FourBitType>(quant_type);
}

inline void check_blocksize(int64_t blocksize) {
  STD_TORCH_CHECK(blocksize >= 32 && (blocksize & (blocksize - 1)) == 0,
                  "pynlp: blocksize: expected a power of two from 32 on, got ", blocksize);
}

template <class T>
const T* data_of(const Tensor& x, ScalarType dtype, int64_t count, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == dtype && x.is_contiguous() && x.numel() == count, "pynlp: ", name,
                  ": expected another dtype, contiguous, of another size");
  return static_cast<const T*>(x.const_data_ptr());
}

inline pynlp::FourBit four_bit(const Tensor& packed, const Tensor& absmax, const MaybeTensor& nested_absmax,
                        const MaybeTensor& nested_offset, const MaybeTensor& nested_code, int64_t rows,
                        int64_t columns, int64_t blocksize, int64_t quant_type) {
  check_blocksize(blocksize);
  pynlp::FourBit in{type_of(quant_type), rows, columns, blocksize};
  const int64_t count = rows * columns, blocks = (count + blocksize - 1) / blocksize;
  in.packed = data_of<uint8_t>(packed, ScalarType::Byte, (count + 1) / 2, "packed");
  if (in.type != pynlp::FourBitType::mxfp4 && !nested_absmax) {
    in.scales = data_of<float>(absmax, ScalarType::Float, blocks, "absmax");
    return in;
  }
  in.scale_codes = data_of<uint8_t>(absmax, ScalarType::Byte, blocks, "absmax");
  if (in.type == pynlp::FourBitType::mxfp4) return in;
  STD_TORCH_CHECK(nested_offset && nested_code, "pynlp: nested_offset, nested_code: expected with nested_absmax");
  in.nested_absmax = data_of<float>(*nested_absmax, ScalarType::Float, (blocks + 255) / 256, "nested_absmax");
  in.nested_offset = data_of<float>(*nested_offset, ScalarType::Float, 1, "nested_offset");
  in.nested_code = data_of<float>(*nested_code, ScalarType::Float, 256, "nested_code");
  return in;
}

// Rows of codes (rows, bytes) of `columns` values, in groups of `group`; scales (1, 1), (rows, 1) or (rows, groups).
template <int BITS>
pynlp::Integers<BITS> integers(const Tensor& codes, const Tensor& scales, const MaybeTensor& zeros,
                               const MaybeTensor& minimums, int64_t columns, int64_t group) {
  STD_TORCH_CHECK(codes.dim() == 2 && scales.dim() == 2, "pynlp: codes, scale: expected two dimensions");
  pynlp::Integers<BITS> in{codes.size(0), columns, group, scales.size(1), scales.size(0) == 1 ? 0 : scales.size(1)};
  STD_TORCH_CHECK(codes.size(1) == in.row_bytes(), "pynlp: codes: expected ", in.row_bytes(), " bytes a row");
  STD_TORCH_CHECK(group > 0 && (group % 16 == 0 || group >= columns) &&
                      (in.groups == (columns + group - 1) / group || columns == 0),
                  "pynlp: scale: expected one for each group");
  STD_TORCH_CHECK(scales.size(0) == 1 || scales.size(0) == in.rows, "pynlp: scale: expected one row, or one a row");
  STD_TORCH_CHECK(codes.is_contiguous() && scales.is_contiguous(), "pynlp: codes, scale: expected contiguous");
  in.codes = static_cast<const uint8_t*>(codes.const_data_ptr());
  in.scale_dtype = float_dtype_of(scales);
  STD_TORCH_CHECK(in.scale_dtype != pynlp::Dtype::bfloat16, "pynlp: scale: expected float32 or float16");
  in.scales = scales.const_data_ptr();
  STD_TORCH_CHECK(!zeros || !minimums, "pynlp: zero_point, minimum: expected one of them");
  if (zeros) in.zeros = data_of<int8_t>(*zeros, ScalarType::Char, scales.numel(), "zero_point");
  if (minimums) in.minimums = data_of<void>(*minimums, scales.scalar_type(), scales.numel(), "minimum");
  return in;
}

}  // namespace
