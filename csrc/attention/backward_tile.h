// P and dS of a tile of queries against a block of keys, and what they add to the gradients of q, k and v:
//
//   P = exp(S - lse)   dV += P^T dO   dS = P * (dO V^T - delta)   dK += dS^T Q   dQ += dS K
//
// In a masked tile a weight of 0 would turn a row that is not finite into NaN, also for those that do not see it. Such
// rows of queries and of keys, the spoiled ones, are packed as zeros and added apart, where they are seen.
#pragma once

#include "../simd/memory.h"
#include "bias_gradients.h"
#include "dropout.h"
#include "rows.h"
#include "units.h"

namespace pynlp {
namespace {

constexpr int64_t PART_KEYS = 64;  // keys of a block at once: their scores and weights stay in the first-level cache
constexpr int64_t PITCH = TILE_QUERIES + LANES;  // of a row of a tile: zeros between rows, for the sums along diagonals

// One tile of queries against some keys of a block.
struct Tile {
  int64_t head;         // of the queries
  int64_t query, last;  // queries query .. last - 1
  int64_t key;          // first key of the block
  int64_t block_keys;   // a block's keys, unless it is the last one
  int64_t first, end;   // keys of the block, those that some query sees; first is even
  Range full;           // keys of the block that every query sees
  int64_t line;         // index in the bias line of (first query, first key of the block)
  float* grad_q;        // the sum so far, rows of key_columns
  int64_t rows() const { return end - first; }
  bool masked() const { return first < full.first || end > full.last; }
};

template <class E>
class TileGradients {
 public:
  const int64_t key_words, value_words, key_columns, value_columns;  // of a packed row, and of a row of gradients
  const int64_t most_tiles;                                          // tiles of the longest sequence

  TileGradients(const AttentionBackward& in, const float* delta, bool sums_biases)
      : key_words(row_words<E>(in.head_dim)),
        value_words(row_words<E>(in.head_dim_v)),
        key_columns(round_up(in.head_dim, LANES)),
        value_columns(round_up(in.head_dim_v, LANES)),
        most_tiles(tiles_of(most(in, &Sequence::queries))),
        in_(in),
        block_keys_(keys_of_block(in, most(in, &Sequence::keys))),
        delta_(delta),
        sums_biases_(sums_biases) {}

  struct Scratch {
    int32_t *keys, *values, *clean_keys, *keys_right;  // as rows; without spoiled rows; as a right-hand side
    int32_t *rows, *queries, *queries_right, *grads, *grads_right;  // transposed, and as a right-hand side
    float *room, *scores, *grad_scores, *cap_slopes, *grad_k, *grad_v, *line, *grad_line;
    int32_t *weights, *grad_weights, *grad_weights_right;  // bf16: rows of P and dS, dS as pairs of rows
    float *lse, *delta;
    int32_t *spoiled_keys, *random;
    Scratch(const TileGradients& t, Arena& arena) {
      const int64_t row = larger(t.key_words, t.key_columns), row_v = larger(t.value_words, t.value_columns);
      const int64_t part = PART_KEYS * PITCH, tile = t.block_keys_ * PITCH;
      keys = arena.take<int32_t>(t.block_keys_ * row);
      values = arena.take<int32_t>(t.block_keys_ * row_v);
      clean_keys = arena.take<int32_t>(t.block_keys_ * row);
      keys_right = arena.take<int32_t>(t.block_keys_ * row);
      rows = arena.take<int32_t>(TILE_QUERIES * larger(row, row_v));
      queries = arena.take<int32_t>(TILE_QUERIES * row);
      queries_right = arena.take<int32_t>(TILE_QUERIES * row);
      grads = arena.take<int32_t>(TILE_QUERIES * row_v);
      grads_right = arena.take<int32_t>(TILE_QUERIES * row_v);
      room = arena.take<float>(E::PAIR == 2 ? 256 : 0);
      scores = arena.take<float>(part);
      grad_scores = arena.take<float>(LANES + (E::PAIR == 1 ? tile : part)) + LANES;
      cap_slopes = arena.take<float>(t.in_.softcap > 0 ? part : 0);
      grad_k = arena.take<float>(t.block_keys_ * t.key_columns);
      grad_v = arena.take<float>(t.block_keys_ * t.value_columns);
      const int64_t longest = t.most_tiles * TILE_QUERIES + t.block_keys_ + 2 * LANES;
      line = arena.take<float>(t.in_.biased() ? longest : 0);
      grad_line = arena.take<float>(LANES + (t.sums_biases_ ? longest : 0)) + LANES;
      weights = arena.take<int32_t>(E::PAIR == 2 ? part : 0);
      grad_weights = arena.take<int32_t>(E::PAIR == 2 ? part : 0);
      grad_weights_right = arena.take<int32_t>(E::PAIR == 2 ? tile : 0);
      lse = arena.take<float>(TILE_QUERIES);
      delta = arena.take<float>(TILE_QUERIES);
      spoiled_keys = arena.take<int32_t>(t.block_keys_);
      random = arena.take<int32_t>(t.in_.dropped ? Keeps::size(PART_KEYS, TILE_QUERIES) : 0);
    }
  };

