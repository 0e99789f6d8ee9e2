#include "cuda/choose_tile.h"
#include "cuda/gather_call.cuh"

namespace ilnas::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 2;

// A warp holds 16 / kPositions rows at kPositions slots a thread; a slot is four images of one target. A live weight is
// read by the whole warp at once and costs one 128-bit shared load and four multiply-adds a slot.
template <class S, int kPositions>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) direct_kernel(TypedCall<S> call, ImageTile t) {
  constexpr int kRows = 16 / kPositions, kEntries = 32 / kRows, kWarps = kThreads / 32;
  constexpr unsigned kEntryMask = (1u << kEntries) - 1;
  ILNAS_SHARED(int, entries, kWarps * 64);
  ILNAS_DYNAMIC_SHARED(dynamic);
  const Shared<float> tile = pointer_cast<float>(dynamic);
  const Gather& g = call.g;
  const int taps = g.kernel_height * g.kernel_width;
  const int lane = lane_id(), warp = warp_id();
  const Shared<int> own_entries = entries + 64 * warp;

  const TileTask d = tile_task(blockIdx.x, g, t, kWarps * kRows);
  const AxisClass vertical = axis_class(g.vertical, d.remainder_y, g.kernel_height);
  const AxisClass horizontal = axis_class(g.horizontal, d.remainder_x, g.kernel_width);
  const int first_y = d.tile_y * t.height, first_x = d.tile_x * t.width;
  const int64_t first_image = d.image_block * t.packs * 4;
  const int first_row = d.first_row + warp * kRows;

  // Each group of kEntries lanes walks the entries of one of the warp's rows.
  const int walked = first_row + lane / kEntries;
  const bool walks = walked < g.rows_per_group;
  int cursor = walks ? static_cast<int>(call.row_ptr[d.group * g.rows_per_group + walked]) : 0;
  const int end = walks ? static_cast<int>(call.row_ptr[d.group * g.rows_per_group + walked + 1]) : 0;

  int base[kPositions];
  float4 sum[kRows][kPositions];
#pragma unroll
  for (int p = 0; p < kPositions; ++p) {
    const Slot slot = slot_of(p * 32 + lane, t);
    base[p] = 4 * pack_of(slot, g, t);
#pragma unroll
    for (int r = 0; r < kRows; ++r) sum[r][p] = make_float4(0, 0, 0, 0);
  }

  for (int chunk = 0; chunk < g.sources_per_group; chunk += t.channels) {
    const int channels = min(t.channels, g.sources_per_group - chunk);
    __syncthreads();
    stage_images<S, 4>(dynamic, call.source, g, t, first_image, d.group * g.sources_per_group + chunk, channels,
                       first_y * vertical.scale + vertical.origin, first_x * horizontal.scale + horizontal.origin);
    __syncthreads();
    const int column_end = (chunk + channels) * taps;
    bool more = true;
    while (more) {
      const int j = cursor + lane % kEntries;
      const int column = j < end ? static_cast<int>(call.col[j]) : column_end;
      const bool inside = column < column_end;
      int offset = -1;
      float value = 0;
      if (inside) {
        const int channel = column / taps, tap = column % taps;
        const int dy = shift_of(vertical, tap / g.kernel_width), dx = shift_of(horizontal, tap % g.kernel_width);
        if (dy >= 0 && dx >= 0) {
          offset = 4 * ((channel - chunk) * t.plane + (dy * t.source_width + dx) * t.pixel);
          value = to_float(load_readonly<S>(call.values + (call.has_perm ? static_cast<int>(call.perm[j]) : j)));
        }
      }
      const unsigned walked_mask = __ballot_sync(kFullMask, inside), used = __ballot_sync(kFullMask, offset >= 0);
      store_as<int2>(own_entries + 2 * lane, make_int2(offset, static_cast<int>(__float_as_uint(value))));
      __syncwarp();
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        for (unsigned left = used >> (r * kEntries) & kEntryMask; left != 0; left &= left - 1) {
          const int2 entry = load_as<int2>(own_entries + 2 * (r * kEntries + __ffs(left) - 1));
          const float weight = __uint_as_float(static_cast<unsigned>(entry.y));
#pragma unroll
          for (int p = 0; p < kPositions; ++p) {
            const float4 v = load_as<float4>(tile + (base[p] + entry.x));
            sum[r][p].x = fmaf(weight, v.x, sum[r][p].x);
            sum[r][p].y = fmaf(weight, v.y, sum[r][p].y);
            sum[r][p].z = fmaf(weight, v.z, sum[r][p].z);
            sum[r][p].w = fmaf(weight, v.w, sum[r][p].w);
          }
        }
      }
      __syncwarp();
      const int taken = __popc(walked_mask >> (lane / kEntries * kEntries) & kEntryMask);
      cursor += taken;
      more = __any_sync(kFullMask, taken == kEntries);
    }
  }

