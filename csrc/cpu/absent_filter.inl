// From gradients to candidates: scores at or above the running threshold become keys, the rest is forgotten.
#pragma once
#include "cpu/best_keys.h"
#include "cpu/vector.h"

namespace ilnas {
namespace ILNAS_ISA {
namespace {

constexpr float greatest_finite = 3.402823466e+38f;
constexpr int filter_lanes = 16;

// |score| in 31 bits, then the index falling, then the sign: greater keys are better, ties go to the lower index.
inline uint64_t key_of(float score, int64_t index) {
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  return uint64_t{bits & 0x7fffffffu} << 33 | uint64_t{0xffffffffu - static_cast<uint32_t>(index)} << 1 | bits >> 31;
}
inline int64_t index_of(uint64_t key) { return 0xffffffffu - static_cast<uint32_t>(key >> 1); }
inline float score_of(uint64_t key) {
  const uint32_t bits = static_cast<uint32_t>(key >> 33) | static_cast<uint32_t>(key & 1u) << 31;
  float score;
  std::memcpy(&score, &bits, sizeof score);
  return score;
}
// The least key of a score of this size.
inline uint64_t least_key(float size) { return key_of(size < 0 ? 0.0f : size, 0xffffffff); }

// Which of 16 scores have |score| >= size, and which are NaN or infinite, one bit each. NaN is in the second only.
struct Lanes16 {
  uint32_t reach, non_finite;
};
inline Lanes16 compare_16(const float* scores, float size) {
#if defined(ILNAS_ISA_AVX512)
  const __m512 v = _mm512_abs_ps(_mm512_loadu_ps(scores));
  return {_mm512_cmp_ps_mask(v, _mm512_set1_ps(size), _CMP_GE_OQ),
          _mm512_cmp_ps_mask(v, _mm512_set1_ps(greatest_finite), _CMP_NLE_UQ)};
#elif defined(ILNAS_ISA_AVX2)
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  const __m256 a = _mm256_and_ps(_mm256_loadu_ps(scores), magnitude);
  const __m256 b = _mm256_and_ps(_mm256_loadu_ps(scores + 8), magnitude);
  const __m256 low = _mm256_set1_ps(size), high = _mm256_set1_ps(greatest_finite);
  const auto mask = [](__m256 x, __m256 y) {
    return static_cast<uint32_t>(_mm256_movemask_ps(x)) | static_cast<uint32_t>(_mm256_movemask_ps(y)) << 8;
  };
  return {mask(_mm256_cmp_ps(a, low, _CMP_GE_OQ), _mm256_cmp_ps(b, low, _CMP_GE_OQ)),
          mask(_mm256_cmp_ps(a, high, _CMP_NLE_UQ), _mm256_cmp_ps(b, high, _CMP_NLE_UQ))};
#else
  Lanes16 r{0, 0};
  for (int i = 0; i < filter_lanes; ++i) {
    const float v = scores[i] < 0 ? -scores[i] : scores[i];
    r.reach |= static_cast<uint32_t>(v >= size) << i;
    r.non_finite |= static_cast<uint32_t>(!(v <= greatest_finite)) << i;
  }
  return r;
#endif
}

inline int count_bits(uint32_t bits) {
  int count = 0;
  for (; bits; bits &= bits - 1) ++count;
  return count;
}

inline int lowest_bit(uint32_t bits) {
#if defined(__GNUC__)
  return __builtin_ctz(bits);
#else
  int place = 0;
  while (!(bits >> place & 1u)) ++place;
  return place;
#endif
}

// Sets of outputs of a tile, one bit each: [column][marks_per_column].
inline int64_t marks_of(int64_t outputs) { return (outputs + filter_lanes - 1) / filter_lanes; }
inline void mark(uint16_t* marks, int64_t output) {
  marks[output / filter_lanes] |= static_cast<uint16_t>(1u << output % filter_lanes);
}

// One thread's candidates on their way to the common best.
class Candidates {
 public:
  explicit Candidates(BestKeys* best) : best_(best) { read_threshold(); }

  // scores[count] of the indices first + i * step, without those whose bit in blocked[i / 16] is set. NaN and infinity
  // are counted, not ranked.
  void offer(const float* scores, const uint16_t* blocked, int64_t count, int64_t first, int64_t step) {
    for (int64_t i = 0; i < count; i += filter_lanes) {
      Lanes16 lanes = compare_16(scores + i, size_);
      uint32_t offered = ~uint32_t{blocked[i / filter_lanes]};
      if (count - i < filter_lanes) offered &= (1u << (count - i)) - 1;
      lanes.reach &= offered, lanes.non_finite &= offered;
      if ((lanes.reach | lanes.non_finite) == 0) continue;
      non_finite_ += count_bits(lanes.non_finite);
      for (uint32_t reach = lanes.reach & ~lanes.non_finite; reach; reach &= reach - 1) {
        const int lane = lowest_bit(reach);
        const uint64_t key = key_of(scores[i + lane], first + (i + lane) * step);
        if (key >= threshold_) keys_[held_++] = key;
      }
      if (held_ > capacity - filter_lanes) flush();
    }
  }
  void flush() {
    if (held_ > 0) best_->add(keys_, held_);
    held_ = 0;
    read_threshold();
  }
  void read_threshold() {
    threshold_ = best_->threshold();
    size_ = score_of(threshold_ & ~uint64_t{1});
  }
  int64_t non_finite() const { return non_finite_; }

 private:
  static constexpr int64_t capacity = 2048;
  BestKeys* best_;
  uint64_t threshold_;
  float size_;
  int64_t held_ = 0, non_finite_ = 0;
  uint64_t keys_[capacity];
};

}  // namespace
}  // namespace ILNAS_ISA
}  // namespace ilnas
