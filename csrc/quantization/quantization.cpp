#include "quantization.h"

#include "../common/isa.h"
#include "table.h"

namespace pynlp {
namespace {

constexpr Variant<QuantizationKernels> VARIANTS[] = {
#if PYNLP_COMPILES_AMX_AND_AVX_VNNI
    {&quantization_amx_int8, &Features::amx_int8},
    {&quantization_amx_bf16, &Features::amx_bf16},
#endif
#if defined(__x86_64__)
    {&quantization_avx512_vnni, &Features::avx512_vnni},
    {&quantization_avx512_bf16, &Features::avx512_bf16},
    {&quantization_avx512, &Features::avx512},
#endif
#if PYNLP_COMPILES_AMX_AND_AVX_VNNI
    {&quantization_avx_vnni, &Features::avx_vnni},
#endif
#if defined(__x86_64__)
    {&quantization_avx2, &Features::avx2},
#endif
    {&quantization_portable},
};

}  // namespace

void quantize_4bit(const Quantize4bit& problem) { pick(VARIANTS, &QuantizationKernels::quantize_4bit)(problem); }
void dequantize_4bit(const Dequantize4bit& problem) { pick(VARIANTS, &QuantizationKernels::dequantize_4bit)(problem); }
void linear_4bit(const LinearForward<FourBit>& problem) { pick(VARIANTS, &QuantizationKernels::linear_4bit)(problem); }
void linear_4bit_backward(const LinearBackward<FourBit>& problem) {
  pick(VARIANTS, &QuantizationKernels::linear_4bit_backward)(problem);
}
void quantize_integers(const QuantizeIntegers& problem) {
  pick(VARIANTS, &QuantizationKernels::quantize_integers)(problem);
}
void dequantize_integers(const DequantizeIntegers<8>& problem) {
  pick(VARIANTS, &QuantizationKernels::dequantize_int8)(problem);
}
void dequantize_integers(const DequantizeIntegers<4>& problem) {
  pick(VARIANTS, &QuantizationKernels::dequantize_int4)(problem);
}
void integer_linear(const LinearForward<Int8>& problem) {
  pick(VARIANTS, &QuantizationKernels::int8_linear)(problem);
}
void integer_linear(const LinearForward<Int4>& problem) {
  pick(VARIANTS, &QuantizationKernels::int4_linear)(problem);
}
void integer_linear_backward(const LinearBackward<Int8>& problem) {
  pick(VARIANTS, &QuantizationKernels::int8_linear_backward)(problem);
}
void integer_linear_backward(const LinearBackward<Int4>& problem) {
  pick(VARIANTS, &QuantizationKernels::int4_linear_backward)(problem);
}
void dynamic_integer_linear(const DynamicLinear<Int8>& problem) {
  pick(VARIANTS, &QuantizationKernels::int8_dynamic_linear)(problem);
}
void dynamic_integer_linear(const DynamicLinear<Int4>& problem) {
  pick(VARIANTS, &QuantizationKernels::int4_dynamic_linear)(problem);
}

}  // namespace pynlp
