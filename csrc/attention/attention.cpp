// Picks the kernels by the CPU's features and the dtype.
#include "attention.h"

#include "../common/isa.h"
#include "kernels.h"

namespace pynlp {
namespace {

const AttentionKernels& kernels_for([[maybe_unused]] Dtype dtype) {
#if defined(__x86_64__)
  const Features f = features();
  if (f.avx512_bf16 && dtype == Dtype::bfloat16) return attention_avx512_bf16;
  if (f.avx512) return attention_avx512;
  if (f.avx2) return attention_avx2;
#endif
  return attention_portable;
}

}  // namespace

void attention_append(const AttentionAppend& problem) { kernels_for(problem.dtype).append(problem); }
void attention_forward(const AttentionForward& problem) { kernels_for(problem.dtype).forward(problem); }
void attention_backward(const AttentionBackward& problem) { kernels_for(problem.dtype).backward(problem); }
void attention_weights(const AttentionWeights& problem) { kernels_for(problem.dtype).weights(problem); }

}  // namespace pynlp
