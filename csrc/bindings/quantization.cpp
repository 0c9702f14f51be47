// Quantized weights in torch's dispatcher: tensors become pointers and strides.
#include "../quantization/quantization.h"

#include <vector>

#include "tensors.h"

namespace {

pynlp::FourBitType type_of(int64_t quant_type) {
  STD_TORCH_CHECK(quant_type >= 0 && quant_type <= 2, "pynlp: quant_type: expected 0 to 2, got ", quant_type);
  return static_cast<pynlp::FourBitType>(quant_type);
}

void check_blocksize(int64_t blocksize) {
  STD_TORCH_CHECK(blocksize >= 32 && (blocksize & (blocksize - 1)) == 0,
                  "pynlp: blocksize: expected a power of two from 32 on, got ", blocksize);
}

template <class T>
const T* data_of(const Tensor& x, ScalarType dtype, int64_t count, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == dtype && x.is_contiguous() && x.numel() == count, "pynlp: ", name,
                  ": expected another dtype, contiguous, of another size");
  return static_cast<const T*>(x.const_data_ptr());
}

pynlp::FourBit four_bit(const Tensor& packed, const Tensor& absmax, const MaybeTensor& nested_absmax,
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

std::tuple<Tensor, Tensor> quantize_4bit(Tensor x, int64_t blocksize, int64_t quant_type) {
  check_blocksize(blocksize);
  STD_TORCH_CHECK(x.is_contiguous(), "pynlp: x: expected contiguous");
  pynlp::Quantize4bit in{type_of(quant_type), x.numel(), blocksize};
  const bool is_mx = in.type == pynlp::FourBitType::mxfp4;
  Tensor packed = output(x, {(in.count + 1) / 2, 1}, ScalarType::Byte);
  Tensor absmax = output(x, {(in.count + blocksize - 1) / blocksize}, is_mx ? ScalarType::Byte : ScalarType::Float);
  in.x = {x.const_data_ptr(), in.count, float_dtype_of(x)};
  in.packed = static_cast<uint8_t*>(packed.mutable_data_ptr());
  if (is_mx)
    in.scale_codes = static_cast<uint8_t*>(absmax.mutable_data_ptr());
  else
    in.scales = static_cast<float*>(absmax.mutable_data_ptr());
  pynlp::quantize_4bit(in);
  return {packed, absmax};
}

Tensor dequantize_4bit(Tensor packed, Tensor absmax, MaybeTensor nested_absmax, MaybeTensor nested_offset,
                       MaybeTensor nested_code, int64_t count, int64_t blocksize, int64_t quant_type,
                       ScalarType dtype) {
  Tensor out = output(packed, {count}, dtype);
  pynlp::dequantize_4bit({four_bit(packed, absmax, nested_absmax, nested_offset, nested_code, 1, count, blocksize,
                                   quant_type),
                          {out.mutable_data_ptr(), float_dtype_of(out)}});
  return out;
}

// The number of rows, also of those without columns.
int64_t rows_of(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t i = 0; i < x.dim() - 1; ++i) rows *= x.size(i);
  return rows;
}

Tensor with_columns(const Tensor& x, int64_t columns) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = columns;
  return output(x, sizes);
}

Tensor linear_4bit(Tensor x, Tensor packed, Tensor absmax, MaybeTensor nested_absmax, MaybeTensor nested_offset,
                   MaybeTensor nested_code, MaybeTensor bias, int64_t outputs, int64_t blocksize,
                   int64_t quant_type) {
  pynlp::LinearForward<pynlp::FourBit> in{};
  in.rows = rows_of(x);
  in.x = rows_in(x, "x");
  in.weight = four_bit(packed, absmax, nested_absmax, nested_offset, nested_code, outputs, columns_of(x), blocksize,
                       quant_type);
  in.bias = bias ? data_of<float>(*bias, ScalarType::Float, outputs, "bias") : nullptr;
  Tensor y = with_columns(x, outputs);
  in.y = {y.mutable_data_ptr(), float_dtype_of(y)};
  pynlp::linear_4bit(in);
  return y;
}

Tensor linear_4bit_backward(Tensor grad, Tensor packed, Tensor absmax, MaybeTensor nested_absmax,
                            MaybeTensor nested_offset, MaybeTensor nested_code, int64_t columns, int64_t blocksize,
                            int64_t quant_type) {
  pynlp::LinearBackward<pynlp::FourBit> in{};
  in.rows = rows_of(grad);
  in.grad = rows_in(grad, "grad");
  in.weight = four_bit(packed, absmax, nested_absmax, nested_offset, nested_code, columns_of(grad), columns, blocksize,
                       quant_type);
  Tensor grad_x = with_columns(grad, columns);
  in.grad_x = {grad_x.mutable_data_ptr(), float_dtype_of(grad_x)};
  pynlp::linear_4bit_backward(in);
  return grad_x;
}

