// Which instruction sets this CPU has, and which of them the kernels may use.
#pragma once

namespace pynlp {

// Levels, each with all of those before it.
enum class Isa { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16_vnni = 3 };

// Kernels ask for a feature, never for a level: a CPU can have VNNI without BF16.
struct Features {
  bool avx2;         // AVX2, FMA and F16C
  bool avx512;       // AVX-512 F, BW, DQ and VL
  bool avx512_bf16;  // vdpbf16ps
  bool avx512_vnni;  // vpdpbusd
};

Features detected_features();  // of this CPU and operating system
Features features();           // in use: the detected ones, up to the level set
Isa isa();                     // in use: the highest level that `features()` reaches
void set_isa(Isa highest);     // from now on use no feature above this level; a level the CPU lacks changes nothing

}  // namespace pynlp
