// CPU: tiles and order of work of a convolution of slabs, and the convolution itself in that order
// by plain loops. Slow: it is there to prove the schedule of the CUDA kernel.
#include "cuda/conv_schedule.h"

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

namespace moe_kernels {

namespace {

// The tile of a worker of the wide kernel. `speed` is to be expected, as a part of the largest
// tiles' own: what is limited by reading gains from a cluster.
struct Candidate {
  ConvTiles tiles;
  double speed;
};

// In falling order of products per byte read.
constexpr Candidate kSingle[] = {{{128, 256, 128, 256, false}, 1.0},
                                 {{256, 128, 256, 128, false}, 1.0},
                                 {{128, 128, 128, 128, false}, 0.85},
                                 {{128, 64, 128, 64, false}, 0.6}};
constexpr Candidate kClusters[] = {
    {{128, 256, 256, 256, false}, 1.0}, {{128, 256, 128, 512, false}, 1.0},
    {{256, 128, 512, 128, false}, 1.0}, {{128, 128, 256, 128, false}, 0.9},
    {{128, 128, 128, 256, false}, 0.9}, {{128, 64, 128, 128, false}, 0.65},
    {{128, 64, 256, 64, false}, 0.65}};

// Large tiles read the least; but the last round should not leave most multiprocessors idle. The
// price of a tile is its size over its speed. Null if no tile fits.
template <int kCount>
const ConvTiles* cheapest(const Candidate (&candidates)[kCount], const ConvSizes& sizes,
                          int multiprocessors) {
  const ConvTiles* best = nullptr;
  double best_price = 0.0;
  for (const auto& [tiles, speed] : candidates) {
    if (sizes.N % tiles.worker_rows != 0 || sizes.O % tiles.worker_channels != 0) continue;
    const Index count = static_cast<Index>(sizes.E) * sizes.P * sizes.Q *
                        (sizes.N / tiles.worker_rows) * (sizes.O / tiles.worker_channels);
    const int workers = multiprocessors / tiles.blocks();
    const double price = (count + workers - 1) / workers * (tiles.rows * tiles.channels / speed);
    if (best == nullptr || price < best_price) {
      best = &tiles;
      best_price = price;
    }
  }
  return best;
}

}  // namespace

ConvTiles conv_sm90a_tiles(const ConvSizes& sizes, int multiprocessors, bool clusters) {
  if (sizes.O == kNarrowChannels && sizes.E <= multiprocessors &&
      sizes.R * sizes.S * sizes.C + sizes.D <= kMaxStationary * kChunk) {
    const int rows = sizes.N % 256 == 0 ? 256 : 128;
    return {rows, kNarrowChannels, rows, kNarrowChannels, true};
  }
  const ConvTiles* found = nullptr;
  if (clusters && multiprocessors > 1) found = cheapest(kClusters, sizes, multiprocessors);
  return found != nullptr ? *found : *cheapest(kSingle, sizes, multiprocessors);
}

// Workers that have many tiles end at about the same time in any order.
constexpr Index kManyTurns = 16;

Schedule make_schedule(const ConvSizes& sizes, int tile_rows, int tile_channels, int num_workers,
                       bool by_expert) {
  Schedule schedule{};
  schedule.tile_rows = tile_rows;
  schedule.tile_channels = tile_channels;
  schedule.num_workers = num_workers;
  schedule.by_expert = by_expert;
  const int pixels = sizes.P * sizes.Q;
  const Index tiles =
      static_cast<Index>(sizes.E) * pixels * (sizes.N / tile_rows) * (sizes.O / tile_channels);
  // One expert after the other keeps what is read in the L2 cache.
  schedule.experts_outermost = by_expert || tiles >= kManyTurns * num_workers;
  if (pixels > kMaxSorted) return schedule;
  schedule.num_sorted = pixels;
  std::vector<int> chunks(pixels);
  for (int pixel = 0; pixel < pixels; ++pixel) {
    chunks[pixel] = num_chunks(sizes, Tile{0, pixel / sizes.Q, pixel % sizes.Q, 0, 0});
    schedule.sorted[pixel] = static_cast<std::uint16_t>(pixel);
  }
  std::stable_sort(schedule.sorted, schedule.sorted + pixels,
                   [&](int a, int b) { return chunks[a] > chunks[b]; });
  return schedule;
}

const Schedule& schedule_for(const ConvSizes& sizes, int tile_rows, int tile_channels,
                             int num_workers, bool by_expert) {
  using Key = std::pair<std::array<int, 21>, std::array<int, 4>>;
  static std::mutex mutex;
  static std::map<Key, Schedule> known;
  const auto& [E, P, Q, N, O, source_E, H, W, C, R, S, stride, padding, side_H, side_W, D,
               side_stride, input_grad, groups, channels, outputs] = sizes;
  const Key key = {
      {E,      P,       Q,      N,      O, source_E,    H,          W,      C,        R,      S,
       stride, padding, side_H, side_W, D, side_stride, input_grad, groups, channels, outputs},
      {tile_rows, tile_channels, num_workers, by_expert}};
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = known.find(key);
  if (found == known.end()) {
    found =
        known.emplace(key, make_schedule(sizes, tile_rows, tile_channels, num_workers, by_expert))
            .first;
  }
  return found->second;
}

namespace {

// One tile into `total` [tile_rows, tile_channels]; returns how many chunks it took.
int add_slices(const ConvSizes& sizes, const Schedule& schedule, const Tile& tile,
               const float* source, const float* weight, const float* side,
               const float* side_weight, float* total) {
  int chunks = 0;
  for_each_slice(sizes, tile, [&](const Slice& slice) {
    const Index channels = slice.channels;
    const Index columns = slice.side ? sizes.D : static_cast<Index>(sizes.R) * sizes.S * sizes.C;
    const float* rows = (slice.side ? side : source) +
                        (static_cast<Index>(slice.pixel) * sizes.N + tile.n) * channels;
    const float* filters = (slice.side ? side_weight : weight) +
                           (static_cast<Index>(tile.e) * sizes.O + tile.o) * columns + slice.column;
    for (int c0 = 0; c0 < slice.channels; c0 += kChunk, ++chunks) {
      for (int n = 0; n < schedule.tile_rows; ++n) {
        for (int o = 0; o < schedule.tile_channels; ++o) {
          float sum = 0.0f;
          for (int c = c0; c < c0 + kChunk; ++c) {
            sum += rows[n * channels + c] * filters[o * columns + c];
          }
          total[n * schedule.tile_channels + o] += sum;
        }
      }
    }
  });
  return chunks;
}

}  // namespace

Index conv_by_schedule(const float* source, const float* weight, const float* side,
                       const float* side_weight, const float* bias, const float* addend,
                       const float* activation, float* output, ConvSizes sizes, bool relu,
                       int tile_rows, int tile_channels, int num_workers, bool by_expert) {
  const Schedule& schedule = schedule_for(sizes, tile_rows, tile_channels, num_workers, by_expert);
  std::vector<float> total(static_cast<std::size_t>(tile_rows) * tile_channels);
  Index tiles = 0;
  for (int worker = 0; worker < num_workers; ++worker) {
    Tile tile;
    for (int turn = 0; tile_at(sizes, schedule, worker, turn, &tile); ++turn, ++tiles) {
      std::fill(total.begin(), total.end(), 0.0f);
      const int chunks =
          add_slices(sizes, schedule, tile, source, weight, side, side_weight, total.data());
      if (chunks != num_chunks(sizes, tile)) return -1;
      const Index row =
          ((static_cast<Index>(tile.e) * sizes.P + tile.p) * sizes.Q + tile.q) * sizes.N + tile.n;
      for (int n = 0; n < tile_rows; ++n) {
        for (int o = 0; o < tile_channels; ++o) {
          const Index place = (row + n) * sizes.O + tile.o + o;
          float value = total[n * tile_channels + o];
          if (bias != nullptr) value += bias[tile.e * sizes.O + tile.o + o];
          if (addend != nullptr) value += addend[place];
          if (relu) value = maximum(value, 0.0f);
          if (activation != nullptr && !(activation[place] > 0.0f)) value = 0.0f;
          output[place] = value;
        }
      }
    }
  }
  return tiles;
}

}  // namespace moe_kernels
