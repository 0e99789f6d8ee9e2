// A tile of source images in shared memory, batch innermost: [channels][source_height][source_width][packs]. A pack is
// the 16 bytes that four float or eight 16-bit images fill at one pixel, so that a thread reads it with one load, or
// ldmatrix as one row, at any shift of the kernel.
#pragma once
#include "cuda/gather.cuh"

namespace ilnas::cuda {

// Which dimension neighbouring threads walk while staging: the one that is contiguous in memory.
enum class Contiguous : int { kColumns, kChannels, kImages };

inline Contiguous contiguous_of(const Strides& s) {
  if (s.batch == 1) return Contiguous::kImages;
  return s.channel == 1 && s.col != 1 ? Contiguous::kChannels : Contiguous::kColumns;
}

struct ImageTile {
  int packs;                        // a power of two
  int height, width;                // targets of one class (see AxisClass), powers of two
  int source_height, source_width;  // what they reach
  int pixel, plane;                 // packs between neighbouring pixels and channels
  int channels;                     // staged at once
  int tiles_y, tiles_x;             // of one class
  int64_t image_blocks;
  Contiguous order;
  bool vector_images;  // the images of a pack can be read at once
  Divisor by_packs, by_width, by_height, by_channels, by_target_width;
};

inline int64_t tile_bytes(const ImageTile& t) { return int64_t{16} * t.plane * t.channels; }

// One block's work: rows of one group at one tile.
struct TileTask {
  int group, first_row;  // within the group
  int remainder_y, remainder_x, tile_y, tile_x;
  int64_t image_block;
};

__host__ __device__ __forceinline__ int64_t tile_tasks(const Gather& g, const ImageTile& t, int rows_per_block) {
  return int64_t{(g.rows_per_group + rows_per_block - 1) / rows_per_block} * g.groups * t.tiles_y * t.tiles_x *
         g.vertical.divisor * g.horizontal.divisor * t.image_blocks;
}

// Neighbouring tasks read the same images, so that those come from L2.
__device__ __forceinline__ TileTask tile_task(int64_t task, const Gather& g, const ImageTile& t, int rows_per_block) {
  const auto next = [&](int count) {
    const int digit = static_cast<int>(task % count);
    task /= count;
    return digit;
  };
  TileTask d{};
  d.first_row = next((g.rows_per_group + rows_per_block - 1) / rows_per_block) * rows_per_block;
  d.group = next(g.groups);
  d.tile_x = next(t.tiles_x), d.tile_y = next(t.tiles_y);
  d.remainder_x = next(g.horizontal.divisor), d.remainder_y = next(g.vertical.divisor);
  d.image_block = task;
  return d;
}

struct TileItem {
  unsigned channel, pack, y, x;
};

__device__ __forceinline__ TileItem tile_item(unsigned index, const ImageTile& t) {
  TileItem i{};
  if (t.order == Contiguous::kColumns) {
    i.x = index, i.y = split(i.x, t.by_width), i.pack = split(i.y, t.by_height), i.channel = split(i.pack, t.by_packs);
  } else if (t.order == Contiguous::kChannels) {
    i.channel = index, i.x = split(i.channel, t.by_channels), i.y = split(i.x, t.by_width);
    i.pack = split(i.y, t.by_height);
  } else {
    i.pack = index, i.x = split(i.pack, t.by_packs), i.y = split(i.x, t.by_width), i.channel = split(i.y, t.by_height);
  }
  return i;
}

// The images of one pack from `from` on, those from `count` on zero. Float tiles widen.
template <class S>
__device__ __forceinline__ float4 load_float_pack(Global<const S> from, int64_t stride, int64_t count, bool vector) {
  if constexpr (sizeof(S) == 4) {
    if (vector && count >= 4) return load_readonly<float4>(from);
  }
  float4 v = make_float4(0, 0, 0, 0);
  v.x = to_float(load_readonly<S>(from));
  if (count > 1) v.y = to_float(load_readonly<S>(from + stride));
  if (count > 2) v.z = to_float(load_readonly<S>(from + 2 * stride));
  if (count > 3) v.w = to_float(load_readonly<S>(from + 3 * stride));
  return v;
}

template <class S>
__device__ __forceinline__ uint4 load_half_pack(Global<const S> from, int64_t stride, int64_t count, bool vector) {
  if (vector && count >= 8) return load_readonly<uint4>(from);
  uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = 2 * i < count ? load_readonly<uint16_t>(from + 2 * i * stride) : uint16_t{0};
    const uint32_t high = 2 * i + 1 < count ? load_readonly<uint16_t>(from + (2 * i + 1) * stride) : uint16_t{0};
    word[i] = low | high << 16;
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

// Stages `channels` channels from `first_channel` on; what lies outside the source becomes zero. All threads of the
// block take part; the caller puts barriers around it. kImages: images in a pack, 4 (stored as float) or 8 (as S).
template <class S, int kImages>
__device__ __forceinline__ void stage_images(Shared<unsigned char> tile, Global<const S> source, const Gather& g,
                                             const ImageTile& t, int64_t first_image, int first_channel, int channels,
                                             int first_row, int first_col) {
  const unsigned items = static_cast<unsigned>(t.channels * t.packs) * t.source_height * t.source_width;
  for (unsigned index = threadIdx.x; index < items; index += blockDim.x) {
    const TileItem i = tile_item(index, t);
    if (static_cast<int>(i.channel) >= channels) continue;
    const int y = first_row + static_cast<int>(i.y), x = first_col + static_cast<int>(i.x);
    const int64_t image = first_image + int64_t{kImages} * i.pack;
    const bool inside = y >= 0 && y < g.source_height && x >= 0 && x < g.source_width && image < g.batch;
    const Global<const S> from =
        inside
            ? source + (image * g.source.batch + (first_channel + static_cast<int64_t>(i.channel)) * g.source.channel +
                        y * g.source.row + x * g.source.col)
            : source;
    const Shared<unsigned char> to =
        tile + 16 * (i.channel * t.plane + (i.y * t.source_width + i.x) * t.pixel + i.pack);
    if constexpr (kImages == 4)
      store_as<float4>(to, inside ? load_float_pack<S>(from, g.source.batch, g.batch - image, t.vector_images)
                                  : make_float4(0, 0, 0, 0));
    else
      store_as<uint4>(to, inside ? load_half_pack<S>(from, g.source.batch, g.batch - image, t.vector_images)
                                 : make_uint4(0, 0, 0, 0));
  }
}

// A slot is one pack of targets; the tile has packs * height * width of them.
struct Slot {
  int pack, y, x;
};

__device__ __forceinline__ Slot slot_of(unsigned slot, const ImageTile& t) {
  unsigned pack = slot, x = split(pack, t.by_packs);
  const unsigned y = split(x, t.by_target_width);
  return {static_cast<int>(pack), static_cast<int>(y), static_cast<int>(x)};
}

// The pack that tap shift (0, 0) joins to a slot.
__device__ __forceinline__ int pack_of(const Slot& s, const Gather& g, const ImageTile& t) {
  return (s.y * g.vertical.scale * t.source_width + s.x * g.horizontal.scale) * t.pixel + s.pack;
}

}  // namespace ilnas::cuda
