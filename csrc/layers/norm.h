// Layer norm and RMS norm of residual + dropout(x): a few rows at a time, in the first-level cache.
#pragma once

#include "../common/parallel.h"
#include "../simd/math.h"
#include "../simd/memory.h"
#include "../simd/rows.h"
#include "dropout.h"

namespace pynlp {
namespace {

// Rows are summed in pieces of so many values, and then the pieces, which loses fewer digits.
constexpr int64_t SUMMED = 16 * LANES;
constexpr float MAX_FLOAT = 3.4028234663852886e38f;

// How many of `rows` rows a task takes. A task sums the weights' gradients over its rows: so that their bits do not
// depend on the threads, it depends on the number of rows alone.
constexpr int64_t LEAST_ROWS = 16, MOST_TASKS = 64;
inline int64_t task_rows(int64_t rows) { return larger(LEAST_ROWS, (rows + MOST_TASKS - 1) / MOST_TASKS); }

template <int COUNT>
struct Count {
  static constexpr int count = COUNT;
};

// work(first, Count<how many>) for the rows from `first` to `last`, MOST at a time or one: side by side, the sums of
// one row do not wait for those of another. A row's result does not depend on its neighbours.
template <int MOST, class Work>
PYNLP_INLINE void in_groups(int64_t first, int64_t last, const Work& work) {
  for (; first + MOST <= last; first += MOST) work(first, Count<MOST>{});
  for (; first < last; ++first) work(first, Count<1>{});
}

// work(r) for each of COUNT rows, unrolled: arrays of sums by r are registers.
template <int COUNT, class Work>
PYNLP_INLINE void each(const Work& work) {
#pragma GCC unroll 4
  for (int r = 0; r < COUNT; ++r) work(r);
}

// work(d, whether a cache line of fp32 begins there) for each vector d of a row.
template <class Work>
PYNLP_INLINE void over_row(int64_t size, const Work& work) {
  constexpr int LINE = 16 / LANES;
  int64_t d = 0;
  for (; d + 4 * LANES <= size; d += 4 * LANES)
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) work(d + n * LANES, n % LINE == 0);
  for (; d < size; d += LANES) work(d, true);
}

// Prefetches a later row, a line at a time: the processor foresees no row that is read beside others.
struct Ahead {
  const char* row;
  int64_t bytes;  // of a value
  Ahead(const RowsIn& in, int64_t i) : row(in.row(i)), bytes(bytes_of(in.dtype)) {}
  void prefetch(int64_t d) const { __builtin_prefetch(row + d * bytes); }
};

class Norm {
 public:
  explicit Norm(const NormForward& in) : in_(in), size_(padded(in.columns)), task_rows_(task_rows(in.rows)) {}

  void run() const {
    const int64_t tasks = (in_.rows + task_rows_ - 1) / task_rows_;
    run_tasks<&Norm::run_task>(tasks, 8 * in_.rows * in_.columns, this);
  }

 private:
  static constexpr int MOST = 4;  // rows side by side

  struct Scratch {
    float *values, *other, *weight, *bias;
    uint16_t* numbers;
    Scratch(const Norm& n, Arena& arena) {
      values = arena.take<float>(MOST * n.size_);
      other = arena.take<float>(n.size_);
      weight = arena.take<float>(n.size_);
      bias = arena.take<float>(n.size_);
      numbers = arena.take<uint16_t>(Keeps::size(n.in_.columns));
    }
  };

