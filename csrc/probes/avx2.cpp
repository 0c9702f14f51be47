// The probes for AVX2 and FMA.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "table.h"
#pragma GCC target("avx2,fma")
#define PYNLP_LANES 8
#include "kernels.h"

const pynlp::ProbeLoops pynlp::PROBES_AVX2 = {fma_rounds, nullptr, nullptr, read_bytes, copy_bytes};
#endif
