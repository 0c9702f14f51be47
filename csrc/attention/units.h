// How backward cuts its work: units, which are the key/value heads of all sequences; their blocks of keys; their tiles
// of queries. Blocks and tiles are numbered through, one unit after the other.
#pragma once

#include "../simd/memory.h"
#include "visibility.h"

namespace pynlp {
namespace {

constexpr int64_t TILE_QUERIES = 4 * LANES;

// A longer block packs the queries less often; what a task keeps must fit in the second-level cache. The size depends
// on the shape alone, since the order of the sums depends on it.
inline int64_t keys_of_block(const AttentionInputs& in, int64_t keys) {
  if (in.head_dim > 128 || in.head_dim_v > 128) return 64;
  return keys < 1024 ? 128 : 256;
}

inline int64_t tiles_of(int64_t queries) { return (queries + TILE_QUERIES - 1) / TILE_QUERIES; }

struct Unit {
  int64_t kv_head;
  Sequence sequence;
  int64_t block_keys, blocks, tiles;
  int64_t first_block, first_tile;  // blocks and tiles of all units before

  // The key blocks that a tile of queries sees, by the window; lengths may hide some of them.
  Range turns(const AttentionInputs& in, int64_t tile) const {
    Visibility visible(in, sequence);
    visible.keys = sequence.keys;
    const int64_t first = tile * TILE_QUERIES;
    const Range seen = visible.of_any(first, smaller(first + TILE_QUERIES, sequence.queries));
    if (seen.empty()) return {0, 0};
    return {seen.first / block_keys, (seen.last - 1) / block_keys + 1};
  }
};

class Units {
 public:
  explicit Units(const AttentionInputs& in) : in_(in), firsts_((in.batch + 1) * sizeof(First)) {
    First* first = static_cast<First*>(firsts_.data);
    first[0] = {0, 0};
    for (int64_t b = 0; b < in.batch; ++b) {
      const Sequence s = in.sequence(b);
      const int64_t block_keys = keys_of_block(in, s.keys);
      first[b + 1] = {first[b].block + (s.keys + block_keys - 1) / block_keys, first[b].tile + tiles_of(s.queries)};
    }
  }

  int64_t count() const { return in_.batch * in_.kv_heads; }
  int64_t blocks() const { return first(in_.batch).block * in_.kv_heads; }
  int64_t tiles() const { return tiles_of_a_head() * in_.kv_heads; }
  int64_t tiles_of_a_head() const { return first(in_.batch).tile; }

  Unit operator[](int64_t number) const { return of(number / in_.kv_heads, number % in_.kv_heads); }
  Unit of(int64_t b, int64_t kv_head) const {
    const Sequence sequence = in_.sequence(b);
    const int64_t blocks = first(b + 1).block - first(b).block, tiles = first(b + 1).tile - first(b).tile;
    return {kv_head,
            sequence,
            keys_of_block(in_, sequence.keys),
            blocks,
            tiles,
            first(b).block * in_.kv_heads + kv_head * blocks,
            first(b).tile * in_.kv_heads + kv_head * tiles};
  }

 private:
  struct First {
    int64_t block, tile;  // of one head, in all sequences before
  };
  const First& first(int64_t b) const { return static_cast<const First*>(firsts_.data)[b]; }

  const AttentionInputs& in_;
  Buffer firsts_;
};

}  // namespace
}  // namespace pynlp
