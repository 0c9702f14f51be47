// Rows of any dtype as fp32, and back.
#pragma once

#include "../dtype.h"
#include "convert.h"

namespace pynlp {
namespace {

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
