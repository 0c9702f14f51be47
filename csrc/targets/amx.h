// AMX: products of tiles of bf16 and of int8, beside AVX-512 with both of its own products.
#include "avx512_bf16.h"

#pragma GCC target("avx512vnni,amx-tile,amx-int8,amx-bf16")
#undef PYNLP_VNNI
#define PYNLP_VNNI 1
#undef PYNLP_AMX
#define PYNLP_AMX 1
