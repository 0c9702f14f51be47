// Always inlined: a copy that was compiled for one instruction set must not be merged with that of another.
#pragma once

#define PYNLP_INLINE __attribute__((always_inline)) inline
