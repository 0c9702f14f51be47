#include "isa.h"

#include <atomic>

namespace pynlp {
namespace {

std::atomic<int> highest_level{static_cast<int>(Isa::avx512_bf16_vnni)};

}  // namespace

Features detected_features() {
#if defined(__x86_64__)
  static const Features found = [] {
    __builtin_cpu_init();
    Features f{};
    f.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    f.avx512 = f.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    f.avx512_bf16 = f.avx512 && __builtin_cpu_supports("avx512bf16");
    f.avx512_vnni = f.avx512 && __builtin_cpu_supports("avx512vnni");
    return f;
  }();
  return found;
#else
  return Features{};
#endif
}

Features features() {
  const int level = highest_level.load(std::memory_order_relaxed);
  Features f = detected_features();
  f.avx2 = f.avx2 && level >= static_cast<int>(Isa::avx2);
  f.avx512 = f.avx512 && level >= static_cast<int>(Isa::avx512);
  f.avx512_bf16 = f.avx512_bf16 && level >= static_cast<int>(Isa::avx512_bf16_vnni);
  f.avx512_vnni = f.avx512_vnni && level >= static_cast<int>(Isa::avx512_bf16_vnni);
  return f;
}

Isa isa() {
  const Features f = features();
  if (f.avx512_bf16 || f.avx512_vnni) return Isa::avx512_bf16_vnni;
  if (f.avx512) return Isa::avx512;
  if (f.avx2) return Isa::avx2;
  return Isa::portable;
}

void set_isa(Isa highest) { highest_level.store(static_cast<int>(highest), std::memory_order_relaxed); }

}  // namespace pynlp
