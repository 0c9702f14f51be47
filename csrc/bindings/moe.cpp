// Mixtures of experts in torch's dispatcher: tensors become pointers and strides.
#include "../moe/moe.h"

#include <vector>

#include "plan.h"
#include "tensors.h"

namespace {

using pynlp::Place;

const int32_t* int32_data(const Tensor& x, int64_t count, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Int && x.is_contiguous() && x.numel() == count, "pynlp: ", name,
                  ": expected int32, contiguous, of another size");
  return static_cast<const int32_t*>(x.const_data_ptr());
}

const float* fp32_data(const Tensor& x, int64_t count, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.numel() == count, "pynlp: ", name,
                  ": expected float32, contiguous, of another size");
  return static_cast<const float*>(x.const_data_ptr());
}

int32_t* int32s(const Tensor& x) { return static_cast<int32_t*>(x.mutable_data_ptr()); }
float* floats(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }
pynlp::RowsOut rows_out(const Tensor& x) { return {x.mutable_data_ptr(), float_dtype_of(x)}; }
Tensor nothing(const Tensor& x, ScalarType dtype) { return empty(x, {0}, dtype); }

// Whether the last dimension of (E, outputs, inputs) is the contiguous one.
bool is_by_lines(const Tensor& x) { return x.stride(2) == 1 || x.size(2) == 1 || x.stride(1) != 1; }

// Matrices (E, outputs, inputs), whose outputs are counted in an order of their own.
pynlp::Experts experts(const Tensor& x, int64_t count, pynlp::Order outputs, pynlp::Order inputs, const char* name) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == count && x.size(1) == outputs.count() && x.size(2) == inputs.count(),
                  "pynlp: ", name, ": expected another shape");
  const bool by_lines = is_by_lines(x);
  const int64_t stride = by_lines ? x.stride(2) : x.stride(1), size = by_lines ? x.size(2) : x.size(1);
  STD_TORCH_CHECK(stride == 1 || size <= 1 || x.numel() == 0, "pynlp: ", name, ": expected contiguous lines");
  return {x.const_data_ptr(), float_dtype_of(x), x.stride(0),        by_lines ? x.stride(1) : x.stride(2),
          by_lines ? outputs : inputs, by_lines ? inputs : outputs, by_lines};
}

// A gradient of such matrices, contiguous in the same order of memory.
Tensor gradient_of(const Tensor& x, const pynlp::Experts& weight, pynlp::ExpertsOut& out) {
  Tensor grad = output(x, {x.size(0), weight.lines.count(), weight.columns.count()});
  out = {grad.mutable_data_ptr(), float_dtype_of(grad), weight.lines, weight.columns, weight.outputs_are_lines};
  return grad;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_dispatch(Tensor top_k_index, int64_t num_experts) {
  const bool is_wide = top_k_index.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK((is_wide || top_k_index.scalar_type() == ScalarType::Int) && top_k_index.is_contiguous(),
                  "pynlp: top_k_index: expected int32 or int64, contiguous");
  STD_TORCH_CHECK(top_k_index.numel() < int64_t{1} << 31, "pynlp: top_k_index: expected less than 2^31 values");
  Tensor counts = output(top_k_index, {num_experts}, ScalarType::Int);
  Tensor offsets = output(top_k_index, {num_experts}, ScalarType::Int);
  Tensor permutation = output(top_k_index, {top_k_index.numel()}, ScalarType::Int);
  Tensor places = output(top_k_index, top_k_index.sizes(), ScalarType::Int);
  const pynlp::Dispatch in{top_k_index.numel(), num_experts, {top_k_index.const_data_ptr(), is_wide}, int32s(counts),
                           int32s(offsets),     int32s(permutation), int32s(places)};
  pynlp::run<pynlp::moe_dispatch>(in, [&] {
    return std::vector<Place>{{&in.choices.data, Place::input},
                              {&in.counts, Place::output},
                              {&in.offsets, Place::output},
                              {&in.permutation, Place::output},
                              {&in.places, Place::output}};
  });
  return {counts, offsets, permutation, places};
}

Tensor grouped_mm(Tensor x, Tensor weight, Tensor offsets, MaybeTensor bias) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 3 && weight.size(1) == x.size(1),
                  "pynlp: weight: expected another shape");
  const int64_t count = weight.size(0), outputs = weight.size(2);
  Tensor y = output(x, {x.size(0), outputs});
  pynlp::GroupedForward in{};
  in.rows = x.size(0);
  in.groups = {count, int32_data(offsets, count, "offsets")};
  in.x = rows_in(x, "x");
  const bool by_lines = weight.stride(1) == 1 && weight.stride(2) != 1 && weight.size(1) != 1;
  const pynlp::Order order_in{x.size(1)}, order_out{outputs};
  in.weight = {weight.const_data_ptr(), float_dtype_of(weight), weight.stride(0),
               weight.stride(by_lines ? 2 : 1), by_lines ? order_out : order_in, by_lines ? order_in : order_out,
               by_lines};
  STD_TORCH_CHECK(weight.stride(by_lines ? 1 : 2) == 1 || weight.size(by_lines ? 1 : 2) <= 1 || weight.numel() == 0,
                  "pynlp: weight: expected contiguous lines");
  in.bias = bias ? fp32_data(*bias, count * outputs, "bias") : nullptr;
  in.y = rows_out(y);
  pynlp::run<pynlp::grouped_mm>(in, [&] {
    return std::vector<Place>{{&in.x.data, Place::input},
                              {&in.weight.data, Place::input},
                              {&in.groups.ends, Place::input},
                              {&in.bias, Place::input, bias.has_value()},
                              {&in.y.data, Place::output}};
  });
  return y;
}

