// GELU, ReLU and SwiGLU with dropout, a row at a time.
#pragma once

#include "../common/parallel.h"
#include "../simd/math.h"
#include "../simd/memory.h"
#include "../simd/rows.h"
#include "dropout.h"

namespace pynlp {
namespace {

constexpr int64_t TASK_ROWS = 16;

class Activate {
 public:
  explicit Activate(const ActivationForward& in) : in_(in), size_(padded(in.columns)) {}

  void run() const {
    const int64_t tasks = (in_.rows + TASK_ROWS - 1) / TASK_ROWS;
    run_tasks<&Activate::run_task>(tasks, 32 * in_.rows * in_.columns, this);
  }

 private:
  struct Scratch {
    float *x, *up, *y;
    uint16_t* numbers;
    Scratch(const Activate& a, Arena& arena) {
      x = arena.take<float>(a.size_);
      up = arena.take<float>(a.size_);
      y = arena.take<float>(a.size_);
      numbers = arena.take<uint16_t>(Keeps::size(a.in_.columns));
    }
  };

  void run_task(int64_t task) const {
    const Scratch s = take_scratch<Scratch>(*this);
    Keeps keeps(in_.dropout, s.numbers);
    for (int64_t i = task * TASK_ROWS; i < smaller(in_.rows, (task + 1) * TASK_ROWS); ++i) {
      with_rows(in_.x, in_.up, i, in_.columns, s.x, s.up, [&](auto read, const char* x, const char* up) {
        using Read = decltype(read);
        constexpr bool BF16 = Read::BF16;
        if (in_.kind == Activation::gelu) {
          write(i, keeps, s, [&](int64_t d) {
            const Float value = Read::load(x, d);
            return value * normal_of<BF16>(value).share;
          });
        } else if (in_.kind == Activation::relu) {
          write(i, keeps, s, [&](int64_t d) {
            const Float value = Read::load(x, d);
            return value < Float{} ? Float{} : value;  // NaN stays
          });
        } else {
          write(i, keeps, s, [&](int64_t d) {
            const Float gate = Read::load(x, d);
            return gate * sigmoid_of<BF16>(gate) * Read::load(up, d);
          });
        }
      });
    }
  }

  template <class Value>
  PYNLP_INLINE void write(int64_t i, Keeps& keeps, const Scratch& s, const Value& value) const {
    float* y = result_row(in_.y, i, in_.columns, in_.columns, s.y);
    if (in_.dropout.dropped) {
      keeps.draw(i, in_.columns);
      for (int64_t d = 0; d < size_; d += LANES) store(y + d, keeps.apply(value(d), d));
    } else {
      for (int64_t d = 0; d < size_; d += LANES) store(y + d, value(d));
    }
    finish(in_.y, i, in_.columns, in_.columns, y);
  }

  const ActivationForward& in_;
  int64_t size_;
};

class ActivateGradient {
 public:
  explicit ActivateGradient(const ActivationBackward& in) : in_(in), size_(padded(in.columns)) {}

  void run() const {
    const int64_t tasks = (in_.rows + TASK_ROWS - 1) / TASK_ROWS;
    run_tasks<&ActivateGradient::run_task>(tasks, 48 * in_.rows * in_.columns, this);
  }

 private:
  struct Scratch {
    float *grad, *x, *up, *grad_x, *grad_up;
    uint16_t* numbers;
    Scratch(const ActivateGradient& a, Arena& arena) {
      grad = arena.take<float>(a.size_);
      x = arena.take<float>(a.size_);
      up = arena.take<float>(a.size_);
      grad_x = arena.take<float>(a.size_);
      grad_up = arena.take<float>(a.size_);
      numbers = arena.take<uint16_t>(Keeps::size(a.in_.columns));
    }
  };

  void run_task(int64_t task) const {
    const Scratch s = take_scratch<Scratch>(*this);
    Keeps keeps(in_.dropout, s.numbers);
    for (int64_t i = task * TASK_ROWS; i < smaller(in_.rows, (task + 1) * TASK_ROWS); ++i) {
      const float* grad = widened(in_.grad, i, in_.columns, s.grad);
      if (in_.dropout.dropped) {
        keeps.draw(i, in_.columns);
        for (int64_t d = 0; d < size_; d += LANES) store(s.grad + d, keeps.apply(load(grad + d), d));
        grad = s.grad;
      }
      float* grad_x = result_row(in_.grad_x, i, in_.columns, in_.grad_stride, s.grad_x);
      with_rows(in_.x, in_.up, i, in_.columns, s.x, s.up, [&](auto read, const char* x, const char* up) {
        using Read = decltype(read);
        constexpr bool BF16 = Read::BF16;
        if (in_.kind == Activation::gelu) {  // Phi(x) + x phi(x)
          const Float factor = broadcast(0.398942280401432678f);
          for (int64_t d = 0; d < size_; d += LANES) {
            const Float value = Read::load(x, d);
            const Normal normal = normal_of<BF16>(value);
            store(grad_x + d, load(grad + d) * (normal.share + value * normal.density * factor));
          }
        } else if (in_.kind == Activation::relu) {
          for (int64_t d = 0; d < size_; d += LANES)
            store(grad_x + d, Read::load(x, d) > Float{} ? load(grad + d) : Float{});
        } else {
          float* grad_up = result_row(in_.grad_up, i, in_.columns, in_.grad_stride, s.grad_up);
          for (int64_t d = 0; d < size_; d += LANES) {
            const Float gate = Read::load(x, d), share = sigmoid_of<BF16>(gate), own = load(grad + d);
            const Float slope = share * (broadcast(1.0f) + gate * (broadcast(1.0f) - share));
            store(grad_up + d, own * gate * share);
            store(grad_x + d, own * Read::load(up, d) * slope);
          }
          finish(in_.grad_up, i, in_.columns, in_.grad_stride, grad_up);
        }
      });
      finish(in_.grad_x, i, in_.columns, in_.grad_stride, grad_x);
    }
  }

  const ActivationBackward& in_;
  int64_t size_;
};

}  // namespace
}  // namespace pynlp
