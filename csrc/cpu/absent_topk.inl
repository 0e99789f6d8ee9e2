#pragma once
#include <math.h>

#include "cpu/absent_filter.inl"
#include "cpu/absent_tiles.inl"
#include "cpu/call.h"
#include "cpu/scratch.h"

namespace ilnas {
namespace ILNAS_ISA {
namespace {

// What all threads together take beside the k best.
constexpr int64_t most_scratch = 7 << 20;

// The weight [out_channels, in_per_group * taps] cut into tiles of whole kernels by outputs, group by group.
struct TilePlan {
  // Whole panels in every instruction set, so that outputs of a tile begin at a multiple of the widest vector.
  static constexpr int64_t panel_outputs = 48;

  int64_t taps, in_per_group, out_per_group, cols;
  int64_t channels_at_once, outputs_at_once, channel_tiles, output_tiles, tiles;

  static TilePlan of(const Conv2dShape& s, const ChunkPlan& chunks, int64_t element, int64_t threads) {
    TilePlan t{};
    t.taps = s.kernel_height * s.kernel_width;
    t.in_per_group = s.in_channels / s.groups, t.out_per_group = s.out_channels / s.groups;
    t.cols = t.in_per_group * t.taps;
    if (t.cols == 0 || t.out_per_group == 0) return t;
    // The largest tiles pack least; many threads hold smaller ones.
    int64_t widest_columns = 576, widest_outputs = 11 * panel_outputs;
    const auto bytes = [&] {
      const int64_t packed = chunks.pixels * widest_outputs + widest_columns / t.taps * chunks.places;
      return threads * element * (widest_columns * widest_outputs + packed);
    };
    while (bytes() > most_scratch && widest_outputs > panel_outputs)
      widest_columns /= 2, widest_outputs = (widest_outputs / 2 + panel_outputs - 1) / panel_outputs * panel_outputs;
    t.output_tiles = (t.out_per_group + widest_outputs - 1) / widest_outputs;
    t.outputs_at_once = (t.out_per_group + t.output_tiles - 1) / t.output_tiles;
    if (t.output_tiles > 1) t.outputs_at_once = (t.outputs_at_once + panel_outputs - 1) / panel_outputs * panel_outputs;
    const int64_t most_channels = t.taps < widest_columns ? widest_columns / t.taps : 1;
    t.channel_tiles = (t.in_per_group + most_channels - 1) / most_channels;
    // Few tiles are dealt out evenly. How a weight's own sum is taken does not depend on its tile.
    const int64_t others = s.groups * t.output_tiles;
    while (t.channel_tiles < t.in_per_group && others * t.channel_tiles < 8 * threads &&
           others * t.channel_tiles % threads != 0)
      ++t.channel_tiles;
    t.channels_at_once = (t.in_per_group + t.channel_tiles - 1) / t.channel_tiles;
    t.channel_tiles = (t.in_per_group + t.channels_at_once - 1) / t.channels_at_once;
    t.tiles = others * t.channel_tiles;
    return t;
  }
  Tile tile(int64_t number) const {
    const int64_t group = number / (output_tiles * channel_tiles);
    const int64_t output = number / channel_tiles % output_tiles * outputs_at_once;
    const int64_t channel = number % channel_tiles * channels_at_once;
    const int64_t outputs = out_per_group - output, channels = in_per_group - channel;
    return {group * out_per_group + output, outputs < outputs_at_once ? outputs : outputs_at_once,
            group * in_per_group + channel, channels < channels_at_once ? channels : channels_at_once};
  }
};

// Where among a row's blocked positions column `first` of `columns` would be if they were spread evenly.
inline const int32_t* guess_place(const PatternView& blocked, int64_t row, int64_t first, int64_t columns) {
  const int64_t begin = blocked.row_ptr[row];
  return blocked.col + begin + (blocked.row_ptr[row + 1] - begin) * first / columns;
}

// Calls f(column - first) of every blocked position of a row in columns [first, last) of `columns`.
template <class F>
void for_blocked_of_row(const PatternView& blocked, int64_t row, int64_t columns, int64_t first, int64_t last,
                        const F& f) {
  constexpr int64_t near = 32;
  const int32_t *at = blocked.col + blocked.row_ptr[row], *end = blocked.col + blocked.row_ptr[row + 1], *limit = end;
  const int32_t* guess = guess_place(blocked, row, first, columns);
  if (guess - at > near && guess[-near - 1] < first) at = guess - near;
  if (end - guess > near && guess[near] >= first) limit = guess + near;
  // A binary search without branches, which would be guessed wrong half of the time.
  for (int64_t left = limit - at; left > 0;) {
    const int64_t half = (left + 1) / 2;
    at += (at[half - 1] < first) * half;
    left -= half;
  }
  for (; at < end && *at < last; ++at) f(*at - first);
}

// Calls f(output in tile, column in tile) of every blocked position of a tile.
template <class F>
void for_each_blocked(const TilePlan& t, const PatternView& blocked, const Tile& tile, const F& f) {
  const int64_t first = tile.channel % t.in_per_group * t.taps, last = first + tile.channels * t.taps;
  for (int64_t o = 0; o < tile.outputs; ++o)
    for_blocked_of_row(blocked, tile.output + o, t.cols, first, last, [&](int64_t column) { f(o, column); });
}

inline const float* as_floats(const float* sums, int64_t, float*) { return sums; }
inline const float* as_floats(const double* sums, int64_t count, float* floats) {
  for (int64_t i = 0; i < count; ++i) floats[i] = static_cast<float>(sums[i]);
  return floats;
}

// Every absent weight of a tile is a candidate.
template <class S>
void offer_weights(const TilePlan& t, const PatternView& blocked, const Tile& tile, const TileMemory<S>& memory,
                   float* floats, uint16_t* marks, Candidates* candidates) {
  const int64_t columns = tile.channels * t.taps, width = marks_of(tile.outputs);
  for (int64_t i = 0; i < columns * width; ++i) marks[i] = 0;
  for_each_blocked(t, blocked, tile, [&](int64_t o, int64_t column) { mark(marks + column * width, o); });
  const int64_t col = tile.channel % t.in_per_group * t.taps;
  for (int64_t column = 0; column < columns; ++column) {
    candidates->read_threshold();
    candidates->offer(as_floats(memory.sums + column * memory.step, tile.outputs, floats), marks + column * width,
                      tile.outputs, tile.output * t.cols + col + column, t.cols);
  }
}

// Every kernel with an absent tap is a candidate, scored by the root mean square over its absent taps.
template <class S>
void offer_kernels(const TilePlan& t, const PatternView& blocked, const Tile& tile, const TileMemory<S>& memory,
                   float* scores, int32_t* taken, uint16_t* marks, Candidates* candidates) {
  for (int64_t i = 0; i < tile.channels * memory.step; ++i) taken[i] = 0;
  for_each_blocked(t, blocked, tile, [&](int64_t o, int64_t column) {
    memory.sums[column * memory.step + o] = 0;
    ++taken[column / t.taps * memory.step + o];
  });
  for (int64_t c = 0; c < tile.channels; ++c) {
    for (int64_t i = 0; i < marks_of(tile.outputs); ++i) marks[i] = 0;
    for (int64_t o = 0; o < tile.outputs; ++o) {
      double squares = 0;
      for (int64_t tap = 0; tap < t.taps; ++tap) {
        const double g = memory.sums[(c * t.taps + tap) * memory.step + o];
        squares += g * g;
      }
      const int64_t absent = t.taps - taken[c * memory.step + o];
      scores[o] = absent ? static_cast<float>(sqrt(squares / static_cast<double>(absent))) : 0.0f;
      if (absent == 0) mark(marks, o);
    }
    candidates->read_threshold();
    candidates->offer(scores, marks, tile.outputs, tile.output * t.in_per_group + tile.channel % t.in_per_group + c,
                      t.in_per_group);
  }
}

void write_best(BestKeys& best, const TopkQuery& q) {
  const uint64_t* keys;
  const int64_t found = best.finish(&keys);
  for (int64_t i = 0; i < q.k; ++i) {
    q.index[i] = i < found ? index_of(keys[i]) : -1;
    q.grad[i] = i < found ? score_of(keys[i]) : 0.0f;
  }
}

// A threshold that about 1.5 k candidates reach, guessed from a sample of the gradient spread over the whole weight; 0
// where a guess would not pay. Without one the threshold rises from nothing, and several times k candidates pass it.
template <class S>
uint64_t guess_threshold(const Conv2dShape& s, const PatternView& blocked, const ImageView& grad_out,
                         const ImageView& x, const TopkQuery& q, const TilePlan& t, const ChunkPlan& chunks) {
  constexpr int64_t most_outputs = 96, most_columns = 288, fewer = 48, least_share = 64, least_rank = 16;
  const int64_t weights = s.out_channels * t.cols;
  const int64_t sample_outputs = weights < least_share * most_outputs * most_columns ? fewer : most_outputs;
  const int64_t sample_columns = weights < least_share * fewer * most_columns ? 4 * fewer : most_columns;
  if (q.by_kernel || s.groups > 1 || t.taps > sample_columns || s.out_channels < sample_outputs) return 0;
  int64_t channels = sample_columns / t.taps;
  if (channels > t.channels_at_once) channels = t.channels_at_once;
  const int64_t sample = sample_outputs * channels * t.taps;
  if (sample * least_share > weights || q.k * sample < least_rank * weights || q.k > (weights - blocked.nnz) / 4)
    return 0;
  const int64_t output_spread = s.out_channels / sample_outputs, channel_spread = s.in_channels / channels;
  ImageView spread_x = x, spread_grad = grad_out;
  spread_x.channel_stride *= channel_spread, spread_grad.channel_stride *= output_spread;
  TileMemory<S> memory(chunks, sample_outputs, channels, t.taps);
  memory.turn_images(s, chunks, spread_x, spread_grad, sample_outputs, channels, most_scratch);
  Scratch scratch(memory.bytes());
  memory.take_from(scratch.take<char>(memory.bytes()));
  compute_tile<S>(s, chunks, spread_x, spread_grad, {0, sample_outputs, 0, channels}, memory);
  const int64_t width = sample_outputs / filter_lanes;
  uint16_t marks[most_columns * most_outputs / filter_lanes] = {};
  for (int64_t o = 0; o < sample_outputs; ++o)
    for (int64_t j = blocked.row_ptr[o * output_spread]; j < blocked.row_ptr[o * output_spread + 1]; ++j) {
      const int64_t c = blocked.col[j] / t.taps;
      if (c % channel_spread == 0 && c / channel_spread < channels)
        mark(marks + (c / channel_spread * t.taps + blocked.col[j] % t.taps) * width, o);
    }
  const double expected = double(q.k) * double(sample) / double(weights);
  const int64_t rank = static_cast<int64_t>(1.25 * expected + 4 * sqrt(expected)) + 8;
  BestKeys best(rank, 0);
  Candidates candidates(&best);
  float floats[most_outputs];
  for (int64_t column = 0; column < channels * t.taps; ++column)
    candidates.offer(as_floats(memory.sums + column * memory.step, sample_outputs, floats), marks + column * width,
                     sample_outputs, column * sample_outputs, 1);
  candidates.flush();
  const uint64_t* keys;
  return best.finish(&keys) < rank ? 0 : least_key(fabsf(score_of(keys[rank - 1])));
}

// Offers every absent candidate to `best`.
template <class S>
void rank_absent(const Conv2dShape& s, const PatternView& blocked, const ImageView& grad_out, const ImageView& x,
                 const TopkQuery& q, const TilePlan& t, const ChunkPlan& chunks, BestKeys* best,
                 const Parallel& parallel) {
  const int64_t threads = parallel.threads;
  TileMemory<S> sizes(chunks, t.outputs_at_once, t.channels_at_once, t.taps);
  sizes.turn_images(s, chunks, x, grad_out, t.outputs_at_once, t.channels_at_once, most_scratch / threads);
  const int64_t taken_size = q.by_kernel ? t.channels_at_once * sizes.step : 0;
  const int64_t marks_size = sizes.columns * marks_of(t.outputs_at_once);
  Scratch scratch(threads * (sizes.bytes() + Scratch::size<int32_t>(taken_size) + Scratch::size<float>(sizes.step) +
                             Scratch::size<uint16_t>(marks_size) + Scratch::size<int64_t>(1)));
  char* memory = scratch.take<char>(threads * sizes.bytes());
  int32_t* taken = scratch.take<int32_t>(taken_size * threads);
  float* scores = scratch.take<float>(sizes.step * threads);
  uint16_t* marks = scratch.take<uint16_t>(marks_size * threads);
  int64_t* non_finite = scratch.take<int64_t>(threads);
  parallel_for(parallel, threads, [&](int64_t thread) {
    TileMemory<S> own = sizes;
    own.take_from(memory + thread * sizes.bytes());
    float* own_scores = scores + thread * sizes.step;
    uint16_t* own_marks = marks + thread * marks_size;
    Candidates candidates(best);
    for (int64_t number = t.tiles * thread / threads; number < t.tiles * (thread + 1) / threads; ++number) {
      const Tile tile = t.tile(number);
      compute_tile<S>(s, chunks, x, grad_out, tile, own);
      if (q.by_kernel)
        offer_kernels(t, blocked, tile, own, own_scores, taken + thread * taken_size, own_marks, &candidates);
      else
        offer_weights(t, blocked, tile, own, own_scores, own_marks, &candidates);
    }
    candidates.flush();
    non_finite[thread] = candidates.non_finite();
  });
  for (int64_t thread = 0; thread < threads; ++thread) *q.non_finite += non_finite[thread];
}

template <class S>
void best_absent(const Conv2dShape& s, const PatternView& blocked, const ImageView& grad_out, const ImageView& x,
                 const TopkQuery& q, const Parallel& parallel) {
  const ChunkPlan chunks = ChunkPlan::of(s, PixelRuns::of(x, s.batch, s.height, s.width), s.out_channels / s.groups);
  const TilePlan t = TilePlan::of(s, chunks, sizeof(Sum<S>), parallel.threads);
  const uint64_t floor = least_key(q.floor), guess = guess_threshold<S>(s, blocked, grad_out, x, q, t, chunks);
  for (uint64_t threshold = guess > floor ? guess : floor;; threshold = floor) {
    BestKeys best(q.k, threshold);
    *q.non_finite = 0;
    if (t.tiles > 0) rank_absent<S>(s, blocked, grad_out, x, q, t, chunks, &best, parallel);
    // A guess that was too high is taken back.
    if (threshold == floor || best.held() >= q.k) return write_best(best, q);
  }
}

void absent_topk(DType dtype, const Conv2dShape& s, const PatternView& blocked, const ImageView& grad_out,
                 const ImageView& x, const TopkQuery& q, const Parallel& parallel) {
  with_stored_type(dtype, [&](auto stored) { best_absent<decltype(stored)>(s, blocked, grad_out, x, q, parallel); });
}

}  // namespace
}  // namespace ILNAS_ISA
}  // namespace ilnas