std::tuple<Tensor, Tensor> grouped_mm_weight_backward(Tensor grad, Tensor x, Tensor offsets, bool outputs_are_lines,
                                                      bool needs_bias) {
  STD_TORCH_CHECK(x.dim() == 2 && grad.dim() == 2 && x.size(0) == grad.size(0), "pynlp: grad: expected another shape");
  const int64_t count = offsets.size(0);
  const pynlp::Order inputs{x.size(1)}, outputs{grad.size(1)};
  const pynlp::Order &lines = outputs_are_lines ? outputs : inputs, &columns = outputs_are_lines ? inputs : outputs;
  Tensor weight = output(x, {count, lines.count(), columns.count()});
  Tensor bias = needs_bias ? output(x, {count, outputs.count()}, ScalarType::Float) : nothing(x, ScalarType::Float);
  pynlp::GroupedWeightGradient in{};
  in.groups = {count, int32_data(offsets, count, "offsets")};
  in.x = rows_in(x, "x");
  in.grad_y = rows_in(grad, "grad");
  in.grad_weight = {weight.mutable_data_ptr(), float_dtype_of(weight), lines, columns, outputs_are_lines};
  in.grad_bias = needs_bias ? floats(bias) : nullptr;
  pynlp::run<pynlp::grouped_mm_weight_backward>(in, [&] {
    return std::vector<Place>{{&in.grad_y.data, Place::input},
                              {&in.x.data, Place::input},
                              {&in.groups.ends, Place::input},
                              {&in.grad_weight.data, Place::output},
                              {&in.grad_bias, Place::output}};
  });
  return {weight, bias};
}

// What both passes share.
void fill(pynlp::MoeMlp& in, const Tensor& x, const Tensor& top_k_weights, const Tensor& gate_up,
          const MaybeTensor& gate_up_bias, const Tensor& down, const MaybeTensor& down_bias, const Tensor& permutation,
          const Tensor& places, const Tensor& offsets, int64_t activation, bool interleaved) {
  STD_TORCH_CHECK(activation >= 0 && activation <= 3, "pynlp: activation: expected 0 to 3, got ", activation);
  STD_TORCH_CHECK(x.dim() == 2 && top_k_weights.dim() == 2 && down.dim() == 3 && top_k_weights.size(0) == x.size(0),
                  "pynlp: x, top_k_weights, down_proj: expected other shapes");
  in.tokens = x.size(0);
  in.top_k = top_k_weights.size(1);
  const int64_t slots = in.tokens * in.top_k, count = offsets.size(0);
  in.groups = {count, int32_data(offsets, count, "offsets")};
  in.permutation = int32_data(permutation, slots, "permutation");
  in.places = int32_data(places, slots, "places");
  in.top_k_weights = fp32_data(top_k_weights, slots, "top_k_weights");
  in.activation = static_cast<pynlp::MoeActivation>(activation);
  in.x = rows_in(x, "x");
  const pynlp::Order hidden{x.size(1)}, inner{down.size(2)};
  const bool is_gated = in.activation == pynlp::MoeActivation::swiglu || in.activation == pynlp::MoeActivation::swiglu_oai;
  const pynlp::Order outputs{inner.units, is_gated ? 2 : 1, is_gated && interleaved};
  in.gate_up = experts(gate_up, count, outputs, hidden, "gate_up_proj");
  in.down = experts(down, count, hidden, inner, "down_proj");
  in.gate_up_bias = gate_up_bias ? fp32_data(*gate_up_bias, count * outputs.count(), "gate_up_bias") : nullptr;
  in.down_bias = down_bias ? fp32_data(*down_bias, count * hidden.count(), "down_bias") : nullptr;
}

// The fields of those tensors, in the order of the ops' arguments.
std::vector<Place> places_of(const pynlp::MoeMlp& in, const MaybeTensor& gate_up_bias, const MaybeTensor& down_bias) {
  return {{&in.x.data, Place::input},
          {&in.top_k_weights, Place::input},
          {&in.gate_up.data, Place::input},
          {&in.gate_up_bias, Place::input, gate_up_bias.has_value()},
          {&in.down.data, Place::input},
          {&in.down_bias, Place::input, down_bias.has_value()},
          {&in.permutation, Place::input},
          {&in.places, Place::input},
          {&in.groups.ends, Place::input}};
}