  void run_task(int64_t task) const {
    const Scratch s = take_scratch<Scratch>(*this);
    const float* weight = widened({in_.weight, 0, Dtype::float32}, 0, in_.columns, s.weight);
    const float* bias = in_.bias ? widened({in_.bias, 0, Dtype::float32}, 0, in_.columns, s.bias) : s.bias;
    if (!in_.bias) memset(s.bias, 0, size_ * sizeof(float));
    Keeps keeps(in_.dropout, s.numbers);
    in_groups<MOST>(task * task_rows_, smaller(in_.rows, (task + 1) * task_rows_), [&](int64_t first, auto rows) {
      constexpr int ROWS = decltype(rows)::count;
      const float* values[ROWS];
      each<ROWS>([&](int r) { values[r] = added(first + r, keeps, s, s.values + r * size_); });
      float means[ROWS], variances[ROWS];
      statistics(values, s.values, means, variances);
      each<ROWS>([&](int r) {
        const int64_t i = first + r;
        const float scale =
            variances[r] <= MAX_FLOAT ? 1.0f : scale_down(values[r], s.values + r * size_, means[r], variances[r]);
        const float deviation = 1.0f / __builtin_sqrtf(variances[r] + in_.eps * scale * scale);
        if (in_.mean) in_.mean[i] = means[r] / scale;
        if (in_.rstd) in_.rstd[i] = deviation * scale;
        const float* row = values[r];
        const Float mean = broadcast(means[r]), rstd = broadcast(deviation);
        float* y = result_row(in_.y, i, in_.columns, in_.columns, s.other);
        const Ahead next(in_.x, i + ROWS);
        over_row(size_, [&](int64_t d, bool line) {
          if (line) next.prefetch(d);
          store(y + d, (load(row + d) - mean) * rstd * load(weight + d) + load(bias + d));
        });
        finish(in_.y, i, in_.columns, in_.columns, y);
      });
    });
  }

  // The moments about a guess also tell how far it is from the mean; where that leaves few digits of the variance, they
  // are taken again about the mean. `padding` is where the rows are that had to be widened, one after the other.
  template <int ROWS>
  PYNLP_INLINE void statistics(const float* const (&values)[ROWS], float* padding, float (&means)[ROWS],
                               float (&variances)[ROWS]) const {
    each<ROWS>([&](int r) { means[r] = in_.centred ? lane_sum(load(values[r])) / LANES : 0.0f; });
    float offs[ROWS];
    moments(values, padding, means, variances, offs);
    if (in_.centred)
      each<ROWS>([&](int r) {
        if (offs[r] * offs[r] <= 4 * variances[r]) return;
        const float* const row[1] = {values[r]};
        float mean[1] = {means[r]}, variance[1], off[1];
        moments(row, padding + r * size_, mean, variance, off);
        means[r] = mean[0];
        variances[r] = variance[0];
      });
  }

  // For a row whose squares overflow: makes it of values of at most 2, in `room`, and gives the power of 2 it took; the
  // moments are those of the new row. A row that has no finite largest value stays as it is.
  __attribute__((noinline)) float scale_down(const float*& row, float* room, float& mean, float& variance) const {
    float largest = 0.0f;
    for (int64_t d = 0; d < in_.columns; ++d) {
      const float size = __builtin_fabsf(row[d]);
      largest = size > largest || size != size ? size : largest;
    }
    if (!(largest <= MAX_FLOAT)) return 1.0f;
    const float scale = __builtin_ldexpf(1.0f, -__builtin_ilogbf(largest));
    for (int64_t d = 0; d < size_; ++d) room[d] = d < in_.columns ? row[d] * scale : 0.0f;
    row = room;
    const float* const scaled[1] = {row};
    float means[1], variances[1];
    statistics(scaled, room, means, variances);
    mean = means[0];
    variance = variances[0];
    return scale;
  }

  template <int ROWS>
  PYNLP_INLINE void moments(const float* const (&values)[ROWS], float* padding, float (&means)[ROWS],
                            float (&variances)[ROWS], float (&offs)[ROWS]) const {
    const float count = static_cast<float>(in_.columns);
    Float middles[ROWS], squares[ROWS] = {}, deviations[ROWS] = {};
    each<ROWS>([&](int r) {
      middles[r] = broadcast(means[r]);
      for (int64_t d = in_.columns; d < size_; ++d) padding[r * size_ + d] = means[r];
    });
    for (int64_t start = 0; start < size_; start += SUMMED) {
      Float some_squares[ROWS] = {}, some_deviations[ROWS] = {};
      for (int64_t d = start; d < smaller(size_, start + SUMMED); d += LANES) {
        each<ROWS>([&](int r) {
          const Float centre = load(values[r] + d) - middles[r];
          some_squares[r] += centre * centre;
          some_deviations[r] += centre;
        });
      }
      each<ROWS>([&](int r) {
        squares[r] += some_squares[r];
        deviations[r] += some_deviations[r];
      });
    }
    each<ROWS>([&](int r) {
      variances[r] = lane_sum(squares[r]) / count;
      offs[r] = in_.centred ? lane_sum(deviations[r]) / count : 0.0f;
      variances[r] -= offs[r] * offs[r];
      means[r] += offs[r];
    });
  }

