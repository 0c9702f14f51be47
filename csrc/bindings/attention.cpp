// Attention in torch's dispatcher: tensors become pointers and strides.
#include "../attention/attention.h"

#include "plan.h"
#include "tensors.h"

namespace {

using pynlp::Place;

pynlp::View view(const Tensor& x, const char* name) {
  // To torch a tensor without elements is contiguous, whatever its strides.
  STD_TORCH_CHECK(x.dim() == 4 && (x.stride(3) == 1 || x.size(3) == 1 || x.numel() == 0), "pynlp.attention: ", name,
                  ": expected 4 dimensions, the last one contiguous");
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

template <class T>
const T* data(const MaybeTensor& x, ScalarType dtype, const char* name) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(x->scalar_type() == dtype && x->is_contiguous(), "pynlp.attention: ", name,
                  ": expected it contiguous, floats as float32 and integers as int32");
  return static_cast<const T*>(x->const_data_ptr());
}

struct Options {
  double softmax_scale;
  int64_t window_left, window_right;
  double softcap;
  MaybeTensor key_lengths, cu_seqlens_q, cu_seqlens_k, sinks, alibi_slopes, relative_bias, relative_buckets;
  MaybeTensor rotary_cos, rotary_sin, rotary_positions;
  int64_t rotary_offset;
  bool rotary_interleaved;
  double dropout_p;
  MaybeTensor dropout_seed;
};

void fill(pynlp::AttentionInputs& in, const Tensor& q, const Tensor& k, const Tensor& v, const Options& o,
          int64_t largest_head = 256) {
  in.dtype = float_dtype_of(q);
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                  "pynlp.attention: expected q, k and v of one dtype");
  in.q = view(q, "q");
  in.k = view(k, "k");
  in.v = view(v, "v");
  in.batch = o.cu_seqlens_q ? o.cu_seqlens_q->size(0) - 1 : q.size(0);
  in.rows_q = q.size(1);
  in.heads = q.size(2);
  in.head_dim = q.size(3);
  in.rows_k = k.size(1);
  in.kv_heads = k.size(2);
  in.head_dim_v = v.size(3);
  STD_TORCH_CHECK(
      in.head_dim >= 1 && in.head_dim <= largest_head && in.head_dim_v >= 1 && in.head_dim_v <= largest_head,
      "pynlp.attention: q, v: expected a head_dim of 1 to ", largest_head);
  STD_TORCH_CHECK(in.heads == in.kv_heads || (in.kv_heads > 0 && in.heads % in.kv_heads == 0),
                  "pynlp.attention: k: expected a number of heads that divides q's");
  in.softmax_scale = static_cast<float>(o.softmax_scale);
  in.window_left = o.window_left;
  in.window_right = o.window_right;
  in.softcap = static_cast<float>(o.softcap);
  in.key_lengths = data<int32_t>(o.key_lengths, ScalarType::Int, "key_lengths");
  in.cu_seqlens_q = data<int32_t>(o.cu_seqlens_q, ScalarType::Int, "cu_seqlens_q");
  in.cu_seqlens_k = data<int32_t>(o.cu_seqlens_k, ScalarType::Int, "cu_seqlens_k");
  in.sinks = data<float>(o.sinks, ScalarType::Float, "sinks");
  in.alibi_slopes = data<float>(o.alibi_slopes, ScalarType::Float, "alibi_slopes");
  in.alibi_batch_stride = o.alibi_slopes && o.alibi_slopes->dim() == 2 ? in.heads : 0;
  in.relative_bias = data<float>(o.relative_bias, ScalarType::Float, "relative_bias");
  in.num_buckets = o.relative_bias ? o.relative_bias->size(0) : 0;
  in.relative_buckets = data<int32_t>(o.relative_buckets, ScalarType::Int, "relative_buckets");
  in.max_distance = o.relative_buckets ? o.relative_buckets->size(0) / 2 : 0;
  in.rotary_cos = data<float>(o.rotary_cos, ScalarType::Float, "rotary_cos");
  in.rotary_sin = data<float>(o.rotary_sin, ScalarType::Float, "rotary_sin");
  in.rotary_half = o.rotary_cos ? o.rotary_cos->size(1) : 0;
  in.rotary_positions = data<int32_t>(o.rotary_positions, ScalarType::Int, "rotary_positions");
  in.rotary_offset = o.rotary_offset;
  in.rotary_interleaved = o.rotary_interleaved;
  if (o.dropout_seed) {
    const int64_t* seed = data<int64_t>(o.dropout_seed, ScalarType::Long, "dropout_seed");
    in.dropout_seed = static_cast<uint64_t>(*seed);
    in.dropped = dropped_parts(o.dropout_p);
  }
}

