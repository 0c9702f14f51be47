// Which instruction sets this CPU has, which of them the kernels may use, and which variant of a kernel that makes
// best.
#pragma once

#include <cstddef>

#include "dtype.h"

#if defined(__x86_64__) && __GNUC__ >= 11
#define PYNLP_COMPILES_AMX_AND_AVX_VNNI 1
#else
#define PYNLP_COMPILES_AMX_AND_AVX_VNNI 0
#endif

namespace pynlp {

// Levels, each with all of those before it.
enum class Isa { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16_vnni = 3 };

// Kernels ask for a feature, never for a level: a CPU can have VNNI without BF16.
struct Features {
  bool avx2;         // AVX2, FMA and F16C
  bool avx_vnni;     // vpdpbusd of 256 bits, beside AVX2
  bool avx512;       // AVX-512 F, BW, DQ and VL
  bool avx512_vnni;  // vpdpbusd
  bool avx512_bf16;  // vdpbf16ps
  bool amx_tile;     // tile registers, beside both of AVX-512's products
  bool amx_int8;     // tdpbusd
  bool amx_bf16;     // tdpbf16ps
};

Features detected_features();  // of this CPU and operating system
Features features();           // in use: the detected ones, up to the level set
Isa isa();                     // in use: the highest level that `features()` reaches
void set_isa(Isa highest);     // from now on use no feature above this level; a level the CPU lacks changes nothing

// Whether code that needs the feature may run now. The first question about tiles asks the system for their registers.
bool usable(bool Features::* feature);

// A family's kernels as one target compiled them.
template <class Table>
struct Variant {
  const Table* table;
  bool Features::* needs;  // null: any CPU will do
  bool bf16_only;          // it takes no other dtype
};

// The kernel of the first variant, best first, that has it, takes the dtype and may run; null if there is none.
template <class Table, size_t COUNT, class Kernel>
Kernel* pick(const Variant<Table> (&variants)[COUNT], Kernel* Table::* kernel, Dtype dtype = Dtype::float32) {
  for (const Variant<Table>& variant : variants) {
    if (variant.bf16_only && dtype != Dtype::bfloat16) continue;
    if (variant.table->*kernel && (!variant.needs || usable(variant.needs))) return variant.table->*kernel;
  }
  return nullptr;
}

}  // namespace pynlp
