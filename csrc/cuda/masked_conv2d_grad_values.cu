#include "cuda/choose_tile.h"
#include "cuda/masked_conv2d_routes.h"
#include "cuda/reduce.cuh"

namespace ilnas::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kRowsPerBlock = 64;
constexpr int kLanes = 8;  // live weights summed at once

template <class S>
struct GradValuesCall {
  Gather g;  // the forward's: rows are output channels, the source is x
  Global<const S> x, grad_out;
  Global<const int32_t> row_ptr, col;
  Global<float> partial;  // [splits][nnz]
  int64_t nnz;
};

// Sums eight values over the warp's lanes; lane l gets the total of value l / 4.
__device__ __forceinline__ float sum_of_eight(float (&v)[kLanes], int lane) {
#pragma unroll
  for (int half = kLanes / 2, bit = 16; half >= 1; half /= 2, bit /= 2) {
    const bool upper = (lane & bit) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float kept = upper ? v[i + half] : v[i], sent = upper ? v[i] : v[i + half];
      v[i] = kept + __shfl_xor_sync(kFullMask, sent, bit);
    }
  }
  float total = v[0];
  total += __shfl_xor_sync(kFullMask, total, 2);
  return total + __shfl_xor_sync(kFullMask, total, 1);
}

// A block owns the entries of kRowsPerBlock rows in one chunk of channels and walks every `splits`-th tile. grad_out
// stays in registers while the entries of its row read the staged x at their shifts.
template <class S, int kPositions>
__global__ void __launch_bounds__(kThreads, 2) grad_values_kernel(GradValuesCall<S> call, ImageTile t, int splits) {
  ILNAS_SHARED(int, range, 2 * kRowsPerBlock);
  ILNAS_DYNAMIC_SHARED(dynamic);
  const Shared<float> tile = pointer_cast<float>(dynamic);
  const Gather& g = call.g;
  const int taps = g.kernel_height * g.kernel_width;
  const int lane = lane_id(), warp = warp_id();
  const int row_blocks = (g.rows_per_group + kRowsPerBlock - 1) / kRowsPerBlock;
  const int group = blockIdx.x / row_blocks, first_row = blockIdx.x % row_blocks * kRowsPerBlock;
  const int chunk = blockIdx.y * t.channels;
  const int channels = min(t.channels, g.sources_per_group - chunk);
  const int rows = min(kRowsPerBlock, g.rows_per_group - first_row);
  const AxisClass vertical = axis_class(g.vertical, 0, g.kernel_height);
  const AxisClass horizontal = axis_class(g.horizontal, 0, g.kernel_width);

  for (int r = threadIdx.x; r < rows; r += kThreads) {
    const int row = group * g.rows_per_group + first_row + r;
    const int begin = call.row_ptr[row], end = call.row_ptr[row + 1];
    range[2 * r] = lower_bound(call.col, begin, end, chunk * taps);
    range[2 * r + 1] = lower_bound(call.col, begin, end, (chunk + channels) * taps);
  }

  const int64_t tiles = t.image_blocks * t.tiles_y * t.tiles_x;
  for (int64_t index = blockIdx.z; index < tiles; index += splits) {
    const int first_x = static_cast<int>(index % t.tiles_x) * t.width;
    const int first_y = static_cast<int>(index / t.tiles_x % t.tiles_y) * t.height;
    const int64_t first_image = index / t.tiles_x / t.tiles_y * t.packs * 4;
    const bool first = index < splits;
    __syncthreads();
    stage_images<S, 4>(dynamic, call.x, g, t, first_image, group * g.sources_per_group + chunk, channels,
                       first_y * vertical.scale + vertical.origin, first_x * horizontal.scale + horizontal.origin);
    __syncthreads();

    int base[kPositions];
    int64_t place[kPositions], images[kPositions];  // of grad_out; images left from the slot's first on
#pragma unroll
    for (int p = 0; p < kPositions; ++p) {
      const Slot slot = slot_of(p * 32 + lane, t);
      const int y = first_y + slot.y, x = first_x + slot.x;
      const int64_t image = first_image + 4 * slot.pack;
      base[p] = 4 * pack_of(slot, g, t);
      place[p] = image * g.target.batch + y * g.target.row + x * g.target.col;
      images[p] = y < g.height && x < g.width ? g.batch - image : 0;
    }
    for (int r = warp; r < rows; r += kWarps) {
      const int begin = range[2 * r], end = range[2 * r + 1];
      if (begin == end) continue;
      const Global<const S> grad_row =
          call.grad_out + (group * int64_t{g.rows_per_group} + first_row + r) * g.target.channel;
      float4 grad[kPositions];
#pragma unroll
      for (int p = 0; p < kPositions; ++p)
        grad[p] = images[p] > 0 ? load_float_pack<S>(grad_row + place[p], g.target.batch, images[p], false)
                                : make_float4(0, 0, 0, 0);
      for (int j = begin; j < end; j += kLanes) {
        const int column = j + lane % kLanes < end ? static_cast<int>(call.col[j + lane % kLanes]) : chunk * taps;
        const int tap = column % taps;
        const int own_offset =
            4 * ((column / taps - chunk) * t.plane + (shift_of(vertical, tap / g.kernel_width) * t.source_width +
                                                      shift_of(horizontal, tap % g.kernel_width)) *
                                                         t.pixel);
        float sum[kLanes];
#pragma unroll
        for (int i = 0; i < kLanes; ++i) {
          const int offset = __shfl_sync(kFullMask, own_offset, i);
          sum[i] = 0;
          if (j + i >= end) continue;
#pragma unroll
          for (int p = 0; p < kPositions; ++p) {
            const float4 v = load_as<float4>(tile + (base[p] + offset));
            sum[i] = fmaf(v.x, grad[p].x, sum[i]);
            sum[i] = fmaf(v.y, grad[p].y, sum[i]);
            sum[i] = fmaf(v.z, grad[p].z, sum[i]);
            sum[i] = fmaf(v.w, grad[p].w, sum[i]);
          }
        }
        const float total = sum_of_eight(sum, lane);
        if (lane % 4 == 0 && j + lane / 4 < end) {
          const Global<float> to = call.partial + (blockIdx.z * call.nnz + j + lane / 4);
          to[0] = first ? total : to[0] + total;
        }
      }
    }
  }
}

