// A pointer that knows the array it points into and has every access through it checked.
#pragma once
#include <cstddef>
#include <type_traits>

#include "simt/machine.h"

namespace ilnas::simt {

template <class T, bool shared>
class Pointer {
 public:
  using Plain = std::remove_const_t<T>;

  // p[i]. It converts to the value, or takes one, in the expression that names it: `auto v = p[i]` would be read later
  // than on the device, so a proxy with a name does neither.
  class Element {
   public:
    explicit Element(const Pointer& at) : at_(at) {}
    Element(const Element&) = delete;
    [[gnu::always_inline]] operator Plain() const&& { return read(); }
    [[gnu::always_inline]] const Element& operator=(const Plain& v) const&& { return write(v); }
    const Element& operator=(const Element& named) const&& = delete;
    const Element& operator=(const Element&& other) const&& { return write(other.read()); }
    const Element& operator+=(const Plain& v) const&& { return write(static_cast<Plain>(read() + v)); }
    const Element& operator-=(const Plain& v) const&& { return write(static_cast<Plain>(read() - v)); }
    const Element& operator*=(const Plain& v) const&& { return write(static_cast<Plain>(read() * v)); }
    const Element& operator|=(const Plain& v) const&& { return write(static_cast<Plain>(read() | v)); }
    const Element& operator&=(const Plain& v) const&& { return write(static_cast<Plain>(read() & v)); }

   private:
    [[gnu::always_inline]] Plain read() const {
      machine().touch(at_.region_, at_.raw_, sizeof(T), alignof(T), Touch::kRead);
      return *at_.raw_;
    }
    [[gnu::always_inline]] const Element& write(const Plain& v) const {
      static_assert(!std::is_const_v<T>, "write through a pointer to const");
      machine().touch(at_.region_, at_.raw_, sizeof(T), alignof(T), Touch::kWrite);
      *at_.raw_ = v;
      return *this;
    }
    const Pointer at_;
  };

  Pointer() = default;
  Pointer(std::nullptr_t) {}
  Pointer(T* raw)
    requires(!shared)
      : raw_(raw), region_(raw ? machine().find_global(raw) : nullptr) {}
  Pointer(T* raw, Region* region) : raw_(raw), region_(region) {}
  template <class U>
    requires(std::is_const_v<T> && std::is_same_v<U, Plain>)
  Pointer(const Pointer<U, shared>& p) : raw_(p.raw()), region_(p.region()) {}
  static Pointer of_region(Region* region) { return Pointer(reinterpret_cast<T*>(region->begin), region); }

  T* raw() const { return raw_; }
  Region* region() const { return region_; }

  Element operator[](ptrdiff_t i) const { return Element(*this + i); }
  Element operator*() const { return Element(*this); }
  explicit operator bool() const { return raw_ != nullptr; }
  Pointer operator+(ptrdiff_t i) const { return Pointer(raw_ + i, region_); }
  Pointer operator-(ptrdiff_t i) const { return Pointer(raw_ - i, region_); }
  ptrdiff_t operator-(const Pointer& p) const { return raw_ - p.raw_; }
  Pointer& operator+=(ptrdiff_t i) { return raw_ += i, *this; }
  Pointer& operator-=(ptrdiff_t i) { return raw_ -= i, *this; }
  Pointer& operator++() { return *this += 1; }
  bool operator==(const Pointer& p) const { return raw_ == p.raw_; }
  bool operator==(std::nullptr_t) const { return raw_ == nullptr; }
  auto operator<=>(const Pointer& p) const { return raw_ <=> p.raw_; }

 private:
  T* raw_ = nullptr;
  Region* region_ = nullptr;
};

}  // namespace ilnas::simt
