#include "../table.h"
#if PYNLP_COMPILES_AMX_AND_AVX_VNNI
#include "../../targets/avx_vnni.h"
#include "../loops.h"

const pynlp::ProbeLoops pynlp::probes_avx_vnni = pynlp::LOOPS;
#endif
