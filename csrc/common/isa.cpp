#include "isa.h"

#include <atomic>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pynlp {
namespace {

std::atomic<Isa> highest_level{Isa::avx512_bf16_vnni};

#if defined(__x86_64__)
// Leaf 7 of cpuid, where __builtin_cpu_supports of older compilers does not know a name. The numbers are bits.
struct Leaf7 {
  unsigned eax, ebx, ecx, edx;
  explicit Leaf7(unsigned subleaf) {
    if (!__get_cpuid_count(7, subleaf, &eax, &ebx, &ecx, &edx)) eax = ebx = ecx = edx = 0;
  }
};
constexpr unsigned AVX_VNNI = 4;                                 // of subleaf 1, eax
constexpr unsigned AMX_BF16 = 22, AMX_TILE = 24, AMX_INT8 = 25;  // of subleaf 0, edx

// Whether the system saves the tile registers (XCR0 bits 17 and 18). Only for CPUs that have them.
bool system_knows_tiles() {
  unsigned low, high;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low >> 17 & 3) == 3;
}
#endif

// Linux gives a process the tile registers when it asks for them.
bool ask_for_tiles() {
#if defined(__x86_64__) && defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
  return false;
#endif
}

}  // namespace

Features detected_features() {
#if defined(__x86_64__)
  static const Features found = [] {
    __builtin_cpu_init();
    const Leaf7 leaf(0), subleaf(1);
    Features f{};
    f.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    f.avx_vnni = f.avx2 && subleaf.eax >> AVX_VNNI & 1;
    f.avx512 = f.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    f.avx512_vnni = f.avx512 && __builtin_cpu_supports("avx512vnni");
    f.avx512_bf16 = f.avx512 && __builtin_cpu_supports("avx512bf16");
    f.amx_tile = f.avx512_vnni && f.avx512_bf16 && leaf.edx >> AMX_TILE & 1 && system_knows_tiles();
    f.amx_int8 = f.amx_tile && leaf.edx >> AMX_INT8 & 1;
    f.amx_bf16 = f.amx_tile && leaf.edx >> AMX_BF16 & 1;
    return f;
  }();
  return found;
#else
  return Features{};
#endif
}

Features features() {
  const Isa level = highest_level.load(std::memory_order_relaxed);
  Features f = detected_features();
  if (level < Isa::avx512_bf16_vnni) {
    f.avx512_vnni = f.avx512_bf16 = false;
    f.amx_tile = f.amx_int8 = f.amx_bf16 = false;
  }
  if (level < Isa::avx512) f.avx512 = false;
  if (level < Isa::avx2) f.avx2 = f.avx_vnni = false;
  return f;
}

Isa isa() {
  const Features f = features();
  if (f.avx512_bf16 || f.avx512_vnni) return Isa::avx512_bf16_vnni;
  if (f.avx512) return Isa::avx512;
  if (f.avx2) return Isa::avx2;
  return Isa::portable;
}

void set_isa(Isa highest) { highest_level.store(highest, std::memory_order_relaxed); }

bool usable(bool Features::* feature) {
  if (!(features().*feature)) return false;
  if (feature != &Features::amx_tile && feature != &Features::amx_int8 && feature != &Features::amx_bf16) return true;
  static const bool given = ask_for_tiles();
  return given;
}

}  // namespace pynlp