  // Computes row i of residual + dropout(x), and rounds it to its dtype. It is in `room` if that is not fp32, or it is
  // no whole vectors.
  const float* added(int64_t i, Keeps& keeps, const Scratch& s, float* room) const {
    const float* x = widened(in_.x, i, in_.columns, room);
    if (!in_.added.data) return x;
    float* sum = result_row(in_.added, i, in_.columns, in_.columns, room);
    const float* residual = in_.residual.data ? widened(in_.residual, i, in_.columns, s.other) : nullptr;
    const bool drops = in_.dropout.dropped;
    if (drops) keeps.draw(i, in_.columns);
    for (int64_t d = 0; d < size_; d += LANES) {
      Float value = load(x + d);
      if (drops) value = keeps.apply(value, d);
      if (residual) value += load(residual + d);
      store(sum + d, value);
    }
    finish(in_.added, i, in_.columns, in_.columns, sum);
    if (in_.added.dtype != Dtype::float32)
      read_row(in_.added.dtype, static_cast<const uint16_t*>(in_.added.data) + i * in_.columns, in_.columns, sum);
    return sum;
  }

  const NormForward& in_;
  int64_t size_, task_rows_;
};

class NormGradient {
 public:
  explicit NormGradient(const NormBackward& in)
      : in_(in),
        size_(padded(in.columns)),
        task_rows_(task_rows(in.rows)),
        parts_((in.rows + task_rows_ - 1) / task_rows_),
        sums_(parts_ * 2 * size_ * sizeof(float)) {}

  void run() const {
    run_tasks<&NormGradient::run_task>(parts_, 16 * in_.rows * in_.columns, this);
    run_tasks<&NormGradient::add_parts>((size_ + TOGETHER - 1) / TOGETHER, 4 * parts_ * size_, this);
  }

 private:
  static constexpr int64_t TOGETHER = 512;  // columns
  static constexpr int MOST = 2;            // rows side by side, of two tensors: more leave the first-level cache

  struct Scratch {
    float *added, *grad_y, *grad_added, *grad, *weight;
    uint16_t* numbers;
    Scratch(const NormGradient& n, Arena& arena) {
      added = arena.take<float>(MOST * n.size_);
      grad_y = arena.take<float>(MOST * n.size_);
      grad_added = arena.take<float>(n.size_);
      grad = arena.take<float>(n.size_);
      weight = arena.take<float>(n.size_);
      numbers = arena.take<uint16_t>(Keeps::size(n.in_.columns));
    }
  };

  float* of_weight(int64_t part) const { return sums_.floats() + part * 2 * size_; }
  float* of_bias(int64_t part) const { return of_weight(part) + size_; }

