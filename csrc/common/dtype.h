// The dtypes that the kernels take.
#pragma once

#include <cstdint>

#include "inline.h"

namespace pynlp {

enum class Dtype { float32, bfloat16, float16 };

PYNLP_INLINE int64_t bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

}  // namespace pynlp
