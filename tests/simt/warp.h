// Warp functions: shuffles, votes, ldmatrix, mma. Fragment layouts are those of the PTX ISA 9.0, cited one by one.
#pragma once
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>

#include "cpu/storage.h"
#include "simt/machine.h"

namespace ilnas::simt {

// How the value of a lane's source lane is found (PTX ISA, shfl.sync); -1: the lane keeps its own value.
enum class Shuffle { kIndex, kUp, kDown, kXor };
int shuffle_source(Shuffle kind, int lane, int argument, int width);
uint64_t shuffle(Shuffle kind, const char* name, unsigned mask, uint64_t value, int argument, int width, Site site);
unsigned ballot(const char* name, unsigned mask, bool predicate, Site site);

void load_matrices(uint32_t* fragment, int count, const void* row, Region* region, bool transposed, Site site);

// d += a b of one warp, a [16, depth], b [depth, 8], with elements already widened.
using WarpMultiply = void (*)(Lane* const* lanes);
void warp_multiply(const char* name, float (&d)[4], std::array<uint32_t, 4> a, std::array<uint32_t, 2> b, Site site,
                   uint64_t& counter, WarpMultiply multiply);
void multiply_f16_k8(Lane* const* lanes);
void multiply_f16_k16(Lane* const* lanes);
void multiply_bf16_k8(Lane* const* lanes);
void multiply_bf16_k16(Lane* const* lanes);
void multiply_tf32_k8(Lane* const* lanes);
void require_arch(int arch, const char* what);

template <class T, int depth>
void multiply(float (&d)[4], std::array<uint32_t, 4> a, std::array<uint32_t, 2> b, Site site) {
  const char* name = depth == 8 ? "mma_m16n8k8" : "mma_m16n8k16";
  uint64_t& counter = depth == 8 ? machine().counts.mma_k8 : machine().counts.mma_k16;
  if constexpr (std::is_same_v<T, Half>) {
    warp_multiply(name, d, a, b, site, counter, depth == 8 ? multiply_f16_k8 : multiply_f16_k16);
  } else {
    static_assert(std::is_same_v<T, BFloat16>, "mma multiplies Half or BFloat16");
    require_arch(80, "bfloat16 mma");
    warp_multiply(name, d, a, b, site, counter, depth == 8 ? multiply_bf16_k8 : multiply_bf16_k16);
  }
}
inline void multiply_tf32(float (&d)[4], std::array<uint32_t, 4> a, std::array<uint32_t, 2> b, Site site) {
  require_arch(80, "tf32 mma");
  warp_multiply("mma_m16n8k8_tf32", d, a, b, site, machine().counts.mma_k8, multiply_tf32_k8);
}

template <class T>
T shuffle_as(Shuffle kind, const char* name, unsigned mask, T value, int argument, int width, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles exchange 32- and 64-bit values");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shuffle(kind, name, mask, bits, argument, width, site);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace ilnas::simt

// In the global namespace, as in CUDA.
using IlnasSimtSite = ilnas::simt::Site;

inline void __syncthreads(IlnasSimtSite site = IlnasSimtSite::current()) {
  ilnas::simt::machine().sync_block("__syncthreads", 0, site);
}
inline int __syncthreads_or(int predicate, IlnasSimtSite site = IlnasSimtSite::current()) {
  return ilnas::simt::machine().sync_block("__syncthreads_or", predicate != 0, site) != 0;
}
inline int __syncthreads_count(int predicate, IlnasSimtSite site = IlnasSimtSite::current()) {
  return ilnas::simt::machine().sync_block("__syncthreads_count", predicate != 0, site);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, IlnasSimtSite site = IlnasSimtSite::current()) {
  ilnas::simt::machine().sync_warp(mask, site);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, IlnasSimtSite site = IlnasSimtSite::current()) {
  return ilnas::simt::shuffle_as(ilnas::simt::Shuffle::kIndex, "__shfl_sync", mask, value, lane, width, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 IlnasSimtSite site = IlnasSimtSite::current()) {
  return ilnas::simt::shuffle_as(ilnas::simt::Shuffle::kUp, "__shfl_up_sync", mask, value, static_cast<int>(delta),
                                 width, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   IlnasSimtSite site = IlnasSimtSite::current()) {
  return ilnas::simt::shuffle_as(ilnas::simt::Shuffle::kDown, "__shfl_down_sync", mask, value, static_cast<int>(delta),
                                 width, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  IlnasSimtSite site = IlnasSimtSite::current()) {
  return ilnas::simt::shuffle_as(ilnas::simt::Shuffle::kXor, "__shfl_xor_sync", mask, value, lane_mask, width, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, IlnasSimtSite site = IlnasSimtSite::current()) {
  return ilnas::simt::ballot("__ballot_sync", mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate, IlnasSimtSite site = IlnasSimtSite::current()) {
  return ilnas::simt::ballot("__any_sync", mask, predicate != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, IlnasSimtSite site = IlnasSimtSite::current()) {
  return ilnas::simt::ballot("__all_sync", mask, predicate != 0, site) == mask;
}
