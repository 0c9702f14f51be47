// The weights of chosen queries, for plots and checks: scores of all keys a row, then softmax over the row.
#pragma once

#include "../parallel.h"
#include "scores.h"

namespace pynlp {
namespace {

class Weights {
 public:
  explicit Weights(const AttentionWeights& in) : in_(in), scorer_(&Rows::read, in), group_(in.heads / in.kv_heads) {
    Arena sizes{nullptr};
    Scratch(*this, sizes);
    scratch_bytes_ = sizes.used;
  }

  void run() const {
    run_tasks(
        in_.batch * in_.row_count * in_.kv_heads,
        [](void* w, int64_t task) { static_cast<const Weights*>(w)->run_task(task); }, const_cast<Weights*>(this));
  }

 private:
  struct Scratch {
    float *query, *scores, *line, *keys;
    const char **key_rows, **room_rows;
    Scratch(const Weights& w, Arena& arena) {
      query = arena.take<float>(w.scorer_.size);
      scores = arena.take<float>(SCORES);
      line = arena.take<float>(SCORES);
      keys = arena.take<float>(BLOCK_KEYS * w.scorer_.size);
      key_rows = arena.take<const char*>(BLOCK_KEYS);
      room_rows = arena.take<const char*>(BLOCK_KEYS);
    }
  };

  // One query in the heads that share a key/value head.
  void run_task(int64_t task) const {
    const int64_t kv_head = task % in_.kv_heads, number = task / in_.kv_heads % in_.row_count;
    const Sequence sequence = in_.sequence(task / in_.kv_heads / in_.row_count);
    const int64_t i = in_.rows ? in_.rows[number] : number;
    Arena arena{static_cast<char*>(thread_scratch(scratch_bytes_))};
    const Scratch s(*this, arena);
    const Visibility visible(in_, sequence);
    const Range keys = visible.of_any(i, i + 1);
    const HeadRows k(&Rows::read, keys_of, in_.k, in_, sequence);
    for (int64_t head = kv_head * group_; head < (kv_head + 1) * group_; ++head) {
      float* row = in_.weights + ((sequence.number * in_.heads + head) * in_.row_count + number) * sequence.keys;
      memset(row, 0, sequence.keys * sizeof(float));
      scorer_.read_query(sequence, head, i, s.query);
      for (int64_t first = keys.first; first < keys.last; first += BLOCK_KEYS) {
        const Range block{first, smaller(first + BLOCK_KEYS, keys.last)};
        k.locate(block, s.key_rows);
        const BlockRows rows = k.of(kv_head, block, s.key_rows, s.key_rows, s.key_rows, s.keys, s.room_rows);
        scorer_.multiply<1>(rows, block.last - first, s.query, s.scores);
        scorer_.scale(sequence, visible, i, head, block, s.scores, s.line);
        memcpy(row + first, s.scores, (block.last - first) * sizeof(float));
      }
      if (!keys.empty()) normalise(sequence, head, i, row + keys.first, keys.last - keys.first);
    }
  }

  // Scores in log2 units -> weights.
  void normalise(const Sequence& sequence, int64_t head, int64_t i, float* row, int64_t count) const {
    float pivot = in_.sinks ? in_.sinks[head] * LOG2_E : -__builtin_inff();
    if (in_.lse) {
      exponentiate(row, count, in_.lse[in_.statistic(sequence, head, i)] * LOG2_E);
    } else {
      const float sink = pivot;
      for (int64_t n = 0; n < count; ++n) pivot = row[n] > pivot ? row[n] : pivot;
      if (pivot == -__builtin_inff()) pivot = 0;
      exponentiate(row, count, pivot);
      double sum = __builtin_exp2f(sink - pivot);
      for (int64_t n = 0; n < count; ++n) sum += row[n];
      const float factor = sum == 0 ? 0.0f : static_cast<float>(1 / sum);
      for (int64_t n = 0; n < count; ++n) row[n] *= factor;
    }
  }

  // row[n] = 2^(row[n] - pivot).
  static void exponentiate(float* row, int64_t count, float pivot) {
    int64_t n = 0;
    for (; n + LANES <= count; n += LANES) store(row + n, exp2_of<6>(load(row + n) - broadcast(pivot)));
    float last[LANES] = {};
    memcpy(last, row + n, (count - n) * sizeof(float));
    store(last, exp2_of<6>(load(last) - broadcast(pivot)));
    memcpy(row + n, last, (count - n) * sizeof(float));
  }

  const AttentionWeights& in_;
  Scorer scorer_;
  int64_t group_;
  size_t scratch_bytes_;
};

}  // namespace
}  // namespace pynlp
