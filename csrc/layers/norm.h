// Layer norm and RMS norm of residual + dropout(x): a row at a time, in the first-level cache.
#pragma once

#include "../parallel.h"
#include "../simd/math.h"
#include "../simd/memory.h"
#include "rows.h"

namespace pynlp {
namespace {

// add(d, n) for each vector d of a row: into n of four sums in turn, which do not wait for each other.
template <class Add>
PYNLP_INLINE void over_row(int64_t size, const Add& add) {
  int64_t d = 0;
  for (; d + 4 * LANES <= size; d += 4 * LANES)
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) add(d + n * LANES, n);
  for (; d < size; d += LANES) add(d, 0);
}

inline float total(const Float (&sums)[4]) { return lane_sum((sums[0] + sums[1]) + (sums[2] + sums[3])); }

class Norm {
 public:
  explicit Norm(const NormForward& in) : in_(in), size_(padded(in.columns)) {}

  void run() const { run_tasks<&Norm::run_task>((in_.rows + TASK_ROWS - 1) / TASK_ROWS, this); }

 private:
  struct Scratch {
    float *values, *other, *weight, *bias;
    uint16_t* numbers;
    Scratch(const Norm& n, Arena& arena) {
      values = arena.take<float>(n.size_);
      other = arena.take<float>(n.size_);
      weight = arena.take<float>(n.size_);
      bias = arena.take<float>(n.size_);
      numbers = arena.take<uint16_t>(Keeps::size(n.in_.columns));
    }
  };

  void run_task(int64_t task) const {
    const Scratch s = take_scratch<Scratch>(*this);
    const float* weight = widened({in_.weight, 0, Dtype::float32}, 0, in_.columns, s.weight);
    const float* bias = in_.bias ? widened({in_.bias, 0, Dtype::float32}, 0, in_.columns, s.bias) : nullptr;
    Keeps keeps(in_.dropout, s.numbers);
    for (int64_t i = task * TASK_ROWS; i < smaller(in_.rows, (task + 1) * TASK_ROWS); ++i) {
      const float* values = added(i, keeps, s);
      const float count = static_cast<float>(in_.columns);
      float mean = 0;
      if (in_.centred) {
        Float sums[4] = {};
        over_row(size_, [&](int64_t d, int n) { sums[n] += load(values + d); });
        mean = total(sums) / count;
      }
      for (int64_t d = in_.columns; d < size_; ++d) s.values[d] = mean;  // padded rows lie there
      // The deviations also tell by how much the mean was rounded.
      Float squares[4] = {}, deviations[4] = {};
      over_row(size_, [&](int64_t d, int n) {
        const Float centre = load(values + d) - broadcast(mean);
        squares[n] += centre * centre;
        deviations[n] += centre;
      });
      float variance = total(squares) / count;
      if (in_.centred) {
        const float off = total(deviations) / count;
        variance -= off * off;
        in_.mean[i] = mean += off;
      }
      const Float middle = broadcast(mean);
      const float rstd = in_.rstd[i] = 1.0f / __builtin_sqrtf(variance + in_.eps);
      const Float scale = broadcast(rstd);
      float* y = result_row(in_.y, i, in_.columns, in_.columns, s.other);
      if (bias)
        for (int64_t d = 0; d < size_; d += LANES)
          store(y + d, (load(values + d) - middle) * scale * load(weight + d) + load(bias + d));
      else
        for (int64_t d = 0; d < size_; d += LANES) store(y + d, (load(values + d) - middle) * scale * load(weight + d));
      finish(in_.y, i, in_.columns, in_.columns, y);
    }
  }

  // Row i of residual + dropout(x), as it was rounded when it was written.
  const float* added(int64_t i, Keeps& keeps, const Scratch& s) const {
    const float* x = widened(in_.x, i, in_.columns, s.values);
    if (!in_.added.data) return x;
    float* sum = result_row(in_.added, i, in_.columns, in_.columns, s.values);
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
  int64_t size_;
};

class NormGradient {
 public:
  explicit NormGradient(const NormBackward& in)
      : in_(in),
        size_(padded(in.columns)),
        task_rows_(larger(TASK_ROWS, (in.rows + MOST_PARTS - 1) / MOST_PARTS)),
        parts_((in.rows + task_rows_ - 1) / task_rows_),
        sums_(parts_ * 2 * size_ * sizeof(float)) {}

