// Cross-entropy of a projection to the vocabulary, and its gradients, without the logits of all tokens in memory.
//
// Tokens are taken in chunks. A first round goes over blocks of the vocabulary: logits (tokens in the lanes), their
// maximum and sum of exponentials a block, and the exponentials, which are kept for the chunk. With the sums of all
// blocks known, a second round turns these into gradients of the logits, block by block, and multiplies them on the
// spot: by the tokens for the weight's gradient, by the block's weights for the tokens'. Three products, none of them
// twice. The tokens' gradient is summed in groups of blocks, cut by the shape alone: the bits do not depend on the
// threads.
#pragma once

#include "../common/parallel.h"
#include "../gemm/pack.h"
#include "../simd/math.h"
#include "../simd/memory.h"
#include "layers.h"

namespace pynlp {
namespace {

constexpr int64_t PANEL = TILE_VECTORS * LANES;  // columns of a product

template <class E>
class Loss {
 public:
  explicit Loss(const LinearCrossEntropy& in)
      : in_(in),
        width_(round_up(in.dim, PANEL)),
        words_(width_ / E::PAIR),
        blocks_((in.vocabulary + BLOCK - 1) / BLOCK),
        groups_(larger(1, smaller(blocks_, larger(4, smaller(32, (1 << 21) / (CHUNK * width_)))))),
        keeps_logits_(in.softcap > 0 || E::PAIR == 1),
        own_sums_(in.grad_weight.data && (in.grad_weight.dtype != Dtype::float32 || in.dim != width_)),
        token_rows_(CHUNK * words_ * 4),
        token_columns_(CHUNK * words_ * 4),
        token_panels_(CHUNK * words_ * 4),
        kept_(blocks_ * BLOCK * CHUNK * (keeps_logits_ ? 4 : 2)),
        statistics_(blocks_ * 3 * CHUNK * sizeof(float)),
        tokens_(4 * CHUNK * sizeof(float)),
        partials_(in.grad_x.data ? groups_ * CHUNK * width_ * sizeof(float) : 0),
        weight_sums_(own_sums_ ? in.vocabulary * width_ * sizeof(float) : 0) {}

  void run() {
    if (in_.tokens == 0 && in_.grad_weight.data) memset(weight_sum(0), 0, in_.vocabulary * width_ * sizeof(float));
    if (in_.grad_bias) memset(in_.grad_bias, 0, in_.vocabulary * sizeof(float));
    for (first_ = 0; first_ < in_.tokens; first_ += CHUNK) {
      count_ = smaller(CHUNK, in_.tokens - first_);
      padded_ = round_up(count_, PANEL);
      const int64_t products = count_ * in_.vocabulary * (in_.dim + 16);
      run_tasks<&Loss::pack_tokens>(padded_ / PANEL, 8 * count_ * width_, this);
      run_tasks<&Loss::exponentials>(blocks_, products, this);
      run_tasks<&Loss::losses>(padded_ / PANEL, 16 * count_ * blocks_, this);
      if (!in_.grad_x.data && !in_.grad_weight.data && !in_.grad_bias) continue;
      run_tasks<&Loss::gradients>(groups_, 2 * products, this);
      if (in_.grad_x.data) run_tasks<&Loss::write_grad_x>(padded_ / PANEL, 4 * count_ * width_ * groups_, this);
    }
    if (own_sums_) run_tasks<&Loss::write_grad_weight>(blocks_, 4 * in_.vocabulary * width_, this);
  }

 private:
  static constexpr int64_t CHUNK = 256, BLOCK = 128;  // tokens and rows of the weight: what meets fits in 1 MiB

  // Values of each token of the chunk.
  float* target_logit() const { return tokens_.floats(); }
  float* top() const { return tokens_.floats() + CHUNK; }          // the largest logit
  float* inverse() const { return tokens_.floats() + 2 * CHUNK; }  // 1 / the sum of exponentials above that
  float* lse() const { return tokens_.floats() + 3 * CHUNK; }

  // A block's values of each token: the largest logit (0), the sum of exponentials above it (1), the sum of logits (2).
  float* statistic(int64_t block, int which) const { return statistics_.floats() + (3 * block + which) * CHUNK; }

  float* weight_sum(int64_t v) const {
    return (own_sums_ ? weight_sums_.floats() : static_cast<float*>(in_.grad_weight.data)) + v * width_;
  }
  int32_t* words_of(const Buffer& buffer) const { return static_cast<int32_t*>(buffer.data); }

