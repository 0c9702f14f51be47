// Mixtures of experts in torch's dispatcher: tensors become pointers and strides.
#include "../moe/moe.h"

#include <vector>

#include "plan.h"
#include "quantized_weights.h"

namespace {

using pynlp::Place;

const int32_t* int32_data(const Tensor& x, int64_t count, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Int && x.is_contiguous() && x.numel() == count, "pynlp: ", name,
                  ": expected int32, contiguous, of another size");
  return static_cast<const int32_t*>(x.const_data_ptr());
}

// Where the rows of each group end: of `rows` rows in all. Values that do not fit would lead out of memory.
pynlp::Groups groups_of(const Tensor& offsets, int64_t count, int64_t rows) {
  const int32_t* ends = int32_data(offsets, count, "offsets");
  for (int64_t i = 0; i < count; ++i)
    STD_TORCH_CHECK(ends[i] >= (i ? ends[i - 1] : 0) && ends[i] <= rows, "pynlp: offsets: expected numbers from 0 to ",
                    rows, " that never fall, got ", ends[i]);
  return {count, ends};
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
  return {{by_lines ? outputs : inputs, by_lines ? inputs : outputs, by_lines},
          x.const_data_ptr(),
          float_dtype_of(x),
          x.stride(0),
          by_lines ? x.stride(1) : x.stride(2)};
}

