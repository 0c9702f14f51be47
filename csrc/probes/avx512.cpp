// The probes for AVX-512.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "table.h"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#define PYNLP_LANES 16
#define PYNLP_AVX512 1
#include "kernels.h"

const pynlp::ProbeLoops pynlp::PROBES_AVX512 = {fma_rounds, nullptr, nullptr, read_bytes, copy_bytes};
#endif