  // grad_residual = (g - mean(g) - n mean(g n)) / deviation + grad_added, with g = grad_y weight and
  // n = (added - mean) / deviation.
  void run_task(int64_t part) const {
    const Scratch s = take_scratch<Scratch>(*this);
    const float* weight = widened({in_.weight, 0, Dtype::float32}, 0, in_.columns, s.weight);
    float *weight_sum = of_weight(part), *bias_sum = of_bias(part);
    memset(weight_sum, 0, 2 * size_ * sizeof(float));
    Keeps keeps(in_.dropout, s.numbers);
    in_groups<MOST>(part * task_rows_, smaller(in_.rows, (part + 1) * task_rows_), [&](int64_t first, auto rows) {
      constexpr int ROWS = decltype(rows)::count;
      const float *added[ROWS], *grad_y[ROWS];
      Float means[ROWS], rstds[ROWS], levels[ROWS] = {}, alongs[ROWS] = {};
      each<ROWS>([&](int r) {
        const int64_t i = first + r;
        added[r] = widened(in_.added, i, in_.columns, s.added + r * size_);
        grad_y[r] = widened(in_.grad_y, i, in_.columns, s.grad_y + r * size_);
        means[r] = broadcast(in_.centred ? in_.mean[i] : 0.0f);
        rstds[r] = broadcast(in_.rstd[i]);
      });
      for (int64_t start = 0; start < size_; start += SUMMED) {
        Float some_levels[ROWS] = {}, some_alongs[ROWS] = {};
        for (int64_t d = start; d < smaller(size_, start + SUMMED); d += LANES) {
          const Float factor = load(weight + d);
          Float of_weight = load(weight_sum + d), of_bias = load(bias_sum + d);
          each<ROWS>([&](int r) {
            const Float own = load(grad_y[r] + d), normal = (load(added[r] + d) - means[r]) * rstds[r];
            const Float scaled = own * factor;
            of_weight += own * normal;
            of_bias += own;
            some_levels[r] += scaled;
            some_alongs[r] += scaled * normal;
          });
          store(weight_sum + d, of_weight);
          store(bias_sum + d, of_bias);
        }
        each<ROWS>([&](int r) {
          levels[r] += some_levels[r];
          alongs[r] += some_alongs[r];
        });
      }
      const float count = static_cast<float>(in_.columns);
      each<ROWS>([&](int r) {
        const int64_t i = first + r;
        const Float mean_along = broadcast(lane_sum(alongs[r]) / count);
        const Float mean_level = broadcast(in_.centred ? lane_sum(levels[r]) / count : 0.0f);
        float* grad = result_row(in_.grad_residual, i, in_.columns, in_.columns, s.grad);
        const float* more = in_.grad_added.data ? widened(in_.grad_added, i, in_.columns, s.grad_added) : nullptr;
        const Ahead next_added(in_.added, i + ROWS), next_grad_y(in_.grad_y, i + ROWS);
        over_row(size_, [&](int64_t d, bool line) {
          if (line) {
            next_added.prefetch(d);
            next_grad_y.prefetch(d);
          }
          const Float normal = (load(added[r] + d) - means[r]) * rstds[r];
          const Float level = rounded(load(grad_y[r] + d) * load(weight + d)) - mean_level;
          const Float change = (level - normal * mean_along) * rstds[r];
          store(grad + d, more ? change + load(more + d) : change);
        });
        finish(in_.grad_residual, i, in_.columns, in_.columns, grad);
        if (in_.grad_x.data) write_grad_x(i, grad, keeps, s);
      });
    });
  }

  void write_grad_x(int64_t i, const float* grad, Keeps& keeps, const Scratch& s) const {
    if (!in_.dropout.dropped) {  // only the dtype is another
      write_row(in_.grad_x.dtype, grad, in_.columns, in_.grad_x.data, i * in_.columns);
      return;
    }
    keeps.draw(i, in_.columns);
    float* grad_x = result_row(in_.grad_x, i, in_.columns, in_.columns, s.grad_added);
    for (int64_t d = 0; d < size_; d += LANES) store(grad_x + d, keeps.apply(load(grad + d), d));
    finish(in_.grad_x, i, in_.columns, in_.columns, grad_x);
  }

  // Gradients of weight and bias of TOGETHER columns: the parts in their order.
  void add_parts(int64_t task) const {
    const int64_t first = task * TOGETHER, last = smaller(size_, first + TOGETHER);
    float weight[TOGETHER] = {}, bias[TOGETHER] = {};
    for (int64_t part = 0; part < parts_; ++part) {
      for (int64_t d = first; d < last; d += LANES) {
        store(weight + d - first, load(weight + d - first) + load(of_weight(part) + d));
        store(bias + d - first, load(bias + d - first) + load(of_bias(part) + d));
      }
    }
    const int64_t count = smaller(in_.columns, last) - first;
    memcpy(in_.grad_weight + first, weight, count * sizeof(float));
    if (in_.grad_bias) memcpy(in_.grad_bias + first, bias, count * sizeof(float));
  }

  const NormBackward& in_;
  int64_t size_, task_rows_, parts_;
  Buffer sums_;
};

}  // namespace
}  // namespace pynlp
