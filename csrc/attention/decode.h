// Forward for few queries over many keys, as a step of decoding has them: it costs what reading the keys costs.
//
// The keys of a sequence are cut into parts, a task each (Flash-Decoding, Dao et al., 2023), which goes over its keys
// once, for all heads: a tile of keys and values is fetched while the one before is worked on. Channels lie in the
// lanes. A part leaves the maximum, the sum and the weighted values of each query; these are put together at the end.
// How keys are cut depends on their number alone, so that the bits do not depend on the threads.
#pragma once

#include "../parallel.h"
#include "scores.h"

namespace pynlp {
namespace {

class Decode {
 public:
  explicit Decode(const AttentionForward& in)
      : in_(in),
        scorer_(in),
        size_v_(round_up(in.head_dim_v, LANES)),
        group_(in.kv_heads ? in.heads / in.kv_heads : 0),
        firsts_((in.batch + 1) * sizeof(First)),
        parts_(count(in, firsts_) * sizeof(Part)),
        partials_(first(in.batch).partial * sizeof(float)) {
    Part* part = static_cast<Part*>(parts_.data);
    for (int64_t b = 0; b < in.batch; ++b)
      for (int64_t n = 0; n < first(b + 1).part - first(b).part; ++n) *part++ = {b, n};
    longest_ = 0;
    for (int64_t b = 0; b < in.batch; ++b)
      if (few_queries(in, in.sequence(b))) longest_ = larger(longest_, in.sequence(b).queries);
    Arena sizes{nullptr};
    Scratch(*this, sizes);
    scratch_bytes_ = sizes.used;
  }

  void run() const {
    if (longest_ == 0) return;
    const auto self = const_cast<Decode*>(this);
    run_tasks(
        first(in_.batch).part, [](void* d, int64_t task) { static_cast<const Decode*>(d)->run_task(task); }, self);
    run_tasks(
        in_.batch * longest_ * in_.heads, [](void* d, int64_t task) { static_cast<const Decode*>(d)->combine(task); },
        self);
  }

 private:
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

  // Keys of a part, whole tiles: enough parts to share, but not so many that they cost.
  static int64_t keys_of_part(int64_t keys, int64_t num_splits) {
    const int64_t wanted = num_splits ? num_splits : larger(1, smaller(16, keys / 128));
    const int64_t size = (keys + wanted - 1) / wanted;
    return larger(1, round_up(num_splits ? size : smaller(size, 1024), TILE_KEYS));
  }

