// AVX2 with the int8 products of AVX-VNNI.
#include "avx2.h"

#pragma GCC target("avxvnni")
#undef PYNLP_VNNI
#define PYNLP_VNNI 1
