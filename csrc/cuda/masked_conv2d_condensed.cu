#include "cuda/condense.cuh"

namespace ilnas::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kBlocksPerMultiprocessor = 2;

// How a thread's results, two rows at two neighbouring slots, reach memory.
enum class Store : int { kSingle, kColumnPairs, kRowPairs };

template <class S>
struct CondensedCall {
  Gather g;
  ImageTile t;
  CondensedShape shape;
  Global<const S> source, bias;
  Global<const uint32_t> value;  // pairs of neighbouring slots
  Global<const int32_t> pack_offset, block_ptr;
  Global<S> target;
  int64_t octets;
  int warps_along_slots;
  bool has_bias;
  Store store;
};

// What a lane needs of one block: the pack offset of its ldmatrix row, and two weights.
struct Block {
  int offset;
  uint32_t value;
};

template <class S>
__device__ __forceinline__ Block load_block(const CondensedCall<S>& c, int64_t block, int lane) {
  return {c.pack_offset[block * kOctet + lane % 8], c.value[block * 32 + lane]};
}

template <class S>
__device__ __forceinline__ void store_results(const CondensedCall<S>& c, const TileTask& d, int row, const Slot& first,
                                              const Slot& second, int64_t first_image, int lane,
                                              const float (&sum)[4]) {
  const Gather& g = c.g;
  const int64_t image = first_image + lane / 4;
  const int in_group = row + lane % 4 * 2;
  if (in_group >= g.rows_per_group) return;
  const bool two_rows = in_group + 1 < g.rows_per_group;
  const int channel = d.group * g.rows_per_group + in_group;
  const float bias0 = c.has_bias ? to_float(load_readonly<S>(c.bias + channel)) : 0.0f;
  const float bias1 = c.has_bias && two_rows ? to_float(load_readonly<S>(c.bias + (channel + 1))) : 0.0f;
  const S v[2][2] = {{from_float<S>(sum[0] + bias0), from_float<S>(sum[1] + bias1)},
                     {from_float<S>(sum[2] + bias0), from_float<S>(sum[3] + bias1)}};
  Global<S> at[2] = {c.target, c.target};
  bool inside[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Slot& slot = i == 0 ? first : second;
    const int y = (d.tile_y * c.t.height + slot.y) * g.vertical.divisor + d.remainder_y;
    const int x = (d.tile_x * c.t.width + slot.x) * g.horizontal.divisor + d.remainder_x;
    const int64_t n = image + 8 * slot.pack;
    inside[i] = n < g.batch && y < g.height && x < g.width;
    if (inside[i])
      at[i] = c.target + (n * g.target.batch + channel * g.target.channel + y * g.target.row + x * g.target.col);
  }
  if (c.store == Store::kColumnPairs && inside[1]) {
    store_as<uint32_t>(at[0], pack2<S>(v[0][0], v[1][0]));
    if (two_rows) store_as<uint32_t>(at[0] + g.target.channel, pack2<S>(v[0][1], v[1][1]));
    return;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (!inside[i]) continue;
    if (c.store == Store::kRowPairs && two_rows) {
      store_as<uint32_t>(at[i], pack2<S>(v[i][0], v[i][1]));
    } else {
      at[i][0] = v[i][0];
      if (two_rows) at[i][g.target.channel] = v[i][1];
    }
  }
}

