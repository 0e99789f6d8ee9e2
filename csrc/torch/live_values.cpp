// Moving weights between the dense and the packed form in O(nnz), and reading a dense weight for strays.
//
// Elements are only copied or compared with zero, so the kernels know their size and not their type.
#include <algorithm>
#include <atomic>
#include <cstdint>

#include "torch/cpu_call.h"

namespace ilnas {
namespace {

// Calls body with an unsigned integer of the tensor's element size.
template <typename Body>
auto with_element(const Tensor& t, const Body& body) {
  switch (t.element_size()) {
    case 1:
      return body(uint8_t{});
    case 2:
      return body(uint16_t{});
    case 4:
      return body(uint32_t{});
    default:
      STD_TORCH_CHECK(t.element_size() == 8, "ilnas: a weight has elements of 1, 2, 4 or 8 bytes, got ",
                      t.element_size());
      return body(uint64_t{});
  }
}

// Where the column (input channel, tap) of a row lies in a weight of any strides.
class ColumnOffset {
 public:
  explicit ColumnOffset(const Tensor& weight) {
    int64_t taps = 1, expected = 1;
    for (int64_t d = weight.dim() - 1; d > 0; --d) {
      contiguous_ = contiguous_ && (weight.size(d) == 1 || weight.stride(d) == expected);
      expected *= weight.size(d);
      if (d > 1) taps *= weight.size(d);
    }
    row_ = weight.dim() > 0 ? weight.stride(0) : 0;
    channel_ = weight.dim() > 1 ? weight.stride(1) : 0;
    tap_.resize(taps);
    for (int64_t tap = 0; tap < taps; ++tap) {
      int64_t rest = tap;
      for (int64_t d = weight.dim() - 1; d > 1; --d) {
        tap_[tap] += rest % weight.size(d) * weight.stride(d);
        rest /= weight.size(d);
      }
    }
  }
  int64_t operator()(int64_t row, int32_t col) const {
    if (contiguous_) return row * row_ + col;
    const auto taps = static_cast<int32_t>(tap_.size());
    return row * row_ + col / taps * channel_ + tap_[col % taps];
  }

 private:
  bool contiguous_ = true;
  int64_t row_, channel_;
  Ints tap_;
};

// Rows handed to one task: enough work that starting it costs nothing beside it.
constexpr int64_t kEntriesPerTask = 1 << 15;

template <typename Body>
void for_rows(int64_t rows, int64_t entries, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, rows * kEntriesPerTask / std::max<int64_t>(entries, 1));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row);
  });
}

Tensor gather_live(const Tensor& weight, const Tensor& row_ptr, const Tensor& col) {
  Tensor values = torch::stable::new_empty(weight, {col.numel()});
  const ColumnOffset offset(weight);
  const int32_t* rows = row_ptr.const_data_ptr<int32_t>();
  const int32_t* cols = col.const_data_ptr<int32_t>();
  with_element(weight, [&](auto element) {
    using E = decltype(element);
    const E* from = static_cast<const E*>(weight.data_ptr());
    E* to = static_cast<E*>(values.data_ptr());
    for_rows(row_ptr.numel() - 1, col.numel(), [&](int64_t row) {
      for (int32_t j = rows[row]; j < rows[row + 1]; ++j) to[j] = from[offset(row, cols[j])];
    });
  });
  return values;
}

Tensor scatter_live(const Tensor& values, const Tensor& row_ptr, const Tensor& col, const Ints& size,
                    const Ints& stride) {
  Tensor weight = empty_strided(values, size, stride);
  torch::stable::zero_(weight);
  const Tensor packed = torch::stable::contiguous(values);
  const ColumnOffset offset(weight);
  const int32_t* rows = row_ptr.const_data_ptr<int32_t>();
  const int32_t* cols = col.const_data_ptr<int32_t>();
  with_element(weight, [&](auto element) {
    using E = decltype(element);
    const E* from = static_cast<const E*>(packed.data_ptr());
    E* to = static_cast<E*>(weight.data_ptr());
    for_rows(row_ptr.numel() - 1, col.numel(), [&](int64_t row) {
      for (int32_t j = rows[row]; j < rows[row + 1]; ++j) to[offset(row, cols[j])] = from[j];
    });
  });
  return weight;
}

// Calls body(offset) for every absent position of a row.
template <typename Body>
void for_absent(const ColumnOffset& offset, const int32_t* rows, const int32_t* cols, int64_t row, int64_t row_length,
                const Body& body) {
  int32_t next = 0;
  for (int32_t j = rows[row]; j < rows[row + 1]; ++j) {
    for (; next < cols[j]; ++next) body(offset(row, next));
    next = cols[j] + 1;
  }
  for (; next < row_length; ++next) body(offset(row, next));
}

