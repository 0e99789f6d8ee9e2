#include "cuda/kernels.h"
#include "cuda/masked_conv2d_routes.h"
#include "cuda/reduce.cuh"

namespace ilnas::cuda {
namespace {

constexpr int kChannels = 32, kParts = 8;  // a block: 32 neighbouring channels or positions, eight warps
constexpr int kMaxSplits = 32;
constexpr int64_t kPositionsPerSplit = 4096;

template <class S>
struct GradBiasCall {
  Global<const S> grad_out;
  Strides strides;
  int64_t batch, channels;
  int height, width;
  Global<float> partial;  // [splits][channels]
};

template <class S>
__device__ __forceinline__ float grad_at(const GradBiasCall<S>& c, int64_t channel, int64_t position) {
  const int64_t plane = int64_t{c.height} * c.width, image = position / plane;
  const int pixel = static_cast<int>(position % plane);
  return to_float(load_readonly<S>(c.grad_out + (image * c.strides.batch + channel * c.strides.channel +
                                                 pixel / c.width * c.strides.row + pixel % c.width * c.strides.col)));
}

// One channel a block, its threads along the positions.
template <class S>
__global__ void __launch_bounds__(kChannels* kParts) grad_bias_kernel(GradBiasCall<S> c, int splits) {
  ILNAS_SHARED(float, sums, kParts);
  const int64_t positions = c.batch * c.height * c.width;
  const int64_t first = positions * blockIdx.y / splits, last = positions * (blockIdx.y + 1) / splits;
  for (int64_t channel = blockIdx.x; channel < c.channels; channel += gridDim.x) {
    float sum = 0;
    for (int64_t p = first + threadIdx.x; p < last; p += kChannels * kParts) sum += grad_at<S>(c, channel, p);
    for (int bit = 16; bit >= 1; bit /= 2) sum += __shfl_xor_sync(kFullMask, sum, bit);
    if (lane_id() == 0) sums[warp_id()] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      float total = 0;
      for (int part = 0; part < kParts; ++part) total += sums[part];
      c.partial[blockIdx.y * c.channels + channel] = total;
    }
    __syncthreads();
  }
}

// Channels contiguous in memory: a warp along 32 channels.
template <class S>
__global__ void __launch_bounds__(kChannels* kParts) grad_bias_channels_kernel(GradBiasCall<S> c, int splits) {
  ILNAS_SHARED(float, sums, kChannels* kParts);
  const int64_t positions = c.batch * c.height * c.width;
  const int64_t first = positions * blockIdx.y / splits, last = positions * (blockIdx.y + 1) / splits;
  for (int64_t block = blockIdx.x; block * kChannels < c.channels; block += gridDim.x) {
    const int64_t channel = block * kChannels + lane_id();
    float sum = 0;
    if (channel < c.channels)
      for (int64_t p = first + warp_id(); p < last; p += kParts) sum += grad_at<S>(c, channel, p);
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (warp_id() == 0 && channel < c.channels) {
      float total = 0;
      for (int part = 0; part < kParts; ++part) total += sums[part * kChannels + lane_id()];
      c.partial[blockIdx.y * c.channels + channel] = total;
    }
    __syncthreads();
  }
}

int splits_of(const Conv2dShape& s) {
  const int64_t positions = s.batch * s.out_height * s.out_width;
  return static_cast<int>(std::clamp<int64_t>(positions / kPositionsPerSplit, 1, kMaxSplits));
}

}  // namespace

int64_t grad_bias_workspace(const Conv2dShape& s) {
  return splits_of(s) * s.out_channels * static_cast<int64_t>(sizeof(float));
}

cudaError_t launch_grad_bias(DType dtype, const Conv2dShape& s, const ImageView& grad_out, void* grad_bias,
                             void* workspace, cudaStream_t stream) {
  return with_stored_type(dtype, [&](auto stored) {
    using S = decltype(stored);
    const Strides strides = strides_of(grad_out);
    const int splits = splits_of(s);
    const GradBiasCall<S> call{static_cast<const S*>(grad_out.data),
                               strides,
                               s.batch,
                               s.out_channels,
                               static_cast<int>(s.out_height),
                               static_cast<int>(s.out_width),
                               static_cast<float*>(workspace)};
    const bool channels_innermost = contiguous_of(strides) == Contiguous::kChannels;
    dim3 grid = grid_of(channels_innermost ? ceil_div(s.out_channels, kChannels) : s.out_channels);
    grid.y = static_cast<unsigned>(splits);
    const cudaError_t error =
        channels_innermost
            ? ILNAS_LAUNCH(grad_bias_channels_kernel<S>, grid, dim3(kChannels * kParts), 0, stream, call, splits)
            : ILNAS_LAUNCH(grad_bias_kernel<S>, grid, dim3(kChannels * kParts), 0, stream, call, splits);
    if (error != cudaSuccess) return error;
    return launch_sum_splits<S>(static_cast<const float*>(workspace), static_cast<S*>(grad_bias), s.out_channels,
                                splits, stream);
  });
}

}  // namespace ilnas::cuda