// A warp computes the eight rows of one octet at 2 * kTiles slots of eight images: kTiles products of 16 targets (two
// slots) by eight rows. ldmatrix takes the rows of a fragment, the packs of eight columns, from wherever their shifts
// lie. kWide: 16 columns an instruction (sm_80), otherwise 8.
template <class S, int kTiles, bool kWide>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) condensed_kernel(CondensedCall<S> c) {
  ILNAS_DYNAMIC_SHARED(dynamic);
  const Shared<S> tile = pointer_cast<S>(dynamic);
  constexpr int kStep = kWide ? 2 : 1;  // blocks an instruction
  constexpr int kLoads = kTiles / 2;    // of four matrices: one block at four slots
  const Gather& g = c.g;
  const ImageTile& t = c.t;
  const int lane = lane_id(), warp = warp_id();
  const int octets_per_block = kWarps / c.warps_along_slots;
  const int first_slot_of_warp = warp % c.warps_along_slots * 2 * kTiles;
  const int zero_pack = t.channels * t.plane;
  if (threadIdx.x == 0) store_as<uint4>(tile + 8 * zero_pack, make_uint4(0, 0, 0, 0));

  int base[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) base[i] = pack_of(slot_of(first_slot_of_warp + 4 * i + lane / 8, t), g, t);

  const TileTask d = tile_task(blockIdx.x, g, t, octets_per_block * kOctet);
  const AxisClass vertical = axis_class(g.vertical, d.remainder_y, g.kernel_height);
  const AxisClass horizontal = axis_class(g.horizontal, d.remainder_x, g.kernel_width);
  const int64_t first_image = d.image_block * t.packs * 8;
  const int octet_in_group = d.first_row / kOctet + warp / c.warps_along_slots;
  const bool works = octet_in_group < c.shape.octets_per_group;
  const int64_t octet = int64_t{d.group} * c.shape.octets_per_group + octet_in_group;
  const int remainder = d.remainder_y * g.horizontal.divisor + d.remainder_x;
  const Global<const int32_t> blocks =
      c.block_ptr + (works ? (remainder * c.octets + octet) * (c.shape.chunks + 1) : 0);

  float sum[kTiles][4];
#pragma unroll
  for (int i = 0; i < kTiles; ++i) sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = 0;

  for (int chunk = 0; chunk < c.shape.chunks; ++chunk) {
    const int first_channel = chunk * t.channels;
    __syncthreads();
    stage_images<S, 8>(dynamic, c.source, g, t, first_image, d.group * g.sources_per_group + first_channel,
                       min(t.channels, g.sources_per_group - first_channel),
                       d.tile_y * t.height * vertical.scale + vertical.origin,
                       d.tile_x * t.width * horizontal.scale + horizontal.origin);
    __syncthreads();
    if (!works) continue;
    const int end = blocks[chunk + 1];
    int block = blocks[chunk];
    if (block >= end) continue;
    Block next[kStep];
#pragma unroll
    for (int k = 0; k < kStep; ++k) next[k] = load_block<S>(c, block + k, lane);
    for (; block < end; block += kStep) {
      Block now[kStep];
#pragma unroll
      for (int k = 0; k < kStep; ++k) {
        now[k] = next[k];
        if (block + kStep < end) next[k] = load_block<S>(c, block + kStep + k, lane);
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        uint32_t a[kStep][4];
#pragma unroll
        for (int k = 0; k < kStep; ++k) {
          // Padding reads the zeros, not another column's images, which may be infinite.
          const int pack = now[k].offset < 0 ? zero_pack : now[k].offset + base[i];
          ldmatrix_trans<4>(a[k], tile + 8 * pack);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float (&to)[4] = sum[2 * i + half];
          if constexpr (kWide)
            mma_m16n8k16<S>(to, a[0][2 * half], a[0][2 * half + 1], a[1][2 * half], a[1][2 * half + 1], now[0].value,
                            now[1].value);
          else
            mma_m16n8k8<S>(to, a[0][2 * half], a[0][2 * half + 1], now[0].value);
        }
      }
    }
  }
  if (!works) return;
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
    store_results<S>(c, d, octet_in_group * kOctet, slot_of(first_slot_of_warp + 2 * i, t),
                     slot_of(first_slot_of_warp + 2 * i + 1, t), first_image, lane, sum[i]);
}

struct Plan {
  int tiles, warps_along_slots;
  bool wide;
  ImageTile tile;
  CondensedShape shape;
};

// A staged pack costs eight loads, address arithmetic and a store.
constexpr double kStagingWeight = 5;

// The same for every call of one geometry: what a kept form was built for.
cudaError_t plan_condensed(const Gather& g, int64_t nnz, const void* source, Plan* plan) {
  DeviceLimits limits{};
  if (cudaError_t error = device_limits(&limits)) return error;
  plan->wide = limits.arch >= 80;
  const double columns = static_cast<double>(g.kernel_height) * g.kernel_width;
  const double places = columns * g.groups * g.rows_per_group * g.sources_per_group;
  const double per_channel = columns * union_density(places > 0 ? std::min(1.0, double(nnz) / places) : 0);
  const bool vectors = images_are_vectors(source, g.source, 8, 2);
  double cost = 0;
  plan->tiles = 0;
  for (int tiles : {16, 8, 4})
    for (int warps = 1; warps <= kWarps; warps *= 2) {
      const int octets = kWarps / warps;
      // The tile ends in a pack of zeros.
      const TileDemand demand{8,
                              2,
                              2 * tiles * warps,
                              octets * kOctet,
                              octets * per_channel,
                              kStagingWeight,
                              shared_budget(limits) - 16,
                              limits.multiprocessors};
      if (!choose_image_tile(g, vectors, demand, &plan->tile, &cost)) continue;
      plan->tiles = tiles;
      plan->warps_along_slots = warps;
    }
  if (plan->tiles == 0 || !condensed_shape(g, plan->tile, nnz, plan->wide ? 16 : 8, &plan->shape))
    return cudaErrorNotSupported;
  return cudaSuccess;
}

// Pairs of results go out as one word where every pair is aligned.
Store store_of(const Gather& g, const ImageTile& t, const void* target) {
  const auto even = [](int64_t a, int64_t b, int64_t c) { return a % 2 == 0 && b % 2 == 0 && c % 2 == 0; };
  const Strides& s = g.target;
  if (reinterpret_cast<uintptr_t>(target) % 4 != 0) return Store::kSingle;
  if (s.col == 1 && t.packs == 1 && t.width >= 2 && g.horizontal.divisor == 1 && even(s.batch, s.channel, s.row))
    return Store::kColumnPairs;
  if (s.channel == 1 && g.rows_per_group % 2 == 0 && even(s.batch, s.row, s.col)) return Store::kRowPairs;
  return Store::kSingle;
}

