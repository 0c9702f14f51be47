#if defined(__x86_64__)
#include "../../targets/avx512_bf16.h"

#include "../loops.h"

const pynlp::ProbeLoops pynlp::probes_avx512_bf16 = pynlp::LOOPS;
#endif