  // Computes P and dS of a tile, and adds to grad_k and grad_v of the block.
  void differentiate(const Scratch& s, const Visibility& visible, const Sequence& sequence, const Rows& q,
                     const Rows& grad_out, const Tile& tile) const {
    const int64_t queries = tile.last - tile.query;
    int32_t spoiled[TILE_QUERIES];
    int64_t spoiled_count = 0;
    if (tile.masked())
      for (int64_t i = tile.query; i < tile.last; ++i)
        if (!q.finite(i) || !grad_out.finite(i)) spoiled[spoiled_count++] = static_cast<int32_t>(i - tile.query);

    pack_both(q, tile, spoiled, spoiled_count, s, s.queries, s.queries_right);
    pack_both(grad_out, tile, spoiled, spoiled_count, s, s.grads, s.grads_right);

    const int64_t row = in_.statistic(sequence, tile.head, tile.query);
    for (int64_t i = 0; i < TILE_QUERIES; ++i) {
      // Rows that see nothing, and those beyond the end, get a weight of exp(-inf) = 0.
      const float lse = i < queries ? in_.lse[row + i] : -__builtin_inff();
      s.lse[i] = lse == -__builtin_inff() ? __builtin_inff() : lse;
      s.delta[i] = i < queries ? delta_[row + i] : 0.0f;
    }
    Keeps keeps(in_, s.random, TILE_QUERIES);
    for (Tile part = tile; part.first < tile.end; part.first += PART_KEYS) {
      part.end = smaller(part.first + PART_KEYS, tile.end);
      if (in_.dropped) keeps.draw(sequence, tile.head, tile.key + part.first, tile.key + part.end, tile.query);
      differentiate_part(s, visible, sequence, q, grad_out, part, keeps);
      if (spoiled_count) add_spoiled_queries(s, visible, q, grad_out, part, spoiled, spoiled_count);
    }
  }

  // Adds dS K of the block to the tile's grad_q, or begins the sum with it.
  void add_grad_q(const Scratch& s, const Tile& tile, const int32_t* keys_right, bool first) const {
    const void* ds = grad_scores_of(s, tile);
    if (E::PAIR == 2) ds = s.grad_weights_right + tile.first / 2 * TILE_QUERIES;
    const int64_t pitch = E::PAIR == 1 ? PITCH : TILE_QUERIES, depth = (tile.rows() + E::PAIR - 1) / E::PAIR;
    const int32_t* keys = keys_right + tile.first / E::PAIR * key_columns;
    const int64_t queries = tile.last - tile.query;
    if (first)
      matmul<E, Into::overwrite>(queries, key_columns, depth, ds, 1, pitch, keys, key_columns, tile.grad_q,
                                 key_columns);
    else
      matmul<E, Into::add>(queries, key_columns, depth, ds, 1, pitch, keys, key_columns, tile.grad_q, key_columns);
  }

