// Picks the kernels for the CPU's features and the dtype.
#include "attention.h"

#include "../isa.h"
#include "kernels.h"

namespace pynlp {

void attention_forward(const AttentionForward& problem) {
  const Features f = features();
  if (f.avx512_bf16 && problem.dtype == Dtype::bfloat16) return attention_forward_avx512_bf16(problem);
#if defined(__x86_64__)
  if (f.avx512) return attention_forward_avx512(problem);
  if (f.avx2) return attention_forward_avx2(problem);
#endif
  attention_forward_portable(problem);
}

}  // namespace pynlp
