#include "../table.h"
#if PYNLP_COMPILES_AMX_AND_AVX_VNNI
#include "../../targets/amx.h"
#include "../tiles.h"

const pynlp::ProbeLoops pynlp::probes_amx_bf16 = {nullptr, nullptr, nullptr, bf16_tile_rounds};
const pynlp::ProbeLoops pynlp::probes_amx_int8 = {nullptr, nullptr, nullptr, nullptr, int8_tile_rounds};
#endif
