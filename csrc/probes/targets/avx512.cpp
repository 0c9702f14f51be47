#if defined(__x86_64__)
#include "../../targets/avx512.h"

#include "../loops.h"

const pynlp::ProbeLoops pynlp::probes_avx512 = pynlp::LOOPS;
#endif
