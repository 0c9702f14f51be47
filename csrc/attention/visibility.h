// Which keys a query sees, and the bias of a distance.
#pragma once

#include "../simd/math.h"
#include "attention.h"

namespace pynlp {
namespace {

// The longest sequence's queries or keys.
inline int64_t most(const AttentionInputs& in, int64_t Sequence::* rows) {
  int64_t most = 0;
  for (int64_t b = 0; b < in.batch; ++b) most = larger(most, in.sequence(b).*rows);
  return most;
}

// The multiply-adds of the scores and sums of all heads, exponentials as a few more; masks aside.
inline int64_t operations(const AttentionInputs& in) {
  int64_t scores = 0;
  for (int64_t b = 0; b < in.batch; ++b) scores += in.sequence(b).queries * in.sequence(b).keys;
  return scores * in.heads * (in.head_dim + in.head_dim_v + 16);
}

// Whether decode.h takes a sequence, which reads the keys once for all queries, or forward.h, where each block of
// queries reads them. decode.h works at once on heads that share keys: the more do, the longer it is faster.
inline bool few_queries(const AttentionInputs& in, const Sequence& sequence) {
  if (in.head_dim > 256 || in.head_dim_v > 256) return true;
  return sequence.queries <= (in.heads >= 4 * in.kv_heads ? 8 : 4) && !in.dropped;
}

// Keys or queries first .. last - 1.
struct Range {
  int64_t first, last;
  bool empty() const { return first >= last; }
};

// Which keys the queries of one batch entry see. Query i stands at key i + offset.
struct Visibility {
  int64_t offset, left, right, keys;

  Visibility(const AttentionInputs& in, const Sequence& sequence)
      : offset(sequence.keys - sequence.queries),
        left(in.window_left < 0 ? INT32_MAX : in.window_left),
        right(in.window_right < 0 ? INT32_MAX : in.window_right),
        keys(in.key_lengths ? in.key_lengths[sequence.number] : sequence.keys) {}

  // Keys that at least one, or every one, of the queries first .. last - 1 sees.
  Range of_any(int64_t first, int64_t last) const {
    return {larger(0, first + offset - left), smaller(keys, last + offset + right)};
  }
  Range of_all(int64_t first, int64_t last) const {
    return {larger(0, last - 1 + offset - left), smaller(keys, first + offset + right + 1)};
  }
  bool sees(int64_t query, int64_t key) const {
    const Range range = of_any(query, query + 1);
    return key >= range.first && key < range.last;
  }
};

// For each lane, the first and the last key it sees, counted from `origin`.
struct LaneLimits {
  Int first, last;
  LaneLimits(const Visibility& visible, int64_t query, int64_t origin) {
    for (int i = 0; i < LANES; ++i) {
      const Range range = visible.of_any(query + i, query + i + 1);
      first[i] = static_cast<int32_t>(range.first - origin);
      last[i] = static_cast<int32_t>(larger(range.last, 0) - 1 - origin);
    }
  }
  Int see(int32_t key) const { return (broadcast(key) >= first) & (broadcast(key) <= last); }
};

// The bias of each distance query - key for distances first .. first + count - 1.
inline void bias_line(const AttentionInputs& in, int64_t batch, int64_t head, int64_t first, int64_t count,
                      float* line) {
  const float slope = in.alibi_slopes ? in.alibi_slopes[batch * in.alibi_batch_stride + head] : 0.0f;
  const int64_t farthest = in.max_distance;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t distance = first + i;
    float bias = -slope * static_cast<float>(distance < 0 ? -distance : distance);
    if (in.relative_bias) {
      const int64_t clamped = larger(-farthest, smaller(farthest, -distance)) + farthest;
      bias += in.relative_bias[in.relative_buckets[clamped] * in.heads + head];
    }
    line[i] = bias;
  }
}

}  // namespace
}  // namespace pynlp
