#include "quantization.h"

#include "../common/isa.h"
#include "table.h"

namespace pynlp {
namespace {

constexpr Variant<QuantizationKernels> VARIANTS[] = {
#if defined(__x86_64__)
    {&quantization_avx512_bf16, &Features::avx512_bf16},
    {&quantization_avx512, &Features::avx512},
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
void quantize_int8(const QuantizeInt8& problem) { pick(VARIANTS, &QuantizationKernels::quantize_int8)(problem); }
void dequantize_int8(const DequantizeInt8& problem) { pick(VARIANTS, &QuantizationKernels::dequantize_int8)(problem); }
void int8_linear(const LinearForward<Int8>& problem) { pick(VARIANTS, &QuantizationKernels::int8_linear)(problem); }
void int8_linear_backward(const LinearBackward<Int8>& problem) {
  pick(VARIANTS, &QuantizationKernels::int8_linear_backward)(problem);
}

}  // namespace pynlp
