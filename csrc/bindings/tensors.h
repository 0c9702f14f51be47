// What the bindings share: tensors through torch's stable ABI.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "../common/rows.h"

#if !defined(STABLE_TORCH_ERROR_CODE_CHECK)  // its name up to torch 2.11
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// The dtype of a tensor of floats, which all kernels so far take.
inline pynlp::Dtype float_dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return pynlp::Dtype::float32;
    case ScalarType::BFloat16:
      return pynlp::Dtype::bfloat16;
    case ScalarType::Half:
      return pynlp::Dtype::float16;
    default:
      STD_TORCH_CHECK(false, "pynlp: expected float32, bfloat16 or float16");
  }
}

inline int64_t columns_of(const Tensor& x) { return x.size(x.dim() - 1); }

// The rows of x, all at one stride.
inline pynlp::RowsIn rows_in(const Tensor& x, const char* name) {
  int64_t rows = 1, stride = columns_of(x);
  bool fit = columns_of(x) == 1 || x.stride(x.dim() - 1) == 1;
  for (int64_t i = x.dim() - 2; i >= 0; --i) {
    if (x.size(i) == 1) continue;
    if (rows == 1)
      stride = x.stride(i);
    else
      fit &= x.stride(i) == rows * stride;
    rows *= x.size(i);
  }
  STD_TORCH_CHECK(fit || x.numel() == 0, "pynlp: ", name, ": expected contiguous rows, all at one stride");
  return {x.const_data_ptr(), stride, float_dtype_of(x)};
}

// A new tensor like x: torch::stable::new_empty, past the search for the operator by its name, which takes longer than
// all else when the tensor is small.
inline Tensor empty(const Tensor& x, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                    std::optional<ScalarType> dtype = std::nullopt) {
  int32_t type = dtype ? torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype)) : 0;
  AtenTensorHandle result;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(x.get(), sizes.data(), static_cast<int64_t>(sizes.size()),
                                                          dtype ? &type : nullptr, nullptr, nullptr, 0, nullptr,
                                                          &result));
  return Tensor(result);
}

// The same for results. A large one is fresh memory from the system at every call: asking for huge pages makes a fault
// every 2 MiB of it instead of every 4 KiB, which would cost a quarter of the time of a long window.
inline Tensor output(const Tensor& x, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                     std::optional<ScalarType> dtype = std::nullopt) {
  Tensor result = empty(x, sizes, dtype);
#if defined(__linux__)
  constexpr uintptr_t HUGE = uintptr_t{1} << 21;
  const auto start = reinterpret_cast<uintptr_t>(result.mutable_data_ptr());
  const uintptr_t end = start + result.numel() * result.element_size();
  const uintptr_t first = (start + HUGE - 1) / HUGE * HUGE, last = end / HUGE * HUGE;
  if (end - start >= 8 * HUGE && first < last)
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint: a refusal does not matter
#endif
  return result;
}

// How many of 65536 random numbers drop their value.
inline int32_t dropped_parts(double dropout_p) {
  return static_cast<int32_t>(std::min(65535.0, std::nearbyint(dropout_p * 65536)));
}

// Hands a call to the reference, which has the same schema, if the tensor that is its argument number ARGUMENT, counted
// from 0, is in fp64.
template <int ARGUMENT = 0>
bool reference_serves(const char* op, StableIValue* stack) {
  const auto tensor = torch::stable::detail::to<AtenTensorHandle>(stack[ARGUMENT]);
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &dtype));
  if (dtype != aoti_torch_dtype_float64()) return false;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack, TORCH_ABI_VERSION));
  return true;
}

// Makes the function `name` the kernel of pynlp::name. A last argument tells which argument's dtype decides whether the
// reference serves a call: by default the first one's.
#define PYNLP_IMPL(library, name, ...)                                               \
  (library).impl(#name, [](StableIValue* stack, uint64_t inputs, uint64_t outputs) { \
    if (!reference_serves<__VA_ARGS__>("pynlp::" #name "_reference", stack))         \
        TORCH_BOX (&name)(stack, inputs, outputs);                                   \
  })

}  // namespace
