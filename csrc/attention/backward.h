// Backward: gradients of q, k, v and of what the biases are made of, from q, k, v, out, lse (FlashAttention-2).
//
// A task is a block of keys of one key/value head. It walks over the tiles of queries that see the block, for each
// query head of the group, and keeps grad_k and grad_v to itself:
//
//   P = exp(S - lse)   dV += P^T dO   dS = P * (dO V^T - delta)   dK += dS^T Q   dQ += dS K,   delta = rowsum(dO * out)
//
// grad_q of a tile is summed over the key blocks, by different tasks, always in rising order: each tile has a ticket
// that says whose turn it is. So five products suffice, without atomics, and the bits do not depend on the threads. A
// task waits only for lower tasks, which run or have run. The sums are kept in fp32 for the few heads in flight.
#pragma once

#include "../common/parallel.h"
#include "bias_gradients.h"
#include "dropout.h"
#include "schedule.h"

namespace pynlp {
namespace {

constexpr int64_t PART_KEYS = 64;  // keys of a block at once: their scores and weights stay in the first-level cache
constexpr int64_t PITCH = TILE_QUERIES + LANES;  // of a row of a tile: zeros between rows, for the sums along diagonals

template <class E>
class Backward {
 public:
  explicit Backward(const AttentionBackward& in)
      : in_(in),
        block_keys_(keys_of_block(in, most(in, &Sequence::keys))),
        words_(row_words<E>(in.head_dim)),
        words_v_(row_words<E>(in.head_dim_v)),
        columns_(round_up(in.head_dim, LANES)),
        columns_v_(round_up(in.head_dim_v, LANES)),
        group_(in.kv_heads ? in.heads / in.kv_heads : 0),
        tiles_(tiles_of(most(in, &Sequence::queries))),
        units_(in),
        in_flight_(larger(1, smaller(units_.count(), thread_count()))),
        schedule_(in, units_, in_flight_, tiles_),
        biases_(in, units_),
        delta_(in.entries * in.heads * in.rows_q * sizeof(float)),
        grad_q_(in_flight_ * group_ * tiles_ * TILE_QUERIES * columns_ * sizeof(float)),
        tickets_(in_flight_ * group_ * tiles_ * sizeof(int32_t)) {
    memset(tickets_.data, 0, in_flight_ * group_ * tiles_ * sizeof(int32_t));
  }

  void run() {
    run_tasks<&Backward::prepare>(units_.tiles_of_a_head() * in_.heads, this);
    run_tasks<&Backward::run_task>(units_.blocks(), this);
    if (biases_.needed()) biases_.write();
    if (in_.grad_sinks) write_grad_sinks();
  }

