// Norms, activations, linear layers and the loss in torch's dispatcher: tensors become pointers and strides.
#include "../layers/layers.h"

#include <vector>

#include "../common/isa.h"
#include "plan.h"
#include "tensors.h"

namespace {

using pynlp::Place;

int64_t rows_of(const Tensor& x) { return columns_of(x) ? x.numel() / columns_of(x) : 0; }

void check_like(const Tensor& x, const Tensor& like, const char* name) {
  bool same = x.dim() == like.dim();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = x.size(i) == like.size(i);
  STD_TORCH_CHECK(same, "pynlp: ", name, ": expected another shape");
}

// The values of a parameter or a statistic of `count` values.
const float* fp32_data(const Tensor& x, int64_t count, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.numel() == count, "pynlp: ", name,
                  ": expected float32, contiguous, of another size");
  return static_cast<const float*>(x.const_data_ptr());
}

pynlp::RowDropout dropout_of(double dropout_p, const MaybeTensor& seed) {
  if (!seed) return {0, 0};
  STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long && seed->numel() == 1, "pynlp: dropout_seed: expected int64");
  return {dropped_parts(dropout_p), static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()))};
}

Tensor like(const Tensor& x, ScalarType dtype) { return output(x, x.sizes(), dtype); }
Tensor nothing(const Tensor& x) { return empty(x, {0}); }
pynlp::RowsOut rows_out(Tensor& x) { return {x.mutable_data_ptr(), float_dtype_of(x)}; }
float* floats(Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_forward(Tensor x, MaybeTensor residual, Tensor weight, MaybeTensor bias,
                                                        bool centred, double eps, double dropout_p, MaybeTensor seed) {
  pynlp::NormForward in{};
  in.rows = rows_of(x);
  in.columns = columns_of(x);
  in.x = rows_in(x, "x");
  if (residual) {
    check_like(*residual, x, "residual");
    in.residual = rows_in(*residual, "residual");
  }
  in.weight = fp32_data(weight, in.columns, "weight");
  in.bias = bias ? fp32_data(*bias, in.columns, "bias") : nullptr;
  in.centred = centred;
  in.eps = static_cast<float>(eps);
  in.dropout = dropout_of(dropout_p, seed);
  Tensor y = like(x, x.scalar_type());
  Tensor added = residual || seed ? like(x, (residual ? *residual : x).scalar_type()) : nothing(x);
  const auto rows = x.sizes().slice(0, x.dim() - 1);
  Tensor mean = centred ? output(x, rows, ScalarType::Float) : empty(x, {0}, ScalarType::Float);
  Tensor rstd = output(x, rows, ScalarType::Float);
  in.y = rows_out(y);
  if (residual || seed) in.added = rows_out(added);
  in.mean = floats(mean);
  in.rstd = floats(rstd);
  pynlp::run<pynlp::norm_forward>(in, [&] {
    return std::vector<Place>{{&in.x.data, Place::input},
                              {&in.residual.data, Place::input, residual.has_value()},
                              {&in.weight, Place::input},
                              {&in.bias, Place::input, bias.has_value()},
                              {&in.dropout.seed, Place::seed, seed.has_value()},
                              {&in.y.data, Place::output},
                              {&in.added.data, Place::output},
                              {&in.mean, Place::optional},
                              {&in.rstd, Place::optional}};
  });
  return {y, added, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_backward(Tensor grad_y, MaybeTensor grad_added, Tensor added,
                                                         Tensor weight, Tensor mean, Tensor rstd, bool centred,
                                                         double dropout_p, MaybeTensor seed, bool needs_bias) {
  pynlp::NormBackward in{};
  in.rows = rows_of(added);
  in.columns = columns_of(added);
  check_like(grad_y, added, "grad_y");
  in.grad_y = rows_in(grad_y, "grad_y");
  if (grad_added) {
    check_like(*grad_added, added, "grad_new");
    in.grad_added = rows_in(*grad_added, "grad_new");
  }
  in.added = rows_in(added, "new");
  in.weight = fp32_data(weight, in.columns, "weight");
  in.mean = fp32_data(mean, centred ? in.rows : 0, "mean");
  in.rstd = fp32_data(rstd, in.rows, "rstd");
  in.centred = centred;
  in.dropout = dropout_of(dropout_p, seed);
  const bool separate = seed || added.scalar_type() != grad_y.scalar_type();
  Tensor grad_residual = like(added, added.scalar_type());
  Tensor grad_x = separate ? like(added, grad_y.scalar_type()) : nothing(grad_y);
  Tensor grad_weight = torch::stable::empty_like(weight);
  Tensor grad_bias = needs_bias ? torch::stable::empty_like(weight) : nothing(weight);
  in.grad_residual = rows_out(grad_residual);
  if (separate) in.grad_x = rows_out(grad_x);
  in.grad_weight = floats(grad_weight);
  if (needs_bias) in.grad_bias = floats(grad_bias);
  pynlp::run<pynlp::norm_backward>(in, [&] {
    return std::vector<Place>{{&in.grad_y.data, Place::input},
                              {&in.grad_added.data, Place::input, grad_added.has_value()},
                              {&in.added.data, Place::input},
                              {&in.weight, Place::input},
                              {&in.mean, Place::input},
                              {&in.rstd, Place::input},
                              {&in.dropout.seed, Place::seed, seed.has_value()},
                              {&in.grad_residual.data, Place::output},
                              {&in.grad_x.data, Place::output},
                              {&in.grad_weight, Place::output},
                              {&in.grad_bias, Place::output}};
  });
  return {grad_residual, grad_x, grad_weight, grad_bias};
}

// Fills in the kind, x and up.
template <class Problem>
void fill(Problem& in, const Tensor& x, const MaybeTensor& up, int64_t kind) {
  in.kind = static_cast<pynlp::Activation>(kind);
  in.is_packed = in.kind == pynlp::Activation::swiglu && !up;
  in.columns = in.is_packed ? columns_of(x) / 2 : columns_of(x);
  in.rows = rows_of(x);
  in.x = rows_in(x, "x");
  if (up) {
    check_like(*up, x, "up");
    in.up = rows_in(*up, "up");
  }
}

Tensor activation_forward(Tensor x, MaybeTensor up, int64_t kind, double dropout_p, MaybeTensor seed) {
  pynlp::ActivationForward in{};
  fill(in, x, up, kind);
  in.dropout = dropout_of(dropout_p, seed);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = in.columns;
  Tensor y = output(x, {sizes.data(), sizes.size()}, x.scalar_type());
  in.y = rows_out(y);
  pynlp::run<pynlp::activation_forward>(in, [&] {
    return std::vector<Place>{{&in.x.data, Place::input},
                              {&in.up.data, Place::input, up.has_value()},
                              {&in.dropout.seed, Place::seed, seed.has_value()},
                              {&in.y.data, Place::output}};
  });
  return y;
}

std::tuple<Tensor, Tensor> activation_backward(Tensor grad, Tensor x, MaybeTensor up, int64_t kind, double dropout_p,
                                               MaybeTensor seed) {
  pynlp::ActivationBackward in{};
  fill(in, x, up, kind);
  STD_TORCH_CHECK(rows_of(grad) == in.rows && columns_of(grad) == in.columns, "pynlp: grad: expected another shape");
  in.grad = rows_in(grad, "grad");
  in.dropout = dropout_of(dropout_p, seed);
  Tensor grad_x = like(x, x.scalar_type());
  Tensor grad_up = up ? like(x, x.scalar_type()) : nothing(x);
  in.grad_x = rows_out(grad_x);
  if (up) in.grad_up = rows_out(grad_up);
  in.grad_stride = columns_of(x);
  pynlp::run<pynlp::activation_backward>(in, [&] {
    return std::vector<Place>{{&in.grad.data, Place::input},
                              {&in.x.data, Place::input},
                              {&in.up.data, Place::input, up.has_value()},
                              {&in.dropout.seed, Place::seed, seed.has_value()},
                              {&in.grad_x.data, Place::output},
                              {&in.grad_up.data, Place::output}};
  });
  return {grad_x, grad_up};
}

Tensor linear_reference(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  using torch::stable::detail::from, torch::stable::detail::to;
  StableIValue stack[] = {from(x), from(weight), from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("pynlp::linear_reference", "", stack, TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

// Of more rows PyTorch's product is the faster one: it repacks the weight, once for all of them.
int64_t most_rows() { return pynlp::features().avx512 ? 2048 : 128; }

Tensor linear(Tensor x, Tensor weight, MaybeTensor bias) {
  if (rows_of(x) > most_rows()) return linear_reference(x, weight, bias);
  pynlp::LinearForward in{};
  in.rows = rows_of(x);
  in.columns = columns_of(x);
  STD_TORCH_CHECK(weight.dim() == 2 && columns_of(weight) == in.columns && in.columns > 0,
                  "pynlp: weight: expected another shape");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && weight.scalar_type() == ScalarType::Float,
                  "pynlp: x, weight: expected float32");
  in.outputs = weight.size(0);
  in.x = rows_in(x, "x");
  in.weight = rows_in(weight, "weight");
  in.bias = bias ? fp32_data(*bias, in.outputs, "bias") : nullptr;
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = in.outputs;
  Tensor y = output(x, sizes);
  in.y = floats(y);
  pynlp::linear_forward(in);
  return y;
}

std::tuple<Tensor, Tensor> argmax_and_lse(Tensor x) {
  STD_TORCH_CHECK(x.dim() == 2 && columns_of(x) > 0 && x.scalar_type() == ScalarType::Float,
                  "pynlp: x: expected float32 (rows, columns)");
  Tensor argmax = empty(x, {x.size(0)}, ScalarType::Long);
  Tensor lse = empty(x, {x.size(0)});
  pynlp::argmax_and_lse(
      {x.size(0), columns_of(x), rows_in(x, "x"), static_cast<int64_t*>(argmax.mutable_data_ptr()), floats(lse)});
  return {argmax, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy(Tensor x, Tensor weight, MaybeTensor bias,
                                                                Tensor targets, MaybeTensor row_scale, bool needs_x,
                                                                bool needs_weight, bool needs_bias,
                                                                double label_smoothing, int64_t ignore_index,
                                                                double softcap, double z_loss) {
  pynlp::LinearCrossEntropy in{};
  in.tokens = rows_of(x);
  in.dim = columns_of(x);
  in.vocabulary = weight.size(0);
  STD_TORCH_CHECK(weight.dim() == 2 && columns_of(weight) == in.dim && in.vocabulary > 0 && in.dim > 0,
                  "pynlp: weight: expected another shape");
  in.x = rows_in(x, "x");
  in.weight = rows_in(weight, "weight");
  in.bias = bias ? fp32_data(*bias, in.vocabulary, "bias") : nullptr;
  STD_TORCH_CHECK(targets.scalar_type() == ScalarType::Long && targets.is_contiguous() && targets.numel() == in.tokens,
                  "pynlp: target: expected int64, contiguous, one for each row of x");
  in.targets = static_cast<const int64_t*>(targets.const_data_ptr());
  in.ignore_index = ignore_index;
  for (int64_t t = 0; t < in.tokens; ++t)
    STD_TORCH_CHECK(in.targets[t] == ignore_index || (in.targets[t] >= 0 && in.targets[t] < in.vocabulary),
                    "pynlp: target: expected 0 to ", in.vocabulary - 1, " or ", ignore_index, ", got ", in.targets[t]);
  in.smoothing = static_cast<float>(label_smoothing);
  in.softcap = static_cast<float>(softcap);
  in.z_loss = static_cast<float>(z_loss);
  in.row_scale = row_scale ? fp32_data(*row_scale, in.tokens, "row_scale") : nullptr;
  Tensor losses = output(x, targets.sizes(), ScalarType::Float);
  Tensor grad_x = needs_x ? like(x, x.scalar_type()) : nothing(x);
  Tensor grad_weight = needs_weight ? like(weight, weight.scalar_type()) : nothing(weight);
  Tensor grad_bias = needs_bias ? torch::stable::empty_like(*bias) : empty(x, {0}, ScalarType::Float);
  in.losses = floats(losses);
  if (needs_x) in.grad_x = rows_out(grad_x);
  if (needs_weight) in.grad_weight = rows_out(grad_weight);
  if (needs_bias) in.grad_bias = floats(grad_bias);
  pynlp::linear_cross_entropy(in);
  if (!row_scale) return {losses, grad_x, grad_weight, grad_bias};
  Tensor sum = empty(x, {}, ScalarType::Float);
  double total = 0;
  for (int64_t t = 0; t < in.tokens; ++t) total += static_cast<double>(in.row_scale[t]) * in.losses[t];
  *floats(sum) = static_cast<float>(total);
  return {sum, grad_x, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pynlp, CPU, m) {
  PYNLP_IMPL(m, norm_forward);
  PYNLP_IMPL(m, norm_backward);
  PYNLP_IMPL(m, activation_forward);
  PYNLP_IMPL(m, activation_backward, 1);  // x
  PYNLP_IMPL(m, linear);
  PYNLP_IMPL(m, argmax_and_lse);
  PYNLP_IMPL(m, linear_cross_entropy);
}
