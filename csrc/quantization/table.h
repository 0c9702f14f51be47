// The kernels of quantized weights, and the variants of them.
#pragma once

#include "../common/isa.h"
#include "quantization.h"

namespace pynlp {

struct QuantizationKernels {
  void (*quantize_4bit)(const Quantize4bit& problem);
  void (*dequantize_4bit)(const Dequantize4bit& problem);
  void (*linear_4bit)(const LinearForward<FourBit>& problem);
  void (*linear_4bit_backward)(const LinearBackward<FourBit>& problem);
  void (*quantize_integers)(const QuantizeIntegers& problem);
  void (*dequantize_int8)(const DequantizeIntegers<8>& problem);
  void (*dequantize_int4)(const DequantizeIntegers<4>& problem);
  void (*int8_linear)(const LinearForward<Int8>& problem);
  void (*int4_linear)(const LinearForward<Int4>& problem);
  void (*int8_linear_backward)(const LinearBackward<Int8>& problem);
  void (*int4_linear_backward)(const LinearBackward<Int4>& problem);
  void (*int8_dynamic_linear)(const DynamicLinear<Int8>& problem);
  void (*int4_dynamic_linear)(const DynamicLinear<Int4>& problem);
};

extern const QuantizationKernels quantization_portable;
#if defined(__x86_64__)
extern const QuantizationKernels quantization_avx2;
extern const QuantizationKernels quantization_avx512;
extern const QuantizationKernels quantization_avx512_bf16;
extern const QuantizationKernels quantization_avx512_vnni;
#endif
#if PYNLP_COMPILES_AMX_AND_AVX_VNNI
extern const QuantizationKernels quantization_avx_vnni;
extern const QuantizationKernels quantization_amx_bf16;
extern const QuantizationKernels quantization_amx_int8;
#endif

}  // namespace pynlp