 private:
  struct Scratch {
    int32_t *keys, *values, *clean_keys, *keys_right;  // as rows; without spoiled rows; as a right-hand side
    int32_t *rows, *queries, *queries_right, *grads, *grads_right;  // transposed, and as a right-hand side
    float *scores, *grad_scores, *cap_slopes, *grad_k, *grad_v, *line, *grad_line;
    int32_t *weights, *grad_weights, *grad_weights_right;  // bf16: rows of P and dS, dS as pairs of rows
    float *lse, *delta;
    int32_t *spoiled_keys, *random;
    Scratch(const Backward& b, Arena& arena) {
      const int64_t row = larger(b.words_, b.columns_), row_v = larger(b.words_v_, b.columns_v_);
      const int64_t part = PART_KEYS * PITCH, tile = b.block_keys_ * PITCH;
      keys = arena.take<int32_t>(b.block_keys_ * row);
      values = arena.take<int32_t>(b.block_keys_ * row_v);
      clean_keys = arena.take<int32_t>(b.block_keys_ * row);
      keys_right = arena.take<int32_t>(b.block_keys_ * row);
      rows = arena.take<int32_t>(TILE_QUERIES * larger(row, row_v));
      queries = arena.take<int32_t>(TILE_QUERIES * row);
      queries_right = arena.take<int32_t>(TILE_QUERIES * row);
      grads = arena.take<int32_t>(TILE_QUERIES * row_v);
      grads_right = arena.take<int32_t>(TILE_QUERIES * row_v);
      scores = arena.take<float>(part);
      grad_scores = arena.take<float>(LANES + (E::PAIR == 1 ? tile : part)) + LANES;
      cap_slopes = arena.take<float>(b.in_.softcap > 0 ? part : 0);
      grad_k = arena.take<float>(b.block_keys_ * b.columns_);
      grad_v = arena.take<float>(b.block_keys_ * b.columns_v_);
      const int64_t longest = b.tiles_ * TILE_QUERIES + b.block_keys_ + 2 * LANES;
      line = arena.take<float>(b.in_.biased() ? longest : 0);
      grad_line = arena.take<float>(LANES + (b.biases_.needed() ? longest : 0)) + LANES;
      weights = arena.take<int32_t>(E::PAIR == 2 ? part : 0);
      grad_weights = arena.take<int32_t>(E::PAIR == 2 ? part : 0);
      grad_weights_right = arena.take<int32_t>(E::PAIR == 2 ? tile : 0);
      lse = arena.take<float>(TILE_QUERIES);
      delta = arena.take<float>(TILE_QUERIES);
      spoiled_keys = arena.take<int32_t>(b.block_keys_);
      random = arena.take<int32_t>(b.in_.dropped ? Keeps::size(PART_KEYS, TILE_QUERIES) : 0);
    }
  };

  // One tile of queries against some keys of a block.
  struct Tile {
    int64_t head;         // of the queries
    int64_t query, last;  // queries query .. last - 1
    int64_t key;          // first key of the block
    int64_t block_keys;   // a block's keys, unless it is the last one
    int64_t first, end;   // keys of the block, those that some query sees; first is even
    Range full;           // keys of the block that every query sees
    int64_t line;         // index in the bias line of (first query, first key of the block)
    float* grad_q;        // the sum so far, rows of columns_
    int64_t rows() const { return end - first; }
    bool masked() const { return first < full.first || end > full.last; }
  };

  // delta of one tile of queries; zeros for queries that see no key and so never get a turn.
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

    const Scratch s = take_scratch<Scratch>(*this);
    const Visibility visible(in_, sequence);
    const Rows k = keys_of(in_, sequence, u.kv_head), v = values_of(in_, sequence, u.kv_head);
    const int64_t block_end = smaller(start + u.block_keys, sequence.keys);
    const int64_t seen_end = larger(start, smaller(block_end, visible.keys));  // keys from here on are padding
    const int64_t padded = round_up(seen_end - start, 2);
    pack_rows<E>(k, start, seen_end, padded, s.keys);
    pack_rows<E>(v, start, seen_end, padded, s.values);
    memset(s.grad_k, 0, u.block_keys * columns_ * sizeof(float));
    memset(s.grad_v, 0, u.block_keys * columns_v_ * sizeof(float));
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
    if (E::PAIR == 2) pair_rows<E>(clean_keys, in_.head_dim, padded, s.keys_right);
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
        const int64_t place = (slot * group_ + member) * tiles_ + t;
        tile.grad_q = grad_q_.floats() + place * TILE_QUERIES * columns_;
        if (tile.rows() > 0) differentiate(s, visible, sequence, q, grad_out, tile, biased);

