// The probes for AVX-512 with BF16 and VNNI.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "table.h"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,fma")
#define PYNLP_LANES 16
#define PYNLP_AVX512 1
#define PYNLP_BF16 1
#include "kernels.h"

const pynlp::ProbeLoops pynlp::PROBES_AVX512_BF16_VNNI = {fma_rounds, bf16_dot_rounds, int8_dot_rounds, read_bytes,
                                                          copy_bytes};
#endif
