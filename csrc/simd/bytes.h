// Products of bytes where one instruction adds up four of them.
#pragma once

#include "../common/inline.h"

namespace pynlp {
namespace {

#if PYNLP_VNNI
// sum + the products of four unsigned bytes of a by four signed ones of b, in each lane; vectors of the target's width,
// or of 256 bits. The intrinsic of g++ 12 copies its accumulator, at half the speed.
template <class Sum, class A, class B>
PYNLP_INLINE Sum add_byte_products(Sum sum, A a, B b) {
#if PYNLP_AVX512
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#else
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
#endif
  return sum;
}
#endif

}  // namespace
}  // namespace pynlp
