// Philox4x32-10 (Salmon et al., SC 2011): random words as a hash of counters, a counter in each lane.
#pragma once

#include "vector.h"

namespace pynlp {
namespace {

// Half as many lanes of 64 bits: of each only the low 32 count, and a product needs no shuffle.
typedef uint64_t Wide __attribute__((vector_size(4 * LANES)));

inline Wide multiply_low_halves(Wide a, Wide b) {
#if PYNLP_AVX512
  return (Wide)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif PYNLP_LANES == 8
  return (Wide)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Wide)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// The counters of LANES draws: those of even lanes, those of odd ones.
struct Counters {
  Wide words[2][4];
  void set(int word, uint32_t value) { words[0][word] = words[1][word] = Wide{} + value; }
  void count_from(int word, uint32_t first) {  // first + lane
    Wide lanes{};
    for (int i = 0; i < LANES / 2; ++i) lanes[i] = static_cast<uint64_t>(2 * i);
    lanes += first;
    words[0][word] = lanes & 0xffffffffu;
    words[1][word] = (lanes + 1) & 0xffffffffu;
  }
};

// words[0 .. 3][lane] = Philox with the key `seed` of a lane's counters.
inline void philox(uint64_t seed, Counters x, Int* words) {
  const Wide multiplier0 = Wide{} + 0xD2511F53u, multiplier1 = Wide{} + 0xCD9E8D57u;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const Wide k0 = Wide{} + key0, k1 = Wide{} + key1;
#pragma GCC unroll 2
    for (int parity = 0; parity < 2; ++parity) {
      Wide* c = x.words[parity];
      const Wide p0 = multiply_low_halves(c[0], multiplier0), p1 = multiply_low_halves(c[2], multiplier1);
      c[0] = (p1 >> 32) ^ c[1] ^ k0;
      c[1] = p1;
      c[2] = (p0 >> 32) ^ c[3] ^ k1;
      c[3] = p0;
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  for (int i = 0; i < 4; ++i) words[i] = (Int)((x.words[0][i] & 0xffffffffu) | x.words[1][i] << 32);
}

}  // namespace
}  // namespace pynlp
