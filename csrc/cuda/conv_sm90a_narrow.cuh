// The narrow kernel of conv_sm90a.cu, for 64 output channels: the filters of an expert stay in
// shared memory, and each multiplying warpgroup has its own tiles and its own ring.
#pragma once

#include "cuda/conv_sm90a.cuh"

namespace moe_kernels::sm90a {

// Shared memory of the narrow kernel; what TMA writes comes first, see hopper.cuh.
template <int kRows>
struct NarrowShared {
  static constexpr int kPlaces = 64 * 1024 / (kRows * kRowBytes);
  unsigned char filters[kMaxStationary][kNarrowChannels * kRowBytes];
  unsigned char ring[kMultipliers][kPlaces][kRows * kRowBytes];
  float sums[kMultiplierWarps][kNarrowStoreRows * kStoreColumns];
  Barrier full[kMultipliers][kPlaces], empty[kMultipliers][kPlaces], filters_full;
  int failed;
};

// One thread: the filters of this block's expert. One more per multiplying warpgroup: its rows.
template <int kRows>
__device__ void copy_filters(const Arguments& arguments, NarrowShared<kRows>& shared) {
  const ConvSizes& sizes = arguments.sizes;
  Tile tile;
  // Both warpgroups have tiles of this expert, if the first one has any.
  if (!tile_at(sizes, arguments.schedule, kMultipliers * blockIdx.x, 0, &tile)) return;
  const int columns = sizes.R * sizes.S * sizes.C;
  arrive_and_expect(&shared.filters_full, (columns + sizes.D) / kChunk * sizeof(shared.filters[0]));
  int chunk = 0;
  for (int c = 0; c < columns; c += kChunk, ++chunk) {
    copy_box(shared.filters[chunk], &arguments.weight, &shared.filters_full, c, tile.e * sizes.O);
  }
  for (int d = 0; d < sizes.D; d += kChunk, ++chunk) {
    copy_box(shared.filters[chunk], &arguments.side_weight, &shared.filters_full, d,
             tile.e * sizes.O);
  }
}

template <int kRows>
__device__ void copy_narrow(const Arguments& arguments, NarrowShared<kRows>& shared,
                            int multiplier) {
  const ConvSizes& sizes = arguments.sizes;
  const int worker = kMultipliers * blockIdx.x + multiplier;
  Cursor<NarrowShared<kRows>::kPlaces> cursor;
  bool alive = true;
  Tile tile;
  for (int turn = 0; alive && tile_at(sizes, arguments.schedule, worker, turn, &tile); ++turn) {
    for_each_slice(sizes, tile, [&](const Slice& slice) {
      const CUtensorMap* rows = slice.side ? &arguments.side : &arguments.source;
      for (int c = 0; c < slice.channels; c += kChunk) {
        Barrier* full = &shared.full[multiplier][cursor.place];
        alive = alive &&
                wait(&shared.empty[multiplier][cursor.place], cursor.parity ^ 1, &shared.failed);
        if (!alive) return;
        auto& place = shared.ring[multiplier][cursor.place];
        arrive_and_expect(full, sizeof(place));
        copy_box(place, rows, full, c, slice.pixel * sizes.N + tile.n);
        cursor.advance();
      }
    });
  }
}

template <int kRows>
__device__ void multiply_narrow(const Arguments& arguments, NarrowShared<kRows>& shared,
                                int multiplier) {
  constexpr int kWarps = kWarpgroup / kWarp;
  constexpr int kBlockRows =
      kWarps * kNarrowStoreRows;  // images that the warpgroup exchanges at a time
  const ConvSizes& sizes = arguments.sizes;
  const int worker = kMultipliers * blockIdx.x + multiplier;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x % kWarpgroup / kWarp;
  const int side_chunk = sizes.R * sizes.S * sizes.C / kChunk;
  float* exchange = shared.sums[multiplier * kWarps];
  Cursor<NarrowShared<kRows>::kPlaces> cursor;
  bool alive = true;
  Tile tile;
  for (int turn = 0; tile_at(sizes, arguments.schedule, worker, turn, &tile); ++turn) {
    if (turn == 0) alive = wait(&shared.filters_full, 0, &shared.failed);
    float sums[kRows / 2] = {};  // channels x images
    // Bit i: the chunk of the tile that meets chunk i of the filters.
    unsigned meets = 0;
    for_each_slice(sizes, tile, [&](const Slice& slice) {
      const int first = slice.side ? side_chunk : slice.column / kChunk;
      meets |= ((1u << slice.channels / kChunk) - 1) << first;
    });
    int previous = -1;
    for (; meets != 0; meets &= meets - 1) {
      alive = alive && wait(&shared.full[multiplier][cursor.place], cursor.parity, &shared.failed);
      __syncwarp();
      const auto& filters = shared.filters[__ffs(meets) - 1];
      begin_products();
#pragma unroll
      for (int step = 0; step < kChunk / kProductDepth; ++step) {
        multiply<kRows>(sums, matrix(filters, step),
                        matrix(shared.ring[multiplier][cursor.place], step));
      }
      commit_products();
      wait_for_products<1>();
      if (previous >= 0 && lane == 0) arrive(&shared.empty[multiplier][previous]);
      previous = cursor.place;
      cursor.advance();
    }
    wait_for_products<0>();
    if (previous >= 0 && lane == 0) arrive(&shared.empty[multiplier][previous]);

    const bool failed = !alive || *static_cast<volatile int*>(&shared.failed) != 0;
    const Index row = output_row(sizes, tile);
#pragma unroll
    for (int block = 0; block < kRows / kBlockRows; ++block) {
      // The sums of an image are spread over the four warps: each has 16 of its 64 channels.
      sync_warpgroup(multiplier);
#pragma unroll
      for (int at = 0; at < kBlockRows / 2; ++at) {
        const int line = 8 * (at / 4) + 2 * (lane % 4) + at % 2;
        const int channel = 16 * warp + lane / 4 + 8 * (at / 2 % 2);
        const float sum = sums[block * kBlockRows / 2 + at];
        exchange[exchange_place(line, channel, line >> 1)] = sum;
      }
      sync_warpgroup(multiplier);
      store_rows<kNarrowStoreRows, 1>(arguments, exchange + warp * kNarrowStoreRows * kStoreColumns,
                                      tile.e, row + block * kBlockRows + warp * kNarrowStoreRows, 0,
                                      failed);
    }
  }
}

template <int kRows>
__global__ void __launch_bounds__(kThreads, 1)
    narrow_kernel(const __grid_constant__ Arguments arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Shared = NarrowShared<kRows>;
  auto& shared = shared_memory<Shared>();
  if (threadIdx.x == 0) {
    for (int multiplier = 0; multiplier < kMultipliers; ++multiplier) {
      for (int place = 0; place < Shared::kPlaces; ++place) {
        init_barrier(&shared.full[multiplier][place], 1);
        init_barrier(&shared.empty[multiplier][place], kWarpgroup / kWarp);
      }
    }
    init_barrier(&shared.filters_full, 1);
    shared.failed = 0;
    publish_barriers();
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(kFullMask, threadIdx.x / kWarpgroup, 0);
  if (warpgroup == 0) {
    set_registers<kCopyRegisters, false>();
    const int warp = __shfl_sync(kFullMask, threadIdx.x / kWarp, 0);
    if (threadIdx.x % kWarp == 0) {
      if (warp < kMultipliers) copy_narrow<kRows>(arguments, shared, warp);
      if (warp == kMultipliers) copy_filters<kRows>(arguments, shared);
    }
  } else {
    set_registers<kMultiplyRegisters, true>();
    multiply_narrow<kRows>(arguments, shared, warpgroup - 1);
  }
#endif
}

}  // namespace moe_kernels::sm90a
