// Forward: out = softmax(scores) v, one pass over the keys with a running maximum (FlashAttention-2, arXiv 2307.08691).
//
// A task is a block of queries of one head. Queries lie in the lanes, so the scores of a tile are
// s[key][query] = K Q^T, their maximum and sum run down the rows, and out[d][query] += V^T P needs no transposition.
#pragma once

#include "../common/parallel.h"
#include "../simd/memory.h"
#include "dropout.h"
#include "rows.h"
#include "visibility.h"

namespace pynlp {
namespace {

constexpr int64_t QUERIES = TILE_VECTORS * LANES;  // of a tile

template <class E>
class Forward {
 public:
  explicit Forward(const AttentionForward& in)
      : in_(in),
        block_keys_(in.head_dim > 128 ? 64 : 128),
        block_queries_(queries_of_block(in)),
        words_(row_words<E>(in.head_dim)),
        columns_(round_up(in.head_dim_v, LANES)),
        blocks_(count_blocks(in, block_queries_) * sizeof(Block)) {
    // Under a causal mask the last blocks of a sequence take longest: they come first.
    Block* next = static_cast<Block*>(blocks_.data);
    for (int64_t n = most(in, &Sequence::queries) / block_queries_; n >= 0; --n)
      for (int64_t b = 0; b < in.batch; ++b)
        if (n * block_queries_ < in.sequence(b).queries && !few_queries(in, in.sequence(b)))
          *next++ = {b, n * block_queries_};
    block_count_ = next - static_cast<Block*>(blocks_.data);
    longest_ = most(in, &Sequence::keys);
  }

  void run() const {
    if (block_count_ == 0) return;
    run_tasks<&Forward::run_task>(block_count_ * in_.heads, operations(in_), this);
  }

 private:
  struct Block {
    int64_t sequence, first_query;
  };

  static int64_t count_blocks(const AttentionInputs& in, int64_t queries) {
    int64_t count = 0;
    for (int64_t b = 0; b < in.batch; ++b)
      if (!few_queries(in, in.sequence(b))) count += (in.sequence(b).queries + queries - 1) / queries;
    return count;
  }

  // A longer block packs its keys for more queries; a shorter one gives more tasks. The result is the same.
  static int64_t queries_of_block(const AttentionInputs& in) {
    const int64_t head_dim = larger(in.head_dim, in.head_dim_v);
    int64_t queries = head_dim > 128 ? 128 : head_dim > 64 ? 256 : 512;
    while (queries > 2 * QUERIES && queries > 32 && in.heads * count_blocks(in, queries) < 4 * thread_count())
      queries /= 2;
    return queries;
  }

  struct Scratch {
    int32_t *queries, *rows, *keys, *values;  // packed
    float *room, *scores, *out, *maximum, *sum, *line;
    int32_t *weights, *random;
    int32_t* spoiled;  // keys of the block whose value row is not finite: see pack_block
    Scratch(const Forward& f, Arena& arena) {
      const int64_t longest = larger(f.block_keys_, QUERIES);
      queries = arena.take<int32_t>(f.block_queries_ * f.words_);
      rows = arena.take<int32_t>(longest * larger(f.words_, f.columns_));
      keys = arena.take<int32_t>(f.block_keys_ * f.words_);
      values = arena.take<int32_t>(f.block_keys_ * f.columns_);
      room = arena.take<float>(E::PAIR == 2 ? 256 : 0);
      scores = arena.take<float>(f.block_keys_ * QUERIES);
      weights = arena.take<int32_t>(f.block_keys_ * QUERIES);
      random = arena.take<int32_t>(f.in_.dropped ? Keeps::size(f.block_keys_, QUERIES) : 0);
      out = arena.take<float>(f.block_queries_ * f.columns_);
      maximum = arena.take<float>(f.block_queries_);
      sum = arena.take<float>(f.block_queries_);
      spoiled = arena.take<int32_t>(f.block_keys_);
      line = arena.take<float>(f.in_.biased() ? f.longest_ + f.block_queries_ + 2 * QUERIES : 0);
    }
  };