        // grad_q: this task's turn comes after that of the blocks before.
        const Range turn = u.turns(in_, t);
        int32_t* ticket = static_cast<int32_t*>(tickets_.data) + place;
        const int32_t first_turn = schedule_.first_turn(u, t);
        const int32_t mine = first_turn + static_cast<int32_t>(block.number - turn.first);
        wait_for(ticket, mine);
        if (block.number == turn.first && tile.rows() <= 0)
          memset(tile.grad_q, 0, TILE_QUERIES * columns_ * sizeof(float));
        if (tile.rows() > 0) {
          add_grad_q(s, tile, keys_right, block.number == turn.first);
          if (spoiled) add_spoiled_keys(s, visible, k, tile, spoiled);
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

  // Lists the keys of the block that are not finite and zeroes them in a copy. Only where a tile is masked: there a
  // weight of 0 would turn them into NaN for queries that do not see them. add_spoiled_keys adds them for those that
  // do.
  int64_t clean(const Scratch& s, const Rows& k, int64_t start, int64_t end) const {
    int64_t count = 0;
    for (int64_t j = start; j < end; ++j)
      if (!k.finite(j)) s.spoiled_keys[count++] = static_cast<int32_t>(j);
    if (count) memcpy(s.clean_keys, s.keys, round_up(end - start, 2) * words_ * 4);
    for (int64_t n = 0; n < count; ++n) memset(s.clean_keys + (s.spoiled_keys[n] - start) * words_, 0, words_ * 4);
    return count;
  }

  // P and dS of a tile, and what they add to grad_v and grad_k.
  void differentiate(const Scratch& s, const Visibility& visible, const Sequence& sequence, const Rows& q,
                     const Rows& grad_out, const Tile& tile, bool biased) {
    const int64_t queries = tile.last - tile.query;
    int32_t spoiled[TILE_QUERIES];
    int64_t spoiled_count = 0;
    if (tile.masked())
      for (int64_t i = tile.query; i < tile.last; ++i)
        if (!q.finite(i) || !grad_out.finite(i)) spoiled[spoiled_count++] = static_cast<int32_t>(i - tile.query);

    pack_both(q, tile, spoiled, spoiled_count, s.rows, s.queries, s.queries_right);
    pack_both(grad_out, tile, spoiled, spoiled_count, s.rows, s.grads, s.grads_right);

    const int64_t row = in_.statistic(sequence, tile.head, tile.query);
    for (int64_t i = 0; i < TILE_QUERIES; ++i) {
      // Rows that see nothing, and those beyond the end, get a weight of exp2(-inf) = 0.
      const float lse = i < queries ? in_.lse[row + i] : -__builtin_inff();
      s.lse[i] = lse == -__builtin_inff() ? __builtin_inff() : lse * LOG2_E;
      s.delta[i] = i < queries ? delta_.floats()[row + i] : 0.0f;
    }
    Keeps keeps(in_, s.random, TILE_QUERIES);
    for (Tile part = tile; part.first < tile.end; part.first += PART_KEYS) {
      part.end = smaller(part.first + PART_KEYS, tile.end);
      if (in_.dropped) keeps.draw(sequence, tile.head, tile.key + part.first, tile.key + part.end, tile.query);
      differentiate_part(s, visible, sequence, q, grad_out, part, biased, keeps);
      if (spoiled_count) add_spoiled_queries(s, visible, q, grad_out, part, spoiled, spoiled_count);
    }
  }

  // Where dO V^T and then dS of a part are: fp32 keeps those of the whole block, for grad_q.
  static float* grad_scores_of(const Scratch& s, const Tile& part) {
    return s.grad_scores + (E::PAIR == 1 ? part.first * PITCH : 0);
  }

  void differentiate_part(const Scratch& s, const Visibility& visible, const Sequence& sequence, const Rows& q,
                          const Rows& grad_out, const Tile& part, bool biased, const Keeps& keeps) {
    const int64_t queries = part.last - part.query;
    const auto depth = [](int64_t head_dim) { return (head_dim + E::PAIR - 1) / E::PAIR; };
    float* grad_scores = grad_scores_of(s, part);
    prefetch_next(q, part, sequence.queries);
    matmul<E, Into::overwrite>(part.rows(), TILE_QUERIES, depth(in_.head_dim), s.keys + part.first * words_, words_, 1,
                               s.queries, TILE_QUERIES, s.scores, PITCH);
    prefetch_next(grad_out, part, sequence.queries);
    matmul<E, Into::overwrite>(part.rows(), TILE_QUERIES, depth(in_.head_dim_v), s.values + part.first * words_v_,
                               words_v_, 1, s.grads, TILE_QUERIES, grad_scores, PITCH);
    float scale = in_.softmax_scale * LOG2_E;
    if (in_.softcap > 0) {
      cap(s.scores, part.rows(), s.cap_slopes);
      scale = 1;
    }
    const auto weigh = in_.dropped     ? part.masked() ? &Backward::weigh<true, true> : &Backward::weigh<false, true>
                       : part.masked() ? &Backward::weigh<true, false>
                                       : &Backward::weigh<false, false>;
    (this->*weigh)(s, visible, part, scale, biased, keeps);
    if (biases_.needed()) {
      sum_diagonals(grad_scores, part.rows(), TILE_QUERIES, PITCH, s.grad_line + part.line - part.first);
      if (E::PAIR == 1 && in_.softcap > 0) multiply(grad_scores, s.cap_slopes, part.rows());
    }

    prefetch_grad_q(part);
    const void* p = E::PAIR == 1 ? static_cast<void*>(s.scores) : s.weights;
    const void* ds = E::PAIR == 1 ? static_cast<void*>(grad_scores) : s.grad_weights;
    const int64_t pitch = E::PAIR == 1 ? PITCH : TILE_QUERIES / 2;
    const int64_t inner = (queries + E::PAIR - 1) / E::PAIR;
    matmul<E, Into::add>(part.rows(), columns_v_, inner, p, pitch, 1, s.grads_right, columns_v_,
                         s.grad_v + part.first * columns_v_, columns_v_);
    matmul<E, Into::add>(part.rows(), columns_, inner, ds, pitch, 1, s.queries_right, columns_,
                         s.grad_k + part.first * columns_, columns_);
  }

  // Rows of the next tile of queries, and the sums of this one: the share that goes with this part of the block.
  void prefetch_next(const Rows& rows, const Tile& part, int64_t queries) const {
    const int64_t first = part.last + part.first / PART_KEYS * share(part);
    for (int64_t i = first; i < smaller(first + share(part), queries); ++i) rows.prefetch(i);
  }
  void prefetch_grad_q(const Tile& part) const {
    const float* first = part.grad_q + part.first / PART_KEYS * share(part) * columns_;
    for (int64_t i = 0; i < share(part) * columns_; i += 16) __builtin_prefetch(first + i, 0, 2);
  }
  static int64_t share(const Tile& part) { return (TILE_QUERIES * PART_KEYS + part.block_keys - 1) / part.block_keys; }

  // Rows of a tile of queries, transposed, and as the right-hand side of a sum over them; there without the spoiled
  // ones.
  void pack_both(const Rows& from, const Tile& tile, const int32_t* spoiled, int64_t count, int32_t* rows,
                 int32_t* transposed, int32_t* right) const {
    if (E::PAIR == 1) rows = right;
    const int64_t words = row_words<E>(from.head_dim);
    pack_rows<E>(from, tile.query, tile.last, TILE_QUERIES, rows);
    transpose(rows, words, transposed, TILE_QUERIES, TILE_QUERIES, words);
    for (int64_t n = 0; n < count; ++n) memset(rows + spoiled[n] * words, 0, words * 4);
    if (E::PAIR == 2) pair_rows<E>(rows, from.head_dim, TILE_QUERIES, right);
  }

  // Scores become softcap * tanh(score / softcap) * log2(e); slopes are its derivative by the score, 1 - tanh^2.
  void cap(float* scores, int64_t rows, float* slopes) const {
    const Float inner = broadcast(in_.softmax_scale / in_.softcap), outer = broadcast(in_.softcap * LOG2_E);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = r * PITCH; i < r * PITCH + TILE_QUERIES; i += LANES) {
        const Float t = tanh_of(load(scores + i) * inner);
        store(slopes + i, broadcast(1.0f) - t * t);
        store(scores + i, t * outer);
      }
    }
  }

