// The probes' inner loops, and the variants of them.
#pragma once

#include <cstdint>

#include "../common/isa.h"

namespace pynlp {

struct ProbeLoops {
  // Run so many rounds; return the operations done. Null where the target has no such instruction.
  double (*fma)(int64_t rounds);
  double (*bf16_dot)(int64_t rounds);
  double (*int8_dot)(int64_t rounds);
  double (*bf16_tile)(int64_t rounds);
  double (*int8_tile)(int64_t rounds);
  // Sizes are multiples of 1024 bytes, addresses of 64.
  void (*read)(const char* from, int64_t bytes);
  void (*copy)(const char* from, char* to, int64_t bytes);
};

extern const ProbeLoops probes_portable;
#if defined(__x86_64__)
extern const ProbeLoops probes_avx2;
extern const ProbeLoops probes_avx512;
extern const ProbeLoops probes_avx512_vnni;
extern const ProbeLoops probes_avx512_bf16;
#endif
#if PYNLP_COMPILES_AMX_AND_AVX_VNNI
extern const ProbeLoops probes_avx_vnni;
extern const ProbeLoops probes_amx_bf16;
extern const ProbeLoops probes_amx_int8;
#endif

}  // namespace pynlp