  void run_task(int64_t task) const {
    const Block block = static_cast<const Block*>(blocks_.data)[task / in_.heads];
    const Sequence sequence = in_.sequence(block.sequence);
    const int64_t head = task % in_.heads, kv_head = head / (in_.heads / in_.kv_heads);
    const int64_t first = block.first_query, last = smaller(first + block_queries_, sequence.queries);

    const Scratch s = take_scratch<Scratch>(*this);
    const Visibility visible(in_, sequence);
    const Rows q = queries_of(in_, sequence, head), k = keys_of(in_, sequence, kv_head);
    const Rows v = values_of(in_, sequence, kv_head);

    const Range keys = visible.of_any(first, last);
    for (int64_t i = first; i < last; i += QUERIES) {
      prefetch_share(k, v, keys.first, keys, i - first, last - first);
      for (int64_t next = i + QUERIES; next < smaller(i + 2 * QUERIES, last); ++next) q.prefetch(next);
      pack_columns<E>(q, i, smaller(i + QUERIES, last), QUERIES, words_, s.room, s.rows,
                      s.queries + (i - first) * words_, QUERIES);
    }
    const int64_t padded = round_up(last - first, QUERIES);
    memset(s.out, 0, padded * columns_ * sizeof(float));
    const float sink = in_.sinks ? in_.sinks[head] : -__builtin_inff();  // a key seen before all others
    for (int64_t i = 0; i < padded; ++i) {
      s.maximum[i] = sink;
      s.sum[i] = sink == -__builtin_inff() ? 0.0f : 1.0f;
    }

    // Line entry 0 is the distance of the first query to the key after the last one.
    const int64_t line_first = first + visible.offset - keys.last - 1;
    const bool biased = in_.biased();
    if (biased && !keys.empty())
      bias_line(in_, sequence.number, head, line_first, padded + keys.last - keys.first + 3, s.line);

    Keeps keeps(in_, s.random, QUERIES);
    for (int64_t start = keys.first / block_keys_ * block_keys_; start < keys.last; start += block_keys_) {
      const Range some{larger(start, keys.first & ~1), smaller(start + block_keys_, keys.last)};
      const int64_t spoiled = pack_block(s, visible, k, v, some, {first, last});
      for (int64_t i = first; i < last; i += QUERIES) {
        prefetch_share(k, v, start + block_keys_, keys, i - first, last - first);
        const int64_t end = smaller(i + QUERIES, last);
        const Range any = visible.of_any(i, end), all = visible.of_all(i, end);
        const Range tile{larger(some.first, any.first & ~1), smaller(some.last, any.last)};
        if (tile.empty()) continue;
        const bool masked = tile.first < all.first || tile.last > all.last;
        const float* line = biased ? s.line + (i + visible.offset - tile.first - line_first) : nullptr;
        if (in_.dropped) keeps.draw(sequence, head, tile.first, tile.last, i);
        attend(s, visible, k, tile, some.first, i, i - first, masked, line, keeps);
        if (spoiled) add_spoiled(s, visible, v, tile, i, i - first, spoiled);
      }
    }
    for (int64_t i = first; i < last; i += QUERIES) finish(s, sequence, head, i, smaller(i + QUERIES, last), i - first);
  }

  // Of the block of keys that starts at `start`, the part that goes with queries slot .. slot + QUERIES of `queries`:
  // spread over the work on the block before, its loads cost nothing.
  void prefetch_share(const Rows& k, const Rows& v, int64_t start, Range keys, int64_t slot, int64_t queries) const {
    const int64_t last = smaller(keys.last, start + smaller(slot + QUERIES, queries) * block_keys_ / queries);
    for (int64_t j = start + slot * block_keys_ / queries; j < last; ++j) {
      k.prefetch(j);
      v.prefetch(j);
    }
  }

  // Packs keys and values `block`. Where a tile is masked, a weight of 0 would turn a NaN or an infinity in a value row
  // into NaN for queries that do not see it: such rows are packed as zeros and listed. Returns how many.
  int64_t pack_block(const Scratch& s, const Visibility& visible, const Rows& k, const Rows& v, Range block,
                     Range queries) const {
    const int64_t padded = round_up(block.last - block.first, 2);
    if (!k.in_place(E::PAIR)) pack_rows<E>(k, block.first, block.last, padded, words_, s.room, s.keys);
    int64_t spoiled = 0;
    const Range all = visible.of_all(queries.first, queries.last);
    if (block.first < all.first || block.last > all.last)
      for (int64_t j = block.first; j < block.last; ++j)
        if (!v.finite(j)) s.spoiled[spoiled++] = static_cast<int32_t>(j);
    if constexpr (E::PAIR == 1) {
      pack_rows<E>(v, block.first, block.last, padded, columns_, s.room, s.values);
      for (int64_t n = 0; n < spoiled; ++n) memset(s.values + (s.spoiled[n] - block.first) * columns_, 0, columns_ * 4);
    } else {
      static const uint16_t zeros[256] = {};
      const int32_t* next = s.spoiled;
      const auto row = [&](int64_t j) {
        const bool skip = j >= block.last || (next < s.spoiled + spoiled && *next == j && next++);
        return skip ? zeros : v.halves(j);
      };
      for (int64_t j = block.first; j < block.last; j += 2) {
        const uint16_t* even = row(j);
        pack_pair(even, row(j + 1), in_.head_dim_v, columns_, s.values + (j - block.first) / 2 * columns_);
      }
    }
    return spoiled;
  }

