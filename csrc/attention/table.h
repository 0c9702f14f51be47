// The kernels of attention, and the variants of them.
#pragma once

#include "attention.h"

namespace pynlp {

struct AttentionKernels {
  void (*append)(const AttentionAppend& problem);
  void (*forward)(const AttentionForward& problem);
  void (*backward)(const AttentionBackward& problem);
  void (*weights)(const AttentionWeights& problem);
};

extern const AttentionKernels attention_portable;
#if defined(__x86_64__)
extern const AttentionKernels attention_avx2;
extern const AttentionKernels attention_avx512;
extern const AttentionKernels attention_avx512_bf16;  // takes bf16 only
#endif

}  // namespace pynlp
