// Shared by both kernels of conv_sm90a.cu: arguments, the ring of places in shared memory, and how
// sums become output. For code that is compiled for sm_90a alone.
#pragma once

#include "cuda/conv_schedule.h"
#include "cuda/hopper.cuh"

namespace moe_kernels::sm90a {

using BFloat16 = __nv_bfloat16;

constexpr int kThreads = 3 * kWarpgroup;
constexpr int kMultipliers = 2;  // warpgroups; in the narrow kernel workers of the schedule
constexpr int kMultiplierWarps = kMultipliers * kWarpgroup / kWarp;
constexpr int kSharedBytes = 227 * 1024;
// Three warpgroups share 64 Ki registers; what the copying one does not need goes to the others.
constexpr int kCopyRegisters = 40, kMultiplyRegisters = 232;
// Sums are exchanged between threads in blocks of 64 channels; so many rows are stored by a warp.
constexpr int kStoreColumns = 64;
constexpr int kWideStoreRows = 16, kNarrowStoreRows = 8;

struct Arguments {
  CUtensorMap source, weight, side, side_weight;
  const float* bias;       // [E, O] or null
  const BFloat16* addend;  // [E, P, Q, N, O] or null, like all below
  const BFloat16* activation;
  BFloat16* output;
  ConvSizes sizes;
  Schedule schedule;
  bool relu;
};
static_assert(sizeof(Arguments) <= 4096, "the arguments of a kernel");

// Where the next chunk goes or comes from: a place of the ring and how often it was used before.
template <int kPlaces>
struct Cursor {
  int place = 0;
  unsigned parity = 0;

  __device__ void advance() {
    if (++place == kPlaces) {
      place = 0;
      parity ^= 1;
    }
  }
};

template <typename Shared>
__device__ Shared& shared_memory() {
  unsigned char* raw = dynamic_shared_memory();
  const unsigned address = shared_address(raw);
  const unsigned start = (address + kPatternBytes - 1) / kPatternBytes * kPatternBytes;
  return *reinterpret_cast<Shared*>(raw + (start - address));
}

// The threads of one multiplying warpgroup; barrier 0 is __syncthreads().
__device__ inline void sync_warpgroup(int multiplier) { sync_threads<kWarpgroup>(multiplier + 1); }

// Neighbors of one row stay together in groups of eight; which group is where depends on the row,
// so that the lanes of a warp that write one column meet different banks.
__device__ inline int exchange_place(int row, int column, int twist) {
  return row * kStoreColumns + (column ^ (twist % 4 * 8));
}

__device__ inline float2 to_floats(unsigned pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

// Finishes and stores kRows rows of 64 channels, from `row` and `channel` of the output on, whose
// sums lie in `sums` at exchange_place(row, column, row >> kTwist). All lanes of a warp together:
// eight of them move the 128 bytes of a row.
template <int kRows, int kTwist>
__device__ void store_rows(const Arguments& arguments, const float* sums, int e, Index row,
                           int channel, bool failed) {
  constexpr int kPack = 8, kLanes = kStoreColumns / kPack, kSteps = kRows * kLanes / kWarp;
  const int lane = threadIdx.x % kWarp, O = arguments.sizes.O;
  const int column = lane % kLanes * kPack, first = lane / kLanes;
  const Index start = (row + first) * O + channel + column;
  constexpr int kRowsPerStep = kWarp / kLanes;

  // Before anything waits for them.
  uint4 addend[kSteps] = {}, activation[kSteps] = {};
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const Index place = start + static_cast<Index>(step) * kRowsPerStep * O;
    if (arguments.addend != nullptr) {
      addend[step] = *reinterpret_cast<const uint4*>(arguments.addend + place);
    }
    if (arguments.activation != nullptr) {
      activation[step] = *reinterpret_cast<const uint4*>(arguments.activation + place);
    }
  }
  Pack<float, 4> bias[2] = {};
  if (arguments.bias != nullptr) {
    const float* from = arguments.bias + e * O + channel + column;
    bias[0] = *reinterpret_cast<const Pack<float, 4>*>(from);
    bias[1] = *reinterpret_cast<const Pack<float, 4>*>(from + 4);
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int line = first + step * kRowsPerStep;
    const float* values = sums + exchange_place(line, column, line >> kTwist);
    const unsigned added[4] = {addend[step].x, addend[step].y, addend[step].z, addend[step].w};
    const unsigned active[4] = {activation[step].x, activation[step].y, activation[step].z,
                                activation[step].w};
    Pack<__nv_bfloat162, 4> result;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 more = to_floats(added[i]), gate = to_floats(active[i]);
      float2 value = *reinterpret_cast<const float2*>(values + 2 * i);
      value.x += bias[i / 2].value[i % 2 * 2] + more.x;
      value.y += bias[i / 2].value[i % 2 * 2 + 1] + more.y;
      if (arguments.relu) {
        value.x = maximum(value.x, 0.0f);
        value.y = maximum(value.y, 0.0f);
      }
      if (arguments.activation != nullptr) {
        value.x = gate.x > 0.0f ? value.x : 0.0f;
        value.y = gate.y > 0.0f ? value.y : 0.0f;
      }
      if (failed) value.x = value.y = __int_as_float(0x7fffffff);
      result.value[i] = __floats2bfloat162_rn(value.x, value.y);
    }
    const Index place = start + static_cast<Index>(step) * kRowsPerStep * O;
    *reinterpret_cast<Pack<__nv_bfloat162, 4>*>(arguments.output + place) = result;
  }
}

__device__ inline Index output_row(const ConvSizes& sizes, const Tile& tile) {
  return ((static_cast<Index>(tile.e) * sizes.P + tile.p) * sizes.Q + tile.q) * sizes.N + tile.n;
}

}  // namespace moe_kernels::sm90a