// Every geometry: one warp per live weight and split of the images.
template <class S>
__global__ void __launch_bounds__(kThreads) grad_values_general_kernel(GradValuesCall<S> call, int splits) {
  const Gather& g = call.g;
  const int taps = g.kernel_height * g.kernel_width, rows = g.groups * g.rows_per_group;
  const int lane = lane_id();
  const int64_t plane = int64_t{g.height} * g.width, targets = g.batch * plane;
  for (int64_t task = blockIdx.x * int64_t{kWarps} + warp_id(); task < call.nnz * splits;
       task += int64_t{gridDim.x} * kWarps) {
    const int j = static_cast<int>(task % call.nnz), part = static_cast<int>(task / call.nnz);
    // The row that holds entry j: the last one that starts at or before it.
    const int row = lower_bound(call.row_ptr, 0, rows + 1, j + 1) - 1;
    const int column = call.col[j], tap = column % taps;
    const int64_t channel = int64_t{row / g.rows_per_group} * g.sources_per_group + column / taps;
    float sum = 0;
    for (int64_t position = int64_t{part} * 32 + lane; position < targets; position += int64_t{splits} * 32) {
      const int64_t image = position / plane;
      const int y = static_cast<int>(position % plane / g.width), x = static_cast<int>(position % plane % g.width);
      const int sy = source_of(g.vertical, y, tap / g.kernel_width, g.source_height);
      const int sx = source_of(g.horizontal, x, tap % g.kernel_width, g.source_width);
      if (sy < 0 || sx < 0) continue;
      sum = fmaf(to_float(load_readonly<S>(call.grad_out + (image * g.target.batch + row * g.target.channel +
                                                            y * g.target.row + x * g.target.col))),
                 to_float(load_readonly<S>(call.x + (image * g.source.batch + channel * g.source.channel +
                                                     sy * g.source.row + sx * g.source.col))),
                 sum);
    }
    for (int bit = 16; bit >= 1; bit /= 2) sum += __shfl_xor_sync(kFullMask, sum, bit);
    if (lane == 0) call.partial[part * call.nnz + j] = sum;
  }
}

struct Plan {
  int positions;  // 0: the general kernel
  ImageTile tile;
  int splits;
};

constexpr double kStagingWeight = 3;
// Enough blocks for every multiprocessor at two resident ones and a short tail, few enough that the partial sums stay
// a small multiple of the values.
constexpr int64_t kBlocksPerMultiprocessor = 6, kMaxSplits = 16;

