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

struct Launch {
  Kernel kernel;
  int shared_bytes;
};

template <int kRows, int kChannels>
Launch wide(int blocks) {
  constexpr int kBytes = sizeof(WideShared<kRows, kChannels>) + kPatternBytes;
  static_assert(kBytes <= kSharedBytes);
  return {blocks == 1 ? wide_kernel<kRows, kChannels, 1> : wide_kernel<kRows, kChannels, 2>,
          kBytes};
}

template <int kRows>
Launch narrow() {
  constexpr int kBytes = sizeof(NarrowShared<kRows>) + kPatternBytes;
  static_assert(kBytes <= kSharedBytes);
  return {narrow_kernel<kRows>, kBytes};
}

Launch launch_for(const ConvTiles& tiles) {
  if (tiles.narrow) return tiles.rows == 256 ? narrow<256>() : narrow<128>();
  if (tiles.rows == 256) return wide<256, 128>(tiles.blocks());
  if (tiles.channels == 256) return wide<128, 256>(tiles.blocks());
  if (tiles.channels == 128) return wide<128, 128>(tiles.blocks());
  return wide<128, 64>(tiles.blocks());
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
  const ConvTiles tiles = conv_sm90a_tiles(sizes, multiprocessors, clusters);
  const Launch launch = launch_for(tiles);
  // Blocks of a cluster that have channels of their own fetch a part of the images each, blocks
  // that have images of their own a part of the filters.
  const int source_box = tiles.rows * tiles.channels / tiles.worker_channels;
  const int filter_box = tiles.channels * tiles.rows / tiles.worker_rows;
  const Index rows = static_cast<Index>(sizes.source_E) * sizes.H * sizes.W * N;
  const Index side_rows = static_cast<Index>(E) * sizes.side_H * sizes.side_W * N;
  const Index filters = static_cast<Index>(E) * O;
  if (!describe(encode, source, rows, C, source_box, &arguments.source) ||
      !describe(encode, weight, filters, static_cast<Index>(sizes.R) * sizes.S * C, filter_box,
                &arguments.weight) ||
      (D > 0 && (!describe(encode, side, side_rows, D, source_box, &arguments.side) ||
                 !describe(encode, side_weight, filters, D, filter_box, &arguments.side_weight)))) {
    return cudaErrorInvalidValue;
  }
  const int workers =
      tiles.narrow ? kMultipliers * multiprocessors : multiprocessors / tiles.blocks();
  arguments.schedule = schedule_for(arguments.sizes, tiles.worker_rows, tiles.worker_channels,
                                    workers, tiles.narrow);

  if (const cudaError_t error =
          cudaFuncSetAttribute(reinterpret_cast<const void*>(launch.kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared_bytes);
      error != cudaSuccess) {
    return error;
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = tiles.blocks();
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = tiles.narrow ? multiprocessors : workers * tiles.blocks();
  config.blockDim = kThreads;
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = tiles.blocks() > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, launch.kernel, arguments);
}

}  // namespace moe_kernels