// The fields of an op's tensors: those before the options, the options', and the results'.
std::vector<Place> places_of(const pynlp::AttentionInputs& in, const Options& o, std::vector<Place> places,
                             const std::vector<Place>& results) {
  const Place options[] = {{&in.key_lengths, Place::input, o.key_lengths.has_value()},
                           {&in.cu_seqlens_q, Place::input, o.cu_seqlens_q.has_value()},
                           {&in.cu_seqlens_k, Place::input, o.cu_seqlens_k.has_value()},
                           {&in.sinks, Place::input, o.sinks.has_value()},
                           {&in.alibi_slopes, Place::input, o.alibi_slopes.has_value()},
                           {&in.relative_bias, Place::input, o.relative_bias.has_value()},
                           {&in.relative_buckets, Place::input, o.relative_buckets.has_value()},
                           {&in.rotary_cos, Place::input, o.rotary_cos.has_value()},
                           {&in.rotary_sin, Place::input, o.rotary_sin.has_value()},
                           {&in.rotary_positions, Place::input, o.rotary_positions.has_value()},
                           {&in.dropout_seed, Place::seed, o.dropout_seed.has_value()}};
  places.insert(places.end(), std::begin(options), std::end(options));
  places.insert(places.end(), results.begin(), results.end());
  return places;
}

