// How fast this machine is: the measured peaks that a kernel's speed is compared with. No torch here.
#pragma once

#include <cstddef>

namespace pynlp {

// Operations a second with the instruction sets in use, a multiplication and an addition counted as two; 0 where these
// have no such instruction. Measured on `threads` threads of their own, as the best of many short runs that together
// take about `seconds`.
double peak_fma(int threads, double seconds);        // fp32
double peak_bf16_dot(int threads, double seconds);   // vdpbf16ps
double peak_int8_dot(int threads, double seconds);   // vpdpbusd; vpmaddubsw and vpmaddwd without VNNI
double peak_bf16_tile(int threads, double seconds);  // tdpbf16ps
double peak_int8_tile(int threads, double seconds);  // tdpbusd

// Bytes a second over a buffer of `bytes`; a byte copied counts as one read and one written.
double read_bandwidth(int threads, double seconds, size_t bytes);
double copy_bandwidth(int threads, double seconds, size_t bytes);

}  // namespace pynlp
