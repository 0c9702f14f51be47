// Quantized weights in torch's dispatcher: tensors become pointers and strides.
#include <type_traits>
#include <vector>

#include "quantized_weights.h"

namespace {

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

// The problem of x by a weight, and y, which it writes to.
template <class Problem, class Weight>
Problem forward_problem(const Tensor& x, const Weight& weight, const MaybeTensor& bias, const Tensor& y) {
  Problem in{};
  in.rows = rows_of(x);
  in.x = rows_in(x, "x");
  in.weight = weight;
  in.bias = bias ? data_of<float>(*bias, ScalarType::Float, weight.rows, "bias") : nullptr;
  in.y = {y.mutable_data_ptr(), float_dtype_of(y)};
  return in;
}

Tensor linear_4bit(Tensor x, Tensor packed, Tensor absmax, MaybeTensor nested_absmax, MaybeTensor nested_offset,
                   MaybeTensor nested_code, MaybeTensor bias, int64_t outputs, int64_t blocksize,
                   int64_t quant_type) {
  const pynlp::FourBit weight = four_bit(packed, absmax, nested_absmax, nested_offset, nested_code, outputs,
                                         columns_of(x), blocksize, quant_type);
  Tensor y = with_columns(x, outputs);
  pynlp::linear_4bit(forward_problem<pynlp::LinearForward<pynlp::FourBit>>(x, weight, bias, y));
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

// work(8 or 4 bits as a constant), by the codes' dtype.
template <class Work>
auto with_bits(const Tensor& codes, const Work& work) {
  if (codes.scalar_type() == ScalarType::Char) return work(std::integral_constant<int, 8>{});
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte, "pynlp: codes: expected int8 or uint8");
  return work(std::integral_constant<int, 4>{});
}

std::tuple<Tensor, Tensor, Tensor> quantize_integers(Tensor x, int64_t bits, bool affine, int64_t group) {
  STD_TORCH_CHECK(x.is_contiguous() && x.dim() == 2 && (group == 0 || group % 16 == 0 || group >= x.size(1)),
                  "pynlp: x: expected two dimensions, contiguous");
  STD_TORCH_CHECK(bits == 8 || bits == 4, "pynlp: bits: expected 8 or 4, got ", bits);
  const bool whole = group == 0;  // one scale for all values, as if they were one row
  pynlp::QuantizeIntegers in{static_cast<int>(bits), whole ? 1 : x.size(0), whole ? x.numel() : x.size(1)};
  in.group = std::max<int64_t>(1, whole ? in.columns : group);
  in.width = std::max<int64_t>(1, x.size(1));
  in.affine = affine;
  in.x = {x.const_data_ptr(), in.columns, float_dtype_of(x)};
  const int64_t groups = whole ? 1 : (in.columns + in.group - 1) / in.group;
  Tensor codes = bits == 8 ? output(x, x.sizes(), ScalarType::Char)
                           : output(x, {x.size(0), (x.size(1) + 1) / 2}, ScalarType::Byte);
  Tensor scales = output(x, {in.rows, groups}, ScalarType::Float);
  Tensor zeros = affine ? output(x, {in.rows, groups}, ScalarType::Char) : empty(x, {0}, ScalarType::Char);
  in.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  in.scales = static_cast<float*>(scales.mutable_data_ptr());
  in.zeros = static_cast<int8_t*>(zeros.mutable_data_ptr());
  if (whole && x.numel() == 0) {
    in.scales[0] = 0;
    if (affine) in.zeros[0] = 0;
  }
  pynlp::quantize_integers(in);
  return {codes, scales, zeros};
}

Tensor dequantize_integers(Tensor codes, Tensor scales, MaybeTensor zeros, MaybeTensor minimums, int64_t columns,
                           int64_t group, ScalarType dtype) {
  Tensor out = output(codes, {codes.size(0), columns}, dtype);
  const pynlp::RowsOut to{out.mutable_data_ptr(), float_dtype_of(out)};
  with_bits(codes, [&](auto bits) {
    pynlp::dequantize_integers(
        pynlp::DequantizeIntegers<bits>{integers<bits>(codes, scales, zeros, minimums, columns, group), to});
  });
  return out;
}

Tensor integer_linear(Tensor x, Tensor codes, Tensor scales, MaybeTensor zeros, MaybeTensor minimums, MaybeTensor bias,
                      int64_t group) {
  Tensor y = with_columns(x, codes.size(0));
  with_bits(codes, [&](auto bits) {
    using Weight = pynlp::Integers<bits>;
    const Weight weight = integers<bits>(codes, scales, zeros, minimums, columns_of(x), group);
    pynlp::integer_linear(forward_problem<pynlp::LinearForward<Weight>>(x, weight, bias, y));
  });
  return y;
}

Tensor integer_linear_backward(Tensor grad, Tensor codes, Tensor scales, MaybeTensor zeros, MaybeTensor minimums,
                               int64_t columns, int64_t group) {
  STD_TORCH_CHECK(codes.dim() == 2 && columns_of(grad) == codes.size(0), "pynlp: grad: expected another shape");
  Tensor grad_x = with_columns(grad, columns);
  with_bits(codes, [&](auto bits) {
    pynlp::LinearBackward<pynlp::Integers<bits>> in{};
    in.rows = rows_of(grad);
    in.grad = rows_in(grad, "grad");
    in.weight = integers<bits>(codes, scales, zeros, minimums, columns, group);
    in.grad_x = {grad_x.mutable_data_ptr(), float_dtype_of(grad_x)};
    pynlp::integer_linear_backward(in);
  });
  return grad_x;
}

Tensor dynamic_integer_linear(Tensor x, Tensor codes, Tensor scales, MaybeTensor zeros, MaybeTensor minimums,
                              MaybeTensor bias, int64_t group, int64_t x_group, double outlier_threshold) {
  STD_TORCH_CHECK(x_group == 0 || x_group == 32, "pynlp: x_group: expected 0 or 32, got ", x_group);
  STD_TORCH_CHECK(x_group == 0 || std::isinf(outlier_threshold), "pynlp: outlier_threshold: expected none with groups");
  Tensor y = with_columns(x, codes.size(0));
  with_bits(codes, [&](auto bits) {
    using Weight = pynlp::Integers<bits>;
    const Weight weight = integers<bits>(codes, scales, zeros, minimums, columns_of(x), group);
    auto in = forward_problem<pynlp::DynamicLinear<Weight>>(x, weight, bias, y);
    in.x_group = x_group;
    in.outlier_threshold = static_cast<float>(outlier_threshold);
    pynlp::dynamic_integer_linear(in);
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pynlp, CPU, m) {
  PYNLP_IMPL(m, quantize_4bit);
  PYNLP_IMPL(m, dequantize_4bit);
  PYNLP_IMPL(m, linear_4bit);
  PYNLP_IMPL(m, linear_4bit_backward);
  PYNLP_IMPL(m, quantize_integers);
  PYNLP_IMPL(m, dequantize_integers);
  PYNLP_IMPL(m, integer_linear);
  PYNLP_IMPL(m, integer_linear_backward);
  PYNLP_IMPL(m, dynamic_integer_linear);
}