  // A thread's memory: a block of the weight in rows and in panels, and its logits or their gradients.
  struct Scratch {
    float *room, *logits;
    int32_t *rows, *panels, *pairs;
    uint16_t* halves;
    Scratch(const Loss& l, Arena& arena) {
      room = arena.take<float>(l.width_);
      logits = arena.take<float>(BLOCK * CHUNK);
      rows = arena.take<int32_t>(BLOCK * l.words_);
      panels = arena.take<int32_t>(BLOCK * l.words_);
      pairs = arena.take<int32_t>(E::PAIR == 2 ? BLOCK / 2 * CHUNK : 0);
      halves = arena.take<uint16_t>(E::PAIR == 2 ? BLOCK * CHUNK : 0);
    }
  };

  // PANEL tokens, as rows, as columns (the lanes of the logits), and as panels of a sum over tokens.
  void pack_tokens(int64_t panel) {
    const Scratch s = take_scratch<Scratch>(*this);
    int32_t* rows = words_of(token_rows_) + panel * PANEL * words_;
    const int64_t first = first_ + panel * PANEL, last = smaller(first + PANEL, first_ + count_);
    pack_rows<E>(FloatRows{in_.x, in_.dim}, first, last, PANEL, words_, s.room, rows);
    transpose(rows, words_, words_of(token_columns_) + panel * PANEL * words_, PANEL, PANEL, words_);
    if (!in_.grad_weight.data) return;
    // Every panel of columns has a place for the rows of these tokens.
    pack_panels<E>(rows, words_, PANEL, width_, PANEL, s.panels);
    constexpr int64_t OWN = PANEL / E::PAIR * PANEL;
    for (int64_t column = 0; column < width_ / PANEL; ++column)
      copy_row(words_of(token_panels_) + column * (padded_ / E::PAIR) * PANEL + panel * OWN, s.panels + column * OWN,
               4 * OWN);
  }

  // Rows of a block of the weight as words, where they are or in scratch; zeros behind the last one, up to a pair.
  const int32_t* weight_rows(int64_t first, int64_t count, const Scratch& s, int64_t* stride) const {
    const FloatRows weight{in_.weight, in_.dim};
    if (weight.in_place(E::PAIR) && in_.dim == width_ && count % E::PAIR == 0) {
      *stride = weight.stride / E::PAIR;
      return weight.words(first, E::PAIR);
    }
    *stride = words_;
    pack_rows<E>(weight, first, first + count, round_up(count, E::PAIR), words_, s.room, s.rows);
    return s.rows;
  }

  // The first round over a block.
  void exponentials(int64_t block) {
    const Scratch s = take_scratch<Scratch>(*this);
    const int64_t first = block * BLOCK, count = smaller(BLOCK, in_.vocabulary - first);
    int64_t stride;
    const int32_t* rows = weight_rows(first, count, s, &stride);
    float* logits = keeps_logits_ ? kept_.floats() + first * CHUNK : s.logits;
    for (int64_t t = 0; t < padded_; t += PANEL)
      matmul<E, Into::overwrite>(count, PANEL, words_, rows, stride, 1, words_of(token_columns_) + t * words_, PANEL,
                                 logits + t, CHUNK);
    for (int64_t t = 0; t < padded_; t += LANES) finish_logits(block, first, count, t, logits + t);
    for (int64_t t = 0; t < count_; ++t) {
      const int64_t target = in_.targets[first_ + t] - first;
      if (target >= 0 && target < count) target_logit()[t] = logits[target * CHUNK + t];
    }
    // Exponentials above the block's maximum take the logits' place; where softcap needs these again, they stay.
    for (int64_t t = 0; t < padded_; t += LANES) {
      const Float highest = load(statistic(block, 0) + t);
      const Float pivot = highest == broadcast(-__builtin_inff()) ? Float{} : highest;
      Float sums[2] = {};
      const auto add = [&](int64_t v, int n) __attribute__((always_inline)) {
        float* logit = logits + v * CHUNK + t;
        const Float x = exp_of<E::EXP_DEGREE>(load(logit) - pivot);
        sums[n] += x;
        if (in_.softcap == 0) keep(first + v, t, x);
      };
      int64_t v = 0;
      for (; v + 2 <= count; v += 2) {
        add(v, 0);
        add(v + 1, 1);
      }
      if (v < count) add(v, 0);
      store(statistic(block, 1) + t, sums[0] + sums[1]);
    }
  }

  // The exponential of entry v of the vocabulary, for the LANES tokens from t on.
  void keep(int64_t v, int64_t t, Float x) const {
#if PYNLP_BF16
    if constexpr (E::PAIR == 2) {
      store_bf16(static_cast<uint16_t*>(kept_.data) + v * CHUNK + t, x);
      return;
    }
#endif
    store(kept_.floats() + v * CHUNK + t, x);
  }
  Float kept(int64_t v, int64_t t) const {
    if constexpr (E::PAIR == 2)
      return load_bf16(static_cast<const uint16_t*>(kept_.data) + v * CHUNK + t);
    else
      return load(kept_.floats() + v * CHUNK + t);
  }

