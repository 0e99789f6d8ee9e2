#include "simt/warp.h"

#include <cmath>

namespace ilnas::simt {

// ---- shuffles and votes ----

int shuffle_source(Shuffle kind, int lane, int argument, int width) {
  const int segment = lane & ~(width - 1);
  switch (kind) {
    case Shuffle::kIndex:
      return segment | (argument & (width - 1));
    case Shuffle::kUp:
      return lane - argument >= segment ? lane - argument : -1;
    case Shuffle::kDown:
      return lane + argument < segment + width ? lane + argument : -1;
    default:
      return (lane ^ argument) < segment + width ? lane ^ argument : -1;
  }
}

uint64_t shuffle(Shuffle kind, const char* name, unsigned mask, uint64_t value, int argument, int width, Site site) {
  Machine& m = machine();
  const int lane = static_cast<int>(m.lane());
  if (width < 1 || width > 32 || (width & (width - 1)) != 0)
    m.fail(std::string(name) + ": width must be a power of two up to 32, got " + std::to_string(width));
  const int source = shuffle_source(kind, lane, argument, width);
  if (source >= 0 && (source > 31 || !(mask >> source & 1)))
    m.fail(std::string(name) + ": lane " + std::to_string(lane) + " reads lane " + std::to_string(source) +
           ", which does not take part");
  Lane self;
  self.value = value;
  self.source = source < 0 ? lane : source;
  m.exchange(name, mask, &self, site, [&](Lane** lanes) {
    ++m.counts.shuffles;
    uint64_t before[32];
    for (int i = 0; i < 32; ++i) before[i] = lanes[i] ? lanes[i]->value : 0;
    for (int i = 0; i < 32; ++i)
      if (lanes[i]) lanes[i]->value = before[lanes[i]->source];
  });
  return self.value;
}

unsigned ballot(const char* name, unsigned mask, bool predicate, Site site) {
  Lane self;
  self.value = predicate;
  machine().exchange(name, mask, &self, site, [](Lane** lanes) {
    uint64_t votes = 0;
    for (int i = 0; i < 32; ++i)
      if (lanes[i]) votes |= lanes[i]->value << i;
    for (int i = 0; i < 32; ++i)
      if (lanes[i]) lanes[i]->value = votes;
  });
  return static_cast<unsigned>(self.value);
}

// ---- ldmatrix ----

// PTX ISA 9.0, 9.7.14.5.15: lanes 8 i .. 8 i + 7 address the rows of matrix i; lane l receives the elements
// [l / 4, 2 (l % 4)] and [l / 4, 2 (l % 4) + 1] of each matrix, or of its transpose.
void load_matrices(uint32_t* fragment, int count, const void* row, Region* region, bool transposed, Site site) {
  Machine& m = machine();
  Lane self;
  self.address = row;
  self.region = region;
  m.exchange(transposed ? "ldmatrix_trans" : "ldmatrix", 0xffffffffu, &self, site, [&](Lane** lanes) {
    m.counts.ldmatrix += static_cast<uint64_t>(count);
    for (unsigned lane = 0; lane < 32; ++lane) m.check_row(*lanes[lane], lane);
    if (m.profiling) m.count_matrices(lanes, count);
    for (int i = 0; i < count; ++i) {
      uint16_t element[8][8];
      for (unsigned r = 0; r < 8; ++r) {
        const Lane& source = *lanes[8 * i + static_cast<int>(r)];
        m.touch_row(source, r, transposed);
        std::memcpy(element[r], source.address, 16);
      }
      for (int lane = 0; lane < 32; ++lane) {
        const int r = lane / 4, c = 2 * (lane % 4);
        const uint32_t low = transposed ? element[c][r] : element[r][c];
        const uint32_t high = transposed ? element[c + 1][r] : element[r][c + 1];
        lanes[lane]->fragment[i] = low | high << 16;
      }
    }
  });
  for (int i = 0; i < count; ++i) fragment[i] = self.fragment[i];
}

// ---- mma ----

namespace {

// The hardware sums the products with at least single precision and cuts off what does not fit: towards zero is the
// worst a kernel's tolerance has to allow for (PTX ISA 9.0, 9.7.14.5.14: the rounding is not specified).
float toward_zero(double sum) {
  const auto rounded = static_cast<float>(sum);
  if (std::isfinite(rounded) && std::fabs(static_cast<double>(rounded)) > std::fabs(sum))
    return std::nextafterf(rounded, 0.0f);
  return rounded;
}

template <class T>
double half_of(uint32_t word, int i) {
  return widen(T{static_cast<uint16_t>(word >> (16 * i))});
}

template <int depth>
void accumulate(Lane* const* lanes, const double (&a)[16][depth], const double (&b)[depth][8]) {
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      // Accumulators: row = groupID for c0, c1 and groupID + 8 for c2, c3; col = 2 threadID_in_group + (i & 1).
      const int row = lane / 4 + (i < 2 ? 0 : 8), col = 2 * (lane % 4) + (i & 1);
      double sum = lanes[lane]->d[i];
      for (int k = 0; k < depth; ++k) sum += a[row][k] * b[k][col];
      lanes[lane]->d[i] = toward_zero(sum);
    }
}

// PTX ISA 9.0, 9.7.14.5.7 (m16n8k8) and 9.7.14.5.8 (m16n8k16), .f16 and .bf16. A: row = groupID for the words 0 and 2,
// groupID + 8 for 1 and 3; col = 2 threadID_in_group + (i & 1), + 8 for the words 2 and 3.
// B: row = 2 threadID_in_group + (i & 1), + 8 for the word 1; col = groupID.
template <class T, int depth>
void multiply_halves(Lane* const* lanes) {
  double a[16][depth], b[depth][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, in_group = lane % 4;
    for (int word = 0; word < depth / 4; ++word)
      for (int i = 0; i < 2; ++i)
        a[group + 8 * (word & 1)][2 * in_group + i + 8 * (word / 2)] = half_of<T>(lanes[lane]->a[word], i);
    for (int word = 0; word < depth / 8; ++word)
      for (int i = 0; i < 2; ++i) b[2 * in_group + i + 8 * word][group] = half_of<T>(lanes[lane]->b[word], i);
  }
  accumulate<depth>(lanes, a, b);
}

// The low 13 bits of a tf32 operand are ignored.
double tf32(uint32_t word) { return std::bit_cast<float>(word & 0xffffe000u); }

}  // namespace

