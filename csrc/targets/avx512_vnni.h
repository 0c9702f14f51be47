// AVX-512 with products of int8.
#include "avx512.h"

#pragma GCC target("avx512vnni")
#undef PYNLP_VNNI
#define PYNLP_VNNI 1
