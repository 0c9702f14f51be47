#include "moe.h"

#include "../common/isa.h"
#include "table.h"

namespace pynlp {
namespace {

constexpr Variant<MoeKernels> VARIANTS[] = {
#if defined(__x86_64__)
    {&moe_avx512_bf16, &Features::avx512_bf16},
    {&moe_avx512, &Features::avx512},
    {&moe_avx2, &Features::avx2},
#endif
    {&moe_portable},
};

}  // namespace

// Counting sort: a slot's row follows from the slots of the same expert before it.
void moe_dispatch(const Dispatch& in) {
  const auto is_chosen = [&](int64_t expert) { return expert >= 0 && expert < in.experts; };
  for (int64_t expert = 0; expert < in.experts; ++expert) in.counts[expert] = 0;
  for (int64_t slot = 0; slot < in.slots; ++slot) {
    const int64_t expert = in.choices.at(slot);
    if (is_chosen(expert)) ++in.counts[expert];
  }
  int32_t row = 0;
  for (int64_t expert = 0; expert < in.experts; ++expert) {
    in.offsets[expert] = row;  // where its next row comes
    row += in.counts[expert];
  }
  for (int64_t slot = 0; slot < in.slots; ++slot) {
    const int64_t expert = in.choices.at(slot);
    const int32_t own = is_chosen(expert) ? in.offsets[expert]++ : row++;
    in.places[slot] = is_chosen(expert) ? own : -1;
    in.permutation[own] = static_cast<int32_t>(slot);
  }
}

void grouped_mm(const GroupedForward& problem) { pick(VARIANTS, &MoeKernels::grouped_mm)(problem); }
void grouped_mm_weight_backward(const GroupedWeightGradient& problem) {
  pick(VARIANTS, &MoeKernels::grouped_mm_weight_backward)(problem);
}
void moe_mlp_forward(const MoeMlpForward<Experts>& problem) { pick(VARIANTS, &MoeKernels::moe_mlp_forward)(problem); }
void moe_mlp_forward(const MoeMlpForward<FourBitExperts>& problem) {
  pick(VARIANTS, &MoeKernels::moe_mlp_4bit_forward)(problem);
}
void moe_mlp_forward(const MoeMlpForward<Int8Experts>& problem) {
  pick(VARIANTS, &MoeKernels::moe_mlp_int8_forward)(problem);
}
void moe_mlp_backward(const MoeMlpBackward<Experts>& problem) { pick(VARIANTS, &MoeKernels::moe_mlp_backward)(problem); }
void moe_mlp_backward(const MoeMlpBackward<FourBitExperts>& problem) {
  pick(VARIANTS, &MoeKernels::moe_mlp_4bit_backward)(problem);
}
void moe_mlp_backward(const MoeMlpBackward<Int8Experts>& problem) {
  pick(VARIANTS, &MoeKernels::moe_mlp_int8_backward)(problem);
}

}  // namespace pynlp
