// Which weights dropout keeps: weight (b, h, i, j) has the 16 bits number j % 8 of Philox(seed; j / 8, i, b H + h, 0).
#pragma once

#include "../simd/random.h"
#include "attention.h"

namespace pynlp {
namespace {

// The random numbers of a tile of keys x queries, keys in rows: two rows, of an even and the next key, share a word.
class Keeps {
 public:
  static int64_t size(int64_t keys, int64_t queries) { return (keys / 8 + 1) * 4 * queries; }  // words, at most

  Keeps(const AttentionInputs& in, int32_t* words, int64_t queries)
      : in_(in), words_(words), queries_(queries), dropped_(broadcast(in.dropped)) {}

  // For keys first .. last - 1, of which the first is even, and `queries` queries from `query` on.
  void draw(const Sequence& sequence, int64_t head, int64_t first, int64_t last, int64_t query) {
    first_pair_ = first / 8 * 4;
    const uint32_t number = static_cast<uint32_t>(sequence.number * in_.heads + head);
    int32_t* to = words_;
    for (int64_t group = first / 8; 8 * group < last; ++group, to += 4 * queries_) {
      for (int64_t i = 0; i < queries_; i += LANES) {
        Counters counters;
        counters.set(0, static_cast<uint32_t>(group));
        counters.count_from(1, static_cast<uint32_t>(query + i));
        counters.set(2, number);
        counters.set(3, 0);
        Int words[4];
        philox(in_.dropout_seed, counters, words);
        for (int word = 0; word < 4; ++word) store(to + word * queries_ + i, words[word]);
      }
    }
  }

  // The word of keys `even` and even + 1, for the LANES queries from number `lane` on.
  Int pair(int64_t even, int64_t lane) const { return load(words_ + (even / 2 - first_pair_) * queries_ + lane); }
  // x where it is kept, else 0.
  Float even(Int pair, Float x) const { return (pair & 0xffff) >= dropped_ ? x : Float{}; }
  Float odd(Int pair, Float x) const { return (pair >> 16 & 0xffff) >= dropped_ ? x : Float{}; }

 private:
  const AttentionInputs& in_;
  int32_t* words_;
  int64_t queries_, first_pair_ = 0;
  Int dropped_;
};

}  // namespace
}  // namespace pynlp
