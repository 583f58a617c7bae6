// CUDA for Hopper: convolution of slabs, and the gradient of its input, by TMA and wgmma.
//
// A block stays on its multiprocessor and computes tile after tile. One of its three warpgroups
// copies: for each chunk of 64 channels, a box of rows of the source and a box of filters, into a
// ring of places in shared memory. The other two multiply what has arrived, add bias, residual and
// the rest, and store. Two kernels share this plan:
//
// - wide: both multiplying warpgroups work on one tile, each on half of its rows (images).
// - narrow, for 64 output channels: a product with 64 columns would wait for shared memory half of
//   the time. So filters are the left matrix and images the right one, the filters of an expert
//   stay in shared memory, and each multiplying warpgroup has tiles and a ring of its own.
//
// All control flow is a function of sizes alone. If a wait gives up (hopper.cuh), copying ends,
// multiplying goes on without waiting, and what it stores is NaN.
#include "cuda/conv_schedule.h"
#include "cuda/hopper.cuh"

namespace moe_kernels {
namespace {

using BFloat16 = __nv_bfloat16;

constexpr int kThreads = 3 * kWarpgroup;
constexpr int kMultipliers = 2;  // warpgroups
constexpr int kMultiplierWarps = kMultipliers * kWarpgroup / kWarp;
constexpr int kSharedBytes = 227 * 1024;
// Three warpgroups share 64 Ki registers; what the copying one does not need goes to the others.
constexpr int kCopyRegisters = 40, kMultiplyRegisters = 232;
// Sums are exchanged between threads in blocks of 64 channels; so many rows are stored by a warp.
constexpr int kStoreColumns = 64;
constexpr int kWideStoreRows = 16, kNarrowStoreRows = 8;
constexpr int kMaxStationary = 10;  // chunks of filters in shared memory: 3 x 3 x 64 and a side

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

template <int kRows>
struct NarrowShared {
  static constexpr int kPlaces = 64 * 1024 / (kRows * kRowBytes);
  unsigned char filters[kMaxStationary][kProductRows * kRowBytes];
  unsigned char ring[kMultipliers][kPlaces][kRows * kRowBytes];
  float sums[kMultiplierWarps][kNarrowStoreRows * kStoreColumns];
  Barrier full[kMultipliers][kPlaces], empty[kMultipliers][kPlaces], filters_full;
  int failed;
};

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
  extern __shared__ unsigned char raw[];
  const unsigned address = shared_address(raw);
  const unsigned start = (address + kPatternBytes - 1) / kPatternBytes * kPatternBytes;
  return *reinterpret_cast<Shared*>(raw + (start - address));
}

template <int kRegisters, bool kMore>
__device__ void set_registers() {
  if constexpr (kMore) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
  }
}

// The threads of one multiplying warpgroup; barrier 0 is __syncthreads().
__device__ inline void sync_warpgroup(int multiplier) {
  asm volatile("bar.sync %0, %1;" ::"r"(multiplier + 1), "n"(kWarpgroup) : "memory");
}

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

// wide --------------------------------------------------------------------------------------------

// One thread: copies all chunks of all tiles of this block, in the order in which they are used.
template <int kRows, int kChannels>
__device__ void copy_wide(const Arguments& arguments, WideShared<kRows, kChannels>& shared) {
  using Shared = WideShared<kRows, kChannels>;
  const ConvSizes& sizes = arguments.sizes;
  Cursor<Shared::kPlaces> cursor;
  bool alive = true;
  Tile tile;
  for (int turn = 0; alive && tile_at(sizes, arguments.schedule, blockIdx.x, turn, &tile); ++turn) {
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
        copy_box(place.source, rows, full, c, slice.pixel * sizes.N + tile.n);
        copy_box(place.filters, filters, full, slice.column + c, tile.e * sizes.O + tile.o);
        cursor.advance();
      }
    });
  }
}

template <int kRows, int kChannels>
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
  for (int turn = 0; tile_at(sizes, arguments.schedule, blockIdx.x, turn, &tile); ++turn) {
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
      if (previous >= 0 && lane == 0) arrive(&shared.empty[previous]);
      previous = cursor.place;
      cursor.advance();
    }
    wait_for_products<0>();
    if (previous >= 0 && lane == 0) arrive(&shared.empty[previous]);

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

template <int kRows, int kChannels>
__global__ void __launch_bounds__(kThreads, 1)
    wide_kernel(const __grid_constant__ Arguments arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Shared = WideShared<kRows, kChannels>;
  auto& shared = shared_memory<Shared>();
  if (threadIdx.x == 0) {
    for (int place = 0; place < Shared::kPlaces; ++place) {
      init_barrier(&shared.full[place], 1);
      init_barrier(&shared.empty[place], kMultiplierWarps);
    }
    shared.failed = 0;
    publish_barriers();
  }
  __syncthreads();
  // Of lane 0, so that the compiler knows it for equal in a warp.
  const int warpgroup = __shfl_sync(kFullMask, threadIdx.x / kWarpgroup, 0);
  if (warpgroup == 0) {
    set_registers<kCopyRegisters, false>();
    if (threadIdx.x == 0) copy_wide<kRows, kChannels>(arguments, shared);
  } else {
    set_registers<kMultiplyRegisters, true>();
    multiply_wide<kRows, kChannels>(arguments, shared, warpgroup - 1);
  }
#endif
}

// narrow ------------------------------------------------------------------------------------------

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

