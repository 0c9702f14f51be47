// Backward: gradients of q, k, v and of what the biases are made of, from q, k, v, out, lse (FlashAttention-2).
//
// A task is a block of keys of one key/value head. It walks over the tiles of queries that see the block, for each
// query head of the group (backward_tile.h), and keeps grad_k and grad_v to itself. grad_q of a tile is summed over the
// key blocks, by different tasks, always in rising order: each tile has a ticket that says whose turn it is. So five
// products suffice, without atomics, and the bits do not depend on the threads. A task waits only for lower tasks,
// which run or have run. The sums are kept in fp32, for the few heads that are in flight.
#pragma once

#include "../common/parallel.h"
#include "backward_tile.h"
#include "schedule.h"

namespace pynlp {
namespace {

template <class E>
class Backward {
 public:
  explicit Backward(const AttentionBackward& in)
      : in_(in),
        group_(in.kv_heads ? in.heads / in.kv_heads : 0),
        units_(in),
        biases_(in, units_),
        delta_(in.entries * in.heads * in.rows_q * sizeof(float)),
        tiles_(in, delta_.floats(), biases_.needed()),
        in_flight_(larger(1, smaller(units_.count(), thread_count()))),
        schedule_(in, units_, in_flight_, tiles_.most_tiles),
        grad_q_(in_flight_ * group_ * tiles_.most_tiles * TILE_QUERIES * tiles_.key_columns * sizeof(float)),
        tickets_(in_flight_ * group_ * tiles_.most_tiles * sizeof(int32_t)) {
    memset(tickets_.data, 0, in_flight_ * group_ * tiles_.most_tiles * sizeof(int32_t));
  }

  void run() {
    run_tasks<&Backward::prepare>(units_.tiles_of_a_head() * in_.heads, operations(in_), this);
    run_tasks<&Backward::run_task>(units_.blocks(), 3 * operations(in_), this);
    if (biases_.needed()) biases_.write();
    if (in_.grad_sinks) write_grad_sinks();
  }

 private:
  using Scratch = typename TileGradients<E>::Scratch;

  // Computes delta = rowsum(dO * out) of one tile of queries. Where these see no key no task has a turn: grad_q is 0.
  void prepare(int64_t task) {
    const Schedule::Tile one = schedule_.tile(task / in_.heads);
    const Sequence sequence = in_.sequence(one.sequence);
    const int64_t head = task % in_.heads;
    const int64_t first = one.number * TILE_QUERIES, last = smaller(first + TILE_QUERIES, sequence.queries);
    const Rows grad_out = gradients_of(sequence, head);
    const Rows out(in_, in_.out, sequence.entry, sequence.first_query, head, in_.head_dim_v);
    float a[256 + LANES] = {}, b[256 + LANES] = {};
    for (int64_t i = first; i < last; ++i) {
      grad_out.read(i, a);
      out.read(i, b);
      Float sums = Float{};
      for (int64_t d = 0; d < in_.head_dim_v; d += LANES) sums += load(a + d) * load(b + d);
      float delta = 0;
      for (int lane = 0; lane < LANES; ++lane) delta += sums[lane];
      const int64_t row = in_.statistic(sequence, head, i);
      delta_.floats()[row] = in_.grad_lse ? delta - in_.grad_lse[row] : delta;
    }
    if (units_.of(one.sequence, 0).turns(in_, one.number).empty()) {
      memset(a, 0, sizeof a);
      for (int64_t i = first; i < last; ++i)
        write_row(in_.dtype, a, in_.head_dim, in_.grad_q, in_.query_row(sequence, head, i, in_.head_dim));
    }
  }

  Rows gradients_of(const Sequence& s, int64_t head) const {
    return Rows(in_, in_.grad_out, s.entry, s.first_query, head, in_.head_dim_v);
  }

