// Forward for few queries over many keys, as a step of decoding has them: it costs what reading the keys costs.
//
// The keys of a sequence are cut into parts, a task each (Flash-Decoding, Dao et al., 2023), which goes over its keys
// once, for all heads, in the order in which they lie in memory, and fetches those to come beside the work. Channels
// lie in the lanes. A part leaves the maximum, the sum and the weighted values of each query; these are put together at
// the end. How keys are cut depends on their number alone, so that the bits do not depend on the threads.
#pragma once

#include "../common/parallel.h"
#include "../simd/memory.h"
#include "scores.h"

namespace pynlp {
namespace {

class Decode {
 public:
  explicit Decode(const AttentionForward& in)
      : in_(in),
        scorer_(&Rows::read_factor, in),
        size_v_(round_up(in.head_dim_v, LANES)),
        group_(in.kv_heads ? in.heads / in.kv_heads : 0),
        firsts_((in.batch + 1) * sizeof(First)),
        parts_(count(in, firsts_) * sizeof(Part)),
        partials_(first(in.batch).partial * sizeof(float)) {
    Part* part = static_cast<Part*>(parts_.data);
    for (int64_t b = 0; b < in.batch; ++b)
      for (int64_t n = 0; n < first(b + 1).part - first(b).part; ++n) *part++ = {b, n};
    longest_ = 0;
    finished_ = true;
    for (int64_t b = 0; b < in.batch; ++b) {
      if (!few_queries(in, in.sequence(b))) continue;
      longest_ = larger(longest_, in.sequence(b).queries);
      finished_ &= parts_of(b) == 1;
    }
  }

  void run() const {
    if (longest_ == 0) return;
    run_tasks<&Decode::run_task>(first(in_.batch).part, operations(in_), this);
    if (finished_) return;
    run_tasks<&Decode::combine_parts>(in_.batch * longest_ * in_.heads, first(in_.batch).partial, this);
  }

 private:
  static constexpr int64_t PART_KEYS = 64;  // parts are multiples

  template <int COUNT>
  struct Count {
    static constexpr int count = COUNT;
  };

  struct Part {
    int64_t sequence, number;
  };
  struct First {
    int64_t part, partial;  // how many parts, and floats of their results, the sequences before have
  };
  const First& first(int64_t b) const { return static_cast<const First*>(firsts_.data)[b]; }

  int64_t parts_of(int64_t b) const { return first(b + 1).part - first(b).part; }

  // Keys of a part: enough parts to share, but not so many that they cost.
  static int64_t keys_of_part(int64_t keys, int64_t num_splits) {
    const int64_t wanted = num_splits ? num_splits : larger(1, smaller(16, keys / 128));
    const int64_t size = (keys + wanted - 1) / wanted;
    return larger(1, round_up(num_splits ? size : smaller(size, 1024), PART_KEYS));
  }

  // Keys that some query of the sequence sees.
  static Range seen(const AttentionInputs& in, const Sequence& s) {
    const Range keys = Visibility(in, s).of_any(0, s.queries);
    return {keys.first / PART_KEYS * PART_KEYS, keys.last};
  }

  static int64_t count(const AttentionForward& in, const Buffer& firsts) {
    First* first = static_cast<First*>(firsts.data);
    first[0] = {0, 0};
    for (int64_t b = 0; b < in.batch; ++b) {
      const Sequence s = in.sequence(b);
      const Range keys = seen(in, s);
      int64_t parts = 0;
      if (few_queries(in, s) && !keys.empty() && s.queries > 0) {
        const int64_t size = keys_of_part(keys.last - keys.first, in.num_splits);
        parts = (keys.last - keys.first + size - 1) / size;
      }
      const int64_t rows = s.queries * in.heads;
      first[b + 1] = {first[b].part + parts,
                      first[b].partial + parts * rows * (round_up(in.head_dim_v, LANES) + LANES)};
    }
    return first[in.batch].part;
  }

  // What a part leaves of query `row` = query * heads + head: maximum and sum, and size_v_ channels.
  float* partial(const Part& part, int64_t rows, int64_t row) const {
    const int64_t floats = size_v_ + LANES;
    return static_cast<float*>(partials_.data) + first(part.sequence).partial + (part.number * rows + row) * floats;
  }

