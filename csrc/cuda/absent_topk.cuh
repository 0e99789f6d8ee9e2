// absent_topk: the dense weight gradient is computed tile by tile into a panel of constant size and filtered from
// there; it never exists as a whole.
//
// A candidate's key is |score| (31 bits) << 33 | ~index (32 bits) << 1 | sign: no two are equal, larger is better, and
// ties of |score| go to the lowest index. A pass over all tiles appends the keys not below a threshold to a buffer and
// counts the keys that share a known prefix by their next 11 bits. If the buffer holds at least k keys and all that
// were appended, it is done; otherwise the counts give a better threshold, or one digit more of the k-th key. The
// threshold of the first pass comes from a sample of the tiles. Every pass is enqueued; those after the last one needed
// find the search done and return, so that the host never waits.
#pragma once
#include "cuda/choose_tile.h"
#include "cuda/kernels.h"

namespace ilnas::cuda {

constexpr int kTileRows = 64, kTileCols = 128, kTileSize = kTileRows * kTileCols;
constexpr int64_t kPanelTiles = 256;  // 8 MB: as many blocks as two on every multiprocessor of the largest GPU
constexpr int kDigitBits = 11, kBins = 1 << kDigitBits;
constexpr int kSortBlock = 2048;  // keys; the buffer holds a power of two of such blocks

// The state of the search: 64-bit words, then the counts of kBins digits.
enum TopkWord : int {
  kThreshold,    // keys not below it are appended
  kPrefix,       // the known digits of the k-th key: key >> kPrefixShift
  kPrefixShift,  // 64: none is known
  kAbove,        // keys whose known digits are larger
  kAppended,     // keys not below the threshold; those beyond the buffer's capacity are not kept
  kDone,
  kNonFinite,
  kStateWords,
};

struct TopkState {
  Global<uint64_t> words;
  Global<unsigned> bins;
};

// How the weight gradient [rows, cols] of all groups is cut. A unit is the columns of 1 or, for kernels of more than
// kTileCols taps, several tiles: granularity "kernel" needs whole kernels.
struct TopkTiles {
  int tiles_per_unit, unit_cols;
  int row_tiles, col_units;  // of one group
  int64_t units;             // of all groups
  int splits;                // parts of the positions, each a partial sum in the panel
  int64_t units_per_panel;
};

struct TopkUnit {
  int group, first_row, first_col;
};

__device__ __forceinline__ TopkUnit topk_unit(int64_t unit, const TopkTiles& t) {
  const int col = static_cast<int>(unit % t.col_units), row = static_cast<int>(unit / t.col_units % t.row_tiles);
  return {static_cast<int>(unit / t.col_units / t.row_tiles), row * kTileRows, col * t.unit_cols};
}

// The units of one launch: first, first + step, ...
struct TopkPanel {
  int64_t first, step, count;
};

// panel [count][tiles_per_unit][splits][kTileRows][kTileCols] = partial sums of the weight gradient.
cudaError_t launch_gradient_tiles(DType, const Gather&, const void* grad_out, const void* x, const TopkTiles&,
                                  const TopkPanel&, const uint64_t* state_words, float* panel, cudaStream_t);
// The same for 16-bit types on tensor cores; cudaErrorNotSupported where they do not serve.
cudaError_t launch_gradient_tiles_tensor(DType, const Gather&, const void* grad_out, const void* x, const TopkTiles&,
                                         const TopkPanel&, const uint64_t* state_words, float* panel, cudaStream_t);

}  // namespace ilnas::cuda
