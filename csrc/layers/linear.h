// y = x weight' + bias, with the rows of x in the lanes: the weight is read where it is, each value once for as many
// rows as two vectors hold. Decoding has so few rows that to read the weight is all it costs, and a matrix product that
// first repacks it reads it twice.
//
// A sum runs over k in order whatever the rows and threads: a row gets the same bits in every batch.
#pragma once

#include "../parallel.h"
#include "../simd/matmul.h"
#include "../simd/memory.h"
#include "layers.h"

namespace pynlp {
namespace {

class Linear {
 public:
  explicit Linear(const LinearForward& in)
      : in_(in),
        depth_(round_up(in.columns, LANES)),
        panels_((in.rows + PANEL - 1) / PANEL),
        blocks_((in.outputs + BLOCK - 1) / BLOCK),
        chunk_(larger(1, CHUNK / (PANEL * depth_))),
        x_(panels_ * PANEL * depth_ * sizeof(float)) {}

  void run() {
    run_tasks(panels_, [](void* l, int64_t task) { static_cast<Linear*>(l)->pack(task); }, this);
    const int64_t chunks = (panels_ + chunk_ - 1) / chunk_;
    run_tasks(chunks * blocks_, [](void* l, int64_t task) { static_cast<Linear*>(l)->multiply(task); }, this);
  }

 private:
  static constexpr int64_t PANEL = TILE_VECTORS * LANES;  // rows of x
  static constexpr int64_t BLOCK = 64;                    // rows of the weight
  static constexpr int64_t DEPTH = 64;                    // sums of sums lose less than one long sum
  static constexpr int64_t CHUNK = 1 << 17;               // values of x that stay in the second-level cache

  int32_t* panel_of_x(int64_t panel) const { return static_cast<int32_t*>(x_.data) + panel * PANEL * depth_; }

  // PANEL rows of x as columns, zeros behind the last.
  void pack(int64_t panel) const {
    const int64_t first = panel * PANEL, count = smaller(PANEL, in_.rows - first), lanes = round_up(count, LANES);
    const int32_t* x = static_cast<const int32_t*>(in_.x.data) + first * in_.x.stride;
    int64_t stride = in_.x.stride;
    if (count < lanes || in_.columns < depth_) {
      int32_t* rows = static_cast<int32_t*>(thread_scratch(lanes * depth_ * sizeof(float)));
      memset(rows, 0, lanes * depth_ * sizeof(float));
      for (int64_t r = 0; r < count; ++r) copy_row(rows + r * depth_, x + r * stride, 4 * in_.columns);
      x = rows;
      stride = depth_;
    }
    transpose(x, stride, panel_of_x(panel), PANEL, lanes, depth_);
  }

  // BLOCK rows of the weight by a chunk of x.
  void multiply(int64_t task) const {
    const int64_t block = task % blocks_, first_panel = task / blocks_ * chunk_;
    alignas(64) float products[BLOCK * PANEL], rows[PANEL * BLOCK];
    const int64_t first = block * BLOCK, count = smaller(BLOCK, in_.outputs - first);
    const float* weight = static_cast<const float*>(in_.weight.data) + first * in_.weight.stride;
    for (int64_t panel = first_panel; panel < smaller(panels_, first_panel + chunk_); ++panel) {
      const int64_t tokens = smaller(PANEL, in_.rows - panel * PANEL), lanes = round_up(tokens, LANES);
      for (int64_t k = 0; k < in_.columns; k += DEPTH) {
        const auto product = k == 0 ? matmul<Fp32, Into::overwrite> : matmul<Fp32, Into::add>;
        product(count, lanes, smaller(DEPTH, in_.columns - k), weight + k, in_.weight.stride, 1,
                panel_of_x(panel) + k * PANEL, PANEL, products, PANEL, nullptr);
      }
      transpose(reinterpret_cast<int32_t*>(products), PANEL, reinterpret_cast<int32_t*>(rows), BLOCK,
                round_up(count, LANES), lanes);
      for (int64_t t = 0; t < tokens; ++t) {
        float* row = rows + t * BLOCK;
        if (in_.bias)
          for (int64_t n = 0; n < count; ++n) row[n] += in_.bias[first + n];
        copy_row(in_.y + (panel * PANEL + t) * in_.outputs + first, row, 4 * count);
      }
    }
  }

  const LinearForward& in_;
  const int64_t depth_, panels_, blocks_, chunk_;  // chunk_: panels
  const Buffer x_;
};

}  // namespace
}  // namespace pynlp