  // scores -> P, without what dropout drops, and grad_scores (dO V^T) -> dS.
  template <bool MASKED, bool DROPOUT>
  void weigh(const Scratch& s, const Visibility& visible, const Tile& tile, float scale, bool biased,
             const Keeps& keeps) const {
    const Float factor = broadcast(scale), kept = broadcast(1.0f / in_.kept_share());
    const int64_t rows = tile.rows();
    const bool sums_biases = biases_.needed();
    float* grad_scores = grad_scores_of(s, tile);
    [[maybe_unused]] int32_t* right = s.grad_weights_right + tile.first / 2 * TILE_QUERIES;
    for (int64_t c = 0; c < TILE_QUERIES; c += LANES) {
      const Float lse = load(s.lse + c), delta = load(s.delta + c);
      const LaneLimits limits(visible, tile.query + c, tile.key + tile.first);
      const float* line = s.line + tile.line - tile.first + c;
      const auto one = [&](int64_t r, Float* p, Float* ds) __attribute__((always_inline)) {
        const int64_t at = r * PITCH + c;
        Float x = load(s.scores + at) * factor;
        if (biased) x += load(line - r);
        Float grad = load(grad_scores + at);
        *p = exp2_of<E::EXP2_DEGREE>(x - lse);
        if constexpr (DROPOUT) {
          const Int pair = keeps.pair(tile.key + tile.first + (r & ~1), c);
          const Float weight = *p;
          grad *= kept;
          *p = r % 2 ? keeps.odd(pair, *p) : keeps.even(pair, *p);
          *ds = weight * ((r % 2 ? keeps.odd(pair, grad) : keeps.even(pair, grad)) - delta);
        } else {
          *ds = *p * (grad - delta);
        }
        if constexpr (MASKED) {
          const Int seen = limits.see(static_cast<int32_t>(r));
          *p = seen ? *p : Float{};
          *ds = seen ? *ds : Float{};
        }
        if (sums_biases) store(grad_scores + at, *ds);  // the biases' gradient is that before the softcap
        if (in_.softcap > 0 && !(E::PAIR == 1 && sums_biases)) *ds *= load(s.cap_slopes + at);
      };
      for (int64_t r = 0; r < rows; r += E::PAIR) {
        Float p, ds;
        one(r, &p, &ds);
        if constexpr (E::PAIR == 1) {
          store(s.scores + r * PITCH + c, p);
          store(grad_scores + r * PITCH + c, ds);
        } else {
#if PYNLP_BF16
          Float p_odd = Float{}, ds_odd = Float{};
          store_bf16(s.weights + (r * TILE_QUERIES + c) / 2, p);
          store_bf16(s.grad_weights + (r * TILE_QUERIES + c) / 2, ds);
          if (r + 1 < rows) {
            one(r + 1, &p_odd, &ds_odd);
            store_bf16(s.weights + ((r + 1) * TILE_QUERIES + c) / 2, p_odd);
            store_bf16(s.grad_weights + ((r + 1) * TILE_QUERIES + c) / 2, ds_odd);
          }
          store(right + r / 2 * TILE_QUERIES + c, bf16_pairs(ds, ds_odd));
#endif
        }
      }
    }
  }

