// The element types tensors are stored in, and the type their sums are taken in.
#pragma once
#include <cstdint>
#include <cstring>

namespace ilnas {

enum class DType : int { kFloat32, kFloat64, kFloat16, kBFloat16 };

// Bit patterns; arithmetic happens only after widening to float.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

static inline float widen(float a) { return a; }
static inline double widen(double a) { return a; }
static inline float widen(BFloat16 a) {
  const uint32_t bits = static_cast<uint32_t>(a.bits) << 16;
  float r;
  std::memcpy(&r, &bits, sizeof r);
  return r;
}
static inline float widen(Half a) {
  const uint32_t sign = static_cast<uint32_t>(a.bits & 0x8000u) << 16, magnitude = a.bits & 0x7fffu;
  uint32_t bits;
  float r;
  if (magnitude >= 0x7c00u) {
    bits = sign | 0x7f800000u | (magnitude & 0x3ffu) << 13;
  } else if (magnitude >= 0x400u) {
    bits = sign | ((magnitude << 13) + (112u << 23));
  } else {  // subnormal: magnitude units of 2^-24, exact in float
    r = static_cast<float>(magnitude) * 0x1p-24f;
    return sign ? -r : r;
  }
  std::memcpy(&r, &bits, sizeof r);
  return r;
}

// Round to nearest, ties to even; NaN stays NaN.
static inline void narrow(float a, float& to) { to = a; }
static inline void narrow(double a, double& to) { to = a; }
static inline void narrow(float a, BFloat16& to) {
  uint32_t bits;
  std::memcpy(&bits, &a, sizeof bits);
  to.bits = a != a ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
static inline void narrow(float a, Half& to) {
  uint32_t bits;
  std::memcpy(&bits, &a, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  bits &= 0x7fffffffu;
  uint16_t magnitude;
  if (bits > 0x7f800000u) {
    magnitude = 0x7e00;
  } else if (bits >= 0x477ff000u) {  // rounds to 65536 or more: infinity
    magnitude = 0x7c00;
  } else if (bits >= 0x38800000u) {  // normal in half
    magnitude = static_cast<uint16_t>((bits - (112u << 23) + 0xfffu + (bits >> 13 & 1u)) >> 13);
  } else {  // adding 0.5 leaves the value in units of 2^-24, rounded by the addition itself
    float shifted;
    std::memcpy(&shifted, &bits, sizeof shifted);
    shifted += 0.5f;
    std::memcpy(&bits, &shifted, sizeof bits);
    magnitude = static_cast<uint16_t>(bits - 0x3f000000u);
  }
  to.bits = sign | magnitude;
}

template <class Stored>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

}  // namespace ilnas
