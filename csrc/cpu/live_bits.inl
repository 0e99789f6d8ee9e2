// A contiguous weight beside its mask, one bit an element: looking at absent entries, and zeroing them, as fast as
// memory hands them over. Elements are only copied or compared with zero, so their size is known here, not their type.
#pragma once
#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"

#if defined(ILNAS_ISA_AVX512)
#include <immintrin.h>
#endif

namespace ilnas {
namespace ILNAS_ISA {
namespace {

// Eight elements as machine words, which any compiler turns into wide loads.
template <class E>
struct Eight {
  uint64_t word[sizeof(E)];
  static Eight load(const void* from) {
    Eight e;
    std::memcpy(e.word, from, sizeof e.word);
    return e;
  }
};

// All ones in the elements that a byte of the mask calls absent.
template <class E>
struct AbsentMasks {
  alignas(64) E of[256][8] = {};
  constexpr AbsentMasks() {
    for (int byte = 0; byte < 256; ++byte)
      for (int bit = 0; bit < 8; ++bit) of[byte][bit] = byte >> bit & 1 ? E{0} : static_cast<E>(~E{0});
  }
};
template <class E>
constexpr AbsentMasks<E> absent_masks;

// Every bit set in an absent entry of the elements of mask bytes [begin, end), or-ed into `seen`.
template <class E>
void collect_absent(const E* weight, const uint8_t* live_bits, int64_t begin, int64_t end, E (&seen)[8]) {
  auto all = Eight<E>::load(seen);
  for (int64_t b = begin; b < end; ++b) {
    const auto data = Eight<E>::load(weight + b * 8), absent = Eight<E>::load(absent_masks<E>.of[live_bits[b]]);
    for (size_t i = 0; i < sizeof(E); ++i) all.word[i] |= data.word[i] & absent.word[i];
  }
  std::memcpy(seen, all.word, sizeof all.word);
}
template <class E>
void zero_absent_of(E* weight, const uint8_t* live_bits, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    auto data = Eight<E>::load(weight + b * 8);
    const auto absent = Eight<E>::load(absent_masks<E>.of[live_bits[b]]);
    for (size_t i = 0; i < sizeof(E); ++i) data.word[i] &= ~absent.word[i];
    std::memcpy(weight + b * 8, data.word, sizeof data.word);
  }
}

#if defined(ILNAS_ISA_AVX512)

inline __m512i load_where(const uint8_t* p, uint64_t mask) { return _mm512_maskz_loadu_epi8(mask, p); }
inline __m512i load_where(const uint16_t* p, uint64_t mask) {
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>(mask), p);
}
inline __m512i load_where(const uint32_t* p, uint64_t mask) {
  return _mm512_maskz_loadu_epi32(static_cast<__mmask16>(mask), p);
}
inline __m512i load_where(const uint64_t* p, uint64_t mask) {
  return _mm512_maskz_loadu_epi64(static_cast<__mmask8>(mask), p);
}

// Calls body(vector's elements, the mask's bits for them) for the elements of whole groups of eight mask bytes; returns
// the first byte left over.
template <class E, class Body>
int64_t for_vectors(E* weight, const uint8_t* live_bits, int64_t begin, int64_t end, const Body& body) {
  constexpr int lanes = 64 / sizeof(E);
  int64_t b = begin;
  for (; b + 8 <= end; b += 8) {
    uint64_t live;
    std::memcpy(&live, live_bits + b, sizeof live);
    for (int i = 0; i < 64; i += lanes) body(weight + b * 8 + i, live >> i);
  }
  return b;
}

#endif

template <class E>
bool any_absent(const E* weight, const uint8_t* live_bits, int64_t begin, int64_t end) {
  E seen[8] = {};
#if defined(ILNAS_ISA_AVX512)
  __m512i all = _mm512_setzero_si512();
  begin = for_vectors(weight, live_bits, begin, end,
                      [&](const E* p, uint64_t live) { all = _mm512_or_si512(all, load_where(p, ~live)); });
  E lanes[64 / sizeof(E)];
  std::memcpy(lanes, &all, sizeof lanes);
  for (const E a : lanes) seen[0] |= a;
#endif
  collect_absent(weight, live_bits, begin, end, seen);
  constexpr E magnitude = static_cast<E>(~E{0}) >> 1;  // -0 is a zero too
  for (const E a : seen)
    if (a & magnitude) return true;
  return false;
}

template <class E>
void zero_absent_in(E* weight, const uint8_t* live_bits, int64_t begin, int64_t end) {
#if defined(ILNAS_ISA_AVX512)
  begin = for_vectors(weight, live_bits, begin, end,
                      [&](E* p, uint64_t live) { _mm512_storeu_si512(p, load_where(p, live)); });
#endif
  zero_absent_of(weight, live_bits, begin, end);
}

bool has_strays(int64_t element_size, const void* weight, const uint8_t* live_bits, int64_t begin, int64_t end) {
  switch (element_size) {
    case 1:
      return any_absent(static_cast<const uint8_t*>(weight), live_bits, begin, end);
    case 2:
      return any_absent(static_cast<const uint16_t*>(weight), live_bits, begin, end);
    case 4:
      return any_absent(static_cast<const uint32_t*>(weight), live_bits, begin, end);
    default:
      return any_absent(static_cast<const uint64_t*>(weight), live_bits, begin, end);
  }
}

void zero_absent(int64_t element_size, void* weight, const uint8_t* live_bits, int64_t begin, int64_t end) {
  switch (element_size) {
    case 1:
      return zero_absent_in(static_cast<uint8_t*>(weight), live_bits, begin, end);
    case 2:
      return zero_absent_in(static_cast<uint16_t*>(weight), live_bits, begin, end);
    case 4:
      return zero_absent_in(static_cast<uint32_t*>(weight), live_bits, begin, end);
    default:
      return zero_absent_in(static_cast<uint64_t*>(weight), live_bits, begin, end);
  }
}

}  // namespace
}  // namespace ILNAS_ISA
}  // namespace ilnas