  struct Scratch {
    float *queries, *scores, *line, *room;
    const char **rows, **near, **far, **room_rows;
    Scratch(const Decode& d, Arena& arena) {
      queries = arena.take<float>(d.longest_ * d.in_.heads * d.scorer_.size);
      scores = arena.take<float>(d.longest_ * d.in_.heads * SCORES);
      line = arena.take<float>(SCORES);
      room = arena.take<float>(BLOCK_KEYS * larger(d.scorer_.size, d.size_v_));
      rows = arena.take<const char*>(2 * (TILE_KEYS + FAR));
      near = arena.take<const char*>(BLOCK_KEYS * d.in_.kv_heads);
      far = arena.take<const char*>(BLOCK_KEYS * d.in_.kv_heads);
      room_rows = arena.take<const char*>(BLOCK_KEYS);
    }
  };

  void run_task(int64_t task) const {
    const Part part = static_cast<const Part*>(parts_.data)[task];
    const Sequence sequence = in_.sequence(part.sequence);
    const Visibility visible(in_, sequence);
    const Range all = seen(in_, sequence);
    const int64_t size = keys_of_part(all.last - all.first, in_.num_splits), rows = sequence.queries * in_.heads;
    const Range keys{all.first + part.number * size, smaller(all.last, all.first + (part.number + 1) * size)};

    const Scratch s = take_scratch<Scratch>(*this);
    for (int64_t row = 0; row < rows; ++row) {
      scorer_.read_query(sequence, row % in_.heads, row / in_.heads, s.queries + row * scorer_.size);
      float* result = partial(part, rows, row);
      memset(result, 0, (size_v_ + LANES) * sizeof(float));
      result[0] = -__builtin_inff();
    }
    const HeadRows k(&Rows::read_factor, keys_of, in_.k, in_, sequence);
    const HeadRows v(&Rows::read, values_of, in_.v, in_, sequence);
    for (int64_t start = keys.first; start < keys.last; start += TILE_KEYS) {
      const Range tile{start, smaller(start + TILE_KEYS, keys.last)};
      const int64_t count = tile.last - start;
      // Where keys of the first head lie, then values, then the next tile's first keys; the last again, to be fetched.
      const char** located = v.locate(tile, k.locate(tile, s.rows));
      located = k.locate({tile.last, smaller(tile.last + FAR, keys.last)}, located);
      for (int n = 0; n < FAR; ++n) located[n] = located[-1];

      visit_heads(s, sequence, visible, tile, k, s.rows,
                  [&](auto at_once, const BlockRows& some, int64_t i, int64_t head, Range own) {
                    const int64_t row = i * in_.heads + head;
                    scorer_.multiply<at_once.count>(some, own.last - own.first, s.queries + row * scorer_.size,
                                                    s.scores + row * SCORES + own.first - start);
                  });
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t i = row / in_.heads;
        const Range own = both(tile, visible.of_any(i, i + 1));
        if (own.empty()) continue;
        float* scores = s.scores + row * SCORES;
        scorer_.scale(sequence, visible, i, row % in_.heads, own, scores + own.first - start, s.line);
        for (int64_t n = 0; n < own.first - start; ++n) scores[n] = -__builtin_inff();
        for (int64_t n = own.last - start; n < round_up(count, LANES); ++n) scores[n] = -__builtin_inff();
        softmax(scores, round_up(count, LANES), partial(part, rows, row));
      }
      visit_heads(s, sequence, visible, tile, v, s.rows + count,
                  [&](auto at_once, const BlockRows& some, int64_t i, int64_t head, Range own) {
                    const int64_t row = i * in_.heads + head;
                    add_values<at_once.count>(some, own.last - own.first, s.scores + row * SCORES + own.first - start,
                                              partial(part, rows, row));
                  });
    }
    if (parts_of(part.sequence) == 1)  // while it is at hand
      for (int64_t row = 0; row < rows; ++row) combine(sequence, part.sequence, row);
  }

  void combine_parts(int64_t task) const {
    const int64_t b = task / (longest_ * in_.heads), row = task % (longest_ * in_.heads);
    const Sequence sequence = in_.sequence(b);
    if (few_queries(in_, sequence) && parts_of(b) != 1 && row < sequence.queries * in_.heads) combine(sequence, b, row);
  }

  static Range both(Range a, Range b) { return {larger(a.first, b.first), smaller(a.last, b.last)}; }