  // Keys that some query of the sequence sees.
  static Range seen(const AttentionInputs& in, const Sequence& s) {
    const Range keys = Visibility(in, s).of_any(0, s.queries);
    return {keys.first / TILE_KEYS * TILE_KEYS, keys.last};
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

  // Addresses of a tile's rows, of the next tile's, and of rows in scratch.
  struct Pointers {
    const char **rows, **next, **room;
    void take(Arena& arena) {
      rows = arena.take<const char*>(TILE_KEYS + LANES);
      next = arena.take<const char*>(TILE_KEYS + LANES);
      room = arena.take<const char*>(TILE_KEYS + LANES);
    }
    void advance() {
      const char** done = rows;
      rows = next;
      next = done;
    }
  };

  struct Scratch {
    float *queries, *scores, *line, *keys, *values;
    Pointers key_rows, value_rows;
    Scratch(const Decode& d, Arena& arena) {
      queries = arena.take<float>(d.longest_ * d.in_.heads * d.scorer_.size);
      scores = arena.take<float>(MOST_ROWS * SCORES);
      line = arena.take<float>(SCORES);
      keys = arena.take<float>(TILE_KEYS * d.scorer_.size);
      values = arena.take<float>(TILE_KEYS * d.size_v_);
      key_rows.take(arena);
      value_rows.take(arena);
    }
  };

  void run_task(int64_t task) const {
    const Part part = static_cast<const Part*>(parts_.data)[task];
    const Sequence sequence = in_.sequence(part.sequence);
    const Visibility visible(in_, sequence);
    const Range all = seen(in_, sequence);
    const int64_t size = keys_of_part(all.last - all.first, in_.num_splits), rows = sequence.queries * in_.heads;
    const Range keys{all.first + part.number * size, smaller(all.last, all.first + (part.number + 1) * size)};

    Arena arena{static_cast<char*>(thread_scratch(scratch_bytes_))};
    const Scratch s(*this, arena);
    for (int64_t head = 0; head < in_.heads; ++head) {
      for (int64_t i = 0; i < sequence.queries; ++i) {
        const int64_t row = i * in_.heads + head;
        scorer_.read_query(sequence, head, i, s.queries + row * scorer_.size);
        float* result = partial(part, rows, row);
        memset(result, 0, (size_v_ + LANES) * sizeof(float));
        result[0] = -__builtin_inff();
      }
    }
    const HeadRows k(keys_of, in_.k, in_, sequence), v(values_of, in_.v, in_, sequence);
    Pointers at = s.key_rows, values_at = s.value_rows;
    const auto tile_from = [&](int64_t start) { return Range{start, smaller(start + TILE_KEYS, keys.last)}; };
    k.locate(tile_from(keys.first), at.rows);
    v.locate(tile_from(keys.first), values_at.rows);
    for (int64_t start = keys.first; start < keys.last; start += TILE_KEYS) {
      const Range tile = tile_from(start), next = tile_from(start + TILE_KEYS);
      const int64_t coming = larger(0, next.last - next.first);
      if (coming > 0) {
        k.locate(next, at.next);
        v.locate(next, values_at.next);
      }
      for (int64_t kv_head = 0; kv_head < in_.kv_heads; ++kv_head) {
        k.prefetch(at.next, coming, kv_head);
        v.prefetch(values_at.next, coming, kv_head);
        visit(s, part, sequence, visible, kv_head, tile, k.of(kv_head, tile, at.rows, s.keys, at.room),
              v.of(kv_head, tile, values_at.rows, s.values, values_at.room));
      }
      at.advance();
      values_at.advance();
    }
  }

  // One tile of keys of one head, for all its queries.
  void visit(const Scratch& s, const Part& part, const Sequence& sequence, const Visibility& visible, int64_t kv_head,
             Range tile, const TileRows& keys, const TileRows& values) const {
    for (int64_t i = 0; i < sequence.queries; ++i) {
      const Range own = visible.of_any(i, i + 1);
      const Range some{larger(tile.first, own.first), smaller(tile.last, own.last)};
      if (some.empty()) continue;
      const TileRows own_keys = keys.from(some.first - tile.first), own_values = values.from(some.first - tile.first);
      const auto heads = [&](auto rows, int64_t member) __attribute__((always_inline)) {
        attend<rows.count>(s, part, sequence, visible, i, kv_head * group_ + member, some, own_keys, own_values);
      };
      int64_t member = 0;
      for (; member + 4 <= group_; member += 4) heads(Count<4>{}, member);
      for (; member + 2 <= group_; member += 2) heads(Count<2>{}, member);
      for (; member < group_; ++member) heads(Count<1>{}, member);
    }
  }

  // Query i in ROWS heads from `head` on.
  template <int ROWS>
  void attend(const Scratch& s, const Part& part, const Sequence& sequence, const Visibility& visible, int64_t i,
              int64_t head, Range some, const TileRows& keys, const TileRows& values) const {
    const int64_t count = some.last - some.first, row = i * in_.heads + head;
    scorer_.score<ROWS>(sequence, visible, i, head, some, keys, s.queries + row * scorer_.size, s.scores, s.line);
    float rescale[ROWS];
    float* results[ROWS];
    for (int r = 0; r < ROWS; ++r) {
      results[r] = partial(part, sequence.queries * in_.heads, row + r);
      rescale[r] = softmax(s.scores + r * SCORES, round_up(count, LANES), results[r]);
    }
    if (values.dtype == Dtype::float32)
      add_values<ReadFloat, ROWS>(values, count, s.scores, rescale, results);
    else if (values.dtype == Dtype::bfloat16)
      add_values<ReadBf16, ROWS>(values, count, s.scores, rescale, results);
#if PYNLP_F16C
    else
      add_values<ReadHalf, ROWS>(values, count, s.scores, rescale, results);
#endif
  }

  // scores -> weights; what the result so far is to be multiplied by. Of the result first comes the maximum, then the
  // sum.
  static float softmax(float* scores, int64_t count, float* result) {
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
      const Float weight = exp2_of<6>(load(scores + n) - broadcast(pivot));
      store(scores + n, weight);
      sums += weight;
    }
    float sum = 0;
    for (int lane = 0; lane < LANES; ++lane) sum += sums[lane];
    const float rescale = exp2_of<6>(broadcast(result[0] - pivot))[0];
    result[0] = best;
    result[1] = result[1] * rescale + sum;
    return rescale;
  }