// Scales (1, 1), (rows, 1) or (rows, groups), of groups of `group` columns.
pynlp::Int8 int8(const Tensor& codes, const Tensor& scales, const MaybeTensor& zeros, int64_t group) {
  STD_TORCH_CHECK(codes.dim() == 2 && scales.dim() == 2, "pynlp: codes, scale: expected two dimensions");
  pynlp::Int8 in{codes.size(0), codes.size(1), group, scales.size(1), scales.size(0) == 1 ? 0 : scales.size(1)};
  STD_TORCH_CHECK(group > 0 && (group % 16 == 0 || group >= in.columns) &&
                      (in.groups == (in.columns + group - 1) / group || in.columns == 0),
                  "pynlp: scale: expected one for each group");
  STD_TORCH_CHECK(scales.size(0) == 1 || scales.size(0) == in.rows, "pynlp: scale: expected one row, or one a row");
  in.codes = data_of<int8_t>(codes, ScalarType::Char, codes.numel(), "codes");
  in.scales = data_of<float>(scales, ScalarType::Float, scales.numel(), "scale");
  if (zeros) in.zeros = data_of<int8_t>(*zeros, ScalarType::Char, scales.numel(), "zero_point");
  return in;
}

std::tuple<Tensor, Tensor, Tensor> quantize_int8(Tensor x, bool affine, int64_t group) {
  STD_TORCH_CHECK(x.is_contiguous() && x.dim() == 2 && (group == 0 || group % 16 == 0 || group >= x.size(1)),
                  "pynlp: x: expected two dimensions, contiguous");
  const bool whole = group == 0;  // one scale for all values, as if they were one row
  pynlp::QuantizeInt8 in{whole ? 1 : x.size(0), whole ? x.numel() : x.size(1)};
  in.group = std::max<int64_t>(1, whole ? in.columns : group);
  in.affine = affine;
  in.x = {x.const_data_ptr(), in.columns, float_dtype_of(x)};
  const int64_t groups = whole ? 1 : (in.columns + in.group - 1) / in.group;
  Tensor codes = output(x, x.sizes(), ScalarType::Char);
  Tensor scales = output(x, {in.rows, groups}, ScalarType::Float);
  Tensor zeros = affine ? output(x, {in.rows, groups}, ScalarType::Char) : empty(x, {0}, ScalarType::Char);
  in.codes = static_cast<int8_t*>(codes.mutable_data_ptr());
  in.scales = static_cast<float*>(scales.mutable_data_ptr());
  in.zeros = static_cast<int8_t*>(zeros.mutable_data_ptr());
  if (whole && x.numel() == 0) {
    in.scales[0] = 0;
    if (affine) in.zeros[0] = 0;
  }
  pynlp::quantize_int8(in);
  return {codes, scales, zeros};
}

Tensor dequantize_int8(Tensor codes, Tensor scales, MaybeTensor zeros, int64_t group, ScalarType dtype) {
  Tensor out = output(codes, codes.sizes(), dtype);
  pynlp::dequantize_int8({int8(codes, scales, zeros, group), {out.mutable_data_ptr(), float_dtype_of(out)}});
  return out;
}

Tensor int8_linear(Tensor x, Tensor codes, Tensor scales, MaybeTensor zeros, MaybeTensor bias, int64_t group) {
  pynlp::LinearForward<pynlp::Int8> in{};
  in.rows = rows_of(x);
  in.x = rows_in(x, "x");
  in.weight = int8(codes, scales, zeros, group);
  STD_TORCH_CHECK(columns_of(x) == in.weight.columns, "pynlp: x: expected another shape");
  in.bias = bias ? data_of<float>(*bias, ScalarType::Float, in.weight.rows, "bias") : nullptr;
  Tensor y = with_columns(x, in.weight.rows);
  in.y = {y.mutable_data_ptr(), float_dtype_of(y)};
  pynlp::int8_linear(in);
  return y;
}

Tensor int8_linear_backward(Tensor grad, Tensor codes, Tensor scales, MaybeTensor zeros, int64_t group) {
  pynlp::LinearBackward<pynlp::Int8> in{};
  in.rows = rows_of(grad);
  in.grad = rows_in(grad, "grad");
  in.weight = int8(codes, scales, zeros, group);
  STD_TORCH_CHECK(columns_of(grad) == in.weight.rows, "pynlp: grad: expected another shape");
  Tensor grad_x = with_columns(grad, in.weight.columns);
  in.grad_x = {grad_x.mutable_data_ptr(), float_dtype_of(grad_x)};
  pynlp::int8_linear_backward(in);
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pynlp, CPU, m) {
  PYNLP_IMPL(m, quantize_4bit);
  PYNLP_IMPL(m, dequantize_4bit);
  PYNLP_IMPL(m, linear_4bit);
  PYNLP_IMPL(m, linear_4bit_backward);
  PYNLP_IMPL(m, quantize_int8);
  PYNLP_IMPL(m, dequantize_int8);
  PYNLP_IMPL(m, int8_linear);
  PYNLP_IMPL(m, int8_linear_backward);
}