  // Adds what the spoiled keys, which `keys_right` holds as zeros, give the queries that see them.
  void add_spoiled_keys(const Scratch& s, const Visibility& visible, const Rows& k, const Tile& tile,
                        int64_t count) const {
    float key[256];
    for (int64_t n = 0; n < count; ++n) {
      const int64_t place = s.spoiled_keys[n] - tile.key;
      if (place < tile.first || place >= tile.end) continue;
      k.read(s.spoiled_keys[n], key);
      for (int64_t i = 0; i < tile.last - tile.query; ++i) {
        if (!visible.sees(tile.query + i, s.spoiled_keys[n])) continue;
        for (int64_t d = 0; d < in_.head_dim; ++d)
          tile.grad_q[i * key_columns + d] += grad_weight(s, place, i) * key[d];
      }
    }
  }

 private:
  // Where dO V^T of a part is, and then dS. In fp32 that of the whole block is kept, for grad_q.
  static float* grad_scores_of(const Scratch& s, const Tile& part) {
    return s.grad_scores + (E::PAIR == 1 ? part.first * PITCH : 0);
  }

  void differentiate_part(const Scratch& s, const Visibility& visible, const Sequence& sequence, const Rows& q,
                          const Rows& grad_out, const Tile& part, const Keeps& keeps) const {
    const int64_t queries = part.last - part.query;
    const auto depth = [](int64_t head_dim) { return (head_dim + E::PAIR - 1) / E::PAIR; };
    float* grad_scores = grad_scores_of(s, part);
    prefetch_next(q, part, sequence.queries);
    matmul_in_sums<E, 128>(part.rows(), TILE_QUERIES, depth(in_.head_dim), s.keys + part.first * key_words, key_words,
                           s.queries, TILE_QUERIES, s.scores, PITCH);
    prefetch_next(grad_out, part, sequence.queries);
    matmul_in_sums<E, 128>(part.rows(), TILE_QUERIES, depth(in_.head_dim_v), s.values + part.first * value_words,
                           value_words, s.grads, TILE_QUERIES, grad_scores, PITCH);
    float scale = in_.softmax_scale;
    if (in_.softcap > 0) {
      cap(s.scores, part.rows(), s.cap_slopes);
      scale = 1;
    }
    if (in_.dropped)
      part.masked() ? weigh<true, true>(s, visible, part, scale, keeps)
                    : weigh<false, true>(s, visible, part, scale, keeps);
    else
      part.masked() ? weigh<true, false>(s, visible, part, scale, keeps)
                    : weigh<false, false>(s, visible, part, scale, keeps);
    if (sums_biases_) {
      sum_diagonals(grad_scores, part.rows(), TILE_QUERIES, PITCH, s.grad_line + part.line - part.first);
      if (E::PAIR == 1 && in_.softcap > 0) multiply(grad_scores, s.cap_slopes, part.rows());
    }

    prefetch_grad_q(part);
    const void* p = E::PAIR == 1 ? static_cast<void*>(s.scores) : s.weights;
    const void* ds = E::PAIR == 1 ? static_cast<void*>(grad_scores) : s.grad_weights;
    const int64_t pitch = E::PAIR == 1 ? PITCH : TILE_QUERIES / 2;
    const int64_t inner = (queries + E::PAIR - 1) / E::PAIR;
    matmul<E, Into::add>(part.rows(), value_columns, inner, p, pitch, 1, s.grads_right, value_columns,
                         s.grad_v + part.first * value_columns, value_columns);
    matmul<E, Into::add>(part.rows(), key_columns, inner, ds, pitch, 1, s.queries_right, key_columns,
                         s.grad_k + part.first * key_columns, key_columns);
  }

