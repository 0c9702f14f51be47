// Backward of the biases: gradients of ALiBi's slopes and of the T5 table.
//
// Both depend on query - key alone. So a task sums dS along the diagonals, into a line with a value for each distance,
// and the line into a sum for each bucket. At the end the few sums of all tasks are added, in a fixed order.
#pragma once

#include "units.h"

namespace pynlp {
namespace {

// line[query - key] += the sum of that diagonal of the rows (keys) x columns (queries) tile ds. Along a chunk of
// diagonals one row's values lie one place further than the row's before; the zeros between rows, LANES of them at
// least, stand for what lies outside of the tile.
inline void sum_diagonals(const float* ds, int64_t rows, int64_t columns, int64_t pitch, float* line) {
  for (int64_t c = -round_up(rows - 1, LANES); c < columns; c += LANES) {
    Float sums[4] = {};
    int64_t r = larger(0, -c - (LANES - 1));
    const int64_t end = smaller(rows, columns - c);
    for (; r + 4 <= end; r += 4)
      for (int64_t n = 0; n < 4; ++n) sums[n] += load(ds + (r + n) * (pitch + 1) + c);
    for (; r < end; ++r) sums[0] += load(ds + r * (pitch + 1) + c);
    store(line + c, load(line + c) + ((sums[0] + sums[1]) + (sums[2] + sums[3])));
  }
}

class BiasGradients {
 public:
  BiasGradients(const AttentionBackward& in, const Units& units)
      : in_(in),
        units_(units),
        group_(in.kv_heads ? in.heads / in.kv_heads : 0),
        partials_(needed() ? units.blocks() * group_ * (in.num_buckets + 1) * sizeof(double) : 0) {}

  bool needed() const { return in_.grad_slopes || in_.grad_table; }

  // Sets one task's sums: one for each bucket, then that of the slope. `line` holds the sums of dS at the distances
  // first .. first + count - 1.
  void add_line(int64_t block, int64_t member, const float* line, int64_t count, int64_t first) const {
    double* sums = partial(block, member);
    for (int64_t n = 0; n <= in_.num_buckets; ++n) sums[n] = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t distance = first + i;
      const double value = line[i];
      if (in_.grad_slopes) sums[in_.num_buckets] -= static_cast<double>(distance < 0 ? -distance : distance) * value;
      if (in_.grad_table) {
        const int64_t clamped = larger(-in_.max_distance, smaller(in_.max_distance, -distance)) + in_.max_distance;
        sums[in_.relative_buckets[clamped]] += value;
      }
    }
  }

  // Adds the sums of all tasks in a fixed order: the bits do not depend on the threads.
  void write() const {
    const auto sum = [&](int64_t batch, int64_t head, int64_t entry) {
      const Unit unit = units_.of(batch, head / group_);
      double total = 0;
      for (int64_t n = 0; n < unit.blocks; ++n) total += partial(unit.first_block + n, head % group_)[entry];
      return total;
    };
    for (int64_t head = 0; head < in_.heads; ++head) {
      double slope = 0;
      for (int64_t batch = 0; in_.grad_slopes && batch < in_.batch; ++batch) {
        slope = sum(batch, head, in_.num_buckets) + (in_.alibi_batch_stride ? 0 : slope);
        if (in_.alibi_batch_stride) in_.grad_slopes[batch * in_.heads + head] = static_cast<float>(slope);
      }
      if (in_.grad_slopes && !in_.alibi_batch_stride) in_.grad_slopes[head] = static_cast<float>(slope);
      for (int64_t bucket = 0; in_.grad_table && bucket < in_.num_buckets; ++bucket) {
        double total = 0;
        for (int64_t batch = 0; batch < in_.batch; ++batch) total += sum(batch, head, bucket);
        in_.grad_table[bucket * in_.heads + head] = static_cast<float>(total);
      }
    }
  }

 private:
  double* partial(int64_t block, int64_t member) const {
    return static_cast<double*>(partials_.data) + (block * group_ + member) * (in_.num_buckets + 1);
  }

  const AttentionBackward& in_;
  const Units& units_;
  int64_t group_;
  Buffer partials_;
};

}  // namespace
}  // namespace pynlp