  // LANES tokens' logits of a block: bias, softcap, the largest, and their sum.
  void finish_logits(int64_t block, int64_t first, int64_t count, int64_t t, float* logits) const {
    Float highest = broadcast(-__builtin_inff()), sum = {};
    const Float inverse = broadcast(in_.softcap > 0 ? 1 / in_.softcap : 0), cap = broadcast(in_.softcap);
    const bool changes = in_.bias || in_.softcap > 0;
    for (int64_t v = 0; v < count; ++v) {
      Float x = load(logits + v * CHUNK);
      if (in_.bias) x += broadcast(in_.bias[first + v]);
      if (in_.softcap > 0) x = tanh_of(x * inverse) * cap;
      if (changes) store(logits + v * CHUNK, x);
      highest = (x > highest) | (x != x) ? x : highest;  // NaN stays
      if (in_.smoothing > 0) sum += x;
    }
    store(statistic(block, 0) + t, highest);
    store(statistic(block, 2) + t, sum);
  }

  // Computes the losses of PANEL tokens, and the sums of all their exponentials.
  void losses(int64_t panel) {
    for (int64_t t = panel * PANEL; t < (panel + 1) * PANEL; ++t) {
      float highest = -__builtin_inff();
      for (int64_t block = 0; block < blocks_; ++block) {
        const float own = statistic(block, 0)[t];
        highest = own > highest || own != own ? own : highest;
      }
      double sum = 0, logits = 0;
      for (int64_t block = 0; block < blocks_; ++block) {
        sum += statistic(block, 1)[t] * __builtin_exp(static_cast<double>(statistic(block, 0)[t]) - highest);
        logits += statistic(block, 2)[t];
      }
      const double above = __builtin_log(sum), log_sum = highest + above;
      top()[t] = highest;
      inverse()[t] = static_cast<float>(1 / sum);
      lse()[t] = static_cast<float>(log_sum);
      if (t >= count_) continue;
      const double far = log_sum - logits / static_cast<double>(in_.vocabulary),
                   near = highest - target_logit()[t] + above;
      const double loss = (1 - in_.smoothing) * near + in_.smoothing * far + in_.z_loss * log_sum * log_sum;
      in_.losses[first_ + t] = in_.targets[first_ + t] == in_.ignore_index ? 0.0f : static_cast<float>(loss);
    }
  }

  // The second round, over a group of blocks.
  void gradients(int64_t group) {
    const Scratch s = take_scratch<Scratch>(*this);
    float* partial = partials_.floats() + group * CHUNK * width_;
    if (in_.grad_x.data) memset(partial, 0, padded_ * width_ * sizeof(float));
    for (int64_t block = group * blocks_ / groups_; block < (group + 1) * blocks_ / groups_; ++block) {
      const int64_t first = block * BLOCK, count = smaller(BLOCK, in_.vocabulary - first);
      const int64_t even = round_up(count, E::PAIR);
      logit_gradients(block, first, count, s);
      if (in_.grad_bias) add_grad_bias(first, count, s);
      const void *along_tokens = s.logits, *along_rows = s.logits;
#if PYNLP_BF16
      if constexpr (E::PAIR == 2) {
        if (even > count) memset(s.logits + count * CHUNK, 0, CHUNK * sizeof(float));
        round_gradients(even, s);
        along_tokens = s.halves;
        along_rows = s.pairs;
      }
#endif
      const int64_t panels = width_ / PANEL, depth = padded_ / E::PAIR;
      for (int64_t column = 0; in_.grad_weight.data && column < panels; ++column) {
        const auto product = first_ == 0 ? &matmul<E, Into::overwrite> : &matmul<E, Into::add>;
        product(count, PANEL, depth, along_tokens, CHUNK / E::PAIR, 1, words_of(token_panels_) + column * depth * PANEL,
                PANEL, weight_sum(first) + column * PANEL, width_, nullptr);
      }
      if (!in_.grad_x.data) continue;
      int64_t stride;
      const int32_t* rows = weight_rows(first, count, s, &stride);
      pack_panels<E>(rows, stride, even, width_, PANEL, s.panels);
      for (int64_t column = 0; column < panels; ++column)
        matmul<E, Into::add>(padded_, PANEL, even / E::PAIR, along_rows, 1, CHUNK,
                             s.panels + column * (even / E::PAIR) * PANEL, PANEL, partial + column * PANEL, width_);
    }
  }