  // Goes over the rows of a tile, a block for one head after the other: visit(Count<heads at once>, rows, query, first
  // of those heads, keys of the rows), for the keys that the query sees.
  template <class Visit>
  PYNLP_INLINE void visit_heads(const Scratch& s, const Sequence& sequence, const Visibility& visible, Range tile,
                                const HeadRows& all, const char* const* located, const Visit& visit) const {
    for (int64_t first = tile.first; first < tile.last; first += BLOCK_KEYS, located += BLOCK_KEYS) {
      const Range block{first, smaller(first + BLOCK_KEYS, tile.last)};
      const int64_t count = block.last - first;
      all.in_order(located + NEAR, count, s.near);
      all.in_order(located + FAR, count, s.far);
      for (int64_t kv_head = 0; kv_head < in_.kv_heads; ++kv_head) {
        const BlockRows rows =
            all.of(kv_head, block, located, s.near + kv_head * count, s.far + kv_head * count, s.room, s.room_rows);
        for (int64_t i = 0; i < sequence.queries; ++i) {
          const Range own = both(block, visible.of_any(i, i + 1));
          if (own.empty()) continue;
          const BlockRows some = rows.from(own.first - first);
          int64_t head = kv_head * group_;
          const int64_t last = head + group_;
          for (; head + 4 <= last; head += 4) visit(Count<4>{}, some, i, head, own);
          for (; head + 2 <= last; head += 2) visit(Count<2>{}, some, i, head, own);
          for (; head < last; ++head) visit(Count<1>{}, some, i, head, own);
        }
      }
    }
  }

  // scores -> weights; the result so far, behind its maximum and its sum, is brought to the new maximum.
  void softmax(float* scores, int64_t count, float* result) const {
    Float highest = load(scores);
    for (int64_t n = LANES; n < count; n += LANES) highest = maximum(load(scores + n), highest);
    float best = result[0];
    bool spoiled = false;
    for (int lane = 0; lane < LANES; ++lane) {
      best = highest[lane] > best ? highest[lane] : best;
      spoiled |= highest[lane] != highest[lane];
    }
    if (spoiled) best = __builtin_nanf("");
    const float pivot = best == -__builtin_inff() ? 0.0f : best;
    Float sums = Float{};
    for (int64_t n = 0; n < count; n += LANES) {
      const Float weight = exp_of<6>(load(scores + n) - broadcast(pivot));
      store(scores + n, weight);
      sums += weight;
    }
    float sum = 0;
    for (int lane = 0; lane < LANES; ++lane) sum += sums[lane];
    const Float rescale = exp_of<6>(broadcast(result[0] - pivot));
    result[0] = best;
    result[1] = result[1] * rescale[0] + sum;
    if (rescale[0] == 1) return;
    for (int64_t d = LANES; d < size_v_ + LANES; d += LANES) store(result + d, load(result + d) * rescale);
  }

  // results[r] += weights[r] . values, behind the results' maxima and sums.
  template <int ROWS>
  PYNLP_INLINE void add_values(const BlockRows& values, int64_t count, const float* weights, float* results) const {
    with_read(values.dtype, [&](auto read) { add_rows_of<decltype(read), ROWS>(values, count, weights, results); });
  }

  template <class Read, int ROWS>
  void add_rows_of(const BlockRows& values, int64_t count, const float* weights, float* results) const {
    if (size_v_ == 64)
      add_rows<Read, ROWS, 64>(values, count, weights, results, 64);
    else
      add_rows<Read, ROWS, 0>(values, count, weights, results, size_v_);
  }

  template <class Read, int ROWS, int SIZE>
  __attribute__((noinline)) static void add_rows(const BlockRows& values, int64_t count, const float* weights,
                                                 float* results, int64_t size) {
    constexpr int VECTORS = ROWS == 1 ? 8 : 16 / ROWS;
    const int64_t channels = SIZE ? SIZE : size, row = channels + LANES;
    int64_t d = 0;
    for (; d + VECTORS * LANES <= channels; d += VECTORS * LANES)
      add_columns<Read, ROWS, VECTORS>(values, count, weights, results, row, d);
    if constexpr (VECTORS > 4)
      for (; d + 4 * LANES <= channels; d += 4 * LANES)
        add_columns<Read, ROWS, 4>(values, count, weights, results, row, d);
    for (; d < channels; d += LANES) add_columns<Read, ROWS, 1>(values, count, weights, results, row, d);
  }

