// Any CPU: 16-byte vectors, SSE2 or NEON.
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

#define PYNLP_LANES 4
#define PYNLP_F16C 0
#define PYNLP_AVX512 0
#define PYNLP_BF16 0
#define PYNLP_VNNI 0
#define PYNLP_AMX 0