// A gradient of such matrices, contiguous in the same order of memory.
Tensor gradient_of(const Tensor& x, const pynlp::Experts& weight, pynlp::ExpertsOut& out) {
  Tensor grad = output(x, {x.size(0), weight.lines.count(), weight.columns.count()});
  out = {{weight.lines, weight.columns, weight.outputs_are_lines}, grad.mutable_data_ptr(), float_dtype_of(grad)};
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
  in.groups = groups_of(offsets, count, in.rows);
  in.x = rows_in(x, "x");
  const bool by_lines = weight.stride(1) == 1 || weight.size(1) == 1 || weight.stride(2) != 1;
  const pynlp::Order order_in{x.size(1)}, order_out{outputs};
  in.weight = {{by_lines ? order_out : order_in, by_lines ? order_in : order_out, by_lines},
               weight.const_data_ptr(),
               float_dtype_of(weight),
               weight.stride(0),
               weight.stride(by_lines ? 2 : 1)};
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
  in.groups = groups_of(offsets, count, x.size(0));
  in.x = rows_in(x, "x");
  in.grad_y = rows_in(grad, "grad");
  in.grad_weight = {{lines, columns, outputs_are_lines}, weight.mutable_data_ptr(), float_dtype_of(weight)};
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

// The overloads by their weights, of which a plan keeps one.
template <class Weights>
void run_forward(const pynlp::MoeMlpForward<Weights>& problem) {
  pynlp::moe_mlp_forward(problem);
}
template <class Weights>
void run_backward(const pynlp::MoeMlpBackward<Weights>& problem) {
  pynlp::moe_mlp_backward(problem);
}

// What both passes share but the weights; returns the order of gate_up's outputs.
template <class Weights>
pynlp::Order fill(pynlp::MoeMlp<Weights>& in, const Tensor& x, const Tensor& top_k_weights,
                  const MaybeTensor& gate_up_bias, const MaybeTensor& down_bias, const Tensor& permutation,
                  const Tensor& places, const Tensor& offsets, int64_t inner, int64_t activation, bool interleaved) {
  STD_TORCH_CHECK(activation >= 0 && activation <= 3, "pynlp: activation: expected 0 to 3, got ", activation);
  STD_TORCH_CHECK(x.dim() == 2 && top_k_weights.dim() == 2 && top_k_weights.size(0) == x.size(0),
                  "pynlp: x, top_k_weights: expected other shapes");
  in.tokens = x.size(0);
  in.top_k = top_k_weights.size(1);
  const int64_t slots = in.tokens * in.top_k, count = offsets.size(0);
  in.groups = groups_of(offsets, count, slots);
  in.permutation = int32_data(permutation, slots, "permutation");
  in.places = int32_data(places, slots, "places");
  in.top_k_weights = fp32_data(top_k_weights, slots, "top_k_weights");
  in.activation = static_cast<pynlp::MoeActivation>(activation);
  in.x = rows_in(x, "x");
  const bool is_gated = activation >= static_cast<int64_t>(pynlp::MoeActivation::swiglu);
  const pynlp::Order outputs{inner, is_gated ? 2 : 1, is_gated && interleaved};
  in.gate_up_bias = gate_up_bias ? fp32_data(*gate_up_bias, count * outputs.count(), "gate_up_bias") : nullptr;
  in.down_bias = down_bias ? fp32_data(*down_bias, count * x.size(1), "down_bias") : nullptr;
  return outputs;
}

void fill_weights(pynlp::MoeMlp<pynlp::Experts>& in, const Tensor& gate_up, const Tensor& down, pynlp::Order outputs,
                  int64_t hidden) {
  in.gate_up = experts(gate_up, in.groups.experts, outputs, {hidden}, "gate_up_proj");
  in.down = experts(down, in.groups.experts, {hidden}, {outputs.units}, "down_proj");
}

// The fields of the tensors that routing brings, and of those before the weights.
std::vector<Place> first_places(const pynlp::Routing& in, const pynlp::RowsIn& x) {
  return {{&x.data, Place::input}, {&in.top_k_weights, Place::input}};
}
void add_routing(std::vector<Place>& fields, const pynlp::Routing& in) {
  fields.insert(fields.end(), {{&in.permutation, Place::input}, {&in.places, Place::input}, {&in.groups.ends, Place::input}});
}

// The fields of those tensors, in the order of the ops' arguments.
std::vector<Place> places_of(const pynlp::MoeMlp<pynlp::Experts>& in, const MaybeTensor& gate_up_bias,
                             const MaybeTensor& down_bias) {
  std::vector<Place> fields = first_places(in, in.x);
  fields.insert(fields.end(), {{&in.gate_up.data, Place::input},
                               {&in.gate_up_bias, Place::input, gate_up_bias.has_value()},
                               {&in.down.data, Place::input},
                               {&in.down_bias, Place::input, down_bias.has_value()}});
  add_routing(fields, in);
  return fields;
}

std::tuple<Tensor, Tensor> moe_mlp_forward(Tensor x, Tensor top_k_weights, Tensor gate_up, MaybeTensor gate_up_bias,
                                           Tensor down, MaybeTensor down_bias, Tensor permutation, Tensor places,
                                           Tensor offsets, int64_t activation, bool interleaved, bool keeps) {
  pynlp::MoeMlpForward<pynlp::Experts> in{};
  STD_TORCH_CHECK(gate_up.dim() == 3 && down.dim() == 3, "pynlp: gate_up_proj, down_proj: expected three dimensions");
  fill_weights(in, gate_up, down, fill(in, x, top_k_weights, gate_up_bias, down_bias, permutation, places, offsets,
                                       down.size(2), activation, interleaved), x.size(1));
  Tensor out = output(x, x.sizes());
  Tensor before = keeps ? output(x, {permutation.numel(), gate_up.size(1)}) : nothing(x, x.scalar_type());
  in.out = rows_out(out);
  if (keeps) in.pre_activation = rows_out(before);
  pynlp::run<run_forward<pynlp::Experts>>(in, [&] {
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
  pynlp::MoeMlpBackward<pynlp::Experts> in{};
  STD_TORCH_CHECK(gate_up.dim() == 3 && down.dim() == 3, "pynlp: gate_up_proj, down_proj: expected three dimensions");
  fill_weights(in, gate_up, down, fill(in, x, top_k_weights, gate_up_bias, down_bias, permutation, places, offsets,
                                       down.size(2), activation, interleaved), x.size(1));
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
  if (!needs_gate_up) in.grad_gate_up = {in.gate_up, nullptr, in.x.dtype};
  if (gate_up_bias) in.grad_gate_up_bias = floats(grad_gate_up_bias);
  if (down_bias) in.grad_down_bias = floats(grad_down_bias);
  pynlp::run<run_backward<pynlp::Experts>>(in, [&] {
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

// Quantized experts: all lines of all experts are the rows of one weight.
template <class Weights>
void fill_quantized(pynlp::MoeMlp<Weights>& in, pynlp::Order outputs, int64_t hidden) {
  in.gate_up.lines = outputs;
  in.gate_up.columns = {hidden};
  in.down.lines = {hidden};
  in.down.columns = {outputs.units};
  in.gate_up.outputs_are_lines = in.down.outputs_are_lines = true;
}

// The tensors of one of two weights in 4 bits, and their fields.
struct FourBitTensors {
  const Tensor &packed, &absmax;
  const MaybeTensor &nested_absmax, &nested_offset, &nested_code;
  int64_t blocksize;

  pynlp::FourBit weight(int64_t rows, int64_t columns, int64_t quant_type) const {
    return four_bit(packed, absmax, nested_absmax, nested_offset, nested_code, rows, columns, blocksize, quant_type);
  }
  void add_places(std::vector<Place>& fields, const pynlp::FourBit& weight) const {
    const bool has_codes = weight.scale_codes;
    fields.insert(fields.end(), {{&weight.packed, Place::input},
                                 {has_codes ? static_cast<const void*>(&weight.scale_codes) : &weight.scales, Place::input},
                                 {&weight.nested_absmax, Place::input, nested_absmax.has_value()},
                                 {&weight.nested_offset, Place::input, nested_offset.has_value()},
                                 {&weight.nested_code, Place::input, nested_code.has_value()}});
  }
};

struct Int8Tensors {
  const Tensor &codes, &scale;
  const MaybeTensor& zeros;
  int64_t group;

  pynlp::Int8 weight(int64_t rows, int64_t columns, int64_t) const {
    STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Char && codes.size(0) == rows, "pynlp: codes: expected int8, ",
                    rows, " rows");
    return integers<8>(codes, scale, zeros, std::nullopt, columns, group);
  }
  void add_places(std::vector<Place>& fields, const pynlp::Int8& weight) const {
    fields.insert(fields.end(), {{&weight.codes, Place::input},
                                 {&weight.scales, Place::input},
                                 {&weight.zeros, Place::input, zeros.has_value()}});
  }
};

template <class Weights, class Tensors>
std::tuple<Tensor, Tensor> quantized_forward(const Tensor& x, const Tensor& top_k_weights, const Tensors& gate_up,
                                             const MaybeTensor& gate_up_bias, const Tensors& down,
                                             const MaybeTensor& down_bias, const Tensor& permutation,
                                             const Tensor& places, const Tensor& offsets, int64_t inner,
                                             int64_t quant_type, int64_t activation, bool interleaved, bool keeps) {
  pynlp::MoeMlpForward<Weights> in{};
  const pynlp::Order outputs = fill(in, x, top_k_weights, gate_up_bias, down_bias, permutation, places, offsets, inner,
                                    activation, interleaved);
  fill_quantized(in, outputs, x.size(1));
  in.gate_up.weight = gate_up.weight(offsets.size(0) * outputs.count(), x.size(1), quant_type);
  in.down.weight = down.weight(offsets.size(0) * x.size(1), inner, quant_type);
  Tensor out = output(x, x.sizes());
  Tensor before = keeps ? output(x, {permutation.numel(), outputs.count()}) : nothing(x, x.scalar_type());
  in.out = rows_out(out);
  if (keeps) in.pre_activation = rows_out(before);
  pynlp::run<run_forward<Weights>>(in, [&] {
    std::vector<Place> fields = first_places(in, in.x);
    gate_up.add_places(fields, in.gate_up.weight);
    fields.push_back({&in.gate_up_bias, Place::input, gate_up_bias.has_value()});
    down.add_places(fields, in.down.weight);
    fields.push_back({&in.down_bias, Place::input, down_bias.has_value()});
    add_routing(fields, in);
    fields.push_back({&in.out.data, Place::output});
    fields.push_back({&in.pre_activation.data, Place::output});
    return fields;
  });
  return {out, before};
}

template <class Weights, class Tensors>
std::tuple<Tensor, Tensor, Tensor, Tensor> quantized_backward(
    const Tensor& grad, const Tensor& x, const Tensor& top_k_weights, const Tensors& gate_up,
    const MaybeTensor& gate_up_bias, const Tensors& down, const MaybeTensor& down_bias, const Tensor& permutation,
    const Tensor& places, const Tensor& offsets, const Tensor& before, int64_t inner, int64_t quant_type,
    int64_t activation, bool interleaved, bool needs_x) {
  pynlp::MoeMlpBackward<Weights> in{};
  const pynlp::Order outputs = fill(in, x, top_k_weights, gate_up_bias, down_bias, permutation, places, offsets, inner,
                                    activation, interleaved);
  fill_quantized(in, outputs, x.size(1));
  in.gate_up.weight = gate_up.weight(offsets.size(0) * outputs.count(), x.size(1), quant_type);
  in.down.weight = down.weight(offsets.size(0) * x.size(1), inner, quant_type);
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == in.tokens && grad.size(1) == x.size(1),
                  "pynlp: grad: expected another shape");
  STD_TORCH_CHECK(before.numel() == permutation.numel() * outputs.count() && before.is_contiguous(),
                  "pynlp: before: expected what forward keeps");
  in.grad = rows_in(grad, "grad");
  in.pre_activation = {before.const_data_ptr(), outputs.count(), float_dtype_of(before)};
  Tensor grad_x = needs_x ? output(x, x.sizes()) : nothing(x, x.scalar_type());
  Tensor grad_weights = output(top_k_weights, top_k_weights.sizes());
  Tensor grad_gate_up_bias = gate_up_bias ? output(*gate_up_bias, gate_up_bias->sizes()) : nothing(x, ScalarType::Float);
  Tensor grad_down_bias = down_bias ? output(*down_bias, down_bias->sizes()) : nothing(x, ScalarType::Float);
  if (needs_x) in.grad_x = rows_out(grad_x);
  in.grad_top_k_weights = floats(grad_weights);
  in.grad_gate_up = {in.gate_up, nullptr, in.x.dtype};
  if (gate_up_bias) in.grad_gate_up_bias = floats(grad_gate_up_bias);
  if (down_bias) in.grad_down_bias = floats(grad_down_bias);
  pynlp::run<run_backward<Weights>>(in, [&] {
    std::vector<Place> fields = first_places(in, in.x);
    fields.insert(fields.begin(), {&in.grad.data, Place::input});
    gate_up.add_places(fields, in.gate_up.weight);
    fields.push_back({&in.gate_up_bias, Place::input, gate_up_bias.has_value()});
    down.add_places(fields, in.down.weight);
    fields.push_back({&in.down_bias, Place::input, down_bias.has_value()});
    add_routing(fields, in);
    fields.push_back({&in.pre_activation.data, Place::input});
    for (const void* field : {static_cast<const void*>(&in.grad_x.data), static_cast<const void*>(&in.grad_top_k_weights),
                              static_cast<const void*>(&in.grad_gate_up_bias),
                              static_cast<const void*>(&in.grad_down_bias)})
      fields.push_back({field, Place::output});
    return fields;
  });
  return {grad_x, grad_weights, grad_gate_up_bias, grad_down_bias};
}

std::tuple<Tensor, Tensor> moe_mlp_4bit_forward(
    Tensor x, Tensor top_k_weights, Tensor up_packed, Tensor up_absmax, MaybeTensor up_nested_absmax,
    MaybeTensor up_nested_offset, MaybeTensor up_nested_code, MaybeTensor gate_up_bias, Tensor down_packed,
    Tensor down_absmax, MaybeTensor down_nested_absmax, MaybeTensor down_nested_offset, MaybeTensor down_nested_code,
    MaybeTensor down_bias, Tensor permutation, Tensor places, Tensor offsets, int64_t inner, int64_t up_blocksize,
    int64_t down_blocksize, int64_t quant_type, int64_t activation, bool interleaved, bool keeps) {
  const FourBitTensors up{up_packed, up_absmax, up_nested_absmax, up_nested_offset, up_nested_code, up_blocksize};
  const FourBitTensors down{down_packed,        down_absmax,      down_nested_absmax,
                            down_nested_offset, down_nested_code, down_blocksize};
  return quantized_forward<pynlp::FourBitExperts>(x, top_k_weights, up, gate_up_bias, down, down_bias, permutation,
                                                  places, offsets, inner, quant_type, activation, interleaved, keeps);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_mlp_4bit_backward(
    Tensor grad, Tensor x, Tensor top_k_weights, Tensor up_packed, Tensor up_absmax, MaybeTensor up_nested_absmax,
    MaybeTensor up_nested_offset, MaybeTensor up_nested_code, MaybeTensor gate_up_bias, Tensor down_packed,
    Tensor down_absmax, MaybeTensor down_nested_absmax, MaybeTensor down_nested_offset, MaybeTensor down_nested_code,
    MaybeTensor down_bias, Tensor permutation, Tensor places, Tensor offsets, Tensor before, int64_t inner,
    int64_t up_blocksize, int64_t down_blocksize, int64_t quant_type, int64_t activation, bool interleaved,
    bool needs_x) {
  const FourBitTensors up{up_packed, up_absmax, up_nested_absmax, up_nested_offset, up_nested_code, up_blocksize};
  const FourBitTensors down{down_packed,        down_absmax,      down_nested_absmax,
                            down_nested_offset, down_nested_code, down_blocksize};
  return quantized_backward<pynlp::FourBitExperts>(grad, x, top_k_weights, up, gate_up_bias, down, down_bias,
                                                   permutation, places, offsets, before, inner, quant_type, activation,
                                                   interleaved, needs_x);
}

std::tuple<Tensor, Tensor> moe_mlp_int8_forward(
    Tensor x, Tensor top_k_weights, Tensor up_codes, Tensor up_scale, MaybeTensor up_zeros, MaybeTensor gate_up_bias,
    Tensor down_codes, Tensor down_scale, MaybeTensor down_zeros, MaybeTensor down_bias, Tensor permutation,
    Tensor places, Tensor offsets, int64_t inner, int64_t up_group, int64_t down_group, int64_t activation,
    bool interleaved, bool keeps) {
  const Int8Tensors up{up_codes, up_scale, up_zeros, up_group}, down{down_codes, down_scale, down_zeros, down_group};
  return quantized_forward<pynlp::Int8Experts>(x, top_k_weights, up, gate_up_bias, down, down_bias, permutation, places,
                                               offsets, inner, 0, activation, interleaved, keeps);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_mlp_int8_backward(
    Tensor grad, Tensor x, Tensor top_k_weights, Tensor up_codes, Tensor up_scale, MaybeTensor up_zeros,
    MaybeTensor gate_up_bias, Tensor down_codes, Tensor down_scale, MaybeTensor down_zeros, MaybeTensor down_bias,
    Tensor permutation, Tensor places, Tensor offsets, Tensor before, int64_t inner, int64_t up_group,
    int64_t down_group, int64_t activation, bool interleaved, bool needs_x) {
  const Int8Tensors up{up_codes, up_scale, up_zeros, up_group}, down{down_codes, down_scale, down_zeros, down_group};
  return quantized_backward<pynlp::Int8Experts>(grad, x, top_k_weights, up, gate_up_bias, down, down_bias, permutation,
                                                places, offsets, before, inner, 0, activation, interleaved, needs_x);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pynlp, CPU, m) {
  PYNLP_IMPL(m, moe_dispatch);
  PYNLP_IMPL(m, grouped_mm);
  PYNLP_IMPL(m, grouped_mm_weight_backward, 1);  // x
  PYNLP_IMPL(m, moe_mlp_forward);
  PYNLP_IMPL(m, moe_mlp_backward, 1);  // x
  PYNLP_IMPL(m, moe_mlp_4bit_forward);
  PYNLP_IMPL(m, moe_mlp_4bit_backward, 1);
  PYNLP_IMPL(m, moe_mlp_int8_forward);
  PYNLP_IMPL(m, moe_mlp_int8_backward, 1);
}
