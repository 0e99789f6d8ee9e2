#include "cuda/absent_topk_filter.cuh"
#include "cuda/masked_conv2d_routes.h"

namespace ilnas::cuda {
namespace {

// The digits of a 64-bit key, and one pass that appends.
constexpr int kPasses = (64 + kDigitBits - 1) / kDigitBits + 1;
constexpr int64_t kSampleShare = 16;
constexpr int64_t kMaxTaps = 4096, kMaxBatch = int64_t{1} << 30, kMaxIndex = 0xfffffffe;
// A part of the positions gives a block at least this many multiply-adds a result.
constexpr int64_t kPositionsPerSplit = 512;

struct Plan {
  TopkTiles tiles;
  int rows_per_group, cols, taps;
  int64_t candidates, capacity;
  int64_t state_bytes, buffer_bytes, panel_bytes;
};

cudaError_t plan_topk(const Conv2dShape& s, int64_t k, bool by_kernel, Plan* plan) {
  const int64_t taps = s.kernel_height * s.kernel_width, channels = s.in_channels / s.groups;
  const int64_t rows = s.out_channels / s.groups, cols = channels * taps;
  if ((by_kernel && taps > kMaxTaps) || s.batch >= kMaxBatch || cols >= int64_t{1} << 30) return cudaErrorNotSupported;
  TopkTiles& t = plan->tiles;
  const int64_t kernel_tiles = ceil_div(taps, kTileCols);
  t.tiles_per_unit = by_kernel ? static_cast<int>(kernel_tiles) : 1;
  t.unit_cols = by_kernel ? static_cast<int>(kernel_tiles > 1 ? taps : kTileCols / taps * taps) : kTileCols;
  t.row_tiles = static_cast<int>(ceil_div(rows, kTileRows));
  t.col_units = static_cast<int>(ceil_div(cols, t.unit_cols));
  t.units = int64_t{t.row_tiles} * t.col_units * s.groups;
  t.units_per_panel = kPanelTiles / t.tiles_per_unit;
  const int64_t positions = s.batch * s.out_height * s.out_width;
  t.splits = 1;
  if (t.units <= t.units_per_panel)
    t.splits = static_cast<int>(std::clamp<int64_t>(kPanelTiles / std::max<int64_t>(t.units * t.tiles_per_unit, 1), 1,
                                                    std::max<int64_t>(positions / kPositionsPerSplit, 1)));
  plan->rows_per_group = static_cast<int>(rows);
  plan->cols = static_cast<int>(cols);
  plan->taps = static_cast<int>(taps);
  plan->candidates = s.out_channels * (by_kernel ? channels : cols);
  if (plan->candidates > kMaxIndex) return cudaErrorNotSupported;
  plan->capacity = kSortBlock;
  while (plan->capacity < 2 * k) plan->capacity *= 2;
  plan->state_bytes = topk_state_bytes();
  plan->buffer_bytes = 8 * plan->capacity;
  const int64_t panel_units = std::min(t.units, t.units_per_panel);
  plan->panel_bytes = panel_units * t.tiles_per_unit * t.splits * kTileSize * static_cast<int64_t>(sizeof(float));
  return cudaSuccess;
}

// What every pass needs.
struct Passes {
  DType dtype;
  Gather g;
  const ImageView &grad_out, &x;
  const PatternView& blocked;
  const TopkQuery& query;
  const Plan& plan;
  unsigned char* state;
  uint64_t* buffer;
  float* panel;
  cudaStream_t stream;

  cudaError_t tiles(const TopkPanel& units) const {
    return launch_gradient_tiles(dtype, g, grad_out.data, x.data, plan.tiles, units,
                                 reinterpret_cast<const uint64_t*>(state), panel, stream);
  }
  cudaError_t filter(const TopkPanel& units, bool appends, bool counts_non_finite) const {
    const FilterArguments arguments{plan.tiles,    units,       plan.rows_per_group, plan.cols, plan.taps,
                                    plan.capacity, query.floor, query.by_kernel,     appends,   counts_non_finite};
    return launch_topk_filter(arguments, state, panel, blocked.row_ptr, blocked.col, buffer, stream);
  }
  cudaError_t decide(bool after_sample, int64_t k) const {
    return launch_topk_decide(state, after_sample, k, plan.capacity, stream);
  }
};

// A gradient that fits the panel is computed once and filtered as often as it takes.
cudaError_t one_panel(const Passes& p) {
  const TopkPanel all{0, 1, p.plan.tiles.units};
  if (cudaError_t error = p.tiles(all)) return error;
  for (int pass = 0; pass < kPasses; ++pass) {
    if (cudaError_t error = p.filter(all, true, pass == 0)) return error;
    if (cudaError_t error = p.decide(false, p.query.k)) return error;
  }
  return cudaSuccess;
}

// A larger one is computed again by every pass; the sample makes more than one rare.
cudaError_t many_panels(const Passes& p, bool everything) {
  const TopkTiles& t = p.plan.tiles;
  if (!everything) {
    const int64_t count = std::min(t.units_per_panel, ceil_div(t.units, kSampleShare));
    const TopkPanel sample{0, t.units / count, count};
    if (cudaError_t error = p.tiles(sample)) return error;
    if (cudaError_t error = p.filter(sample, false, false)) return error;
    // Half again as many as needed, in the middle of what the buffer takes.
    const double rank =
        1.5 * static_cast<double>(p.query.k) * static_cast<double>(count) / static_cast<double>(t.units);
    if (cudaError_t error = p.decide(true, std::max<int64_t>(static_cast<int64_t>(rank), 1))) return error;
  }
  for (int pass = 0; pass < kPasses; ++pass) {
    for (int64_t first = 0; first < t.units; first += t.units_per_panel) {
      const TopkPanel units{first, 1, std::min(t.units_per_panel, t.units - first)};
      if (cudaError_t error = p.tiles(units)) return error;
      if (cudaError_t error = p.filter(units, true, pass == 0)) return error;
    }
    if (cudaError_t error = p.decide(false, p.query.k)) return error;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t absent_topk_workspace(const Conv2dShape& s, int64_t k, bool by_kernel, int64_t* bytes) {
  Plan plan{};
  if (cudaError_t error = plan_topk(s, k, by_kernel, &plan)) return error;
  *bytes = plan.state_bytes + plan.buffer_bytes + plan.panel_bytes;
  return cudaSuccess;
}

cudaError_t launch_absent_topk(DType dtype, const Conv2dShape& s, const PatternView& blocked, const ImageView& grad_out,
                               const ImageView& x, const TopkQuery& query, void* workspace, cudaStream_t stream) {
  Plan plan{};
  if (cudaError_t error = plan_topk(s, query.k, query.by_kernel, &plan)) return error;
  unsigned char* const state = static_cast<unsigned char*>(workspace);
  const Passes passes{dtype,
                      forward_gather(s, x, grad_out),
                      grad_out,
                      x,
                      blocked,
                      query,
                      plan,
                      state,
                      reinterpret_cast<uint64_t*>(state + plan.state_bytes),
                      reinterpret_cast<float*>(state + plan.state_bytes + plan.buffer_bytes),
                      stream};
  const bool everything = plan.candidates <= plan.capacity;
  if (cudaError_t error = launch_topk_start(state, everything, stream)) return error;
  const cudaError_t error =
      plan.tiles.units <= plan.tiles.units_per_panel ? one_panel(passes) : many_panels(passes, everything);
  if (error != cudaSuccess) return error;
  return launch_topk_sort(state, passes.buffer, plan.capacity, query, stream);
}

}  // namespace ilnas::cuda
