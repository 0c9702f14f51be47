// y = x weight' + bias, reading the weight where it is, each value once for many rows of x. Decoding has so few rows
// that to read the weight is all it costs, and a matrix product that first repacks it reads it twice.
//
// Rows of x are in the lanes. A few rows would leave most lanes empty: then rows of the weight lie there, transposed a
// block at a time in the first-level cache. A sum runs over k in the same order either way and for any threads: a row
// gets the same bits in every batch.
#pragma once

#include "../common/parallel.h"
#include "../gemm/pack.h"
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
        x_(in.rows <= FEW ? 0 : panels_ * PANEL * depth_ * sizeof(float)) {}

  void run() {
    const int64_t operations = in_.rows * in_.columns * in_.outputs;
    if (in_.rows <= FEW) {
      run_tasks<&Linear::multiply_few>(blocks_, operations, this);
      return;
    }
    run_tasks<&Linear::pack_x>(panels_, 4 * in_.rows * in_.columns, this);
    const int64_t chunks = (panels_ + chunk_ - 1) / chunk_;
    run_tasks<&Linear::multiply>(chunks * blocks_, operations, this);
  }

 private:
  static constexpr int64_t PANEL = TILE_VECTORS * LANES;  // rows that lie in the lanes
  static constexpr int64_t BLOCK = 64;                    // rows of the weight
  static constexpr int64_t DEPTH = 64;                    // sums of sums lose less than one long sum
  static constexpr int64_t CHUNK = 1 << 17;               // values of x that stay in the second-level cache

  // Up to so many rows of x, rows of the weight lie in the lanes. AVX-512 keeps up with the memory anyway, even if one
  // lane of 16 is in use.
  static constexpr int64_t FEW = PYNLP_AVX512 ? 0 : TILE_ROWS;

  int32_t* panel_of_x(int64_t panel) const { return static_cast<int32_t*>(x_.data) + panel * PANEL * depth_; }

  // Up to PANEL rows as columns, with zeros up to whole vectors.
  static void pack(const FloatRows& rows, int64_t first, int64_t count, int32_t* to) {
    const int64_t lanes = round_up(count, LANES), words = row_words<Fp32>(rows.columns);
    int32_t* room = static_cast<int32_t*>(thread_scratch(lanes * words * sizeof(int32_t)));
    pack_columns<Fp32>(rows, first, first + count, lanes, words, nullptr, room, to, PANEL);
  }

  void pack_x(int64_t panel) const {
    const int64_t first = panel * PANEL;
    pack({in_.x, in_.columns}, first, smaller(PANEL, in_.rows - first), panel_of_x(panel));
  }

  // `columns` columns of the weight, from column k on.
  FloatRows weight(int64_t k, int64_t columns) const {
    const RowsIn& all = in_.weight;
    return {{static_cast<const float*>(all.data) + k, all.stride, all.dtype}, columns};
  }

  // BLOCK rows of the weight by a chunk of x.
  void multiply(int64_t task) const {
    const int64_t block = task % blocks_, first_panel = task / blocks_ * chunk_;
    alignas(64) float products[BLOCK * PANEL], rows[PANEL * BLOCK];
    const int64_t first = block * BLOCK, count = smaller(BLOCK, in_.outputs - first);
    for (int64_t panel = first_panel; panel < smaller(panels_, first_panel + chunk_); ++panel) {
      const int64_t tokens = smaller(PANEL, in_.rows - panel * PANEL), lanes = round_up(tokens, LANES);
      matmul_in_sums<Fp32, DEPTH>(count, lanes, in_.columns, weight(0, in_.columns).row(first), in_.weight.stride,
                                  panel_of_x(panel), PANEL, products, PANEL);
      transpose(reinterpret_cast<int32_t*>(products), PANEL, reinterpret_cast<int32_t*>(rows), BLOCK,
                round_up(count, LANES), lanes);
      for (int64_t t = 0; t < tokens; ++t) write(panel * PANEL + t, first, count, rows + t * BLOCK);
    }
  }

  // BLOCK rows of the weight by all of x.
  void multiply_few(int64_t block) const {
    alignas(64) int32_t turned[DEPTH * PANEL];
    alignas(64) float rows[TILE_ROWS * BLOCK];
    const int64_t first = block * BLOCK, count = smaller(BLOCK, in_.outputs - first);
    for (int64_t n = 0; n < count; n += PANEL) {
      const int64_t some = smaller(PANEL, count - n), lanes = round_up(some, LANES);
      for (int64_t k = 0; k < in_.columns; k += DEPTH) {
        const int64_t depth = smaller(DEPTH, in_.columns - k);
        pack(weight(k, depth), first + n, some, turned);
        const auto product = k == 0 ? matmul<Fp32, Into::overwrite> : matmul<Fp32, Into::add>;
        product(in_.rows, lanes, depth, static_cast<const float*>(in_.x.data) + k, in_.x.stride, 1, turned, PANEL,
                rows + n, BLOCK, nullptr);
      }
    }
    for (int64_t t = 0; t < in_.rows; ++t) write(t, first, count, rows + t * BLOCK);
  }

  // Row t of y from `first` on, with the bias.
  void write(int64_t t, int64_t first, int64_t count, float* values) const {
    if (in_.bias)
      for (int64_t n = 0; n < count; ++n) values[n] += in_.bias[first + n];
    copy_row(in_.y + t * in_.outputs + first, values, 4 * count);
  }

  const LinearForward& in_;
  const int64_t depth_, panels_, blocks_, chunk_;  // chunk_: panels
  const Buffer x_;
};

}  // namespace
}  // namespace pynlp
