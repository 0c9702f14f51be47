// Fused attention on the CPU: what the op hands to the kernels. No torch here.
#pragma once

#include <cstdint>

namespace pynlp {

enum class Dtype { float32, bfloat16, float16 };

// A (batch, seqlen, heads, head_dim) tensor whose last dimension is contiguous; strides count elements.
struct View {
  const void* data;
  int64_t batch_stride, row_stride, head_stride;
};

struct AttentionInputs {
  Dtype dtype;
  int64_t batch, seqlen_q, seqlen_k, heads, kv_heads, head_dim;
  View q, k, v;
  float softmax_scale;
  int64_t window_left, window_right;  // -1 = no limit
  float softcap;                      // 0 = none
  const int32_t* key_lengths;         // (batch,) or null
  const float* alibi_slopes;          // (heads,) or (batch, heads), or null
  int64_t alibi_batch_stride;         // 0 or heads
  const float* relative_bias;         // (num_buckets, heads) or null
  int64_t num_buckets;
  const int32_t* relative_buckets;  // (2 * max_distance + 1,): bucket of key - query
  int64_t max_distance;
  const float* rotary_cos;  // (positions, rotary_half) or null
  const float* rotary_sin;
  int64_t rotary_half;
  const int32_t* rotary_positions;  // (batch, seqlen_k) or null
  int64_t rotary_offset;
  bool rotary_interleaved;

  bool biased() const { return alibi_slopes || relative_bias; }
};

struct AttentionForward : AttentionInputs {
  void* out;   // (batch, seqlen_q, heads, head_dim), contiguous
  float* lse;  // (batch, heads, seqlen_q)
};

struct AttentionBackward : AttentionInputs {
  View grad_out, out;
  const float* lse;                // (batch, heads, seqlen_q)
  const float* grad_lse;           // (batch, heads, seqlen_q) or null
  void *grad_q, *grad_k, *grad_v;  // contiguous, in the inputs' dtype
  float* grad_slopes;              // as alibi_slopes, or null if not needed
  float* grad_table;               // (num_buckets, heads), or null if not needed
};

void attention_forward(const AttentionForward& problem);
void attention_backward(const AttentionBackward& problem);

}  // namespace pynlp
