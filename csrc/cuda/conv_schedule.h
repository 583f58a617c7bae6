// The work of a convolution of slabs and its order: shared by the CUDA kernel and by an emulation
// on the CPU, so that tests reach it without a GPU.
//
// A tile is a block of images x a block of output channels at one output pixel of one expert. It
// sums over slices: filter taps that meet a source pixel, and the side convolution. For one slice
// the rows of the source are a block of N images at one pixel, which lie together in a slab; the
// rows of the filters are a block of output channels. What falls on padding is no slice at all.
//
// The gradient of the input is the same sum: `source` is the gradient of the output, `O` counts the
// channels of the input, and the taps that meet pixel h are those r that took h to an output pixel.
#pragma once

#include "kernels.h"

namespace moe_kernels {

constexpr int kChunk = 64;           // channels that are multiplied at a time
constexpr int kNarrowChannels = 64;  // of the output, in the narrow kernel
constexpr int kMaxStationary = 10;   // its chunks of filters: 3 x 3 x 64 and a side
constexpr int kMaxSorted = 1024;     // pixels whose order fits into the arguments of a kernel

// Columns [column, column + channels) of the filters' rows times those of a pixel of the source.
struct Slice {
  bool side;
  int pixel;  // e * H * W + h * W + w of the source, or of the side
  int column;
  int channels;
};

struct Tile {
  int e, p, q, n, o;
};

// Who computes which tile, and when. Workers take turns over the list of tiles. With `by_expert`
// a worker belongs to one expert and takes turns with the others of that expert; workers 2 i and
// 2 i + 1 belong to the same one, so that they may share its filters.
struct Schedule {
  int tile_rows, tile_channels;  // images and output channels of a tile
  int num_workers;
  bool by_expert;          // then num_workers is even and at least 2 E
  bool experts_outermost;  // else the pixels are; both orders visit pixels as `sorted` says
  int num_sorted;          // P * Q, or 0: in plain order
  std::uint16_t sorted[kMaxSorted];  // pixels p * Q + q by falling number of slices
};

// Along one axis, the source pixel that tap `offset` (tap - padding) takes to `position`; -1: none.
MOE_KERNELS_HOST_DEVICE inline int source_of(int position, int offset, int stride, int size,
                                             bool input_grad) {
  int source = input_grad ? position - offset : position * stride + offset;
  if (input_grad && source >= 0) {
    if (source % stride != 0) return -1;
    source /= stride;
  }
  return source < size ? source : -1;
}

template <typename Visit>
MOE_KERNELS_HOST_DEVICE inline void for_each_slice(const ConvSizes& sizes, const Tile& tile,
                                                   Visit visit) {
  const int source_e = sizes.source_E == 1 ? 0 : tile.e;
  for (int r = 0; r < sizes.R; ++r) {
    const int h = source_of(tile.p, r - sizes.padding, sizes.stride, sizes.H, sizes.input_grad);
    if (h < 0) continue;
    for (int s = 0; s < sizes.S; ++s) {
      const int w = source_of(tile.q, s - sizes.padding, sizes.stride, sizes.W, sizes.input_grad);
      if (w < 0) continue;
      visit(Slice{false, (source_e * sizes.H + h) * sizes.W + w, (r * sizes.S + s) * sizes.C,
                  sizes.C});
    }
  }
  if (sizes.D == 0) return;
  const int h = source_of(tile.p, 0, sizes.side_stride, sizes.side_H, sizes.input_grad);
  const int w = source_of(tile.q, 0, sizes.side_stride, sizes.side_W, sizes.input_grad);
  if (h < 0 || w < 0) return;
  visit(Slice{true, (tile.e * sizes.side_H + h) * sizes.side_W + w, 0, sizes.D});
}

// Chunks of a tile; may be none.
MOE_KERNELS_HOST_DEVICE inline int num_chunks(const ConvSizes& sizes, const Tile& tile) {
  int chunks = 0;
  for_each_slice(sizes, tile, [&](const Slice& slice) { chunks += slice.channels / kChunk; });
  return chunks;
}

// The tile of a worker's turn number `turn`; false when it has no more.
MOE_KERNELS_HOST_DEVICE inline bool tile_at(const ConvSizes& sizes, const Schedule& schedule,
                                            int worker, int turn, Tile* tile) {
  int first = 0, colleagues = schedule.num_workers, experts = sizes.E, e = 0;
  if (schedule.by_expert) {
    // Expert e has the pairs with pair * E / pairs = e.
    const int pairs = schedule.num_workers / 2;
    e = worker / 2 * sizes.E / pairs;
    first = (e * pairs + sizes.E - 1) / sizes.E * 2;
    colleagues = ((e + 1) * pairs + sizes.E - 1) / sizes.E * 2 - first;
    experts = 1;
  }
  const int pixels = sizes.P * sizes.Q, blocks_n = sizes.N / schedule.tile_rows;
  const int blocks_o = sizes.O / schedule.tile_channels;
  // There and back again: who gets one of the longest tiles first gets one of the shortest next.
  const int place = turn % 2 == 0 ? worker - first : colleagues - 1 - (worker - first);
  Index index = static_cast<Index>(turn) * colleagues + place;
  if (index >= static_cast<Index>(experts) * pixels * blocks_n * blocks_o) return false;

  // Tiles that read the same rows are neighbors, so that these come from the L2 cache.
  tile->o = static_cast<int>(index % blocks_o) * schedule.tile_channels;
  index /= blocks_o;
  int pixel;
  if (schedule.experts_outermost) {
    pixel = static_cast<int>(index % pixels);
    index /= pixels;
    tile->n = static_cast<int>(index % blocks_n) * schedule.tile_rows;
    e += static_cast<int>(index / blocks_n);
  } else {
    tile->n = static_cast<int>(index % blocks_n) * schedule.tile_rows;
    index /= blocks_n;
    e += static_cast<int>(index % experts);
    pixel = static_cast<int>(index / experts);
  }
  if (schedule.num_sorted > 0) pixel = schedule.sorted[pixel];
  tile->e = e;
  tile->p = pixel / sizes.Q;
  tile->q = pixel % sizes.Q;
  return true;
}

// Everything but the shape of the tiles, which has to divide N and O, and who works.
Schedule make_schedule(const ConvSizes& sizes, int tile_rows, int tile_channels, int num_workers,
                       bool by_expert);

// The same, made at the first call with these numbers and kept: sorting the pixels takes longer
// than a launch, and a process meets few sizes. From any thread.
const Schedule& schedule_for(const ConvSizes& sizes, int tile_rows, int tile_channels,
                             int num_workers, bool by_expert);

}  // namespace moe_kernels