  void run_task(int64_t task) {
    const Schedule::Block block = schedule_.block(task);
    const Unit u = units_[block.unit];
    const int64_t slot = block.unit % in_flight_;
    const Sequence& sequence = u.sequence;
    const int64_t start = block.number * u.block_keys;

    const Scratch s = take_scratch<Scratch>(tiles_);
    const Visibility visible(in_, sequence);
    const Rows k = keys_of(in_, sequence, u.kv_head), v = values_of(in_, sequence, u.kv_head);
    const int64_t block_end = smaller(start + u.block_keys, sequence.keys);
    const int64_t seen_end = larger(start, smaller(block_end, visible.keys));  // keys from here on are padding
    const int64_t padded = round_up(seen_end - start, 2);
    pack_rows<E>(k, start, seen_end, padded, tiles_.key_words, s.room, s.keys);
    pack_rows<E>(v, start, seen_end, padded, tiles_.value_words, s.room, s.values);
    memset(s.grad_k, 0, u.block_keys * tiles_.key_columns * sizeof(float));
    memset(s.grad_v, 0, u.block_keys * tiles_.value_columns * sizeof(float));
    const int64_t kept_keys = E::PAIR == 1 ? u.block_keys : PART_KEYS;
    memset(s.grad_scores - LANES, 0, (LANES + kept_keys * PITCH) * sizeof(float));

    // Tiles in which at least one query sees a key of the block, by the window alone.
    const int64_t first_query = larger(0, start - visible.offset - visible.right);
    const int64_t last_query = smaller(sequence.queries - 1, block_end - 1 - visible.offset + visible.left);
    const bool any = first_query <= last_query && u.tiles > 0;
    const int64_t first_tile = first_query / TILE_QUERIES, last_tile = any ? last_query / TILE_QUERIES : -1;
    const Range all =
        visible.of_all(first_tile * TILE_QUERIES, smaller((last_tile + 1) * TILE_QUERIES, sequence.queries));
    const int64_t spoiled = start < all.first || seen_end > all.last ? clean(s, k, start, seen_end) : 0;
    const int32_t* clean_keys = spoiled ? s.clean_keys : s.keys;
    if (E::PAIR == 2)
      pack_panels<E>(clean_keys, tiles_.key_words, padded, tiles_.key_columns, tiles_.key_columns, s.keys_right);
    const int32_t* keys_right = E::PAIR == 2 ? s.keys_right : clean_keys;

    const bool biased = in_.biased();
    const int64_t line_first = first_tile * TILE_QUERIES + visible.offset - (start + u.block_keys - 1);
    const int64_t line_count = (last_tile + 1 - first_tile) * TILE_QUERIES + u.block_keys;
    for (int64_t member = 0; member < group_; ++member) {
      const int64_t head = u.kv_head * group_ + member;
      if (biased && any) bias_line(in_, sequence.number, head, line_first, line_count, s.line);
      if (biases_.needed() && any) memset(s.grad_line - LANES, 0, (line_count + 2 * LANES) * sizeof(float));
      const Rows q = queries_of(in_, sequence, head), grad_out = gradients_of(sequence, head);
      for (int64_t t = first_tile; t <= last_tile; ++t) {
        Tile tile;
        tile.head = head;
        tile.query = t * TILE_QUERIES;
        tile.last = smaller(tile.query + TILE_QUERIES, sequence.queries);
        tile.key = start;
        tile.block_keys = u.block_keys;
        const Range seen = visible.of_any(tile.query, tile.last), full = visible.of_all(tile.query, tile.last);
        tile.first = larger(start, seen.first & ~1) - start;
        tile.end = smaller(seen_end, seen.last) - start;
        tile.full = {full.first - start, full.last - start};
        tile.line = tile.query + visible.offset - start - line_first;
        const int64_t place = (slot * group_ + member) * tiles_.most_tiles + t;
        tile.grad_q = grad_q_.floats() + place * TILE_QUERIES * tiles_.key_columns;
        if (tile.rows() > 0) tiles_.differentiate(s, visible, sequence, q, grad_out, tile);

        // grad_q: this task's turn comes after that of the blocks before.
        const Range turn = u.turns(in_, t);
        int32_t* ticket = static_cast<int32_t*>(tickets_.data) + place;
        const int32_t first_turn = schedule_.first_turn(u, t);
        const int32_t mine = first_turn + static_cast<int32_t>(block.number - turn.first);
        wait_for(ticket, mine);
        if (block.number == turn.first && tile.rows() <= 0)
          memset(tile.grad_q, 0, TILE_QUERIES * tiles_.key_columns * sizeof(float));
        if (tile.rows() > 0) {
          tiles_.add_grad_q(s, tile, keys_right, block.number == turn.first);
          if (spoiled) tiles_.add_spoiled_keys(s, visible, k, tile, spoiled);
        }
        if (block.number + 1 == turn.last) write_grad_q(q, tile, sequence);
        __atomic_store_n(ticket, mine + 1, __ATOMIC_RELEASE);
      }
      if (biases_.needed())
        biases_.add_line(u.first_block + block.number, member, s.grad_line, any ? line_count : 0, line_first);
    }
    write_grad_k_and_v(s, k, u, start, block_end);
  }

