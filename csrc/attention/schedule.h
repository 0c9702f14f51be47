// In which order backward works on its blocks, and whose turn it is to add to the sums of a tile of queries.
#pragma once

#include "units.h"

namespace pynlp {
namespace {

class Schedule {
 public:
  struct Block {
    int64_t unit, number;
  };
  struct Tile {
    int64_t sequence, number;
  };

  // Puts blocks in the order of their tasks: `in_flight` units at once, a block of each in turn. The units' sums lie in
  // as many slots. When a slot passes to a later unit, the tickets of its tiles continue to count.
  Schedule(const AttentionInputs& in, const Units& units, int64_t in_flight, int64_t most_tiles)
      : blocks_(units.blocks() * sizeof(Block)),
        tiles_(units.tiles_of_a_head() * sizeof(Tile)),
        first_turns_(units.tiles() * sizeof(int32_t)) {
    Block* block = static_cast<Block*>(blocks_.data);
    int32_t* first_turn = static_cast<int32_t*>(first_turns_.data);
    const Buffer tickets(in_flight * most_tiles * sizeof(int32_t));
    int32_t* ticket = static_cast<int32_t*>(tickets.data);
    memset(ticket, 0, in_flight * most_tiles * sizeof(int32_t));
    for (int64_t first = 0; first < units.count(); first += in_flight) {
      const int64_t last = smaller(first + in_flight, units.count());
      int64_t most_blocks = 0;
      for (int64_t n = first; n < last; ++n) {
        const Unit unit = units[n];
        most_blocks = larger(most_blocks, unit.blocks);
        for (int64_t t = 0; t < unit.tiles; ++t) {
          const Range turns = unit.turns(in, t);
          *first_turn++ = ticket[(n - first) * most_tiles + t];
          ticket[(n - first) * most_tiles + t] += static_cast<int32_t>(turns.last - turns.first);
        }
      }
      for (int64_t number = 0; number < most_blocks; ++number)
        for (int64_t n = first; n < last; ++n)
          if (number < units[n].blocks) *block++ = {n, number};
    }
    Tile* tile = static_cast<Tile*>(tiles_.data);
    for (int64_t b = 0; b < in.batch; ++b)
      for (int64_t t = 0; t < tiles_of(in.sequence(b).queries); ++t) *tile++ = {b, t};
  }

  const Block& block(int64_t task) const { return static_cast<const Block*>(blocks_.data)[task]; }
  const Tile& tile(int64_t number) const { return static_cast<const Tile*>(tiles_.data)[number]; }  // of any head
  // The ticket that the first block of a tile waits for.
  int32_t first_turn(const Unit& unit, int64_t tile) const {
    return static_cast<const int32_t*>(first_turns_.data)[unit.first_tile + tile];
  }

 private:
  Buffer blocks_, tiles_, first_turns_;
};

}  // namespace
}  // namespace pynlp