#pragma unroll
  for (int p = 0; p < kPositions; ++p) {
    const Slot slot = slot_of(p * 32 + lane, t);
    const int y = (first_y + slot.y) * g.vertical.divisor + d.remainder_y;
    const int x = (first_x + slot.x) * g.horizontal.divisor + d.remainder_x;
    const int64_t image = first_image + 4 * slot.pack;
    if (y >= g.height || x >= g.width) continue;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (first_row + r >= g.rows_per_group) continue;
      const int row = d.group * g.rows_per_group + first_row + r;
      const float bias = call.has_bias ? to_float(load_readonly<S>(call.bias + row)) : 0.0f;
      const Global<S> to =
          call.target + (image * g.target.batch + row * g.target.channel + y * g.target.row + x * g.target.col);
      const float4 v = sum[r][p];
      if (image < g.batch) to[0] = from_float<S>(v.x + bias);
      if (image + 1 < g.batch) to[g.target.batch] = from_float<S>(v.y + bias);
      if (image + 2 < g.batch) to[2 * g.target.batch] = from_float<S>(v.z + bias);
      if (image + 3 < g.batch) to[3 * g.target.batch] = from_float<S>(v.w + bias);
    }
  }
}

struct DirectPlan {
  int positions;
  ImageTile tile;
};

// A staged pack costs four loads, address arithmetic and a store.
constexpr double kStagingWeight = 3;
// Fetching an entry and its share of the walk along the rows, in reads of 32 packs.
constexpr double kEntryWeight = 0.5;

constexpr int rows_per_block(int positions) { return kThreads / 32 * 16 / positions; }

bool plan_direct(const GatherCall& c, int element_bytes, const DeviceLimits& limits, DirectPlan* plan) {
  const bool vector_images = images_are_vectors(c.source, c.g.source, 4, element_bytes);
  double cost = 0;
  plan->positions = 0;
  const double channels = static_cast<double>(c.g.groups) * c.g.rows_per_group * c.g.sources_per_group;
  const double live_per_channel = channels > 0 ? static_cast<double>(c.entries.nnz) / channels : 0;
  for (int positions : {4, 2, 1}) {
    const int rows = rows_per_block(positions);
    const double reads = rows * live_per_channel * (1 + kEntryWeight / positions);
    const TileDemand demand{4,     element_bytes,  32 * positions,        rows,
                            reads, kStagingWeight, shared_budget(limits), limits.multiprocessors};
    if (choose_image_tile(c.g, vector_images, demand, &plan->tile, &cost)) plan->positions = positions;
  }
  return plan->positions != 0;
}

template <class S, int kPositions>
cudaError_t launch_tile(const GatherCall& c, const ImageTile& t, cudaStream_t stream) {
  const int64_t tasks = tile_tasks(c.g, t, rows_per_block(kPositions));
  if (tasks > kMaxGrid) return cudaErrorNotSupported;
  return ILNAS_LAUNCH((direct_kernel<S, kPositions>), grid_of(tasks), dim3(kThreads),
                      static_cast<size_t>(tile_bytes(t)), stream, typed_call<S>(c), t);
}

}  // namespace

cudaError_t launch_direct(const GatherCall& c, cudaStream_t stream) {
  DeviceLimits limits{};
  if (cudaError_t error = device_limits(&limits)) return error;
  return with_stored_type(c.dtype, [&](auto stored) {
    using S = decltype(stored);
    DirectPlan plan{};
    if (!plan_direct(c, sizeof(S), limits, &plan)) return cudaErrorNotSupported;
    if (plan.positions == 4) return launch_tile<S, 4>(c, plan.tile, stream);
    if (plan.positions == 2) return launch_tile<S, 2>(c, plan.tile, stream);
    return launch_tile<S, 1>(c, plan.tile, stream);
  });
}

}  // namespace ilnas::cuda
