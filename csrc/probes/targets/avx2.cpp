#if defined(__x86_64__)
#include "../../targets/avx2.h"

#include "../loops.h"

const pynlp::ProbeLoops pynlp::probes_avx2 = pynlp::LOOPS;
#endif
