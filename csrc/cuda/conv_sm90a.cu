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
//   stay in shared memory, and each multiplying warpgroup has its own tiles and its own ring.
//
// Where tiles come in pairs, the wide kernel can also run in clusters of two blocks, which fetch
// what both of them read only once (conv_sm90a_wide.cuh). Whether that is faster has to be
// measured.
//
// All control flow is a function of sizes alone. If a wait gives up (hopper.cuh), copying ends,
// multiplying goes on without waiting, and what it stores is NaN.
#include "cuda/conv_sm90a_narrow.cuh"
#include "cuda/conv_sm90a_wide.cuh"

namespace moe_kernels {
namespace {

using namespace sm90a;

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

// A kernel and the tiles that it is for. A worker of the schedule is a block or a cluster, whose
// tile is that of a block, or twice as large along one axis; two per block in the narrow kernel.
struct Choice {
  Kernel kernel;
  int rows, channels;                // the tile of a block
  int worker_rows, worker_channels;  // the tile of a worker
  double speed;                      // to be expected, as a part of the largest tiles' own
  int shared_bytes;
  bool narrow;

  int blocks() const { return worker_rows / rows * (worker_channels / channels); }
  // Rows of one copy: blocks that have different channels fetch a part of the images each, blocks
  // that have different images a part of the filters.
  int source_box() const { return rows * channels / worker_channels; }
  int filter_box() const { return channels * rows / worker_rows; }
};

// The parameters after the tile of a block: how many of them make the tile of a worker.
template <int kRows, int kChannels, int kDown = 1, int kAcross = 1>
constexpr Choice wide(double speed) {
  static_assert(sizeof(WideShared<kRows, kChannels>) + kPatternBytes <= kSharedBytes);
  return {wide_kernel<kRows, kChannels, kDown * kAcross>,
          kRows,
          kChannels,
          kRows * kDown,
          kChannels * kAcross,
          speed,
          sizeof(WideShared<kRows, kChannels>) + kPatternBytes,
          false};
}

template <int kRows>
constexpr Choice narrow() {
  static_assert(sizeof(NarrowShared<kRows>) + kPatternBytes <= kSharedBytes);
  return {narrow_kernel<kRows>,
          kRows,
          kProductRows,
          kRows,
          kProductRows,
          1.0,
          sizeof(NarrowShared<kRows>) + kPatternBytes,
          true};
}

// In falling order of products per byte read.
constexpr Choice kSingle[] = {wide<128, 256>(1.0), wide<256, 128>(1.0), wide<128, 128>(0.85),
                              wide<128, 64>(0.6)};
constexpr Choice kPairs[] = {wide<128, 256, 2, 1>(1.0), wide<128, 256, 1, 2>(1.0),
                             wide<256, 128, 2, 1>(1.0), wide<128, 128, 2, 1>(0.9),
                             wide<128, 128, 1, 2>(0.9), wide<128, 64, 1, 2>(0.65),
                             wide<128, 64, 2, 1>(0.65)};

// Large tiles read the least; but the last round should not leave most multiprocessors idle. The
// price of a tile is its size over its speed. Null if no tile fits.
template <int kCount>
const Choice* cheapest(const Choice (&choices)[kCount], const ConvSizes& sizes,
                       int multiprocessors) {
  const Choice* best = nullptr;
  double best_price = 0.0;
  for (const Choice& choice : choices) {
    const int rows = choice.worker_rows, channels = choice.worker_channels;
    if (sizes.N % rows != 0 || sizes.O % channels != 0) continue;
    const Index tiles =
        static_cast<Index>(sizes.E) * sizes.P * sizes.Q * (sizes.N / rows) * (sizes.O / channels);
    const int workers = multiprocessors / choice.blocks();
    const double price =
        (tiles + workers - 1) / workers * (choice.rows * choice.channels / choice.speed);
    if (best == nullptr || price < best_price) {
      best = &choice;
      best_price = price;
    }
  }
  return best;
}

Choice choose(const ConvSizes& sizes, int multiprocessors, bool clusters) {
  if (sizes.O == kProductRows && sizes.E <= multiprocessors &&
      sizes.R * sizes.S * sizes.C + sizes.D <= kMaxStationary * kChunk) {
    return sizes.N % 256 == 0 ? narrow<256>() : narrow<128>();
  }
  const Choice* pair =
      clusters && multiprocessors > 1 ? cheapest(kPairs, sizes, multiprocessors) : nullptr;
  return pair != nullptr ? *pair : *cheapest(kSingle, sizes, multiprocessors);
}

}  // namespace

int conv_sm90a(const void* source, const void* weight, const void* side, const void* side_weight,
               const float* bias, const void* addend, const void* activation, void* output,
               ConvSizes sizes, bool relu, bool clusters, int dtype, void* stream) {
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
  const Choice choice = choose(arguments.sizes, multiprocessors, clusters);
  const Index rows = static_cast<Index>(sizes.source_E) * sizes.H * sizes.W * N;
  const Index side_rows = static_cast<Index>(E) * sizes.side_H * sizes.side_W * N;
  const Index filters = static_cast<Index>(E) * O;
  if (!describe(encode, source, rows, C, choice.source_box(), &arguments.source) ||
      !describe(encode, weight, filters, static_cast<Index>(sizes.R) * sizes.S * C,
                choice.filter_box(), &arguments.weight) ||
      (D > 0 &&
       (!describe(encode, side, side_rows, D, choice.source_box(), &arguments.side) ||
        !describe(encode, side_weight, filters, D, choice.filter_box(), &arguments.side_weight)))) {
    return cudaErrorInvalidValue;
  }
  const int workers =
      choice.narrow ? kMultipliers * multiprocessors : multiprocessors / choice.blocks();
  arguments.schedule = schedule_for(arguments.sizes, choice.worker_rows, choice.worker_channels,
                                    workers, choice.narrow);

  if (const cudaError_t error =
          cudaFuncSetAttribute(reinterpret_cast<const void*>(choice.kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, choice.shared_bytes);
      error != cudaSuccess) {
    return error;
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = choice.blocks();
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = choice.narrow ? multiprocessors : workers * choice.blocks();
  config.blockDim = kThreads;
  config.dynamicSmemBytes = choice.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = choice.blocks() > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, choice.kernel, arguments);
}

}  // namespace moe_kernels
