#include "cuda/condense.cuh"

namespace ilnas::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kSlots = 32;  // of a tile: packs of eight images at one target
constexpr int kWarpsPerOctet = 2;
constexpr int kOctets = kWarps / kWarpsPerOctet;  // of a block
constexpr int kColumns = 16;                      // of one product: two blocks of the condensed form
constexpr int kProducts = 8;                      // of a warp at once
constexpr int kGradPitch = kSlots + 1;            // packs; odd, so that the rows of an octet lie in different banks
constexpr int kGradPacks = kOctets * kOctet * kGradPitch;

template <class S>
struct GradCall {
  Gather g;  // the forward's: rows are output channels, the source is x
  ImageTile t;
  CondensedShape shape;
  Global<const S> x, grad_out;
  Global<const int32_t> pack_offset, block_ptr;
  Global<float> partial;  // [splits][slots][row of the octet]
  int octet_blocks_per_group, splits;
  Contiguous grad_order;
};

// grad_out of the block's rows at the tile's targets: [row][slot] packs of eight images.
template <class S>
__device__ __forceinline__ void stage_grad(const GradCall<S>& c, Shared<unsigned char> to, int group, int first_row,
                                           int64_t first_image, int first_y, int first_x) {
  const Gather& g = c.g;
  constexpr int kRows = kOctets * kOctet;
  for (int index = threadIdx.x; index < kRows * kSlots; index += kThreads) {
    const bool rows_first = c.grad_order == Contiguous::kChannels;
    const int row = rows_first ? index % kRows : index / kSlots, at = rows_first ? index / kRows : index % kSlots;
    const Slot slot = slot_of(at, c.t);
    const int y = first_y + slot.y, x = first_x + slot.x;
    const int64_t image = first_image + 8 * slot.pack;
    uint4 pack = make_uint4(0, 0, 0, 0);
    if (first_row + row < g.rows_per_group && y < g.height && x < g.width && image < g.batch) {
      const int64_t channel = int64_t{group} * g.rows_per_group + first_row + row;
      pack = load_half_pack<S>(
          c.grad_out + (image * g.target.batch + channel * g.target.channel + y * g.target.row + x * g.target.col),
          g.target.batch, g.batch - image, false);
    }
    store_as<uint4>(to + 16 * (row * kGradPitch + at), pack);
  }
}