  // One tile: scores, softmax and the weighted sum of the values. `slot` is the tile's first query in the scratch.
  void attend(const Scratch& s, const Visibility& visible, const Rows& k, Range tile, int64_t block_first,
              int64_t query, int64_t slot, bool masked, const float* line, const Keeps& keeps) const {
    const int64_t rows = tile.last - tile.first, skipped = tile.first - block_first;
    // Keys are read where they are, unless they must be turned or widened first.
    const bool in_place = k.in_place(E::PAIR);
    const int32_t* keys = in_place ? k.words(tile.first, E::PAIR) : s.keys + skipped * words_;
    matmul_in_sums<E, 128>(rows, QUERIES, (in_.head_dim + E::PAIR - 1) / E::PAIR, keys,
                           in_place ? k.stride / E::PAIR : words_, s.queries + slot * words_, QUERIES, s.scores,
                           QUERIES);
    float scale = in_.softmax_scale;
    if (in_.softcap > 0) {
      cap(s.scores, rows, in_.softmax_scale / in_.softcap, in_.softcap);
      scale = 1;
    }
    if (masked) {
      mask(s.scores, rows, scale, line, visible, query, tile.first);
      scale = 1;
      line = nullptr;
    }
    float rescale[QUERIES];
    if (in_.dropped)
      softmax<true>(s, rows, slot, scale, line, rescale, keeps, tile.first);
    else
      softmax<false>(s, rows, slot, scale, line, rescale, keeps, tile.first);
    const int64_t pair_skipped = skipped / E::PAIR * columns_;
    const void* weights = E::PAIR == 1 ? static_cast<void*>(s.scores) : s.weights;
    matmul<E, Into::scale_and_add>(in_.head_dim_v, QUERIES, (rows + E::PAIR - 1) / E::PAIR, s.values + pair_skipped, 1,
                                   columns_, weights, QUERIES, s.out + slot * columns_, QUERIES, rescale);
  }

  static void cap(float* scores, int64_t rows, float inner, float outer) {
    for (int64_t i = 0; i < rows * QUERIES; i += LANES)
      store(scores + i, tanh_of(load(scores + i) * broadcast(inner)) * broadcast(outer));
  }

  // scores * scale + line[query - key], -inf where hidden. The line is counted from the tile's first query and key.
  static void mask(float* scores, int64_t rows, float scale, const float* line, const Visibility& visible,
                   int64_t query, int64_t key) {
    const Float factor = broadcast(scale), hidden = broadcast(-__builtin_inff());
    for (int v = 0; v < TILE_VECTORS; ++v) {
      const LaneLimits limits(visible, query + v * LANES, key);
      for (int64_t r = 0; r < rows; ++r) {
        float* p = scores + r * QUERIES + v * LANES;
        Float x = load(p) * factor;
        if (line) x += load(line - r + v * LANES);
        store(p, limits.see(static_cast<int32_t>(r)) ? x : hidden);
      }
    }
  }

  // scores -> weights exp(scores * scale + line - maximum); rescale is what the sums so far are to be multiplied by.
  // Two rows at a time, each with its own running maximum and sum: one alone would wait for its last instruction.
  // Dropout takes weights out of the product, not out of their sum.
  template <bool DROPOUT>
  void softmax(const Scratch& s, int64_t rows, int64_t slot, float scale, const float* line, float* rescale,
               const Keeps& keeps, int64_t key) const {
    constexpr int V = TILE_VECTORS;
    if (!line && scale < 0) negate(s.scores, rows, &scale);  // the maximum is taken before the scale
    const Float nothing = broadcast(-__builtin_inff());
    Float factor = broadcast(scale), even[V], odd[V], pivot[V];
    for (int v = 0; v < V; ++v) even[v] = odd[v] = nothing;
    const auto score = [&](int64_t r, int v) __attribute__((always_inline)) {
      float* p = s.scores + r * QUERIES + v * LANES;
      Float x = load(p);
      if (line) store(p, x = x * factor + load(line - r + v * LANES));
      return x;
    };
    for (int64_t r = 0; r + 1 < rows; r += 2) {
      for (int v = 0; v < V; ++v) even[v] = maximum(even[v], score(r, v));
      for (int v = 0; v < V; ++v) odd[v] = maximum(odd[v], score(r + 1, v));
    }
    if (rows % 2)
      for (int v = 0; v < V; ++v) even[v] = maximum(even[v], score(rows - 1, v));
    if (line) factor = broadcast(1.0f);
    for (int v = 0; v < V; ++v) {
      const Float before = load(s.maximum + slot + v * LANES);
      const Float best = maximum(before, maximum(even[v], odd[v]) * factor);
      pivot[v] = best == nothing ? Float{} : best;  // keeps -inf - -inf out of rows that saw no key yet
      store(s.maximum + slot + v * LANES, best);
      store(rescale + v * LANES, exp_of<6>(before - pivot[v]));
      even[v] = odd[v] = Float{};
    }
    int64_t r = 0;
    for (; r + 1 < rows; r += 2) {
      float* p = s.scores + r * QUERIES;
      for (int v = 0; v < V; ++v) {
        Float a = exp_of<E::EXP_DEGREE>(load(p + v * LANES) * factor - pivot[v]);
        Float b = exp_of<E::EXP_DEGREE>(load(p + QUERIES + v * LANES) * factor - pivot[v]);
        even[v] += a;
        odd[v] += b;
        if constexpr (DROPOUT) {
          const Int pair = keeps.pair(key + r, v * LANES);
          a = keeps.even(pair, a);
          b = keeps.odd(pair, b);
        }
        store_weights(s, r, v, a, b);
      }
    }
    if (r < rows) {
      for (int v = 0; v < V; ++v) {
        Float a = exp_of<E::EXP_DEGREE>(load(s.scores + r * QUERIES + v * LANES) * factor - pivot[v]);
        even[v] += a;
        if constexpr (DROPOUT) a = keeps.even(keeps.pair(key + r, v * LANES), a);
        store_weights(s, r, v, a, Float{});  // block_keys_ is even: there is room for a row of zeros
      }
    }
    for (int v = 0; v < V; ++v) {
      float* sum = s.sum + slot + v * LANES;
      store(sum, load(sum) * load(rescale + v * LANES) + (even[v] + odd[v]));
    }
  }