std::tuple<Tensor, Tensor> attention_forward(Tensor q, Tensor k, Tensor v, double softmax_scale, int64_t window_left,
                                             int64_t window_right, double softcap, MaybeTensor key_lengths,
                                             MaybeTensor cu_seqlens_q, MaybeTensor cu_seqlens_k, MaybeTensor sinks,
                                             MaybeTensor alibi_slopes, MaybeTensor relative_bias,
                                             MaybeTensor relative_buckets, MaybeTensor rotary_cos,
                                             MaybeTensor rotary_sin, MaybeTensor rotary_positions,
                                             int64_t rotary_offset, bool rotary_interleaved, double dropout_p,
                                             MaybeTensor dropout_seed) {
  pynlp::AttentionForward problem{};
  const Options options{softmax_scale, window_left, window_right, softcap, key_lengths, cu_seqlens_q, cu_seqlens_k,
                        sinks, alibi_slopes, relative_bias, relative_buckets, rotary_cos, rotary_sin, rotary_positions,
                        rotary_offset, rotary_interleaved, dropout_p, dropout_seed};
  fill(problem, q, k, v, options);
  Tensor out = output(q, {q.size(0), problem.rows_q, problem.heads, problem.head_dim_v});
  Tensor lse = output(q, {q.size(0), problem.heads, problem.rows_q}, ScalarType::Float);
  problem.out = out.mutable_data_ptr();
  problem.lse = static_cast<float*>(lse.mutable_data_ptr());
  pynlp::run<pynlp::attention_forward>(problem, [&] {
    return places_of(problem, options,
                     {{&problem.q.data, Place::input}, {&problem.k.data, Place::input}, {&problem.v.data, Place::input}},
                     {{&problem.out, Place::output}, {&problem.lse, Place::optional}});
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    Tensor grad_out, MaybeTensor grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, double softmax_scale,
    int64_t window_left, int64_t window_right, double softcap, MaybeTensor key_lengths, MaybeTensor cu_seqlens_q,
    MaybeTensor cu_seqlens_k, MaybeTensor sinks, MaybeTensor alibi_slopes, MaybeTensor relative_bias,
    MaybeTensor relative_buckets, MaybeTensor rotary_cos, MaybeTensor rotary_sin, MaybeTensor rotary_positions,
    int64_t rotary_offset, bool rotary_interleaved, double dropout_p, MaybeTensor dropout_seed, bool needs_slopes,
    bool needs_table, bool needs_sinks) {
  pynlp::AttentionBackward problem{};
  const Options options{softmax_scale, window_left, window_right, softcap, key_lengths, cu_seqlens_q, cu_seqlens_k,
                        sinks, alibi_slopes, relative_bias, relative_buckets, rotary_cos, rotary_sin, rotary_positions,
                        rotary_offset, rotary_interleaved, dropout_p, dropout_seed};
  fill(problem, q, k, v, options);
  problem.entries = q.size(0);
  problem.grad_out = view(grad_out, "grad_out");
  problem.out = view(out, "out");
  STD_TORCH_CHECK(grad_out.scalar_type() == q.scalar_type() && out.scalar_type() == q.scalar_type(),
                  "pynlp.attention: expected grad_out and out in the dtype of q");
  problem.lse = data<float>(lse, ScalarType::Float, "lse");
  problem.grad_lse = data<float>(grad_lse, ScalarType::Float, "grad_lse");
  const auto gradient = [](const Tensor& x) { return output(x, {x.size(0), x.size(1), x.size(2), x.size(3)}); };
  Tensor grad_q = gradient(q), grad_k = gradient(k), grad_v = gradient(v);
  problem.grad_q = grad_q.mutable_data_ptr();
  problem.grad_k = grad_k.mutable_data_ptr();
  problem.grad_v = grad_v.mutable_data_ptr();
  const auto like = [&](const MaybeTensor& x, bool needed, float** pointer) {
    Tensor grad = needed ? torch::stable::empty_like(*x) : empty(q, {0}, ScalarType::Float);
    if (needed) *pointer = static_cast<float*>(grad.mutable_data_ptr());
    return grad;
  };
  Tensor grad_slopes = like(alibi_slopes, needs_slopes, &problem.grad_slopes);
  Tensor grad_table = like(relative_bias, needs_table, &problem.grad_table);
  Tensor grad_sinks = like(sinks, needs_sinks, &problem.grad_sinks);
  pynlp::run<pynlp::attention_backward>(problem, [&] {
    return places_of(problem, options,
                     {{&problem.grad_out.data, Place::input},
                      {&problem.grad_lse, Place::input, grad_lse.has_value()},
                      {&problem.q.data, Place::input},
                      {&problem.k.data, Place::input},
                      {&problem.v.data, Place::input},
                      {&problem.out.data, Place::input},
                      {&problem.lse, Place::input}},
                     {{&problem.grad_q, Place::output},
                      {&problem.grad_k, Place::output},
                      {&problem.grad_v, Place::output},
                      {&problem.grad_slopes, Place::output},
                      {&problem.grad_table, Place::output},
                      {&problem.grad_sinks, Place::output}});
  });
  return {grad_q, grad_k, grad_v, grad_slopes, grad_table, grad_sinks};
}

// The caches, lengths and pages of the ops over a cache; rows of q or of new keys are filled in by each.
void fill_cache(pynlp::AttentionInputs& in, const Tensor& k_cache, const Tensor& v_cache, const Tensor& cache_lengths,
                const MaybeTensor& block_table) {
  STD_TORCH_CHECK(cache_lengths.scalar_type() == ScalarType::Int && cache_lengths.is_contiguous() &&
                      cache_lengths.numel() == in.batch,
                  "pynlp.attention: cache_lengths: expected it contiguous, as int32, one for each batch entry");
  in.cache_lengths = static_cast<const int32_t*>(cache_lengths.const_data_ptr());
  in.block_table = data<int32_t>(block_table, ScalarType::Int, "block_table");
  in.table_pages = block_table ? block_table->size(1) : 0;
  in.page_size = k_cache.size(1);
  // Memory outside of the cache is never touched, whoever calls.
  const int64_t capacity = in.page_size * (block_table ? in.table_pages : 1);
  for (int64_t b = 0; b < in.batch; ++b) {
    const int64_t length = in.cache_lengths[b] + in.appended;
    STD_TORCH_CHECK(in.cache_lengths[b] >= 0 && length <= capacity, "pynlp.attention: cache_lengths: expected 0 to ",
                    capacity - in.appended);
    for (int64_t n = 0; in.block_table && n * in.page_size < length; ++n) {
      const int32_t page = in.block_table[b * in.table_pages + n];
      STD_TORCH_CHECK(page >= 0 && page < k_cache.size(0), "pynlp.attention: block_table: expected pages 0 to ",
                      k_cache.size(0) - 1);
    }
  }
}

std::tuple<Tensor, Tensor> attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_lengths,
                                            int64_t appended, MaybeTensor block_table, double softmax_scale,
                                            int64_t window_left, int64_t window_right, double softcap,
                                            MaybeTensor sinks, MaybeTensor alibi_slopes, MaybeTensor relative_bias,
                                            MaybeTensor relative_buckets, MaybeTensor rotary_cos,
                                            MaybeTensor rotary_sin, int64_t rotary_offset, bool rotary_interleaved,
                                            int64_t num_splits) {
  pynlp::AttentionForward problem{};
  const MaybeTensor none;
  fill(problem, q, k_cache, v_cache,
       {softmax_scale, window_left, window_right, softcap, none, none, none, sinks, alibi_slopes, relative_bias,
        relative_buckets, rotary_cos, rotary_sin, none, rotary_offset, rotary_interleaved, 0.0, none},
       pynlp::LARGEST_CACHED_HEAD);
  problem.appended = appended;
  problem.num_splits = num_splits;
  fill_cache(problem, k_cache, v_cache, cache_lengths, block_table);
  Tensor out = output(q, {q.size(0), problem.rows_q, problem.heads, problem.head_dim_v});
  Tensor lse = output(q, {q.size(0), problem.heads, problem.rows_q}, ScalarType::Float);
  problem.out = out.mutable_data_ptr();
  problem.lse = static_cast<float*>(lse.mutable_data_ptr());
  pynlp::attention_forward(problem);
  return {out, lse};
}

void attention_append(Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor cache_lengths, MaybeTensor block_table,
                      MaybeTensor rotary_cos, MaybeTensor rotary_sin, int64_t rotary_offset, bool rotary_interleaved) {
  pynlp::AttentionAppend problem{};
  const MaybeTensor none;
  fill(problem, k, k_cache, v_cache,
       {1.0, -1, -1, 0.0, none, none, none, none, none, none, none, rotary_cos, rotary_sin, none, rotary_offset,
        rotary_interleaved, 0.0, none},
       pynlp::LARGEST_CACHED_HEAD);
  STD_TORCH_CHECK(v.scalar_type() == k.scalar_type() && v.size(0) == k.size(0) && v.size(1) == k.size(1) &&
                      v.size(2) == k.size(2) && v.size(3) == problem.head_dim_v && k.size(2) == problem.kv_heads &&
                      k.size(3) == k_cache.size(3),
                  "pynlp.attention: k, v: expected new rows in the dtype, heads and head_dim of the cache");
  problem.appended = k.size(1);
  problem.new_k = view(k, "k");
  problem.new_v = view(v, "v");
  problem.k_cache = k_cache.mutable_data_ptr();
  problem.v_cache = v_cache.mutable_data_ptr();
  fill_cache(problem, k_cache, v_cache, cache_lengths, block_table);
  pynlp::attention_append(problem);
}

Tensor attention_weights(Tensor q, Tensor k, MaybeTensor rows, MaybeTensor lse, double softmax_scale,
                         int64_t window_left, int64_t window_right, double softcap, MaybeTensor key_lengths,
                         MaybeTensor cu_seqlens_q, MaybeTensor cu_seqlens_k, MaybeTensor sinks,
                         MaybeTensor alibi_slopes, MaybeTensor relative_bias, MaybeTensor relative_buckets,
                         MaybeTensor rotary_cos, MaybeTensor rotary_sin, MaybeTensor rotary_positions,
                         int64_t rotary_offset, bool rotary_interleaved, double, MaybeTensor) {
  pynlp::AttentionWeights problem{};
  const MaybeTensor none;
  STD_TORCH_CHECK(!cu_seqlens_q && !cu_seqlens_k, "pynlp.attention_weights: expected no packed sequences");
  fill(problem, q, k, k,
       {softmax_scale, window_left, window_right, softcap, key_lengths, none, none, sinks, alibi_slopes, relative_bias,
        relative_buckets, rotary_cos, rotary_sin, rotary_positions, rotary_offset, rotary_interleaved, 0.0, none});
  problem.rows = data<int32_t>(rows, ScalarType::Int, "rows");
  problem.row_count = rows ? rows->size(0) : problem.rows_q;
  for (int64_t n = 0; rows && n < problem.row_count; ++n)
    STD_TORCH_CHECK(problem.rows[n] >= 0 && problem.rows[n] < problem.rows_q,
                    "pynlp.attention_weights: rows: ", "expected 0 to ", problem.rows_q - 1);
  problem.lse = data<float>(lse, ScalarType::Float, "lse");
  Tensor weights = output(q, {q.size(0), problem.heads, problem.row_count, problem.rows_k}, ScalarType::Float);
  problem.weights = static_cast<float*>(weights.mutable_data_ptr());
  if (weights.numel() > 0) pynlp::attention_weights(problem);
  return weights;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pynlp, CPU, m) {
  PYNLP_IMPL(m, attention_forward);
  PYNLP_IMPL(m, attention_backward, 2);   // q
  PYNLP_IMPL(m, attention_append);
  PYNLP_IMPL(m, attention_decode);
  PYNLP_IMPL(m, attention_weights);
}