template <class S>
cudaError_t launch_plan(const CondensedCall<S>& call, const Plan& plan, cudaStream_t stream) {
  const int64_t tasks = tile_tasks(call.g, plan.tile, kWarps / plan.warps_along_slots * kOctet);
  if (tasks > kMaxGrid) return cudaErrorNotSupported;
  const dim3 grid(static_cast<unsigned>(tasks));
  const size_t shared = static_cast<size_t>(tile_bytes(plan.tile) + 16);
  const auto launch = [&](auto kernel) { return ILNAS_LAUNCH(kernel, grid, dim3(kThreads), shared, stream, call); };
  if (plan.wide) {
    if (plan.tiles == 16) return launch(condensed_kernel<S, 16, true>);
    if (plan.tiles == 8) return launch(condensed_kernel<S, 8, true>);
    return launch(condensed_kernel<S, 4, true>);
  }
  if constexpr (std::is_same<S, Half>::value) {
    if (plan.tiles == 16) return launch(condensed_kernel<S, 16, false>);
    if (plan.tiles == 8) return launch(condensed_kernel<S, 8, false>);
    return launch(condensed_kernel<S, 4, false>);
  }
  return cudaErrorNotSupported;
}

}  // namespace

bool tensor_cores_take(DType dtype, int arch) {
  return (dtype == DType::kFloat16 && arch >= 75) || (dtype == DType::kBFloat16 && arch >= 80);
}

cudaError_t condensed_form_bytes(const Gather& g, int64_t nnz, int64_t* bytes) {
  Plan plan{};
  if (cudaError_t error = plan_condensed(g, nnz, nullptr, &plan)) return error;
  *bytes = condensed_bytes(plan.shape, octets_of(plan.shape, g), nnz).total;
  return cudaSuccess;
}

cudaError_t launch_condensed_form(const Gather& g, const Entries& entries, void* form, cudaStream_t stream) {
  Plan plan{};
  if (cudaError_t error = plan_condensed(g, entries.nnz, nullptr, &plan)) return error;
  return launch_condense(g, entries, plan.tile, plan.shape, form, stream);
}

cudaError_t condensed_workspace(DType dtype, const Gather& g, int64_t nnz, bool has_form, int64_t* bytes) {
  DeviceLimits limits{};
  if (cudaError_t error = device_limits(&limits)) return error;
  if (!tensor_cores_take(dtype, limits.arch)) return cudaErrorNotSupported;
  Plan plan{};
  if (cudaError_t error = plan_condensed(g, nnz, nullptr, &plan)) return error;
  *bytes = condensed_value_bytes(plan.shape);
  if (!has_form) *bytes += condensed_bytes(plan.shape, octets_of(plan.shape, g), nnz).total;
  return cudaSuccess;
}

cudaError_t launch_condensed(const GatherCall& a, const void* form, void* workspace, cudaStream_t stream) {
  DeviceLimits limits{};
  if (cudaError_t error = device_limits(&limits)) return error;
  if (!tensor_cores_take(a.dtype, limits.arch)) return cudaErrorNotSupported;
  Plan plan{};
  if (cudaError_t error = plan_condensed(a.g, a.entries.nnz, a.source, &plan)) return error;
  if (form == nullptr) {
    unsigned char* const own = static_cast<unsigned char*>(workspace) + condensed_value_bytes(plan.shape);
    if (cudaError_t error = launch_condense(a.g, a.entries, plan.tile, plan.shape, own, stream)) return error;
    form = own;
  }
  const int64_t octets = octets_of(plan.shape, a.g);
  const CondensedForm built = condensed_form(plan.shape, octets, a.entries.nnz, form);
  if (cudaError_t error =
          launch_place_values(a.dtype, plan.shape, built, a.values, a.perm, a.entries.nnz, workspace, stream))
    return error;
  const auto launch = [&](auto stored) {
    using S = decltype(stored);
    const CondensedCall<S> call{a.g,
                                plan.tile,
                                plan.shape,
                                static_cast<const S*>(a.source),
                                static_cast<const S*>(a.bias),
                                static_cast<const uint32_t*>(workspace),
                                built.pack_offset,
                                built.block_ptr,
                                static_cast<S*>(a.target),
                                octets,
                                plan.warps_along_slots,
                                a.bias != nullptr,
                                store_of(a.g, plan.tile, a.target)};
    return launch_plan<S>(call, plan, stream);
  };
  return a.dtype == DType::kFloat16 ? launch(Half{}) : launch(BFloat16{});
}

}  // namespace ilnas::cuda
