// Rows in memory, as an op hands them to the kernels.
#pragma once

#include "dtype.h"

namespace pynlp {

// Rows of contiguous values, `stride` elements from one to the next. An optional tensor that is missing has no data.
struct RowsIn {
  const void* data;
  int64_t stride;
  Dtype dtype;

  PYNLP_INLINE const char* row(int64_t i) const {
    return static_cast<const char*>(data) + i * stride * bytes_of(dtype);
  }
};

struct RowsOut {  // contiguous
  void* data;
  Dtype dtype;
};

}  // namespace pynlp