std::tuple<Tensor, Tensor> moe_mlp_forward(Tensor x, Tensor top_k_weights, Tensor gate_up, MaybeTensor gate_up_bias,
                                           Tensor down, MaybeTensor down_bias, Tensor permutation, Tensor places,
                                           Tensor offsets, int64_t activation, bool interleaved, bool keeps) {
  pynlp::MoeMlpForward in{};
  fill(in, x, top_k_weights, gate_up, gate_up_bias, down, down_bias, permutation, places, offsets, activation,
       interleaved);
  Tensor out = output(x, x.sizes());
  Tensor before = keeps ? output(x, {permutation.numel(), gate_up.size(1)}) : nothing(x, x.scalar_type());
  in.out = rows_out(out);
  if (keeps) in.pre_activation = rows_out(before);
  pynlp::run<pynlp::moe_mlp_forward>(in, [&] {
    std::vector<Place> fields = places_of(in, gate_up_bias, down_bias);
    fields.push_back({&in.out.data, Place::output});
    fields.push_back({&in.pre_activation.data, Place::output});
    return fields;
  });
  return {out, before};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_mlp_backward(
    Tensor grad, Tensor x, Tensor top_k_weights, Tensor gate_up, MaybeTensor gate_up_bias, Tensor down,
    MaybeTensor down_bias, Tensor permutation, Tensor places, Tensor offsets, Tensor before, int64_t activation,
    bool interleaved, bool needs_x, bool needs_gate_up, bool needs_down) {
  pynlp::MoeMlpBackward in{};
  fill(in, x, top_k_weights, gate_up, gate_up_bias, down, down_bias, permutation, places, offsets, activation,
       interleaved);
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == in.tokens && grad.size(1) == x.size(1),
                  "pynlp: grad: expected another shape");
  STD_TORCH_CHECK(before.numel() == permutation.numel() * gate_up.size(1) && before.is_contiguous(),
                  "pynlp: before: expected what forward keeps");
  in.grad = rows_in(grad, "grad");
  in.pre_activation = {before.const_data_ptr(), gate_up.size(1), float_dtype_of(before)};
  const auto none = [&](ScalarType dtype) { return nothing(x, dtype); };
  Tensor grad_x = needs_x ? output(x, x.sizes()) : none(x.scalar_type());
  Tensor grad_weights = output(top_k_weights, top_k_weights.sizes());
  Tensor grad_gate_up = needs_gate_up ? gradient_of(gate_up, in.gate_up, in.grad_gate_up) : none(gate_up.scalar_type());
  Tensor grad_down = needs_down ? gradient_of(down, in.down, in.grad_down) : none(down.scalar_type());
  Tensor grad_gate_up_bias = gate_up_bias ? output(*gate_up_bias, gate_up_bias->sizes()) : none(ScalarType::Float);
  Tensor grad_down_bias = down_bias ? output(*down_bias, down_bias->sizes()) : none(ScalarType::Float);
  if (needs_x) in.grad_x = rows_out(grad_x);
  in.grad_top_k_weights = floats(grad_weights);
  if (!needs_gate_up) in.grad_gate_up = {nullptr, in.x.dtype, in.gate_up.lines, in.gate_up.columns, in.gate_up.outputs_are_lines};
  if (gate_up_bias) in.grad_gate_up_bias = floats(grad_gate_up_bias);
  if (down_bias) in.grad_down_bias = floats(grad_down_bias);
  pynlp::run<pynlp::moe_mlp_backward>(in, [&] {
    std::vector<Place> fields = places_of(in, gate_up_bias, down_bias);
    fields.insert(fields.begin(), {&in.grad.data, Place::input});
    fields.push_back({&in.pre_activation.data, Place::input});
    for (const void* field : {static_cast<const void*>(&in.grad_x.data), static_cast<const void*>(&in.grad_top_k_weights),
                              static_cast<const void*>(&in.grad_gate_up.data),
                              static_cast<const void*>(&in.grad_gate_up_bias),
                              static_cast<const void*>(&in.grad_down.data),
                              static_cast<const void*>(&in.grad_down_bias)})
      fields.push_back({field, Place::output});
    return fields;
  });
  return {grad_x, grad_weights, grad_gate_up, grad_gate_up_bias, grad_down, grad_down_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pynlp, CPU, m) {
  PYNLP_IMPL(m, moe_dispatch);
  PYNLP_IMPL(m, grouped_mm);
  PYNLP_IMPL(m, grouped_mm_weight_backward, 1);  // x
  PYNLP_IMPL(m, moe_mlp_forward);
  PYNLP_IMPL(m, moe_mlp_backward, 1);  // x
}
