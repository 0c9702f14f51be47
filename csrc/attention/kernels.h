// One entry per instruction set, each from the same source (forward.h, backward.h).
#pragma once

#include "attention.h"

namespace pynlp {

void attention_forward_portable(const AttentionForward& problem);
void attention_forward_avx2(const AttentionForward& problem);
void attention_forward_avx512(const AttentionForward& problem);
void attention_forward_avx512_bf16(const AttentionForward& problem);

void attention_backward_portable(const AttentionBackward& problem);
void attention_backward_avx2(const AttentionBackward& problem);
void attention_backward_avx512(const AttentionBackward& problem);
void attention_backward_avx512_bf16(const AttentionBackward& problem);

}  // namespace pynlp