  static void multiply(float* x, const float* y, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = r * PITCH; i < r * PITCH + TILE_QUERIES; i += LANES) store(x + i, load(x + i) * load(y + i));
  }

  void add_grad_q(const Scratch& s, const Tile& tile, const int32_t* keys_right, bool first) const {
    const void* ds = grad_scores_of(s, tile);
    if (E::PAIR == 2) ds = s.grad_weights_right + tile.first / 2 * TILE_QUERIES;
    const int64_t pitch = E::PAIR == 1 ? PITCH : TILE_QUERIES, depth = (tile.rows() + E::PAIR - 1) / E::PAIR;
    const int32_t* keys = keys_right + tile.first / E::PAIR * columns_;
    const int64_t queries = tile.last - tile.query;
    if (first)
      matmul<E, Into::overwrite>(queries, columns_, depth, ds, 1, pitch, keys, columns_, tile.grad_q, columns_);
    else
      matmul<E, Into::add>(queries, columns_, depth, ds, 1, pitch, keys, columns_, tile.grad_q, columns_);
  }

  // P of row r of a part and query i, and dS of key r of the block, as the products read them.
  static float weight(const Scratch& s, int64_t r, int64_t i) {
    if (E::PAIR == 1) return s.scores[r * PITCH + i];
    return bf16_to_float(reinterpret_cast<const uint16_t*>(s.weights)[r * TILE_QUERIES + i]);
  }
  static float grad_weight(const Scratch& s, int64_t key, int64_t i) {
    if (E::PAIR == 1) return s.grad_scores[key * PITCH + i];
    const uint32_t pair = s.grad_weights_right[key / 2 * TILE_QUERIES + i];
    return bf16_to_float(static_cast<uint16_t>(key % 2 ? pair >> 16 : pair));
  }

