// Picks the kernels for the CPU's features and the dtype.
#include "attention.h"

#include "../isa.h"
#include "kernels.h"

namespace pynlp {

#if defined(__x86_64__)
#define PYNLP_PICK(kernel, problem)                                             \
  do {                                                                          \
    const Features f = features();                                              \
    if (f.avx512_bf16 && problem.dtype == Dtype::bfloat16) return kernel##_avx512_bf16(problem); \
    if (f.avx512) return kernel##_avx512(problem);                              \
    if (f.avx2) return kernel##_avx2(problem);                                  \
    return kernel##_portable(problem);                                          \
  } while (0)
#else
#define PYNLP_PICK(kernel, problem) return kernel##_portable(problem)
#endif

void attention_forward(const AttentionForward& problem) { PYNLP_PICK(attention_forward, problem); }
void attention_backward(const AttentionBackward& problem) { PYNLP_PICK(attention_backward, problem); }

}  // namespace pynlp
