#if defined(__x86_64__)
#include "../../targets/avx512_vnni.h"

#include "../loops.h"

const pynlp::ProbeLoops pynlp::probes_avx512_vnni = pynlp::LOOPS;
#endif
