// Sums of each token's rows, in the order of its choices: the same bits for any threads, and nothing is added by two.
#pragma once

#include "../simd/memory.h"
#include "../simd/rows.h"
#include "moe.h"

namespace pynlp {
namespace {

class Combine {
 public:
  // out[token] = sum over k of weights[slot] * results[place of slot], weights being 1 where there are none.
  Combine(const Routing& in, const float* results, int64_t columns, const float* weights, const RowsOut& out)
      : in_(in), results_(results), columns_(columns), weights_(weights), out_(out) {}

  void run() const {
    const int64_t tasks = (in_.tokens + TOKENS - 1) / TOKENS;
    run_tasks<&Combine::sum>(tasks, (in_.tokens * in_.top_k + in_.tokens) * columns_, this);
  }

 private:
  static constexpr int64_t TOKENS = 16;

  void sum(int64_t task) const {
    float* room = static_cast<float*>(thread_scratch((columns_ + LANES) * sizeof(float)));
    for (int64_t t = task * TOKENS; t < smaller(in_.tokens, (task + 1) * TOKENS); ++t) {
      bool is_first = true;
      for (int64_t slot = t * in_.top_k; slot < (t + 1) * in_.top_k; ++slot) {
        if (in_.places[slot] < 0) continue;
        const float* row = results_ + in_.places[slot] * columns_;
        const float weight = weights_ ? weights_[slot] : 1.0f;
        if (is_first)
          for (int64_t d = 0; d < columns_; ++d) room[d] = weight * row[d];
        else
          for (int64_t d = 0; d < columns_; ++d) room[d] += weight * row[d];
        is_first = false;
      }
      if (is_first) memset(room, 0, columns_ * sizeof(float));
      write_row(out_.dtype, room, columns_, out_.data, t * columns_);
    }
  }

  const Routing& in_;
  const float* results_;
  const int64_t columns_;
  const float* weights_;
  const RowsOut out_;
};

}  // namespace
}  // namespace pynlp
