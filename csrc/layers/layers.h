// Norms, activations, linear layers and the loss on the CPU: what the ops hand to the kernels. No torch here.
#pragma once

#include "../common/rows.h"

namespace pynlp {

// Which values are dropped, see dropout.h.
struct RowDropout {
  int32_t dropped;  // values whose number is below this; 0 = none
  uint64_t seed;
};

// added = residual + dropout(x), which is `new` in Python; y = norm(added).
struct NormForward {
  int64_t rows, columns;
  RowsIn x, residual;
  const float *weight, *bias;  // (columns,); bias may be null
  bool centred;                // layer norm; else rms norm
  float eps;
  RowDropout dropout;
  RowsOut y, added;    // added: no data where it is x itself
  float *mean, *rstd;  // (rows,), or null: not wanted; the mean where centred
};

struct NormBackward {
  int64_t rows, columns;
  RowsIn grad_y, grad_added, added;  // grad_added may have no data
  const float *weight, *mean, *rstd;
  bool centred;
  RowDropout dropout;
  RowsOut grad_residual, grad_x;   // grad_x: no data where it is grad_residual
  float *grad_weight, *grad_bias;  // (columns,); grad_bias may be null
};

enum class Activation { gelu, relu, swiglu };

// y = dropout(gelu(x)), dropout(relu(x)) or dropout(silu(x) * up).
struct ActivationForward {
  int64_t rows, columns;
  Activation kind;
  bool is_packed;  // x has up, too, behind the gate
  RowsIn x, up;
  RowDropout dropout;
  RowsOut y;
};

struct ActivationBackward {
  int64_t rows, columns;
  Activation kind;
  bool is_packed;  // as above; grad_x has grad_up, too
  RowsIn grad, x, up;
  RowDropout dropout;
  RowsOut grad_x, grad_up;
  int64_t grad_stride;  // of their rows
};

// losses = cross-entropy of softcap(x weight' + bias), smoothed, + z_loss lse^2; with row_scale the gradients of its
// sum weighted by that.
struct LinearCrossEntropy {
  int64_t tokens, dim, vocabulary;
  RowsIn x, weight;
  const float* bias;       // (vocabulary,) or null
  const int64_t* targets;  // (tokens,): of the vocabulary, or ignore_index
  int64_t ignore_index;
  float smoothing, softcap, z_loss;
  const float* row_scale;       // (tokens,) or null: no gradients
  float* losses;                // (tokens,)
  RowsOut grad_x, grad_weight;  // no data: not wanted
  float* grad_bias;             // or null
};

// y = x weight' + bias, in fp32.
struct LinearForward {
  int64_t rows, columns, outputs;  // of x; of x and the weight; rows of the weight
  RowsIn x, weight;
  const float* bias;  // (outputs,) or null
  float* y;           // (rows, outputs)
};

// Where each row has its largest value, the first of equal ones, and the logarithm of its sum of exponentials.
struct ArgmaxAndLse {
  int64_t rows, columns;
  RowsIn x;         // fp32
  int64_t* argmax;  // (rows,)
  float* lse;       // (rows,)
};

void linear_cross_entropy(const LinearCrossEntropy& problem);
void linear_forward(const LinearForward& problem);
void argmax_and_lse(const ArgmaxAndLse& problem);
void norm_forward(const NormForward& problem);
void norm_backward(const NormBackward& problem);
void activation_forward(const ActivationForward& problem);
void activation_backward(const ActivationBackward& problem);

}  // namespace pynlp