  // d loss / d logit = (softmax (1 + 2 z lse) - smoothing / V - (1 - smoothing) [target]) times the row's scale.
  void logit_gradients(int64_t block, int64_t first, int64_t count, const Scratch& s) const {
    const float share = in_.smoothing / static_cast<float>(in_.vocabulary);
    for (int64_t t = 0; t < padded_; t += LANES) {
      float scales[LANES] = {};
      for (int64_t n = 0; n < smaller(LANES, count_ - t); ++n)
        scales[n] = in_.targets[first_ + t + n] == in_.ignore_index ? 0.0f : in_.row_scale[first_ + t + n];
      const Float scale = load(scales), highest = load(top() + t);
      const Float weight =
          scale * load(inverse() + t) * (broadcast(1.0f) + load(lse() + t) * broadcast(2 * in_.z_loss));
      const Float offset = scale * broadcast(share);
      const Float factor = weight * exp_of<6>(load(statistic(block, 0) + t) - highest);
      for (int64_t v = 0; v < count; ++v) {
        Float x;
        if (in_.softcap > 0)
          x = weight * exp_of<E::EXP_DEGREE>(load(capped(first + v) + t) - highest);
        else
          x = kept(first + v, t) * factor;
        store(s.logits + v * CHUNK + t, x - offset);
      }
    }
    for (int64_t t = 0; t < count_; ++t) {
      const int64_t target = in_.targets[first_ + t] - first;
      if (target >= 0 && target < count && target + first != in_.ignore_index)
        s.logits[target * CHUNK + t] -= (1 - in_.smoothing) * in_.row_scale[first_ + t];
    }
    if (in_.softcap == 0) return;
    const Float inverse = broadcast(1 / in_.softcap);  // tanh' = 1 - tanh^2
    for (int64_t v = 0; v < count; ++v) {
      for (int64_t t = 0; t < padded_; t += LANES) {
        const Float part = load(capped(first + v) + t) * inverse;
        float* gradient = s.logits + v * CHUNK + t;
        store(gradient, load(gradient) * (broadcast(1.0f) - part * part));
      }
    }
  }
  const float* capped(int64_t v) const { return kept_.floats() + v * CHUNK; }

  void add_grad_bias(int64_t first, int64_t count, const Scratch& s) const {
    for (int64_t v = 0; v < count; ++v) {
      Float sum = {};
      for (int64_t t = 0; t < padded_; t += LANES) sum += load(s.logits + v * CHUNK + t);
      in_.grad_bias[first + v] += lane_sum(sum);
    }
  }

#if PYNLP_BF16
  // The logits' gradients as bf16: a row's tokens one after the other, and pairs of rows in a word.
  void round_gradients(int64_t count, const Scratch& s) const {
    for (int64_t v = 0; v < count; v += 2) {
      for (int64_t t = 0; t < padded_; t += LANES) {
        const Float even = load(s.logits + v * CHUNK + t), odd = load(s.logits + (v + 1) * CHUNK + t);
        store_bf16(s.halves + v * CHUNK + t, even);
        store_bf16(s.halves + (v + 1) * CHUNK + t, odd);
        store(s.pairs + v / 2 * CHUNK + t, bf16_pairs(even, odd));
      }
    }
  }
#endif

  void write_grad_x(int64_t panel) {
    const Scratch s = take_scratch<Scratch>(*this);
    for (int64_t t = panel * PANEL; t < smaller(count_, (panel + 1) * PANEL); ++t) {
      for (int64_t d = 0; d < width_; d += LANES) {
        Float sum = {};
        for (int64_t group = 0; group < groups_; ++group)
          sum += load(partials_.floats() + (group * CHUNK + t) * width_ + d);
        store(s.room + d, sum);
      }
      write_row(in_.grad_x.dtype, s.room, in_.dim, in_.grad_x.data, (first_ + t) * in_.dim);
    }
  }

  void write_grad_weight(int64_t block) {
    for (int64_t v = block * BLOCK; v < smaller(in_.vocabulary, (block + 1) * BLOCK); ++v)
      write_row(in_.grad_weight.dtype, weight_sum(v), in_.dim, in_.grad_weight.data, v * in_.dim);
  }

  const LinearCrossEntropy& in_;
  int64_t width_, words_, blocks_, groups_;
  bool keeps_logits_, own_sums_;
  Buffer token_rows_, token_columns_, token_panels_, kept_, statistics_, tokens_, partials_, weight_sums_;
  int64_t first_ = 0, count_ = 0, padded_ = 0;
};

}  // namespace
}  // namespace pynlp