// A block owns the columns of kOctets octets in one chunk of channels and walks every `splits`-th tile. A product is
// 16 columns by the eight rows of an octet over the images of two slots: both fragments are packs, row by row, as they
// lie in shared memory. Which of the sums are live weights is sorted out afterwards.
template <class S>
__global__ void __launch_bounds__(kThreads) condensed_grad_values_kernel(GradCall<S> c) {
  ILNAS_SHARED(int, slot_pack, kSlots);
  ILNAS_DYNAMIC_SHARED(dynamic);
  const Gather& g = c.g;
  const ImageTile& t = c.t;
  const int lane = lane_id(), warp = warp_id();
  const int zero_pack = t.channels * t.plane;
  const Shared<S> tile = pointer_cast<S>(dynamic);
  const Shared<S> grads = tile + 8 * (zero_pack + 1);
  const int group = blockIdx.x / c.octet_blocks_per_group;
  const int first_octet = blockIdx.x % c.octet_blocks_per_group * kOctets;
  const int chunk = blockIdx.y, first_channel = chunk * t.channels;
  const AxisClass vertical = axis_class(g.vertical, 0, g.kernel_height);
  const AxisClass horizontal = axis_class(g.horizontal, 0, g.kernel_width);
  if (threadIdx.x < kSlots) slot_pack[threadIdx.x] = pack_of(slot_of(threadIdx.x, t), g, t);
  if (threadIdx.x == 0) store_as<uint4>(tile + 8 * zero_pack, make_uint4(0, 0, 0, 0));

  // The products of this warp are every kWarpsPerOctet-th of its octet's.
  const int octet = first_octet + warp / kWarpsPerOctet;
  const bool works = octet < c.shape.octets_per_group;
  const Global<const int32_t> blocks =
      c.block_ptr + (works ? (int64_t{group} * c.shape.octets_per_group + octet) * (c.shape.chunks + 1) + chunk : 0);
  const int first_block = works ? static_cast<int>(blocks[0]) : 0, end_block = works ? static_cast<int>(blocks[1]) : 0;
  const int products = (end_block - first_block) / 2;

  const int64_t tiles = t.image_blocks * t.tiles_y * t.tiles_x;
  for (int round = 0;; ++round) {
    const int first_product = round * kProducts * kWarpsPerOctet + warp % kWarpsPerOctet;
    const int active = max(0, min(kProducts, (products - first_product + kWarpsPerOctet - 1) / kWarpsPerOctet));
    if (!__syncthreads_or(active > 0)) return;
    int offset[kProducts];
    float sum[kProducts][4];
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      const int64_t block = first_block + 2 * int64_t{first_product + i * kWarpsPerOctet};
      offset[i] = i < active ? static_cast<int>(c.pack_offset[block * kOctet + lane % kColumns]) : -1;
      sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = 0;
    }
    for (int64_t index = blockIdx.z; index < tiles; index += c.splits) {
      const int first_x = static_cast<int>(index % t.tiles_x) * t.width;
      const int first_y = static_cast<int>(index / t.tiles_x % t.tiles_y) * t.height;
      const int64_t first_image = index / t.tiles_x / t.tiles_y * t.packs * 8;
      __syncthreads();
      stage_images<S, 8>(dynamic, c.x, g, t, first_image, group * g.sources_per_group + first_channel,
                         min(t.channels, g.sources_per_group - first_channel),
                         first_y * vertical.scale + vertical.origin, first_x * horizontal.scale + horizontal.origin);
      stage_grad<S>(c, pointer_cast<unsigned char>(grads), group, first_octet * kOctet, first_image, first_y, first_x);
      __syncthreads();
      if (active == 0) continue;
#pragma unroll 1
      for (int slot = 0; slot < kSlots; slot += 4) {
        uint32_t b[4];
        const int grad_row = warp / kWarpsPerOctet * kOctet + lane % 8;
        ldmatrix<4>(b, grads + 8 * (grad_row * kGradPitch + slot + lane / 8));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int base = slot_pack[slot + 2 * half + lane / 16];
#pragma unroll
          for (int i = 0; i < kProducts; ++i) {
            if (i >= active) break;
            uint32_t a[4];
            ldmatrix<4>(a, tile + 8 * (offset[i] < 0 ? zero_pack : offset[i] + base));
            mma_m16n8k16<S>(sum[i], a[0], a[1], a[2], a[3], b[2 * half], b[2 * half + 1]);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      if (i >= active) break;
      const int64_t slot = (first_block + 2 * int64_t{first_product + i * kWarpsPerOctet}) * kOctet + lane / 4;
      const Global<float> to = c.partial + ((blockIdx.z * c.shape.class_slots + slot) * kOctet + lane % 4 * 2);
      store_as<float2>(to, make_float2(sum[i][0], sum[i][1]));
      store_as<float2>(to + 8 * kOctet, make_float2(sum[i][2], sum[i][3]));
    }
  }
}

// grad_values[j] = sum over the splits of the sum that belongs to live weight j
template <class S>
__global__ void __launch_bounds__(kThreads)
    pick_live_kernel(Global<const float> ILNAS_RESTRICT partial, Global<const int32_t> ILNAS_RESTRICT slot_of_entry,
                     Global<S> result, int64_t nnz, int64_t per_split, int splits) {
  for (int64_t j = blockIdx.x * int64_t{kThreads} + threadIdx.x; j < nnz; j += int64_t{gridDim.x} * kThreads) {
    const int64_t place = slot_of_entry[j];
    float sum = partial[place];
    for (int s = 1; s < splits; ++s) sum += partial[s * per_split + place];
    result[j] = from_float<S>(sum);
  }
}

struct Plan {
  ImageTile tile;
  CondensedShape shape;
  int octet_blocks_per_group, splits;
  int64_t form_bytes, partial_bytes;
};

constexpr double kStagingWeight = 5;
constexpr int64_t kBlocksPerMultiprocessor = 4, kMaxSplits = 8;
constexpr int64_t kOneBlockLimit = 96 * 1024;

// Small shared memory is better filled by one block than halved: the gradients' part does not shrink with the tile.
int64_t tile_budget(const DeviceLimits& limits) {
  const int64_t whole = limits.shared_bytes_per_block - 1024;
  return (whole > kOneBlockLimit ? whole / 2 : whole) - 16 * (kGradPacks + 1);
}

cudaError_t plan_grad(DType dtype, const Gather& g, int64_t nnz, const void* x, Plan* plan) {
  DeviceLimits limits{};
  if (cudaError_t error = device_limits(&limits)) return error;
  if (!tensor_cores_take(dtype, limits.arch)) return cudaErrorNotSupported;
  const double taps = static_cast<double>(g.kernel_height) * g.kernel_width;
  const double places = taps * g.groups * g.rows_per_group * g.sources_per_group;
  const double density = places > 0 ? std::min(1.0, static_cast<double>(nnz) / places) : 0;
  const TileDemand demand{
      8, 2, kSlots, kOctets * kOctet, kOctets * taps * union_density(density), kStagingWeight, tile_budget(limits), 1};
  double cost = 0;
  if (!choose_image_tile(g, images_are_vectors(x, g.source, 8, 2), demand, &plan->tile, &cost) ||
      !condensed_shape(g, plan->tile, nnz, kColumns, &plan->shape))
    return cudaErrorNotSupported;
  const int64_t blocks = ceil_div(plan->shape.octets_per_group, kOctets);
  if (plan->shape.chunks > 65535 || blocks * g.groups > kMaxGrid) return cudaErrorNotSupported;
  plan->octet_blocks_per_group = static_cast<int>(blocks);
  const int64_t owners = std::max<int64_t>(blocks * g.groups * plan->shape.chunks, 1);
  const int64_t tiles = plan->tile.image_blocks * plan->tile.tiles_y * plan->tile.tiles_x;
  const int64_t wanted = ceil_div(kBlocksPerMultiprocessor * limits.multiprocessors, owners);
  plan->splits = static_cast<int>(std::clamp<int64_t>(wanted, 1, std::max<int64_t>(std::min(kMaxSplits, tiles), 1)));
  plan->form_bytes = condensed_bytes(plan->shape, octets_of(plan->shape, g), nnz).total;
  plan->partial_bytes = plan->splits * plan->shape.class_slots * kOctet * static_cast<int64_t>(sizeof(float));
  return cudaSuccess;
}

template <class S>
cudaError_t launch_plan(const GradValuesArguments& a, const Plan& plan, const void* workspace, float* partial,
                        cudaStream_t stream) {
  const CondensedForm form = condensed_form(plan.shape, octets_of(plan.shape, a.g), a.entries.nnz, workspace);
  const GradCall<S> call{a.g,
                         plan.tile,
                         plan.shape,
                         static_cast<const S*>(a.x),
                         static_cast<const S*>(a.grad_out),
                         form.pack_offset,
                         form.block_ptr,
                         partial,
                         plan.octet_blocks_per_group,
                         plan.splits,
                         contiguous_of(a.g.target)};
  const dim3 grid(static_cast<unsigned>(plan.octet_blocks_per_group * a.g.groups),
                  static_cast<unsigned>(plan.shape.chunks), static_cast<unsigned>(plan.splits));
  const size_t shared = static_cast<size_t>(tile_bytes(plan.tile) + 16 * (kGradPacks + 1));
  if (cudaError_t error = ILNAS_LAUNCH(condensed_grad_values_kernel<S>, grid, dim3(kThreads), shared, stream, call))
    return error;
  const int64_t per_split = plan.shape.class_slots * kOctet;
  return ILNAS_LAUNCH(pick_live_kernel<S>, grid_of(ceil_div(a.entries.nnz, kThreads)), dim3(kThreads), 0, stream,
                      partial, form.slot_of_entry, static_cast<S*>(a.grad_values), a.entries.nnz, per_split,
                      plan.splits);
}

}  // namespace

cudaError_t condensed_grad_values_workspace(DType dtype, const Gather& g, int64_t nnz, int64_t* bytes) {
  Plan plan{};
  if (cudaError_t error = plan_grad(dtype, g, nnz, nullptr, &plan)) return error;
  *bytes = plan.form_bytes + plan.partial_bytes;
  return cudaSuccess;
}

cudaError_t launch_condensed_grad_values(const GradValuesArguments& a, void* workspace, cudaStream_t stream) {
  Plan plan{};
  if (cudaError_t error = plan_grad(a.dtype, a.g, a.entries.nnz, a.x, &plan)) return error;
  if (cudaError_t error = launch_condense(a.g, a.entries, plan.tile, plan.shape, workspace, stream)) return error;
  float* const partial = reinterpret_cast<float*>(static_cast<unsigned char*>(workspace) + plan.form_bytes);
  if (a.dtype == DType::kFloat16) return launch_plan<Half>(a, plan, workspace, partial, stream);
  return launch_plan<BFloat16>(a, plan, workspace, partial, stream);
}

}  // namespace ilnas::cuda
