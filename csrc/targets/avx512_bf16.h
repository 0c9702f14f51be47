// AVX-512 with products of bf16 pairs, and rounding to bf16 in one instruction.
#include "avx512.h"

#pragma GCC target("avx512bf16")
#undef PYNLP_BF16
#define PYNLP_BF16 1
