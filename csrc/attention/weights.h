// The weights of chosen queries, for plots and checks: scores of all keys a row, then softmax over the row.
#pragma once

#include "../common/parallel.h"
#include "../simd/memory.h"
#include "scores.h"

namespace pynlp {
namespace {

class Weights {
 public:
  explicit Weights(const AttentionWeights& in)
      : in_(in),
        scorer_(&Rows::read, in),
        group_(in.kv_heads ? in.heads / in.kv_heads : 0),
        pieces_((in.row_count * group_ + AT_ONCE - 1) / AT_ONCE) {}

  void run() const {
    run_tasks<&Weights::run_task>(in_.batch * in_.kv_heads * pieces_, operations(in_), this);
  }

 private:
  static constexpr int AT_ONCE = 4;  // queries that a key is read for

  struct Scratch {
    float *queries, *scores, *line, *keys;
    const char **key_rows, **room_rows;
    Scratch(const Weights& w, Arena& arena) {
      queries = arena.take<float>(AT_ONCE * w.scorer_.size);
      scores = arena.take<float>(AT_ONCE * SCORES);
      line = arena.take<float>(SCORES);
      keys = arena.take<float>(BLOCK_KEYS * w.scorer_.size);
      key_rows = arena.take<const char*>(TILE_KEYS);
      room_rows = arena.take<const char*>(BLOCK_KEYS);
    }
  };

  // A row of the result: query i of a head, and the keys that it sees.
  struct Row {
    int64_t i, head;
    Range keys;
    float* weights;
  };

  // Computes a few rows of one key/value head, which all read the same keys.
  void run_task(int64_t task) const {
    const int64_t piece = task % pieces_, kv_head = task / pieces_ % in_.kv_heads;
    const Sequence sequence = in_.sequence(task / pieces_ / in_.kv_heads);
    const Scratch s = take_scratch<Scratch>(*this);
    const Visibility visible(in_, sequence);
    Row rows[AT_ONCE];
    const int64_t first_row = piece * AT_ONCE, count = smaller(AT_ONCE, in_.row_count * group_ - first_row);
    Range keys{sequence.keys, 0};
    for (int64_t n = 0; n < count; ++n) {
      const int64_t number = (first_row + n) / group_, head = kv_head * group_ + (first_row + n) % group_;
      const int64_t i = in_.rows ? in_.rows[number] : number;
      const Range own = visible.of_any(i, i + 1);
      float* weights = in_.weights + ((sequence.number * in_.heads + head) * in_.row_count + number) * sequence.keys;
      rows[n] = {i, head, own, weights};
      memset(weights, 0, sequence.keys * sizeof(float));
      if (own.empty()) continue;
      keys = {smaller(keys.first, own.first), larger(keys.last, own.last)};
      scorer_.read_query(sequence, head, i, s.queries + n * scorer_.size);
    }
    const HeadRows k(&Rows::read, keys_of, in_.k, in_, sequence);
    for (int64_t start = keys.first; start < keys.last; start += TILE_KEYS) {
      const Range tile{start, smaller(start + TILE_KEYS, keys.last)};
      k.locate(tile, s.key_rows);
      for (int64_t first = start; first < tile.last; first += BLOCK_KEYS) {
        const Range block{first, smaller(first + BLOCK_KEYS, tile.last)};
        const char** located = s.key_rows + (first - start);
        const BlockRows some = k.of(kv_head, block, located, located, located, s.keys, s.room_rows);
        if (count == AT_ONCE) {
          scorer_.multiply<AT_ONCE>(some, block.last - first, s.queries, s.scores + (first - start));
        } else {
          for (int64_t n = 0; n < count; ++n)
            scorer_.multiply<1>(some, block.last - first, s.queries + n * scorer_.size,
                                s.scores + n * SCORES + (first - start));
        }
      }
      for (int64_t n = 0; n < count; ++n) {
        const Range own{larger(start, rows[n].keys.first), smaller(tile.last, rows[n].keys.last)};
        if (own.empty()) continue;
        float* scores = s.scores + n * SCORES + (own.first - start);
        scorer_.scale(sequence, visible, rows[n].i, rows[n].head, own, scores, s.line);
        memcpy(rows[n].weights + own.first, scores, (own.last - own.first) * sizeof(float));
      }
    }
    for (int64_t n = 0; n < count; ++n) normalise(sequence, rows[n]);
  }

  // Scores -> weights.
  void normalise(const Sequence& sequence, const Row& of) const {
    if (of.keys.empty()) return;
    float* row = of.weights + of.keys.first;
    const int64_t count = of.keys.last - of.keys.first;
    float pivot = in_.sinks ? in_.sinks[of.head] : -__builtin_inff();
    if (in_.lse) {
      exponentiate(row, count, in_.lse[in_.statistic(sequence, of.head, of.i)]);
    } else {
      const float sink = pivot;
      for (int64_t n = 0; n < count; ++n) pivot = row[n] > pivot ? row[n] : pivot;
      if (pivot == -__builtin_inff()) pivot = 0;
      exponentiate(row, count, pivot);
      double sum = __builtin_expf(sink - pivot);
      for (int64_t n = 0; n < count; ++n) sum += row[n];
      const float factor = sum == 0 ? 0.0f : static_cast<float>(1 / sum);
      for (int64_t n = 0; n < count; ++n) row[n] *= factor;
    }
  }

  // row[n] = exp(row[n] - pivot).
  static void exponentiate(float* row, int64_t count, float pivot) {
    int64_t n = 0;
    for (; n + LANES <= count; n += LANES) store(row + n, exp_of<6>(load(row + n) - broadcast(pivot)));
    float last[LANES] = {};
    memcpy(last, row + n, (count - n) * sizeof(float));
    store(last, exp_of<6>(load(last) - broadcast(pivot)));
    memcpy(row + n, last, (count - n) * sizeof(float));
  }

  const AttentionWeights& in_;
  Scorer scorer_;
  int64_t group_, pieces_;
};

}  // namespace
}  // namespace pynlp
