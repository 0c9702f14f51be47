// Products of each expert's rows with its matrix: y^T = W x^T. Rows are in the lanes, and a block of W's outputs is
// multiplied by a chunk of them. A sum runs over the same pieces of at most DEPTH words for any threads.
#pragma once

#include "experts.h"
#include "groups.h"

namespace pynlp {
namespace {

constexpr int64_t BLOCK = 20 * TILE_ROWS;                     // outputs
constexpr int64_t DEPTH = smaller(256, 4096 / PANEL);         // words that are multiplied at once
constexpr int64_t PITCH = CHUNK + LINE;  // no power of two, whose rows would share the cache's sets

// Products (outputs first .. first + count - 1) x (rows of a chunk): values[n * PITCH + row].
struct Products {
  const Chunk& chunk;
  int64_t first, count;
  float* values;

  // Adds a bias to each output, of which `bias` has those of all experts.
  PYNLP_INLINE void add(const float* bias, const Order& outputs) const {
    if (!bias) return;
    for (int64_t n = 0; n < count; ++n) {
      const Float value = broadcast(bias[chunk.expert * outputs.count() + outputs.at(first + n)]);
      float* row = values + n * PITCH;
      for (int64_t m = 0; m < chunk.rows; m += LANES) store(row + m, load(row + m) + value);
    }
  }
};

// `Sink` has write(const Products&, float* room), `room` of Sink::ROOM floats.
template <class E, class Values, class Sink>
class Grouped {
 public:
  // panels: word `k` of a panel of rows is panels[(panel * words + k) * PANEL].
  Grouped(const Chunks& chunks, const Matrices& weight, const Values& values, const int32_t* panels, int64_t words,
          const Sink& sink)
      : chunks_(chunks),
        outputs_(weight.outputs().count()),
        inputs_(weight.inputs().count()),
        panels_(panels),
        words_(words),
        blocks_((outputs_ + BLOCK - 1) / BLOCK),
        weight_(weight, values),
        sink_(sink) {}

  void run() {
    run_tasks<&Grouped::multiply>(chunks_.count * blocks_, chunks_.groups.rows() * inputs_ * outputs_, this);
  }

 private:
  struct Scratch {
    int32_t* weight;
    float *room, *products, *sink_room;
    Scratch(const Grouped&, Arena& arena) {
      weight = arena.take<int32_t>(BLOCK * DEPTH);
      room = arena.take<float>(Blocks::ROOM);
      products = arena.take<float>(round_up(BLOCK, LANES) * PITCH);
      sink_room = arena.take<float>(Sink::ROOM);
    }
  };
  using Blocks = WeightBlocks<E, Values, BLOCK, DEPTH>;

  void multiply(int64_t task) const {
    const auto s = take_scratch<Scratch>(*this);
    const Chunk& chunk = chunks_.at(task / blocks_);
    const int64_t first = task % blocks_ * BLOCK, count = smaller(BLOCK, outputs_ - first);
    const int64_t all = (inputs_ + E::PAIR - 1) / E::PAIR;
    if (all == 0)
      for (int64_t n = 0; n < count; ++n) memset(s.products + n * PITCH, 0, PITCH * sizeof(float));
    for (int64_t word = 0; word < all; word += DEPTH) {
      const int64_t words = smaller(DEPTH, all - word);
      weight_.read(chunk.expert, first, count, word, words, s.room, s.weight);
      for (int64_t m = 0; m < chunk.rows; m += PANEL) {
        const auto product = word == 0 ? matmul<E, Into::overwrite> : matmul<E, Into::add>;
        const int64_t lanes = round_up(smaller(PANEL, chunk.rows - m), LANES);
        const int32_t* panel = panels_ + ((chunk.panel + m / PANEL) * words_ + word) * PANEL;
        product(count, lanes, words, s.weight, weight_.row(), weight_.depth(), panel, PANEL, s.products + m, PITCH,
                nullptr);
      }
    }
    sink_.write({chunk, first, count, s.products}, s.sink_room);
  }

  const Chunks& chunks_;
  const int64_t outputs_, inputs_;
  const int32_t* panels_;
  const int64_t words_, blocks_;
  const Blocks weight_;
  const Sink& sink_;
};

// Writes products as rows of `order.count()` values, outputs in the order of memory.
class RowsSink {
 public:
  RowsSink(const RowsOut& out, const Order& order, const float* bias) : out_(out), order_(order), bias_(bias) {}

  static constexpr int64_t WIDTH = round_up(BLOCK, LANES);
  static constexpr int64_t ROOM = PANEL * WIDTH;

  void write(const Products& products, float* room) const {
    products.add(bias_, order_);
    write_rows(products, room);
  }

  void write_rows(const Products& products, float* room) const {
    const Chunk& chunk = products.chunk;
    for (int64_t m = 0; m < chunk.rows; m += PANEL) {
      const int64_t rows = smaller(PANEL, chunk.rows - m);
      transpose(reinterpret_cast<const int32_t*>(products.values + m), PITCH, reinterpret_cast<int32_t*>(room), WIDTH,
                round_up(products.count, LANES), round_up(rows, LANES));
      for (int64_t i = 0; i < rows; ++i)
        write_in_order<BLOCK>(order_, out_.dtype, room + i * WIDTH, products.first, products.count, out_.data,
                              (chunk.row + m + i) * order_.count());
    }
  }

 private:
  const RowsOut out_;
  const Order order_;
  const float* bias_;
};

}  // namespace
}  // namespace pynlp
