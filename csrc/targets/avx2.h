// AVX2, FMA and F16C.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

#pragma GCC target("avx2,fma,f16c")
#define PYNLP_LANES 8
#define PYNLP_F16C 1
#define PYNLP_AVX512 0
#define PYNLP_BF16 0
#define PYNLP_VNNI 0
#define PYNLP_AMX 0
