// The wide kernel of conv_sm90a.cu: both multiplying warpgroups work on one tile.
//
// With kBlocks = 2 the two blocks of a cluster work side by side on a tile of twice the size, which
// is one tile to the schedule. Half of what they read is the same for both: the filters if they
// share out the images, the images if they share out the channels. Each block fetches one half of
// that, and the copy goes to both. So a place of the ring is empty when the multipliers of both
// blocks have read it, and no block ends before the other, whose copies and arrivals it receives.
#pragma once

#include "cuda/conv_sm90a.cuh"

namespace moe_kernels::sm90a {

// Shared memory of the wide kernel; what TMA writes comes first, see hopper.cuh.
template <int kRows, int kChannels>
struct WideShared {
  static constexpr int kPlaceBytes = (kRows + kChannels) * kRowBytes;
  static constexpr int kPlaces = 192 * 1024 / kPlaceBytes;
  struct Place {
    unsigned char source[kRows * kRowBytes], filters[kChannels * kRowBytes];
  };
  Place ring[kPlaces];
  float sums[kMultiplierWarps][kWideStoreRows * kStoreColumns];
  Barrier full[kPlaces], empty[kPlaces];
  int failed;
};

// Whether the blocks of a cluster have images of their own and the same filters.
template <int kRows>
__device__ bool shares_filters(const Arguments& arguments) {
  return arguments.schedule.tile_rows > kRows;
}

// The tile of this block's turn number `turn`; false when it has no more.
template <int kRows, int kChannels, int kBlocks>
__device__ bool wide_tile_at(const Arguments& arguments, int turn, Tile* tile) {
  const ConvSizes& sizes = arguments.sizes;
  if constexpr (kBlocks == 1) {
    return tile_at(sizes, arguments.schedule, blockIdx.x, turn, tile);
  } else {
    if (!tile_at(sizes, arguments.schedule, blockIdx.x / kBlocks, turn, tile)) return false;
    if (shares_filters<kRows>(arguments)) {
      tile->n += cluster_rank() * kRows;
    } else {
      tile->o += cluster_rank() * kChannels;
    }
    return true;
  }
}

// A place of the ring of both blocks: what is not shared, and one half of what is.
template <int kRows, int kChannels, typename Place>
__device__ void copy_to_cluster(const Arguments& arguments, Place& place, Barrier* full,
                                const CUtensorMap* rows, int column, int row,
                                const CUtensorMap* filters, int filter_column, int filter_row) {
  if (shares_filters<kRows>(arguments)) {
    const int first = cluster_rank() * (kChannels / 2);
    copy_box(place.source, rows, full, column, row);
    copy_box_to_both(place.filters + first * kRowBytes, filters, full, filter_column,
                     filter_row + first);
  } else {
    const int first = cluster_rank() * (kRows / 2);
    copy_box_to_both(place.source + first * kRowBytes, rows, full, column, row + first);
    copy_box(place.filters, filters, full, filter_column, filter_row);
  }
}

// Frees a place that all lanes of this warp have read, in each block that fills it. A warp that
// has given up frees nothing: it did not wait, so that the other block may still need the place.
template <int kBlocks>
__device__ void free_place(Barrier* empty, int lane, bool alive) {
  if constexpr (kBlocks == 1) {
    if (lane == 0) arrive(empty);
  } else if (alive && lane < kBlocks) {
    arrive_at(empty, lane);
  }
}

// One thread: copies all chunks of all tiles of this block, in the order in which they are used.
template <int kRows, int kChannels, int kBlocks>
__device__ void copy_wide(const Arguments& arguments, WideShared<kRows, kChannels>& shared) {
  using Shared = WideShared<kRows, kChannels>;
  const ConvSizes& sizes = arguments.sizes;
  Cursor<Shared::kPlaces> cursor;
  bool alive = true;
  Tile tile;
  for (int turn = 0; alive && wide_tile_at<kRows, kChannels, kBlocks>(arguments, turn, &tile);
       ++turn) {
    for_each_slice(sizes, tile, [&](const Slice& slice) {
      const CUtensorMap* rows = slice.side ? &arguments.side : &arguments.source;
      const CUtensorMap* filters = slice.side ? &arguments.side_weight : &arguments.weight;
      for (int c = 0; c < slice.channels; c += kChunk) {
        Barrier* full = &shared.full[cursor.place];
        // A place is empty from the start: the phase before the first counts as ended.
        alive = alive && wait(&shared.empty[cursor.place], cursor.parity ^ 1, &shared.failed);
        if (!alive) return;
        auto& place = shared.ring[cursor.place];
        arrive_and_expect(full, Shared::kPlaceBytes);
        if constexpr (kBlocks == 1) {
          copy_box(place.source, rows, full, c, slice.pixel * sizes.N + tile.n);
          copy_box(place.filters, filters, full, slice.column + c, tile.e * sizes.O + tile.o);
        } else {
          copy_to_cluster<kRows, kChannels>(arguments, place, full, rows, c,
                                            slice.pixel * sizes.N + tile.n, filters,
                                            slice.column + c, tile.e * sizes.O + tile.o);
        }
        cursor.advance();
      }
    });
  }
}

template <int kRows, int kChannels, int kBlocks>
__device__ void multiply_wide(const Arguments& arguments, WideShared<kRows, kChannels>& shared,
                              int multiplier) {
  using Shared = WideShared<kRows, kChannels>;
  constexpr int kHalf = kRows / kMultipliers;      // rows of this warpgroup
  constexpr int kProducts = kHalf / kProductRows;  // products stacked on each other
  const ConvSizes& sizes = arguments.sizes;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x % kWarpgroup / kWarp;
  float* exchange = shared.sums[multiplier * (kWarpgroup / kWarp) + warp];
  Cursor<Shared::kPlaces> cursor;
  bool alive = true;
  Tile tile;
  for (int turn = 0; wide_tile_at<kRows, kChannels, kBlocks>(arguments, turn, &tile); ++turn) {
    const int chunks = num_chunks(sizes, tile);
    float sums[kProducts][kChannels / 2] = {};
    int previous = -1;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      alive = alive && wait(&shared.full[cursor.place], cursor.parity, &shared.failed);
      __syncwarp();
      const auto& place = shared.ring[cursor.place];
      begin_products();
#pragma unroll
      for (int step = 0; step < kChunk / kProductDepth; ++step) {
#pragma unroll
        for (int i = 0; i < kProducts; ++i) {
          const int row = multiplier * kHalf + i * kProductRows;
          multiply<kChannels>(sums[i], matrix(place.source + row * kRowBytes, step),
                              matrix(place.filters, step));
        }
      }
      commit_products();
      // The chunk before this one has been read by now, so that its place can be filled again.
      wait_for_products<1>();
      if (previous >= 0) free_place<kBlocks>(&shared.empty[previous], lane, alive);
      previous = cursor.place;
      cursor.advance();
    }
    wait_for_products<0>();
    if (previous >= 0) free_place<kBlocks>(&shared.empty[previous], lane, alive);

    const bool failed = !alive || *static_cast<volatile int*>(&shared.failed) != 0;
    const Index row = output_row(sizes, tile) + multiplier * kHalf + warp * kWideStoreRows;
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
#pragma unroll
      for (int block = 0; block < kChannels / kStoreColumns; ++block) {
        __syncwarp();
#pragma unroll
        for (int j = 0; j < kStoreColumns / 8; ++j) {
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const int line = lane / 4 + 8 * k, at = 4 * (block * kStoreColumns / 8 + j) + 2 * k;
            const float2 pair = {sums[i][at], sums[i][at + 1]};
            const int column = 8 * j + 2 * (lane % 4);
            *reinterpret_cast<float2*>(exchange + exchange_place(line, column, line)) = pair;
          }
        }
        __syncwarp();
        store_rows<kWideStoreRows, 0>(arguments, exchange, tile.e, row + i * kProductRows,
                                      tile.o + block * kStoreColumns, failed);
      }
    }
  }
}