// host --------------------------------------------------------------------------------------------

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, without linking the driver: a machine without one loads this as well.
Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &found);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  const bool usable = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
  return usable ? reinterpret_cast<Encode>(function) : nullptr;
}

// Describes a matrix [rows, columns] to be read in boxes of `box_rows` rows and 64 columns.
bool describe(Encode encode, const void* matrix, Index rows, Index columns, int box_rows,
              CUtensorMap* map) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(columns) * sizeof(BFloat16)};
  const cuuint32_t box[] = {kChunk, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(matrix), sizes, strides,
                box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

using Kernel = void (*)(Arguments);

struct Choice {
  Kernel kernel;
  int rows, channels, shared_bytes;
  bool narrow;
};

template <int kRows, int kChannels>
constexpr Choice wide() {
  static_assert(sizeof(WideShared<kRows, kChannels>) + kPatternBytes <= kSharedBytes);
  return {wide_kernel<kRows, kChannels>, kRows, kChannels,
          sizeof(WideShared<kRows, kChannels>) + kPatternBytes, false};
}

template <int kRows>
constexpr Choice narrow() {
  static_assert(sizeof(NarrowShared<kRows>) + kPatternBytes <= kSharedBytes);
  return {narrow_kernel<kRows>, kRows, kProductRows, sizeof(NarrowShared<kRows>) + kPatternBytes,
          true};
}

// Large tiles read the least; but the last round should not leave most multiprocessors idle.
Choice choose(const ConvSizes& sizes, int multiprocessors) {
  if (sizes.O == kProductRows && sizes.E <= multiprocessors &&
      sizes.R * sizes.S * sizes.C + sizes.D <= kMaxStationary * kChunk) {
    return sizes.N % 256 == 0 ? narrow<256>() : narrow<128>();
  }
  // In falling order of products per byte read; the price of a tile is its size over the speed to
  // be expected of that.
  const Choice choices[] = {wide<128, 256>(), wide<256, 128>(), wide<128, 128>(), wide<128, 64>()};
  const double speeds[] = {1.0, 1.0, 0.85, 0.6};
  Choice best = choices[3];
  double best_price = 0.0;
  for (int i = 0; i < 4; ++i) {
    const Choice& choice = choices[i];
    if (sizes.N % choice.rows != 0 || sizes.O % choice.channels != 0) continue;
    const Index tiles = static_cast<Index>(sizes.E) * sizes.P * sizes.Q * (sizes.N / choice.rows) *
                        (sizes.O / choice.channels);
    const Index rounds = (tiles + multiprocessors - 1) / multiprocessors;
    const double price = rounds * (choice.rows * choice.channels / speeds[i]);
    if (best_price == 0.0 || price < best_price) {
      best = choice;
      best_price = price;
    }
  }
  return best;
}

}  // namespace

int conv_sm90a(const void* source, const void* weight, const void* side, const void* side_weight,
               const float* bias, const void* addend, const void* activation, void* output,
               ConvSizes sizes, bool relu, int dtype, void* stream) {
  const int E = sizes.E, N = sizes.N, C = sizes.C, O = sizes.O, D = sizes.D;
  if (static_cast<Index>(E) * sizes.P * sizes.Q * N * O == 0) return cudaSuccess;
  if (dtype != kBFloat16 || N % 128 != 0 || C % kChunk != 0 || O % kChunk != 0 || D % kChunk != 0) {
    return cudaErrorInvalidValue;
  }
  int device = 0, major = 0, minor = 0, multiprocessors = 0;
  for (const cudaError_t error :
       {cudaGetDevice(&device),
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
        cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device)}) {
    if (error != cudaSuccess) return error;
  }
  if (major != 9 || minor != 0) return cudaErrorNoKernelImageForDevice;
  static const Encode encode = find_encode();
  if (encode == nullptr) return cudaErrorNotSupported;

  Arguments arguments{};
  arguments.bias = bias;
  arguments.addend = static_cast<const BFloat16*>(addend);
  arguments.activation = static_cast<const BFloat16*>(activation);
  arguments.output = static_cast<BFloat16*>(output);
  arguments.relu = relu;
  arguments.sizes = sizes;
  const Choice choice = choose(arguments.sizes, multiprocessors);
  const Index rows = static_cast<Index>(sizes.source_E) * sizes.H * sizes.W * N;
  const Index side_rows = static_cast<Index>(E) * sizes.side_H * sizes.side_W * N;
  const Index filters = static_cast<Index>(E) * O;
  if (!describe(encode, source, rows, C, choice.rows, &arguments.source) ||
      !describe(encode, weight, filters, static_cast<Index>(sizes.R) * sizes.S * C, choice.channels,
                &arguments.weight) ||
      (D > 0 &&
       (!describe(encode, side, side_rows, D, choice.rows, &arguments.side) ||
        !describe(encode, side_weight, filters, D, choice.channels, &arguments.side_weight)))) {
    return cudaErrorInvalidValue;
  }
  const int workers = choice.narrow ? kMultipliers * multiprocessors : multiprocessors;
  arguments.schedule =
      make_schedule(arguments.sizes, choice.rows, choice.channels, workers, choice.narrow);

  if (const cudaError_t error =
          cudaFuncSetAttribute(reinterpret_cast<const void*>(choice.kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, choice.shared_bytes);
      error != cudaSuccess) {
    return error;
  }
  choice.kernel<<<multiprocessors, kThreads, choice.shared_bytes,
                  static_cast<cudaStream_t>(stream)>>>(arguments);
  return cudaGetLastError();
}

}  // namespace moe_kernels
