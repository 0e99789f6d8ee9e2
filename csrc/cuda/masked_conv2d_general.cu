#include "cuda/choose_tile.h"
#include "cuda/gather_call.cuh"

namespace ilnas::cuda {
namespace {

constexpr int kThreads = 256;

// Every geometry: one thread per element of the target walks the entries of its row.
template <class S>
__global__ void __launch_bounds__(kThreads) general_kernel(TypedCall<S> call) {
  const Gather& g = call.g;
  const int64_t plane = int64_t{g.height} * g.width, targets = g.batch * plane;
  const int64_t blocks_per_row = (targets + kThreads - 1) / kThreads;
  const int taps = g.kernel_height * g.kernel_width, rows = g.groups * g.rows_per_group;
  for (int64_t task = blockIdx.x; task < blocks_per_row * rows; task += gridDim.x) {
    const int row = static_cast<int>(task / blocks_per_row);
    const int64_t position = task % blocks_per_row * kThreads + threadIdx.x;
    if (position >= targets) continue;
    const int64_t image = position / plane;
    const int y = static_cast<int>(position % plane / g.width), x = static_cast<int>(position % plane % g.width);
    const int64_t first_channel = int64_t{row / g.rows_per_group} * g.sources_per_group;
    const Global<const S> images = call.source + (image * g.source.batch + first_channel * g.source.channel);
    float sum = call.has_bias ? to_float(load_readonly<S>(call.bias + row)) : 0.0f;
    const int end = call.row_ptr[row + 1];
    for (int j = call.row_ptr[row]; j < end; ++j) {
      const int column = call.col[j], tap = column % taps;
      const int sy = source_of(g.vertical, y, tap / g.kernel_width, g.source_height);
      const int sx = source_of(g.horizontal, x, tap % g.kernel_width, g.source_width);
      if (sy < 0 || sx < 0) continue;
      const int place = call.has_perm ? static_cast<int>(call.perm[j]) : j;
      sum = fmaf(to_float(load_readonly<S>(call.values + place)),
                 to_float(load_readonly<S>(images +
                                           (column / taps * g.source.channel + sy * g.source.row + sx * g.source.col))),
                 sum);
    }
    call.target[image * g.target.batch + row * g.target.channel + y * g.target.row + x * g.target.col] =
        from_float<S>(sum);
  }
}

}  // namespace

cudaError_t launch_general(const GatherCall& c, cudaStream_t stream) {
  return with_stored_type(c.dtype, [&](auto stored) {
    using S = decltype(stored);
    const int64_t blocks = ceil_div(c.g.batch * c.g.height * c.g.width, kThreads) * c.g.groups * c.g.rows_per_group;
    return ILNAS_LAUNCH(general_kernel<S>, grid_of(blocks), dim3(kThreads), 0, stream, typed_call<S>(c));
  });
}

}  // namespace ilnas::cuda