template <int kRows, int kChannels, int kBlocks>
__global__ void __launch_bounds__(kThreads, 1)
    wide_kernel(const __grid_constant__ Arguments arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Shared = WideShared<kRows, kChannels>;
  auto& shared = shared_memory<Shared>();
  if (threadIdx.x == 0) {
    for (int place = 0; place < Shared::kPlaces; ++place) {
      init_barrier(&shared.full[place], 1);
      init_barrier(&shared.empty[place], kBlocks * kMultiplierWarps);
    }
    shared.failed = 0;
    publish_barriers();
  }
  if constexpr (kBlocks == 1) {
    __syncthreads();
  } else {
    sync_cluster();
  }
  // Of lane 0, so that the compiler knows it for equal in a warp.
  const int warpgroup = __shfl_sync(kFullMask, threadIdx.x / kWarpgroup, 0);
  if (warpgroup == 0) {
    set_registers<kCopyRegisters, false>();
    if (threadIdx.x == 0) copy_wide<kRows, kChannels, kBlocks>(arguments, shared);
  } else {
    set_registers<kMultiplyRegisters, true>();
    multiply_wide<kRows, kChannels, kBlocks>(arguments, shared, warpgroup - 1);
  }
  if constexpr (kBlocks > 1) sync_cluster();
#endif
}

}  // namespace moe_kernels::sm90a
