// Host side: which tile a launcher stages.
#pragma once
#include <algorithm>

#include "cuda/image_tile.cuh"

namespace ilnas::cuda {

constexpr int64_t kMaxGrid = int64_t{1} << 30;

inline dim3 grid_of(int64_t tasks) { return dim3(static_cast<unsigned>(std::min(tasks, kMaxGrid))); }

// Half of what a block may have, so that one block computes while another one stages; the rest is for static arrays.
inline int64_t shared_budget(const DeviceLimits& limits) { return limits.shared_bytes_per_block / 2 - 4096; }

constexpr double kSpareWeight = 0.05;

struct TileDemand {
  int images_per_pack, element_bytes;
  int slots;                 // of the tile: packs * height * width
  int rows_per_block;        // rows that read a staged tile
  double reads_per_channel;  // packs that one source channel costs at every slot, all rows of the block together
  double staging_weight;     // the cost of staging a pack, in reads of a pack
  int64_t max_shared_bytes;
  int multiprocessors;  // to keep busy; 1 where enough blocks are sure to follow
};

// 32 bytes of global memory are a sector: a multiprocessor's L1 passes as many as it reads two to four packs of shared
// memory meanwhile.
constexpr double kSectorWeight = 3;

// Sectors read to stage one channel of a tile of NCHW images. It goes by this layout whatever the images' own is: a
// form or a workspace that was made for one call has to serve the next.
inline double staged_sectors(const Gather& g, const TileDemand& demand, int packs, int64_t source_height,
                             int64_t source_width) {
  // A run as wide as the image begins with a row, and its borders are not read; any other begins anywhere.
  const int64_t bytes = demand.element_bytes * std::min<int64_t>(source_width, g.source_width);
  const double sectors = source_width >= g.source_width ? std::max(static_cast<double>(bytes) / 32, 0.5)
                                                        : static_cast<double>(bytes + 32 - demand.element_bytes) / 32;
  return static_cast<double>(source_height * packs * demand.images_per_pack) * sectors;
}

// Whether the images of a pack can be read with one load wherever a tile starts.
inline bool images_are_vectors(const void* data, const Strides& s, int images_per_pack, size_t element_bytes) {
  const int64_t n = images_per_pack;
  return element_bytes * images_per_pack == 16 && s.batch == 1 && s.channel % n == 0 && s.row % n == 0 &&
         s.col % n == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

// Takes the cheapest tile into *best if it costs less than *cost (0: nothing chosen yet), and tells whether it did.
inline bool choose_image_tile(const Gather& g, bool vector_images, const TileDemand& demand, ImageTile* best,
                              double* cost) {
  bool found = false;
  const int64_t class_height = ceil_div(g.height, g.vertical.divisor);
  const int64_t class_width = ceil_div(g.width, g.horizontal.divisor);
  const double row_blocks = static_cast<double>(g.groups) * ceil_div(g.rows_per_group, demand.rows_per_block);
  for (int packs = 1; packs <= demand.slots; packs *= 2)
    for (int height = 1; height <= demand.slots / packs; height *= 2) {
      const int width = demand.slots / packs / height;
      const int64_t source_height = reach(g.vertical, g.kernel_height, height);
      const int64_t source_width = reach(g.horizontal, g.kernel_width, width);
      // An odd number of packs between pixels or channels lets eight neighbours be stored without bank conflicts.
      const int pixel = packs >= 8 ? packs + 1 : packs;
      if (source_height > demand.max_shared_bytes || source_width > demand.max_shared_bytes) continue;
      const int64_t plane = source_height * source_width * pixel | 1;
      if (plane * 16 > demand.max_shared_bytes) continue;
      const int64_t image_blocks = ceil_div(g.batch, int64_t{demand.images_per_pack} * packs);
      const int64_t tiles_y = ceil_div(class_height, height), tiles_x = ceil_div(class_width, width);
      const double tiles =
          static_cast<double>(image_blocks) * tiles_y * tiles_x * g.vertical.divisor * g.horizontal.divisor;
      // Eight threads read eight neighbouring packs at once, unless a stride pulls pixels apart.
      const bool conflicts = demand.images_per_pack == 4 && packs < 8 && (g.horizontal.scale != 1 || width * packs < 8);
      const double reads = demand.reads_per_channel * demand.slots * (conflicts ? 2 : 1);
      const double staged = demand.staging_weight * static_cast<double>(source_height * source_width * packs) +
                            kSectorWeight * staged_sectors(g, demand, packs, source_height, source_width);
      // Fewer blocks than multiprocessors take as long as one; among those the least work is best.
      const double share = row_blocks * tiles / demand.multiprocessors;
      const double total = (reads + staged) * (std::max(share, 1.0) + kSpareWeight * share);
      if (*cost > 0 && total >= *cost) continue;
      found = true;
      *cost = total;
      const int channels =
          static_cast<int>(std::min<int64_t>(g.sources_per_group, demand.max_shared_bytes / (16 * plane)));
      *best = {packs,
               height,
               width,
               static_cast<int>(source_height),
               static_cast<int>(source_width),
               pixel,
               static_cast<int>(plane),
               channels,
               static_cast<int>(tiles_y),
               static_cast<int>(tiles_x),
               image_blocks,
               contiguous_of(g.source),
               vector_images,
               divisor_of(packs),
               divisor_of(source_width),
               divisor_of(source_height),
               divisor_of(channels),
               divisor_of(width)};
    }
  return found;
}

}  // namespace ilnas::cuda