  void run() const {
    run_tasks<&NormGradient::run_task>(parts_, this);
    run_tasks<&NormGradient::add_parts>((size_ + TOGETHER - 1) / TOGETHER, this);
  }

 private:
  // Rows are cut by their number alone, so that the bits of the weights' gradients do not depend on the threads.
  static constexpr int64_t MOST_PARTS = 64, TOGETHER = 512;

  struct Scratch {
    float *added, *grad_y, *grad_added, *grad, *weight;
    uint16_t* numbers;
    Scratch(const NormGradient& n, Arena& arena) {
      added = arena.take<float>(n.size_);
      grad_y = arena.take<float>(n.size_);
      grad_added = arena.take<float>(n.size_);
      grad = arena.take<float>(n.size_);
      weight = arena.take<float>(n.size_);
      numbers = arena.take<uint16_t>(Keeps::size(n.in_.columns));
    }
  };

  float* of_weight(int64_t part) const { return sums_.floats() + part * 2 * size_; }
  float* of_bias(int64_t part) const { return of_weight(part) + size_; }

  // d new = (g - mean(g) - n mean(g n)) / deviation + grad_added, with g = grad_y weight and n = (new - mean) /
  // deviation.
  void run_task(int64_t part) const {
    const Scratch s = take_scratch<Scratch>(*this);
    const float* weight = widened({in_.weight, 0, Dtype::float32}, 0, in_.columns, s.weight);
    float *weight_sum = of_weight(part), *bias_sum = of_bias(part);
    memset(weight_sum, 0, 2 * size_ * sizeof(float));
    Keeps keeps(in_.dropout, s.numbers);
    for (int64_t i = part * task_rows_; i < smaller(in_.rows, (part + 1) * task_rows_); ++i) {
      const float* added = widened(in_.added, i, in_.columns, s.added);
      const float* grad_y = widened(in_.grad_y, i, in_.columns, s.grad_y);
      const Float mean = broadcast(in_.centred ? in_.mean[i] : 0.0f), rstd = broadcast(in_.rstd[i]);
      const auto normal = [&](int64_t d) { return (load(added + d) - mean) * rstd; };
      float* grad = result_row(in_.grad_residual, i, in_.columns, in_.columns, s.grad);
      Float levels[4] = {}, alongs[4] = {};
      over_row(size_, [&](int64_t d, int n) {
        const Float own = load(grad_y + d), value = normal(d), scaled = own * load(weight + d);
        store(grad + d, scaled);
        store(weight_sum + d, load(weight_sum + d) + own * value);
        store(bias_sum + d, load(bias_sum + d) + own);
        levels[n] += scaled;
        alongs[n] += scaled * value;
      });
      const float count = static_cast<float>(in_.columns);
      const Float mean_along = broadcast(total(alongs) / count);
      const Float mean_level = broadcast(in_.centred ? total(levels) / count : 0.0f);
      const auto change = [&](int64_t d) { return (load(grad + d) - mean_level - normal(d) * mean_along) * rstd; };
      if (in_.grad_added.data) {
        const float* more = widened(in_.grad_added, i, in_.columns, s.grad_added);
        for (int64_t d = 0; d < size_; d += LANES) store(grad + d, change(d) + load(more + d));
      } else {
        for (int64_t d = 0; d < size_; d += LANES) store(grad + d, change(d));
      }
      finish(in_.grad_residual, i, in_.columns, in_.columns, grad);
      if (in_.grad_x.data) write_grad_x(i, grad, keeps, s);
    }
  }

  void write_grad_x(int64_t i, const float* grad, Keeps& keeps, const Scratch& s) const {
    if (!in_.dropout.dropped) {  // only the dtype is another
      write_row(in_.grad_x.dtype, grad, in_.columns, in_.grad_x.data, i * in_.columns);
      return;
    }
    keeps.draw(i, in_.columns);
    float* grad_x = result_row(in_.grad_x, i, in_.columns, in_.columns, s.grad_y);
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