  // Each part of the block fetches its share: of the next tile's rows, and of the sums of this one.
  void prefetch_next(const Rows& rows, const Tile& part, int64_t queries) const {
    const int64_t first = part.last + part.first / PART_KEYS * share(part);
    for (int64_t i = first; i < smaller(first + share(part), queries); ++i) rows.prefetch(i);
  }
  void prefetch_grad_q(const Tile& part) const {
    const float* first = part.grad_q + part.first / PART_KEYS * share(part) * key_columns;
    for (int64_t i = 0; i < share(part) * key_columns; i += 16) __builtin_prefetch(first + i, 0, 2);
  }
  static int64_t share(const Tile& part) { return (TILE_QUERIES * PART_KEYS + part.block_keys - 1) / part.block_keys; }

  // Packs the rows of a tile of queries as columns, and as the right-hand side of a sum over them, where spoiled ones
  // are zeros.
  void pack_both(const Rows& from, const Tile& tile, const int32_t* spoiled, int64_t count, const Scratch& s,
                 int32_t* transposed, int32_t* right) const {
    int32_t* rows = E::PAIR == 1 ? right : s.rows;
    const int64_t words = row_words<E>(from.columns);
    pack_rows<E>(from, tile.query, tile.last, TILE_QUERIES, words, s.room, rows);
    transpose(rows, words, transposed, TILE_QUERIES, TILE_QUERIES, words);
    for (int64_t n = 0; n < count; ++n) memset(rows + spoiled[n] * words, 0, words * 4);
    const int64_t columns = round_up(from.columns, LANES);
    if (E::PAIR == 2) pack_panels<E>(rows, words, TILE_QUERIES, columns, columns, right);
  }

  // Scores become softcap * tanh(score / softcap); slopes are its derivative by the score, 1 - tanh^2.
  void cap(float* scores, int64_t rows, float* slopes) const {
    const Float inner = broadcast(in_.softmax_scale / in_.softcap), outer = broadcast(in_.softcap);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = r * PITCH; i < r * PITCH + TILE_QUERIES; i += LANES) {
        const Float t = tanh_of(load(scores + i) * inner);
        store(slopes + i, broadcast(1.0f) - t * t);
        store(scores + i, t * outer);
      }
    }
  }

  // Turns scores into P, without what dropout drops, and grad_scores (dO V^T) into dS.
  template <bool MASKED, bool DROPOUT>
  __attribute__((noinline)) void weigh(const Scratch& s, const Visibility& visible, const Tile& tile, float scale,
                                       const Keeps& keeps) const {
    const Float factor = broadcast(scale), kept = broadcast(1.0f / in_.kept_share());
    const int64_t rows = tile.rows();
    const bool biased = in_.biased(), sums_biases = sums_biases_;
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
        *p = exp_of<E::EXP_DEGREE>(x - lse);
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

  // Adds what the spoiled queries, which the right-hand sides hold as zeros, give the keys that they see.
  void add_spoiled_queries(const Scratch& s, const Visibility& visible, const Rows& q, const Rows& grad_out,
                           const Tile& tile, const int32_t* spoiled, int64_t count) const {
    float query[256], grad[256];
    for (int64_t n = 0; n < count; ++n) {
      const int64_t i = spoiled[n];
      q.read(tile.query + i, query);
      grad_out.read(tile.query + i, grad);
      for (int64_t r = 0; r < tile.rows(); ++r) {
        if (!visible.sees(tile.query + i, tile.key + tile.first + r)) continue;
        float* grad_k = s.grad_k + (tile.first + r) * key_columns;
        float* grad_v = s.grad_v + (tile.first + r) * value_columns;
        for (int64_t d = 0; d < in_.head_dim; ++d) grad_k[d] += grad_weight(s, tile.first + r, i) * query[d];
        for (int64_t d = 0; d < in_.head_dim_v; ++d) grad_v[d] += weight(s, r, i) * grad[d];
      }
    }
  }

  const AttentionBackward& in_;
  const int64_t block_keys_;  // at most
  const float* const delta_;  // (entries, heads, rows_q): rowsum(dO * out)
  const bool sums_biases_;    // whether the line of dS by distance is wanted
};

}  // namespace
}  // namespace pynlp