  // results[r] = results[r] * rescale[r] + weights[r] . values.
  template <class Read, int ROWS>
  void add_values(const TileRows& values, int64_t count, const float* weights, const float* rescale,
                  float* const* results) const {
    constexpr int64_t VECTORS = ROWS == 1 ? 8 : 16 / ROWS;
    int64_t d = 0;
    for (; d + VECTORS * LANES <= size_v_; d += VECTORS * LANES)
      add_columns<Read, ROWS, VECTORS>(values, count, weights, rescale, results, d);
    if constexpr (VECTORS > 4)
      for (; d + 4 * LANES <= size_v_; d += 4 * LANES)
        add_columns<Read, ROWS, 4>(values, count, weights, rescale, results, d);
    for (; d < size_v_; d += LANES) add_columns<Read, ROWS, 1>(values, count, weights, rescale, results, d);
  }

  template <class Read, int ROWS, int VECTORS>
  static void add_columns(const TileRows& values, int64_t count, const float* weights, const float* rescale,
                          float* const* results, int64_t column) {
    Float sums[ROWS][VECTORS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < VECTORS; ++c)
        sums[r][c] = load(results[r] + LANES + column + c * LANES) * broadcast(rescale[r]);
    for (int64_t n = 0; n < count; ++n) {
      const char* value = values.rows[n] + values.offset;
      Float weight[ROWS];
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) weight[r] = broadcast(weights[r * SCORES + n]);
#pragma GCC unroll 8
      for (int c = 0; c < VECTORS; ++c) {
        const Float x = Read::load(value, column + c * LANES);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) sums[r][c] += weight[r] * x;
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < VECTORS; ++c) store(results[r] + LANES + column + c * LANES, sums[r][c]);
  }

  // Puts the parts of one query together, a sink with them, and writes its row of out and of lse.
  void combine(int64_t task) const {
    const int64_t b = task / (longest_ * in_.heads), row = task % (longest_ * in_.heads);
    const int64_t i = row / in_.heads, head = row % in_.heads;
    const Sequence sequence = in_.sequence(b);
    if (!few_queries(in_, sequence) || i >= sequence.queries) return;
    const int64_t parts = first(b + 1).part - first(b).part, rows = sequence.queries * in_.heads;
    const float sink = in_.sinks ? in_.sinks[head] * LOG2_E : -__builtin_inff();
    float best = sink;
    for (int64_t n = 0; n < parts; ++n) {
      const float part = partial({b, n}, rows, row)[0];
      best = part > best || part != part ? part : best;
    }
    const float pivot = best == -__builtin_inff() ? 0.0f : best;
    float out[LARGEST_CACHED_HEAD + LANES];
    float sum = __builtin_exp2f(sink - pivot);
    memset(out, 0, size_v_ * sizeof(float));
    for (int64_t n = 0; n < parts; ++n) {
      const float* part = partial({b, n}, rows, row);
      const float factor = __builtin_exp2f(part[0] - pivot);
      sum += part[1] * factor;
      for (int64_t d = 0; d < size_v_; d += LANES)
        store(out + d, load(out + d) + load(part + LANES + d) * broadcast(factor));
    }
    const float inverse = sum == 0 ? 0.0f : 1.0f / sum;
    for (int64_t d = 0; d < size_v_; d += LANES) store(out + d, load(out + d) * broadcast(inverse));
    write_row(in_.dtype, out, in_.head_dim_v, in_.out, in_.query_row(sequence, head, i, in_.head_dim_v));
    in_.lse[in_.statistic(sequence, head, i)] = sum == 0 ? -__builtin_inff() : best * LN_2 + __builtin_logf(sum);
  }

  const AttentionForward& in_;
  Scorer scorer_;
  int64_t size_v_, group_;
  Buffer firsts_, parts_, partials_;
  int64_t longest_;
  size_t scratch_bytes_;
};

// Writes new rows behind those of a cache, keys turned by the angles of their positions.
inline void append(const AttentionAppend& in) {
  run_tasks(
      in.batch * in.rows_q,
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
