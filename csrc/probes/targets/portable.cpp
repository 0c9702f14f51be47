#include "../../targets/portable.h"

#include "../loops.h"

const pynlp::ProbeLoops pynlp::probes_portable = pynlp::LOOPS;
