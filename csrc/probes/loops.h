// The probes' inner loops for the target that the including file chose. They have accumulators enough to hide the
// latency of two pipes.
#pragma once

#include "../simd/bytes.h"
#include "../simd/vector.h"
#include "table.h"

namespace pynlp {
namespace {

#if PYNLP_AVX512
constexpr int ACCUMULATORS = 20;
#else
constexpr int ACCUMULATORS = 12;
#endif

volatile float sink;  // what is stored here must be computed

template <class T>
inline T hidden(T x) {  // from the optimizer
  volatile T copy = x;
  return copy;
}

double fma_rounds(int64_t rounds) {
  const Float factor = hidden(broadcast(0.999f)), addend = hidden(broadcast(0.001f));
  Float sums[ACCUMULATORS];
#pragma GCC unroll 20
  for (int i = 0; i < ACCUMULATORS; ++i) sums[i] = addend * static_cast<float>(i);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 20
    for (int i = 0; i < ACCUMULATORS; ++i) sums[i] = sums[i] * factor + addend;
  }
#pragma GCC unroll 20
  for (int i = 0; i < ACCUMULATORS; ++i) sink = sums[i][0];
  return 2.0 * LANES * ACCUMULATORS * static_cast<double>(rounds);
}

#if PYNLP_BF16
double bf16_dot_rounds(int64_t rounds) {
  const __m512bh a = (__m512bh)hidden(broadcast(0x3a803a80)), b = (__m512bh)hidden(broadcast(0x3a803a80));  // 2^-10
  __m512 sums[ACCUMULATORS];
#pragma GCC unroll 20
  for (int i = 0; i < ACCUMULATORS; ++i) sums[i] = (__m512)broadcast(static_cast<float>(i));
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 20
    for (int i = 0; i < ACCUMULATORS; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], a, b);
  }
#pragma GCC unroll 20
  for (int i = 0; i < ACCUMULATORS; ++i) sink = sums[i][0];
  return 4.0 * LANES * ACCUMULATORS * static_cast<double>(rounds);
}
#endif

#if PYNLP_LANES >= 8
// sum + the products of four unsigned bytes of a by four signed ones of b, in each lane.
inline Int add_products(Int sum, Int a, Int b) {
#if PYNLP_VNNI
  return add_byte_products(sum, a, b);
#else
  asm volatile("" : "+v"(a));  // else the products, the same in every round, would be taken out of the loop
#if PYNLP_AVX512
  return sum + (Int)_mm512_madd_epi16(_mm512_maddubs_epi16((__m512i)a, (__m512i)b), _mm512_set1_epi16(1));
#else
  return sum + (Int)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)a, (__m256i)b), _mm256_set1_epi16(1));
#endif
#endif
}

double int8_dot_rounds(int64_t rounds) {
  const Int a = hidden(broadcast(0x01020301)), b = hidden(broadcast(0x02010102));
  Int sums[ACCUMULATORS];
#pragma GCC unroll 20
  for (int i = 0; i < ACCUMULATORS; ++i) sums[i] = broadcast(i);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 20
    for (int i = 0; i < ACCUMULATORS; ++i) sums[i] = add_products(sums[i], a, b);
  }
#pragma GCC unroll 20
  for (int i = 0; i < ACCUMULATORS; ++i) sink = static_cast<float>(sums[i][0]);
  return 8.0 * LANES * ACCUMULATORS * static_cast<double>(rounds);
}
#endif

constexpr int64_t BLOCK = 1024;  // bytes; the buffers' sizes are multiples of it
constexpr int64_t AHEAD = 8192;  // bytes; the hardware's own prefetch stops at every page

void read_bytes(const char* from, int64_t bytes) {
  constexpr int STREAMS = 4;  // independent sums
  constexpr int64_t WIDTH = sizeof(Int);
  Int sums[STREAMS] = {};
  for (const char* block = from; block < from + bytes; block += BLOCK) {
    for (int64_t line = 0; line < BLOCK; line += 64) __builtin_prefetch(block + AHEAD + line);
#pragma GCC unroll 4
    for (int64_t i = 0; i < BLOCK; i += STREAMS * WIDTH) {
      for (int s = 0; s < STREAMS; ++s) sums[s] ^= load(reinterpret_cast<const int32_t*>(block + i + s * WIDTH));
    }
  }
  for (int s = 0; s < STREAMS; ++s) sink = static_cast<float>(sums[s][0]);
}

inline void stream(float* to, Float x) {  // past the caches, which would first read what is overwritten
#if PYNLP_AVX512
  _mm512_stream_ps(to, (__m512)x);
#elif PYNLP_LANES == 8
  _mm256_stream_ps(to, (__m256)x);
#elif defined(__SSE2__)
  _mm_stream_ps(to, (__m128)x);
#else
  store(to, x);
#endif
}

void copy_bytes(const char* from, char* to, int64_t bytes) {
  constexpr int64_t WIDTH = sizeof(Float);
  for (int64_t block = 0; block < bytes; block += BLOCK) {
    for (int64_t line = 0; line < BLOCK; line += 64) __builtin_prefetch(from + block + AHEAD + line);
#pragma GCC unroll 8
    for (int64_t i = block; i < block + BLOCK; i += WIDTH)
      stream(reinterpret_cast<float*>(to + i), load(reinterpret_cast<const float*>(from + i)));
  }
}

constexpr ProbeLoops LOOPS = {
    fma_rounds,
#if PYNLP_BF16
    bf16_dot_rounds,
#else
    nullptr,
#endif
#if PYNLP_LANES >= 8
    int8_dot_rounds,
#else
    nullptr,
#endif
    nullptr,  // tiles.h
    nullptr,         read_bytes, copy_bytes,
};

}  // namespace
}  // namespace pynlp