  // VECTORS vectors of channels from `column` on. Few of them wait for each other: then every other key has its own
  // sums.
  template <class Read, int ROWS, int VECTORS>
  static PYNLP_INLINE void add_columns(const BlockRows& values, int64_t count, const float* weights, float* results,
                                       int64_t row, int64_t column) {
    constexpr int AT_ONCE = ROWS * VECTORS <= 4 ? 2 : 1;
    Float totals[AT_ONCE][ROWS][VECTORS] = {};
    const auto each = [&](auto work) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < VECTORS; ++c) work(r, c, results + r * row + LANES + column + c * LANES);
    };
    const auto add = [&](int64_t n, int own) __attribute__((always_inline)) {
      const char* value = values.rows[n] + values.offset;
      values.fetch(n, column * Read::BYTES, VECTORS * LANES * Read::BYTES);
      Float weight[ROWS];
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) weight[r] = broadcast(weights[r * SCORES + n]);
#pragma GCC unroll 8
      for (int c = 0; c < VECTORS; ++c) {
        const Float x = Read::load(value, column + c * LANES);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) totals[own][r][c] += weight[r] * x;
      }
    };
    each([&](int r, int c, const float* sum) __attribute__((always_inline)) { totals[0][r][c] = load(sum); });
    int64_t n = 0;
    for (; n + AT_ONCE <= count; n += AT_ONCE)
#pragma GCC unroll 2
      for (int own = 0; own < AT_ONCE; ++own) add(n + own, own);
    if (n < count) add(n, 0);
    each([&](int r, int c, float* sum) __attribute__((always_inline)) {
      store(sum, AT_ONCE == 2 ? totals[0][r][c] + totals[AT_ONCE - 1][r][c] : totals[0][r][c]);
    });
  }

  // Puts the parts of one query together, a sink with them, and writes its row of out and of lse.
  void combine(const Sequence& sequence, int64_t b, int64_t row) const {
    const int64_t i = row / in_.heads, head = row % in_.heads;
    const int64_t parts = parts_of(b), rows = sequence.queries * in_.heads;
    const float sink = in_.sinks ? in_.sinks[head] : -__builtin_inff();
    float best = sink;
    for (int64_t n = 0; n < parts; ++n) {
      const float part = partial({b, n}, rows, row)[0];
      best = part > best || part != part ? part : best;
    }
    const float pivot = best == -__builtin_inff() ? 0.0f : best;
    float out[LARGEST_CACHED_HEAD + LANES];
    float sum = __builtin_expf(sink - pivot);
    memset(out, 0, size_v_ * sizeof(float));
    for (int64_t n = 0; n < parts; ++n) {
      const float* part = partial({b, n}, rows, row);
      const float factor = __builtin_expf(part[0] - pivot);
      sum += part[1] * factor;
      for (int64_t d = 0; d < size_v_; d += LANES)
        store(out + d, load(out + d) + load(part + LANES + d) * broadcast(factor));
    }
    const float inverse = sum == 0 ? 0.0f : 1.0f / sum;
    for (int64_t d = 0; d < size_v_; d += LANES) store(out + d, load(out + d) * broadcast(inverse));
    write_row(in_.dtype, out, in_.head_dim_v, in_.out, in_.query_row(sequence, head, i, in_.head_dim_v));
    if (in_.lse)
      in_.lse[in_.statistic(sequence, head, i)] = sum == 0 ? -__builtin_inff() : best + __builtin_logf(sum);
  }

  const AttentionForward& in_;
  Scorer scorer_;
  int64_t size_v_, group_;
  Buffer firsts_, parts_, partials_;
  int64_t longest_;
  bool finished_;  // where all sequences have one part, a task leaves its result
};

// Writes new rows behind those of a cache, keys turned by the angles of their positions.
inline void append(const AttentionAppend& in) {
  run_tasks(
      in.batch * in.rows_q, 4 * in.batch * in.rows_q * in.kv_heads * (in.head_dim + in.head_dim_v),
      [](void* context, int64_t task) {
        const AttentionAppend& in = *static_cast<const AttentionAppend*>(context);
        const int64_t b = task / in.rows_q, i = task % in.rows_q;
        const int64_t place = in.cache_lengths[b] + i;
        const Sequence sequence = in.sequence(b);
        for (int64_t kv_head = 0; kv_head < in.kv_heads; ++kv_head) {
          float row[LARGEST_CACHED_HEAD + LANES];
          const Rows key = Rows(in, in.new_k, b, 0, kv_head, in.head_dim).rotated(in, sequence, in.cache_lengths[b]);
          key.read(i, row);
          write_row(in.dtype, row, in.head_dim, in.k_cache, keys_of(in, sequence, kv_head).element(place));
          Rows(in, in.new_v, b, 0, kv_head, in.head_dim_v).read(i, row);
          write_row(in.dtype, row, in.head_dim_v, in.v_cache, values_of(in, sequence, kv_head).element(place));
        }
      },
      const_cast<AttentionAppend*>(&in));
}

}  // namespace
}  // namespace pynlp