cudaError_t plan_grad_values(Route route, const Gather& g, int64_t nnz, const void* x, size_t element_bytes,
                             Plan* plan) {
  DeviceLimits limits{};
  if (cudaError_t error = device_limits(&limits)) return error;
  *plan = {};
  const int64_t wanted = kBlocksPerMultiprocessor * limits.multiprocessors;
  const double channels = static_cast<double>(g.groups) * g.rows_per_group * g.sources_per_group;
  double cost = 0;
  if (route != Route::kGeneral)
    for (int positions : {4, 2, 1}) {
      const int rows = std::min(kRowsPerBlock, g.rows_per_group);
      const TileDemand demand{4,
                              static_cast<int>(element_bytes),
                              32 * positions,
                              kRowsPerBlock,
                              channels > 0 ? rows * double(nnz) / channels : 0,
                              kStagingWeight,
                              shared_budget(limits),
                              1};
      if (choose_image_tile(g, images_are_vectors(x, g.source, 4, element_bytes), demand, &plan->tile, &cost))
        plan->positions = positions;
    }
  if (plan->positions == 0) {
    if (route == Route::kDirect) return cudaErrorNotSupported;
    plan->splits = static_cast<int>(
        std::clamp<int64_t>(wanted * kWarps / std::max<int64_t>(nnz, 1), 1,
                            std::min(kMaxSplits, std::max<int64_t>(ceil_div(g.batch * g.height * g.width, 32), 1))));
    return cudaSuccess;
  }
  const ImageTile& t = plan->tile;
  const int64_t owners =
      ceil_div(g.rows_per_group, kRowsPerBlock) * g.groups * ceil_div(g.sources_per_group, std::max(t.channels, 1));
  const int64_t tiles = t.image_blocks * t.tiles_y * t.tiles_x;
  plan->splits = static_cast<int>(
      std::clamp<int64_t>(ceil_div(wanted, owners), 1, std::max<int64_t>(std::min(kMaxSplits, tiles), 1)));
  return cudaSuccess;
}

template <class S, int kPositions>
cudaError_t launch_tile(const GradValuesCall<S>& call, const Plan& plan, cudaStream_t stream) {
  const Gather& g = call.g;
  const int64_t owners = ceil_div(g.rows_per_group, kRowsPerBlock) * g.groups;
  const int64_t chunks = ceil_div(g.sources_per_group, plan.tile.channels);
  if (owners > kMaxGrid || chunks > 65535) return cudaErrorNotSupported;
  const dim3 grid(static_cast<unsigned>(owners), static_cast<unsigned>(chunks), static_cast<unsigned>(plan.splits));
  return ILNAS_LAUNCH((grad_values_kernel<S, kPositions>), grid, dim3(kThreads),
                      static_cast<size_t>(tile_bytes(plan.tile)), stream, call, plan.tile, plan.splits);
}

}  // namespace

cudaError_t direct_grad_values_workspace(Route route, DType dtype, const Gather& g, int64_t nnz, int64_t* bytes) {
  // The alignment of x decides how a tile is read, not which: the plan is the launch's.
  Plan plan{};
  if (cudaError_t error = plan_grad_values(route, g, nnz, nullptr, dtype == DType::kFloat32 ? 4 : 2, &plan))
    return error;
  *bytes = plan.splits * nnz * static_cast<int64_t>(sizeof(float));
  return cudaSuccess;
}

cudaError_t launch_direct_grad_values(Route route, const GradValuesArguments& a, void* workspace, cudaStream_t stream) {
  return with_stored_type(a.dtype, [&](auto stored) {
    using S = decltype(stored);
    Plan plan{};
    if (cudaError_t error = plan_grad_values(route, a.g, a.entries.nnz, a.x, sizeof(S), &plan)) return error;
    const GradValuesCall<S> call{a.g,
                                 static_cast<const S*>(a.x),
                                 static_cast<const S*>(a.grad_out),
                                 a.entries.row_ptr,
                                 a.entries.col,
                                 static_cast<float*>(workspace),
                                 a.entries.nnz};
    cudaError_t error = cudaSuccess;
    if (plan.positions == 4)
      error = launch_tile<S, 4>(call, plan, stream);
    else if (plan.positions == 2)
      error = launch_tile<S, 2>(call, plan, stream);
    else if (plan.positions == 1)
      error = launch_tile<S, 1>(call, plan, stream);
    else
      error = ILNAS_LAUNCH(grad_values_general_kernel<S>, grid_of(ceil_div(a.entries.nnz * plan.splits, kWarps)),
                           dim3(kThreads), 0, stream, call, plan.splits);
    if (error != cudaSuccess) return error;
    return launch_sum_splits<S>(static_cast<const float*>(workspace), static_cast<S*>(a.grad_values), a.entries.nnz,
                                plan.splits, stream);
  });
}

}  // namespace ilnas::cuda