  static void wait_for(const int32_t* ticket, int32_t mine) {
    for (int64_t spins = 0; __atomic_load_n(ticket, __ATOMIC_ACQUIRE) != mine; ++spins) {
      if (spins < 4096) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      } else {
        yield_thread();
      }
    }
  }

  // Lists the spoiled keys of a block, which has masked tiles, and makes them zeros in a copy. Returns how many.
  int64_t clean(const Scratch& s, const Rows& k, int64_t start, int64_t end) const {
    int64_t count = 0;
    for (int64_t j = start; j < end; ++j)
      if (!k.finite(j)) s.spoiled_keys[count++] = static_cast<int32_t>(j);
    if (count) memcpy(s.clean_keys, s.keys, round_up(end - start, 2) * tiles_.key_words * 4);
    for (int64_t n = 0; n < count; ++n)
      memset(s.clean_keys + (s.spoiled_keys[n] - start) * tiles_.key_words, 0, tiles_.key_words * 4);
    return count;
  }

  void write_grad_q(const Rows& q, const Tile& tile, const Sequence& sequence) const {
    for (int64_t i = tile.query; i < tile.last; ++i) {
      float* row = tile.grad_q + (i - tile.query) * tiles_.key_columns;
      for (int64_t d = 0; d < in_.head_dim; ++d) row[d] *= in_.softmax_scale;
      q.turn(row, i, -1.0f);
      write_row(in_.dtype, row, in_.head_dim, in_.grad_q, in_.query_row(sequence, tile.head, i, in_.head_dim));
    }
  }

  void write_grad_k_and_v(const Scratch& s, const Rows& k, const Unit& u, int64_t start, int64_t end) const {
    const float kept = 1.0f / in_.kept_share();
    for (int64_t j = start; j < end; ++j) {
      float* grad_k = s.grad_k + (j - start) * tiles_.key_columns;
      float* grad_v = s.grad_v + (j - start) * tiles_.value_columns;
      for (int64_t d = 0; d < in_.head_dim; ++d) grad_k[d] *= in_.softmax_scale;
      for (int64_t d = 0; d < in_.head_dim_v; ++d) grad_v[d] *= kept;
      k.turn(grad_k, j, -1.0f);
      write_row(in_.dtype, grad_k, in_.head_dim, in_.grad_k, in_.key_row(u.sequence, u.kv_head, j, in_.head_dim));
      write_row(in_.dtype, grad_v, in_.head_dim_v, in_.grad_v, in_.key_row(u.sequence, u.kv_head, j, in_.head_dim_v));
    }
  }

  // A sink is a key without a value: its dS is P (0 - delta).
  void write_grad_sinks() const {
    for (int64_t head = 0; head < in_.heads; ++head) {
      double sum = 0;
      for (int64_t entry = 0; entry < in_.entries; ++entry) {
        const int64_t first = (entry * in_.heads + head) * in_.rows_q;
        for (int64_t row = first; row < first + in_.rows_q; ++row)
          sum -= static_cast<double>(__builtin_expf(in_.sinks[head] - in_.lse[row])) * delta_.floats()[row];
      }
      in_.grad_sinks[head] = static_cast<float>(sum);
    }
  }

  const AttentionBackward& in_;
  int64_t group_;
  Units units_;
  BiasGradients biases_;
  Buffer delta_;
  TileGradients<E> tiles_;
  int64_t in_flight_;
  Schedule schedule_;
  Buffer grad_q_, tickets_;
};

}  // namespace
}  // namespace pynlp
