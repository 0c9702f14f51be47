#include "attention.h"

#include "../common/isa.h"
#include "table.h"

namespace pynlp {
namespace {

constexpr Variant<AttentionKernels> VARIANTS[] = {
#if defined(__x86_64__)
    {&attention_avx512_bf16, &Features::avx512_bf16, true},
    {&attention_avx512, &Features::avx512},
    {&attention_avx2, &Features::avx2},
#endif
    {&attention_portable},
};

}  // namespace

void attention_append(const AttentionAppend& problem) {
  pick(VARIANTS, &AttentionKernels::append, problem.dtype)(problem);
}
void attention_forward(const AttentionForward& problem) {
  pick(VARIANTS, &AttentionKernels::forward, problem.dtype)(problem);
}
void attention_backward(const AttentionBackward& problem) {
  pick(VARIANTS, &AttentionKernels::backward, problem.dtype)(problem);
}
void attention_weights(const AttentionWeights& problem) {
  pick(VARIANTS, &AttentionKernels::weights, problem.dtype)(problem);
}

}  // namespace pynlp
