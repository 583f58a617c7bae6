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
