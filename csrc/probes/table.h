// The probes' inner loops of one ISA.
#pragma once

#include <cstdint>

namespace pynlp {

struct ProbeLoops {
  // Run so many rounds; return the operations done. Null where the ISA has no such instruction.
  double (*fma)(int64_t rounds);
  double (*bf16_dot)(int64_t rounds);
  double (*int8_dot)(int64_t rounds);
  // Sizes are multiples of 1024 bytes, addresses of 64.
  void (*read)(const char* from, int64_t bytes);
  void (*copy)(const char* from, char* to, int64_t bytes);
};

extern const ProbeLoops PROBES_PORTABLE, PROBES_AVX2, PROBES_AVX512, PROBES_AVX512_BF16_VNNI;

}  // namespace pynlp
