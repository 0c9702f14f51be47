// Mixture of experts on the CPU: what the ops hand to the kernels. No torch here.
//
// A slot is one choice of a token: slot t * top_k + k. Slots in the order of their experts are rows; those without an
// expert come last and take part in nothing.
#pragma once

#include "../quantization/quantization.h"

namespace pynlp {

// The experts' numbers, as int32 or int64.
struct Choices {
  const void* data;
  bool is_wide;

  PYNLP_INLINE int64_t at(int64_t slot) const {
    return is_wide ? static_cast<const int64_t*>(data)[slot] : static_cast<const int32_t*>(data)[slot];
  }
};

struct Dispatch {
  int64_t slots, experts;
  Choices choices;
  int32_t *counts, *offsets;  // (experts,): each expert's rows, and where they end
  int32_t* permutation;       // (slots,): the slot of each row
  int32_t* places;            // (slots,): the row of each slot, or -1
};

// Which rows are whose.
struct Groups {
  int64_t experts;
  const int32_t* ends;  // (experts,)
  int64_t begin;        // the first expert that counts: 0, or more in a part of all

  PYNLP_INLINE int64_t first(int64_t expert) const { return expert ? ends[expert - 1] : 0; }
  PYNLP_INLINE int64_t count(int64_t expert) const { return ends[expert] - first(expert); }
  PYNLP_INLINE int64_t end() const { return experts ? ends[experts - 1] : 0; }  // of all rows
  PYNLP_INLINE int64_t rows() const { return end() - first(begin); }
};

// Numbers the lines or columns of an expert's matrix. With `ways` 2 kernels count a gate, what it gates, the next gate, and
// so on; at(i) is where number i lies in memory: likewise if they are interleaved, else with all gates first.
struct Order {
  int64_t units;
  int ways = 1;
  bool is_interleaved = false;

  PYNLP_INLINE int64_t count() const { return units * ways; }
  PYNLP_INLINE bool as_in_memory() const { return ways == 1 || is_interleaved; }
  PYNLP_INLINE int64_t at(int64_t i) const { return as_in_memory() ? i : i / 2 + (i % 2) * units; }
};

// A matrix for each expert: lines of values that follow each other.
struct Matrices {
  Order lines, columns;
  bool outputs_are_lines;  // whether lines are the outputs of x weight', else columns are

  const Order& outputs() const { return outputs_are_lines ? lines : columns; }
  const Order& inputs() const { return outputs_are_lines ? columns : lines; }
};

struct Experts : Matrices {
  const void* data;
  Dtype dtype;
  int64_t expert_stride, line_stride;
};

// Quantized ones: the lines of all experts are the rows of one weight.
template <class Weight>
struct QuantizedExperts : Matrices {
  Weight weight;
};

// The same of a result, contiguous.
struct ExpertsOut : Matrices {
  void* data;
  Dtype dtype;
};

// y = x weight' + bias, of each expert's rows; the rows behind them are 0.
struct GroupedForward {
  int64_t rows;
  Groups groups;
  RowsIn x;
  Experts weight;
  const float* bias;  // (experts, outputs), or null
  RowsOut y;
};

// The gradients of each expert's matrix and bias.
struct GroupedWeightGradient {
  Groups groups;
  RowsIn x, grad_y;
  ExpertsOut grad_weight;
  float* grad_bias;  // (experts, outputs), or null
};

enum class MoeActivation { gelu, relu, swiglu, swiglu_oai };

// Which experts tokens go to, and how much each counts.
struct Routing {
  int64_t tokens, top_k;
  Groups groups;
  const int32_t *permutation, *places;
  const float* top_k_weights;  // (slots,)
};

// What both passes of the experts' layers have: out = sum over k of weight * (down(activation(gate_up(x)))).
template <class Weights>
struct MoeMlp : Routing {
  MoeActivation activation;
  RowsIn x;
  Weights gate_up, down;
  const float *gate_up_bias, *down_bias;  // (experts, outputs), or null
};

template <class Weights>
struct MoeMlpForward : MoeMlp<Weights> {
  RowsOut out;             // (tokens, hidden)
  RowsOut pre_activation;  // (slots, outputs of gate_up), or no data
};

template <class Weights>
struct MoeMlpBackward : MoeMlp<Weights> {
  RowsIn grad;            // (tokens, hidden)
  RowsIn pre_activation;  // rows, as forward wrote them
  RowsOut grad_x;         // each of these has no data where it is not wanted; those of quantized weights never have
  float* grad_top_k_weights;
  ExpertsOut grad_gate_up, grad_down;
  float *grad_gate_up_bias, *grad_down_bias;
};

using FourBitExperts = QuantizedExperts<FourBit>;
using Int8Experts = QuantizedExperts<Int8>;

void moe_dispatch(const Dispatch& problem);
void grouped_mm(const GroupedForward& problem);
void grouped_mm_weight_backward(const GroupedWeightGradient& problem);
void moe_mlp_forward(const MoeMlpForward<Experts>& problem);
void moe_mlp_forward(const MoeMlpForward<FourBitExperts>& problem);
void moe_mlp_forward(const MoeMlpForward<Int8Experts>& problem);
void moe_mlp_backward(const MoeMlpBackward<Experts>& problem);
void moe_mlp_backward(const MoeMlpBackward<FourBitExperts>& problem);
void moe_mlp_backward(const MoeMlpBackward<Int8Experts>& problem);

}  // namespace pynlp