void multiply_f16_k8(Lane* const* lanes) { multiply_halves<Half, 8>(lanes); }
void multiply_f16_k16(Lane* const* lanes) { multiply_halves<Half, 16>(lanes); }
void multiply_bf16_k8(Lane* const* lanes) { multiply_halves<BFloat16, 8>(lanes); }
void multiply_bf16_k16(Lane* const* lanes) { multiply_halves<BFloat16, 16>(lanes); }

// PTX ISA 9.0, 9.7.14.5.7, .tf32. A: row = groupID for a0, a2, + 8 for a1, a3; col = threadID_in_group, + 4 for a2, a3.
// B: row = threadID_in_group for b0, + 4 for b1; col = groupID.
void multiply_tf32_k8(Lane* const* lanes) {
  double a[16][8], b[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, in_group = lane % 4;
    for (int i = 0; i < 4; ++i) a[group + 8 * (i & 1)][in_group + 4 * (i / 2)] = tf32(lanes[lane]->a[i]);
    for (int i = 0; i < 2; ++i) b[in_group + 4 * i][group] = tf32(lanes[lane]->b[i]);
  }
  accumulate<8>(lanes, a, b);
}

void require_arch(int arch, const char* what) {
  Machine& m = machine();
  if (m.arch < arch)
    m.fail(std::string(what) + " needs sm_" + std::to_string(arch) + ", the device is sm_" + std::to_string(m.arch));
}

void warp_multiply(const char* name, float (&d)[4], std::array<uint32_t, 4> a, std::array<uint32_t, 2> b, Site site,
                   uint64_t& counter, WarpMultiply multiply) {
  Lane self;
  for (int i = 0; i < 4; ++i) self.d[i] = d[i], self.a[i] = a[static_cast<size_t>(i)];
  for (int i = 0; i < 2; ++i) self.b[i] = b[static_cast<size_t>(i)];
  machine().exchange(name, 0xffffffffu, &self, site, [&](Lane** lanes) {
    ++counter;
    multiply(lanes);
  });
  for (int i = 0; i < 4; ++i) d[i] = self.d[i];
}

}  // namespace ilnas::simt
