// The probes for any CPU: 128-bit vectors, SSE2 or NEON.
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "table.h"
#define PYNLP_LANES 4
#include "kernels.h"

const pynlp::ProbeLoops pynlp::PROBES_PORTABLE = {fma_rounds, nullptr, nullptr, read_bytes, copy_bytes};
