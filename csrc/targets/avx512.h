// AVX-512 (F, BW, DQ, VL).
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // g++ 12 on its own _mm512_undefined_ps
#pragma GCC diagnostic ignored "-Wuninitialized"
#define PYNLP_LANES 16
#define PYNLP_F16C 1
#define PYNLP_AVX512 1
#define PYNLP_BF16 0
#define PYNLP_VNNI 0
#define PYNLP_AMX 0
