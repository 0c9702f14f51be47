// The dtypes of what kernels read and write.
#pragma once

#include <cstdint>

#include "inline.h"

namespace pynlp {

enum class Dtype { float32, bfloat16, float16, int8, uint8 };

PYNLP_INLINE int64_t bytes_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32:
      return 4;
    case Dtype::bfloat16:
    case Dtype::float16:
      return 2;
    default:
      return 1;
  }
}

}  // namespace pynlp
