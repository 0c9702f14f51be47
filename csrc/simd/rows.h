// Rows of any dtype as fp32, and back.
#pragma once

#include "../common/dtype.h"
#include "../common/inline.h"
#include "convert.h"

namespace pynlp {
namespace {

// LANES values from element i on, as fp32.
struct ReadFloat {
  static constexpr bool BF16 = false;
  static constexpr int64_t BYTES = 4;
  static Float load(const char* row, int64_t i) { return pynlp::load(reinterpret_cast<const float*>(row) + i); }
};
struct ReadBf16 {
  static constexpr bool BF16 = true;
  static constexpr int64_t BYTES = 2;
  static Float load(const char* row, int64_t i) { return load_bf16(reinterpret_cast<const uint16_t*>(row) + i); }
};
#if PYNLP_F16C
struct ReadHalf {
  static constexpr bool BF16 = false;
  static constexpr int64_t BYTES = 2;
  static Float load(const char* row, int64_t i) { return load_half(reinterpret_cast<const uint16_t*>(row) + i); }
};
#endif

// work(how rows of the dtype are read).
template <class Work>
PYNLP_INLINE void with_read(Dtype dtype, const Work& work) {
  if (dtype == Dtype::float32)
    work(ReadFloat{});
  else if (dtype == Dtype::bfloat16)
    work(ReadBf16{});
#if PYNLP_F16C
  else
    work(ReadHalf{});
#endif
}

inline void read_row(Dtype dtype, const void* from, int64_t count, float* to) {
  if (dtype == Dtype::float32)
    copy_row(to, from, 4 * count);
  else if (dtype == Dtype::bfloat16)
    bf16_to_float(static_cast<const uint16_t*>(from), count, to);
  else
    half_to_float(static_cast<const uint16_t*>(from), count, to);
}

// To the elements from number `element` on.
inline void write_row(Dtype dtype, const float* from, int64_t count, void* data, int64_t element) {
  if (dtype == Dtype::float32)
    copy_row(static_cast<float*>(data) + element, from, 4 * count);
  else if (dtype == Dtype::bfloat16)
    float_to_bf16(from, count, static_cast<uint16_t*>(data) + element);
  else
    float_to_half(from, count, static_cast<uint16_t*>(data) + element);
}

}  // namespace
}  // namespace pynlp
