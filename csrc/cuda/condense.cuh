// The condensed form of a pattern: eight rows (an octet) share the union of their columns, channel chunk by chunk.
//
// A column has one slot; eight slots make a block, the k of one tensor-core instruction. Within an octet the chunks
// follow each other, each padded to a multiple of `padding` slots, so that a block never leaves its chunk.
//   pack_offset [slots]: where the staged tile holds a column's shift, in packs from the pack of a target; -1: padding.
//   block_ptr [octets][chunks + 1]: each chunk's first block.
//   slot_of_entry [nnz]: 8 * slot + row of the octet, by place in the compressed rows.
// Columns of a chunk are ordered so that eight neighbours lie in different shared memory banks as far as that goes.
// The form follows from the pattern and the sizes alone, so that a caller may keep it; every call puts the weights in:
//   value [slots / 8][row of the octet][slot of the block]: 0 where absent.
#pragma once
#include "cuda/choose_tile.h"
#include "cuda/masked_conv2d_routes.h"

namespace ilnas::cuda {

constexpr int kOctet = 8;

// The share of columns that at least one of eight rows of this density holds.
inline double union_density(double density) {
  double none = 1;
  for (int i = 0; i < kOctet; ++i) none *= 1 - density;
  return 1 - none;
}

struct CondensedShape {
  int octets_per_group, chunks, padding;
  int classes;            // remainders of a strided grad of the input; each has its own form
  int64_t class_slots;    // slots of one class, an upper bound known without reading the pattern
  int words_per_residue;  // of the bitmap: 32 columns of a chunk each, one residue of the bank
};

// The first slot of an octet: far enough for the padding of all chunks before it. row_begin: its first row's row_ptr.
__host__ __device__ __forceinline__ int64_t first_slot(const CondensedShape& s, int64_t octet, int64_t row_begin) {
  return row_begin / s.padding * s.padding + octet * (s.chunks + 1) * s.padding;
}

inline int64_t octets_of(const CondensedShape& s, const Gather& g) { return int64_t{s.octets_per_group} * g.groups; }

// Fills *shape; false where the form would need too much shared memory or too many slots.
bool condensed_shape(const Gather&, const ImageTile&, int64_t nnz, int padding, CondensedShape* shape);

struct CondensedBytes {
  int64_t pack_offset, block_ptr, slot_of_entry, total;  // where each begins
};
CondensedBytes condensed_bytes(const CondensedShape&, int64_t octets, int64_t nnz);
inline int64_t condensed_value_bytes(const CondensedShape& s) { return 16 * s.class_slots * s.classes; }

// Enqueues the building of the form.
cudaError_t launch_condense(const Gather&, const Entries&, const ImageTile&, const CondensedShape&, void* form,
                            cudaStream_t);

// Where condense_kernel wrote what.
struct CondensedForm {
  const int32_t *pack_offset, *block_ptr, *slot_of_entry;
};
CondensedForm condensed_form(const CondensedShape&, int64_t octets, int64_t nnz, const void* form);

// Enqueues the filling of `value`; perm as in GatherCall.
cudaError_t launch_place_values(DType, const CondensedShape&, const CondensedForm&, const void* values,
                                const int32_t* perm, int64_t nnz, void* value, cudaStream_t);

}  // namespace ilnas::cuda
