// What stands between the two products of an expert: functions of a gate, or of a value, and of what it gates.
#pragma once

#include "../simd/math.h"
#include "moe.h"

namespace pynlp {
namespace {

// A value and its derivatives with respect to the gate and to what it gates.
struct Slopes {
  Float value, gate, up;
};

// ROUNDED: with the accuracy of bf16.
template <bool ROUNDED>
struct MoeGelu {
  static constexpr int WAYS = 1;
  static PYNLP_INLINE Float value(Float x, Float) { return x * normal_of<ROUNDED>(x).share; }
  static PYNLP_INLINE Slopes slopes(Float x, Float) {
    const Normal normal = normal_of<ROUNDED>(x);
    return {x * normal.share, normal.share + x * normal.density * broadcast(0.398942280401432678f), Float{}};
  }
};

template <bool ROUNDED>
struct MoeRelu {
  static constexpr int WAYS = 1;
  static PYNLP_INLINE Float value(Float x, Float) { return x < Float{} ? Float{} : x; }  // NaN stays
  static PYNLP_INLINE Slopes slopes(Float x, Float) {
    return {value(x, x), x > Float{} ? broadcast(1.0f) : Float{}, Float{}};
  }
};

template <bool ROUNDED>
struct MoeSwiglu {
  static constexpr int WAYS = 2;
  static PYNLP_INLINE Float value(Float gate, Float up) { return gate * sigmoid_of<ROUNDED>(gate) * up; }
  static PYNLP_INLINE Slopes slopes(Float gate, Float up) {
    const Float share = sigmoid_of<ROUNDED>(gate), silu = gate * share;
    return {silu * up, up * share * (broadcast(1.0f) + gate * (broadcast(1.0f) - share)), silu};
  }
};

// That of GPT-OSS: gate * sigmoid(1.702 gate) * (up + 1) of a gate of at most 7, and of up from -7 to 7.
template <bool ROUNDED>
struct MoeSwigluOai {
  static constexpr int WAYS = 2;
  static PYNLP_INLINE Float value(Float gate, Float up) {
    gate = lowered(gate);
    return gate * sigmoid_of<ROUNDED>(gate * broadcast(FACTOR)) * (clamped(up) + broadcast(1.0f));
  }
  static PYNLP_INLINE Slopes slopes(Float gate, Float up) {
    const Float g = lowered(gate), more = clamped(up) + broadcast(1.0f);
    const Float share = sigmoid_of<ROUNDED>(g * broadcast(FACTOR)), glu = g * share;
    const Float slope = share * (broadcast(1.0f) + g * broadcast(FACTOR) * (broadcast(1.0f) - share)) * more;
    return {glu * more, gate > broadcast(LIMIT) ? Float{} : slope,
            (up > broadcast(LIMIT)) | (up < broadcast(-LIMIT)) ? Float{} : glu};
  }

 private:
  static constexpr float FACTOR = 1.702f, LIMIT = 7.0f;
  static PYNLP_INLINE Float lowered(Float x) { return x > broadcast(LIMIT) ? broadcast(LIMIT) : x; }  // NaN stays
  static PYNLP_INLINE Float clamped(Float x) {
    x = lowered(x);
    return x < broadcast(-LIMIT) ? broadcast(-LIMIT) : x;
  }
};

// work(one of the structs above).
template <bool ROUNDED, class Work>
PYNLP_INLINE void with_activation(MoeActivation activation, const Work& work) {
  switch (activation) {
    case MoeActivation::gelu:
      work(MoeGelu<ROUNDED>{});
      break;
    case MoeActivation::relu:
      work(MoeRelu<ROUNDED>{});
      break;
    case MoeActivation::swiglu:
      work(MoeSwiglu<ROUNDED>{});
      break;
    case MoeActivation::swiglu_oai:
      work(MoeSwigluOai<ROUNDED>{});
      break;
  }
}

}  // namespace
}  // namespace pynlp
