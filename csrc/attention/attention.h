// Fused attention on the CPU: what the op hands to the kernels. No torch here.
#pragma once

#include "../common/dtype.h"
#include "../common/inline.h"

namespace pynlp {

constexpr int64_t LARGEST_CACHED_HEAD = 1024;  // channels of a head in a cache; elsewhere 256

// A (batch, seqlen, heads, head_dim) tensor whose last dimension is contiguous; strides count elements.
struct View {
  const void* data;
  int64_t batch_stride, row_stride, head_stride;
};

// A batch entry's rows in the tensors. Packed sequences all lie in the tensors' entry 0.
struct Sequence {
  int64_t number, entry;
  int64_t first_query, queries;
  int64_t first_key, keys;
};

struct AttentionInputs {
  Dtype dtype;
  int64_t batch, heads, kv_heads, head_dim, head_dim_v;
  int64_t rows_q, rows_k;  // of an entry of the tensors: a sequence's, or all when sequences are packed
  View q, k, v;
  float softmax_scale;
  int64_t window_left, window_right;  // -1 = no limit
  float softcap;                      // 0 = none
  const int32_t* key_lengths;         // (batch,) or null: keys from there on are masked
  const int32_t* cu_seqlens_q;        // (batch + 1,) or null: where packed sequences start and end
  const int32_t* cu_seqlens_k;
  const float* sinks;          // (heads,) or null
  const float* alibi_slopes;   // (heads,) or (batch, heads), or null
  int64_t alibi_batch_stride;  // 0 or heads
  const float* relative_bias;  // (num_buckets, heads) or null
  int64_t num_buckets;
  const int32_t* relative_buckets;  // (2 * max_distance + 1,): bucket of key - query
  int64_t max_distance;
  const float* rotary_cos;  // (positions, rotary_half) or null
  const float* rotary_sin;
  int64_t rotary_half;
  const int32_t* rotary_positions;  // (entries, rows_k) or null
  int64_t rotary_offset;
  bool rotary_interleaved;
  // Decoding: k and v are a cache, its keys turned already; entry b has cache_lengths[b] + appended keys.
  const int32_t* cache_lengths;  // (batch,) or null
  int64_t appended;
  const int32_t* block_table;    // (batch, table_pages) or null: the pages of k and v that hold an entry's keys
  int64_t table_pages, page_size;
  int32_t dropped;  // dropout drops weights whose 16-bit random number is below this; 0 = none
  uint64_t dropout_seed;

  PYNLP_INLINE bool biased() const { return alibi_slopes || relative_bias; }
  PYNLP_INLINE float kept_share() const { return 1.0f - static_cast<float>(dropped) / 65536.0f; }
  PYNLP_INLINE Sequence sequence(int64_t b) const {
    if (!cu_seqlens_q) return {b, b, 0, rows_q, 0, cache_lengths ? cache_lengths[b] + appended : rows_k};
    return {b,
            0,
            cu_seqlens_q[b],
            cu_seqlens_q[b + 1] - cu_seqlens_q[b],
            cu_seqlens_k[b],
            cu_seqlens_k[b + 1] - cu_seqlens_k[b]};
  }
  // Index of a row of one head in statistics (entries, heads, rows_q), and of its first channel in (entries, rows_q,
  // heads, size).
  PYNLP_INLINE int64_t statistic(const Sequence& s, int64_t head, int64_t query) const {
    return (s.entry * heads + head) * rows_q + s.first_query + query;
  }
  PYNLP_INLINE int64_t query_row(const Sequence& s, int64_t head, int64_t query, int64_t size) const {
    return ((s.entry * rows_q + s.first_query + query) * heads + head) * size;
  }
  PYNLP_INLINE int64_t key_row(const Sequence& s, int64_t kv_head, int64_t key, int64_t size) const {
    return ((s.entry * rows_k + s.first_key + key) * kv_heads + kv_head) * size;
  }
};

struct AttentionForward : AttentionInputs {
  int64_t num_splits;  // parts of the keys where there are few queries; 0 = chosen by their number
  void* out;           // (entries, rows_q, heads, head_dim_v), contiguous
  float* lse;          // (entries, heads, rows_q), or null: not wanted
};

struct AttentionWeights : AttentionInputs {
  int64_t row_count;
  const int32_t* rows;  // (row_count,) queries, or null: all
  const float* lse;     // (batch, heads, rows_q) or null: computed
  float* weights;       // (batch, heads, row_count, rows_k)
};

// New rows of k and v, and the cache that they are appended to.
struct AttentionAppend : AttentionInputs {
  View new_k, new_v;
  void *k_cache, *v_cache;  // what k and v point into
};

struct AttentionBackward : AttentionInputs {
  int64_t entries;  // of the tensors
  View grad_out, out;
  const float* lse;                // (entries, heads, rows_q)
  const float* grad_lse;           // as lse, or null
  void *grad_q, *grad_k, *grad_v;  // contiguous, in the inputs' dtype
  float* grad_slopes;              // as alibi_slopes, or null if not needed
  float* grad_table;               // (num_buckets, heads), or null if not needed
  float* grad_sinks;               // (heads,), or null if not needed
};

void attention_append(const AttentionAppend& problem);
void attention_forward(const AttentionForward& problem);
void attention_backward(const AttentionBackward& problem);
void attention_weights(const AttentionWeights& problem);

}  // namespace pynlp
