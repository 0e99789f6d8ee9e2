// Packed values in the type sums are taken in, and sums brought back to the stored type.
#pragma once
#include "cpu/call.h"
#include "cpu/convert.inl"
#include "cpu/scratch.h"

namespace ilnas {
namespace ILNAS_ISA {
namespace {

// The first of [0, n) that part `part` of `parts` works on.
inline int64_t part_begin(int64_t n, int64_t part, int64_t parts) { return n * part / parts; }

template <class S, class T>
constexpr bool same_type = false;
template <class T>
constexpr bool same_type<T, T> = true;

// values[n] as sums' type: in place where they are stored so, else a copy.
template <class S>
class Widened {
 public:
  Widened(const void* values, int64_t n, const Parallel& parallel)
      : in_place_(values), copy_(same_type<S, Sum<S>> ? 0 : Scratch::size<Sum<S>>(n)) {
    if constexpr (!same_type<S, Sum<S>>) {
      Sum<S>* to = copy_.template take<Sum<S>>(n);
      in_place_ = to;
      parallel_for(parallel, parallel.threads, [&](int64_t part) {
        for (int64_t j = part_begin(n, part, parallel.threads); j < part_begin(n, part + 1, parallel.threads); ++j)
          to[j] = widen(static_cast<const S*>(values)[j]);
      });
    }
  }
  const Sum<S>* data() const { return static_cast<const Sum<S>*>(in_place_); }

 private:
  const void* in_place_;
  Scratch copy_;
};

// values[order[n]] as sums' type.
template <class S>
class Permuted {
 public:
  Permuted(const void* values, const int32_t* order, int64_t n, const Parallel& parallel)
      : copy_(Scratch::size<Sum<S>>(n)), data_(copy_.template take<Sum<S>>(n)) {
    parallel_for(parallel, parallel.threads, [&](int64_t part) {
      for (int64_t j = part_begin(n, part, parallel.threads); j < part_begin(n, part + 1, parallel.threads); ++j)
        data_[j] = widen(static_cast<const S*>(values)[order[j]]);
    });
  }
  const Sum<S>* data() const { return data_; }

 private:
  Scratch copy_;
  Sum<S>* data_;
};

}  // namespace
}  // namespace ILNAS_ISA
}  // namespace ilnas
