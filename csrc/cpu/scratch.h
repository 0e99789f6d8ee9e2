// Work memory of one call, freed with it: cut into cache-aligned parts.
#pragma once
#include <cstdint>
#include <new>

namespace ilnas {
namespace ILNAS_ISA {

class Scratch {
 public:
  explicit Scratch(int64_t bytes)
      : data_(static_cast<char*>(::operator new(static_cast<size_t>(bytes < 64 ? 64 : bytes), alignment))) {}
  ~Scratch() { ::operator delete(data_, alignment); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // The bytes that n elements of T take in a scratch.
  template <class T>
  static int64_t size(int64_t n) {
    return (n * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }
  // The next n elements.
  template <class T>
  T* take(int64_t n) {
    T* part = reinterpret_cast<T*>(data_ + used_);
    used_ += size<T>(n);
    return part;
  }

 private:
  static constexpr std::align_val_t alignment{64};
  char* data_;
  int64_t used_ = 0;
};

}  // namespace ILNAS_ISA
}  // namespace ilnas