  // The weights of rows r and r + 1, as the right-hand side of the sum over keys.
  static void store_weights(const Scratch& s, int64_t r, int v, Float even, Float odd) {
#if PYNLP_BF16
    if constexpr (E::PAIR == 2) {
      store(s.weights + r / 2 * QUERIES + v * LANES, bf16_pairs(even, odd));
      return;
    }
#endif
    store(s.scores + r * QUERIES + v * LANES, even);
    store(s.scores + (r + 1) * QUERIES + v * LANES, odd);
  }

  static void negate(float* scores, int64_t rows, float* scale) {
    for (int64_t i = 0; i < rows * QUERIES; i += LANES) store(scores + i, -load(scores + i));
    *scale = -*scale;
  }

  // Adds the value rows that pack_block left out, for the queries that see them.
  void add_spoiled(const Scratch& s, const Visibility& visible, const Rows& v, Range tile, int64_t query, int64_t slot,
                   int64_t count) const {
    float values[256];
    for (int64_t n = 0; n < count; ++n) {
      const int64_t key = s.spoiled[n], row = key - tile.first;
      if (key < tile.first || key >= tile.last) continue;
      v.read(key, values);
      for (int64_t i = 0; i < QUERIES; ++i) {
        if (!visible.sees(query + i, key)) continue;
        float weight;
        if constexpr (E::PAIR == 1) {
          weight = s.scores[row * QUERIES + i];
        } else {
          const uint32_t word = s.weights[row / 2 * QUERIES + i];
          weight = bf16_to_float(static_cast<uint16_t>(row % 2 ? word >> 16 : word));
        }
        for (int64_t d = 0; d < in_.head_dim_v; ++d) s.out[slot * columns_ + d * QUERIES + i] += weight * values[d];
      }
    }
  }

  // Normalises queries first .. last - 1 and writes their rows of out and lse.
  void finish(const Scratch& s, const Sequence& sequence, int64_t head, int64_t first, int64_t last,
              int64_t slot) const {
    float* out = s.out + slot * columns_;
    const Float kept = broadcast(in_.kept_share());
    for (int v = 0; v < TILE_VECTORS; ++v) {
      const Float sum = load(s.sum + slot + v * LANES);
      const Float inverse = sum == Float{} ? Float{} : broadcast(1.0f) / (sum * kept);
      for (int64_t d = 0; d < in_.head_dim_v; ++d) {
        float* p = out + d * QUERIES + v * LANES;
        store(p, load(p) * inverse);
      }
    }
    float* rows = reinterpret_cast<float*>(s.rows);
    transpose(reinterpret_cast<int32_t*>(out), QUERIES, s.rows, columns_, columns_, QUERIES);
    for (int64_t i = first; i < last; ++i) {
      write_row(in_.dtype, rows + (i - first) * columns_, in_.head_dim_v, in_.out,
                in_.query_row(sequence, head, i, in_.head_dim_v));
      const float sum = s.sum[slot + i - first], maximum = s.maximum[slot + i - first];
      if (in_.lse)
        in_.lse[in_.statistic(sequence, head, i)] = sum == 0 ? -__builtin_inff() : maximum + __builtin_logf(sum);
    }
  }

  const AttentionForward& in_;
  int64_t block_keys_, block_queries_, words_, columns_;
  Buffer blocks_;
  int64_t block_count_, longest_;
};

}  // namespace
}  // namespace pynlp