int64_t row_length(const Tensor& weight) { return weight.size(0) ? weight.numel() / weight.size(0) : 0; }

// Calls body(first byte, last byte) for runs of whole bytes of the packed mask.
template <typename Body>
void for_bytes(int64_t numel, const Body& body) {
  constexpr int64_t bytes_per_task = 1 << 14;  // half a megabyte of float32, read in less time than a thread wakes in
  torch::stable::parallel_for(0, numel / 8, bytes_per_task, body);
}

// Whether an absent entry holds anything but a zero: 1 or 0, int64 [1]; NaN counts. live_bits: the packed mask.
Tensor has_strays(const Tensor& weight, const Tensor& row_ptr, const Tensor& col, const Tensor& live_bits,
                  const std::string& isa) {
  Tensor answer = torch::stable::new_empty(row_ptr, {1}, ScalarType::Long);
  std::atomic<bool> found = false;
  with_element(weight, [&](auto element) {
    using E = decltype(element);
    const E* from = static_cast<const E*>(weight.data_ptr());
    constexpr E magnitude = static_cast<E>(~E{0}) >> 1;
    if (weight.is_contiguous()) {
      const Kernels& kernels = kernels_named(isa);
      const uint8_t* bits = live_bits.const_data_ptr<uint8_t>();
      for_bytes(weight.numel(), [&](int64_t begin, int64_t end) {
        if (kernels.has_strays(sizeof(E), from, bits, begin, end)) found.store(true, std::memory_order_relaxed);
      });
      for (int64_t i = weight.numel() / 8 * 8; i < weight.numel(); ++i)
        if (!(bits[i / 8] >> (i % 8) & 1) && (from[i] & magnitude)) found = true;
      return;
    }
    const ColumnOffset offset(weight);
    const int32_t* rows = row_ptr.const_data_ptr<int32_t>();
    const int32_t* cols = col.const_data_ptr<int32_t>();
    for_rows(row_ptr.numel() - 1, weight.numel(), [&](int64_t row) {
      E any = 0;
      for_absent(offset, rows, cols, row, row_length(weight), [&](int64_t at) { any |= from[at]; });
      if (any & magnitude) found.store(true, std::memory_order_relaxed);
    });
  });
  *answer.mutable_data_ptr<int64_t>() = found;
  return answer;
}

// Sets every absent entry to 0.
void zero_absent_(Tensor weight, const Tensor& row_ptr, const Tensor& col, const Tensor& live_bits,
                  const std::string& isa) {
  with_element(weight, [&](auto element) {
    using E = decltype(element);
    E* to = static_cast<E*>(weight.data_ptr());
    if (weight.is_contiguous()) {
      const Kernels& kernels = kernels_named(isa);
      const uint8_t* bits = live_bits.const_data_ptr<uint8_t>();
      for_bytes(weight.numel(),
                [&](int64_t begin, int64_t end) { kernels.zero_absent(sizeof(E), to, bits, begin, end); });
      for (int64_t i = weight.numel() / 8 * 8; i < weight.numel(); ++i)
        if (!(bits[i / 8] >> (i % 8) & 1)) to[i] = 0;
      return;
    }
    const ColumnOffset offset(weight);
    const int32_t* rows = row_ptr.const_data_ptr<int32_t>();
    const int32_t* cols = col.const_data_ptr<int32_t>();
    for_rows(row_ptr.numel() - 1, weight.numel(), [&](int64_t row) {
      for_absent(offset, rows, cols, row, row_length(weight), [&](int64_t at) { to[at] = 0; });
    });
  });
}

}  // namespace

// row_ptr, col: the live positions. size, stride: of the dense weight to make.
STABLE_TORCH_LIBRARY_FRAGMENT(ilnas, m) {
  m.def("gather_live(Tensor weight, Tensor row_ptr, Tensor col) -> Tensor");
  m.def("scatter_live(Tensor values, Tensor row_ptr, Tensor col, int[] size, int[] stride) -> Tensor");
  m.def("has_strays(Tensor weight, Tensor row_ptr, Tensor col, Tensor live_bits, str isa=\"\") -> Tensor");
  m.def("zero_absent_(Tensor(a!) weight, Tensor row_ptr, Tensor col, Tensor live_bits, str isa=\"\") -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ilnas, CPU, m) {
  m.impl("gather_live", TORCH_BOX(&gather_live));
  m.impl("scatter_live", TORCH_BOX(&scatter_live));
  m.impl("has_strays", TORCH_BOX(&has_strays));
  m.impl("zero_absent_", TORCH_BOX(&zero_absent_));
}

}  // namespace ilnas
