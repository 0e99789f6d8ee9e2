#include "cuda/condense.cuh"

namespace ilnas::cuda {
namespace {

constexpr int kThreads = 256, kResidues = 8;
constexpr int64_t kMaxBitmapBytes = 40 * 1024;

struct CondenseCall {
  Gather g;
  ImageTile t;
  CondensedShape shape;
  Global<const int32_t> row_ptr, col;
  Global<int32_t> pack_offset, block_ptr, slot_of_entry;
  int64_t octets;
};

// A column as the bitmap knows it.
struct Column {
  int chunk, local, pack;  // pack: -1 where no target of the class meets the tap
};

__device__ __forceinline__ Column column_of(const CondenseCall& c, const AxisClass& vertical,
                                            const AxisClass& horizontal, int column) {
  const int taps = c.g.kernel_height * c.g.kernel_width;
  const int channel = column / taps, tap = column % taps, chunk = channel / c.t.channels;
  const int dy = shift_of(vertical, tap / c.g.kernel_width), dx = shift_of(horizontal, tap % c.g.kernel_width);
  const int in_chunk = channel - chunk * c.t.channels;
  return {chunk, in_chunk * taps + tap,
          dy >= 0 && dx >= 0 ? in_chunk * c.t.plane + (dy * c.t.source_width + dx) * c.t.pixel : -1};
}

__device__ __forceinline__ int word_of(const CondensedShape& s, const Column& c) {
  return (c.chunk * kResidues + c.pack % kResidues) * s.words_per_residue + c.local / 32;
}

// The place among the columns of a chunk: one column of every residue in turn, as long as they last. `index` counts
// the columns of the same residue before this one.
__device__ __forceinline__ int place_in_chunk(Shared<const int> count, int residue, int index) {
  int place = 0;
  for (int r = 0; r < kResidues; ++r) {
    const int others = count[r];
    place += min(others, index) + (r < residue && others > index ? 1 : 0);
  }
  return place;
}

__global__ void __launch_bounds__(kThreads) condense_kernel(CondenseCall c) {
  ILNAS_DYNAMIC_SHARED(dynamic);
  const CondensedShape& s = c.shape;
  const int words = s.chunks * kResidues * s.words_per_residue;
  const Shared<unsigned> bits = pointer_cast<unsigned>(dynamic);
  const Shared<int> before = pointer_cast<int>(dynamic) + words;  // columns of the residue in earlier words
  const Shared<int> count = before + words;                       // [chunks][kResidues]
  const Shared<int> chunk_slot = count + s.chunks * kResidues;    // [chunks + 1]

  const int64_t octet = blockIdx.x;
  const int remainder = blockIdx.y;
  const AxisClass vertical = axis_class(c.g.vertical, remainder / c.g.horizontal.divisor, c.g.kernel_height);
  const AxisClass horizontal = axis_class(c.g.horizontal, remainder % c.g.horizontal.divisor, c.g.kernel_width);
  const int group = static_cast<int>(octet / s.octets_per_group);
  const int first_row = static_cast<int>(octet % s.octets_per_group) * kOctet;
  const int rows = min(kOctet, c.g.rows_per_group - first_row);
  const Global<const int32_t> rows_at = c.row_ptr + (int64_t{group} * c.g.rows_per_group + first_row);
  const int begin = rows_at[0], end = rows_at[rows];
  const int64_t region = remainder * s.class_slots + first_slot(s, octet, begin);

  for (int w = threadIdx.x; w < words; w += kThreads) bits[w] = 0;
  __syncthreads();
  for (int j = begin + static_cast<int>(threadIdx.x); j < end; j += kThreads) {
    const Column column = column_of(c, vertical, horizontal, c.col[j]);
    if (column.pack >= 0) atomic_or(bits + word_of(s, column), 1u << column.local % 32);
  }
  __syncthreads();

  for (int i = threadIdx.x; i < s.chunks * kResidues; i += kThreads) {
    int sum = 0;
    for (int w = i * s.words_per_residue; w < (i + 1) * s.words_per_residue; ++w) {
      before[w] = sum;
      sum += __popc(bits[w]);
    }
    count[i] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int slot = 0;
    for (int chunk = 0; chunk < s.chunks; ++chunk) {
      chunk_slot[chunk] = slot;
      int columns = 0;
      for (int r = 0; r < kResidues; ++r) columns += count[chunk * kResidues + r];
      slot += (columns + s.padding - 1) / s.padding * s.padding;
    }
    chunk_slot[s.chunks] = slot;
  }
  __syncthreads();

  const Global<int32_t> blocks = c.block_ptr + (remainder * c.octets + octet) * (s.chunks + 1);
  for (int chunk = threadIdx.x; chunk <= s.chunks; chunk += kThreads)
    blocks[chunk] = static_cast<int32_t>((region + chunk_slot[chunk]) / kOctet);
  const int slots = chunk_slot[s.chunks];
  for (int i = threadIdx.x; i < slots; i += kThreads) c.pack_offset[region + i] = -1;
  __syncthreads();

  const int taps = c.g.kernel_height * c.g.kernel_width;
  for (int w = threadIdx.x; w < words; w += kThreads) {
    const int chunk = w / (kResidues * s.words_per_residue), residue = w / s.words_per_residue % kResidues;
    int index = before[w];
    for (unsigned left = bits[w]; left != 0; left &= left - 1) {
      const int local = w % s.words_per_residue * 32 + __ffs(left) - 1;
      const Column column = column_of(c, vertical, horizontal, chunk * c.t.channels * taps + local);
      const int place = chunk_slot[chunk] + place_in_chunk(count + chunk * kResidues, residue, index);
      c.pack_offset[region + place] = column.pack;
      ++index;
    }
  }
  for (int j = begin + static_cast<int>(threadIdx.x); j < end; j += kThreads) {
    const Column column = column_of(c, vertical, horizontal, c.col[j]);
    if (column.pack < 0) continue;
    const int w = word_of(s, column);
    const unsigned word = bits[w], below = (1u << column.local % 32) - 1;
    const int index = before[w] + __popc(word & below);
    const int64_t slot = region + chunk_slot[column.chunk] +
                         place_in_chunk(count + column.chunk * kResidues, column.pack % kResidues, index);
    int row = 0;
    while (row + 1 < rows && rows_at[row + 1] <= j) ++row;
    c.slot_of_entry[j] = static_cast<int32_t>(slot * kOctet + row);
  }
}

template <class S>
struct PlaceCall {
  Global<const S> values;
  Global<const int32_t> slot_of_entry, perm;
  Global<S> value;
  int64_t nnz;
  bool has_perm;
};

template <class S>
__global__ void __launch_bounds__(kThreads) place_values_kernel(PlaceCall<S> c) {
  for (int64_t j = blockIdx.x * int64_t{kThreads} + threadIdx.x; j < c.nnz; j += int64_t{gridDim.x} * kThreads) {
    const int place = c.slot_of_entry[j], slot = place / kOctet, row = place % kOctet;
    const int64_t from = c.has_perm ? static_cast<int>(c.perm[j]) : j;
    c.value[int64_t{slot / kOctet * kOctet + row} * kOctet + slot % kOctet] = load_readonly<S>(c.values + from);
  }
}

int64_t bitmap_bytes(const CondensedShape& s) {
  const int64_t words = int64_t{s.chunks} * kResidues * s.words_per_residue;
  return 4 * (2 * words + s.chunks * kResidues + s.chunks + 1);
}

}  // namespace

bool condensed_shape(const Gather& g, const ImageTile& t, int64_t nnz, int padding, CondensedShape* s) {
  if (t.channels == 0) return false;
  const int64_t octets_per_group = ceil_div(g.rows_per_group, kOctet);
  const int64_t chunks = ceil_div(g.sources_per_group, t.channels);
  const int64_t words = ceil_div(int64_t{t.channels} * g.kernel_height * g.kernel_width, 32);
  const int64_t octets = octets_per_group * g.groups;
  *s = {static_cast<int>(octets_per_group),
        static_cast<int>(chunks),
        padding,
        g.vertical.divisor * g.horizontal.divisor,
        0,
        static_cast<int>(words)};
  s->class_slots = first_slot(*s, octets, nnz) + padding;
  constexpr int64_t kMax = int64_t{1} << 31;
  return bitmap_bytes(*s) <= kMaxBitmapBytes && s->class_slots * s->classes * kOctet < kMax && s->classes <= 65535 &&
         octets < kMax && g.groups < kMax;
}

CondensedBytes condensed_bytes(const CondensedShape& s, int64_t octets, int64_t nnz) {
  const auto aligned = [](int64_t bytes) { return ceil_div(bytes, 16) * 16; };
  CondensedBytes b{};
  b.pack_offset = 0;
  b.block_ptr = aligned(4 * s.class_slots * s.classes);
  b.slot_of_entry = b.block_ptr + aligned(4 * s.classes * octets * (s.chunks + 1));
  b.total = b.slot_of_entry + aligned(4 * nnz);
  return b;
}

CondensedForm condensed_form(const CondensedShape& s, int64_t octets, int64_t nnz, const void* form) {
  const CondensedBytes bytes = condensed_bytes(s, octets, nnz);
  const auto at = [&](int64_t byte) {
    return reinterpret_cast<const int32_t*>(static_cast<const unsigned char*>(form) + byte);
  };
  return {at(bytes.pack_offset), at(bytes.block_ptr), at(bytes.slot_of_entry)};
}

cudaError_t launch_condense(const Gather& g, const Entries& entries, const ImageTile& t, const CondensedShape& s,
                            void* form, cudaStream_t stream) {
  const int64_t octets = octets_of(s, g);
  const CondensedBytes bytes = condensed_bytes(s, octets, entries.nnz);
  const auto at = [&](int64_t byte) { return reinterpret_cast<int32_t*>(static_cast<unsigned char*>(form) + byte); };
  const CondenseCall call{
      g,     t, s, entries.row_ptr, entries.col, at(bytes.pack_offset), at(bytes.block_ptr), at(bytes.slot_of_entry),
      octets};
  return ILNAS_LAUNCH(condense_kernel, dim3(static_cast<unsigned>(octets), static_cast<unsigned>(s.classes)),
                      dim3(kThreads), static_cast<size_t>(bitmap_bytes(s)), stream, call);
}

cudaError_t launch_place_values(DType dtype, const CondensedShape& s, const CondensedForm& form, const void* values,
                                const int32_t* perm, int64_t nnz, void* value, cudaStream_t stream) {
  const auto bytes = static_cast<size_t>(condensed_value_bytes(s));
  if (cudaError_t error = cudaMemsetAsync(value, 0, bytes, stream)) return error;
  return with_stored_type(dtype, [&](auto stored) {
    using S = decltype(stored);
    if constexpr (sizeof(S) == 2) {
      const PlaceCall<S> call{
          static_cast<const S*>(values), form.slot_of_entry, perm, static_cast<S*>(value), nnz, perm != nullptr};
      return ILNAS_LAUNCH(place_values_kernel<S>, grid_of(ceil_div(nnz, kThreads)), dim3(kThreads), 0, stream, call);
    } else {
      return cudaErrorNotSupported;
    }
  });
}

}  // namespace ilnas::cuda