  void add_spoiled_queries(const Scratch& s, const Visibility& visible, const Rows& q, const Rows& grad_out,
                           const Tile& tile, const int32_t* spoiled, int64_t count) const {
    float query[256], grad[256];
    for (int64_t n = 0; n < count; ++n) {
      const int64_t i = spoiled[n];
      q.read(tile.query + i, query);
      grad_out.read(tile.query + i, grad);
      for (int64_t r = 0; r < tile.rows(); ++r) {
        if (!visible.sees(tile.query + i, tile.key + tile.first + r)) continue;
        float* grad_k = s.grad_k + (tile.first + r) * columns_;
        float* grad_v = s.grad_v + (tile.first + r) * columns_v_;
        for (int64_t d = 0; d < in_.head_dim; ++d) grad_k[d] += grad_weight(s, tile.first + r, i) * query[d];
        for (int64_t d = 0; d < in_.head_dim_v; ++d) grad_v[d] += weight(s, r, i) * grad[d];
      }
    }
  }

  void add_spoiled_keys(const Scratch& s, const Visibility& visible, const Rows& k, const Tile& tile,
                        int64_t count) const {
    float key[256];
    for (int64_t n = 0; n < count; ++n) {
      const int64_t place = s.spoiled_keys[n] - tile.key;
      if (place < tile.first || place >= tile.end) continue;
      k.read(s.spoiled_keys[n], key);
      for (int64_t i = 0; i < tile.last - tile.query; ++i) {
        if (!visible.sees(tile.query + i, s.spoiled_keys[n])) continue;
        for (int64_t d = 0; d < in_.head_dim; ++d) tile.grad_q[i * columns_ + d] += grad_weight(s, place, i) * key[d];
      }
    }
  }

  void write_grad_q(const Rows& q, const Tile& tile, const Sequence& sequence) const {
    for (int64_t i = tile.query; i < tile.last; ++i) {
      float* row = tile.grad_q + (i - tile.query) * columns_;
      for (int64_t d = 0; d < in_.head_dim; ++d) row[d] *= in_.softmax_scale;
      q.turn(row, i, -1.0f);
      write_row(in_.dtype, row, in_.head_dim, in_.grad_q, in_.query_row(sequence, tile.head, i, in_.head_dim));
    }
  }

  void write_grad_k_and_v(const Scratch& s, const Rows& k, const Unit& u, int64_t start, int64_t end) const {
    const float kept = 1.0f / in_.kept_share();
    for (int64_t j = start; j < end; ++j) {
      float* grad_k = s.grad_k + (j - start) * columns_;
      float* grad_v = s.grad_v + (j - start) * columns_v_;
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
  int64_t block_keys_, words_, words_v_, columns_, columns_v_, group_, tiles_;
  Units units_;
  int64_t in_flight_;
  Schedule schedule_;
  BiasGradients biases_;
  Buffer delta_, grad_q_, tickets_;
};

}  // namespace
}  // namespace pynlp
