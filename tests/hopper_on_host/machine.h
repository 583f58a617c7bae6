// Runs kernels for Hopper on one host thread: what they use of CUDA, and machine.cpp behind it.
//
// The test compiles the kernels' own files with this one in front; empty files stand in for CUDA's
// headers, and cuda/hopper_instructions.cuh for the inline assembly.
#pragma once

#include <math.h>
#include <string.h>

#include <cstddef>
#include <cstdint>
#include <functional>

#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __CUDA_ARCH_FEAT_SM90_ALL 1
#define CUDART_VERSION 13000

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  dim3(unsigned x) : x(x) {}
};
extern dim3 threadIdx, blockIdx;  // of the thread that runs

// Numbers -----------------------------------------------------------------------------------------

struct float2 {
  float x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct __half {
  std::uint16_t bits;
};
struct __nv_bfloat16 {
  std::uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }
inline float to_float(__nv_bfloat16 value) { return __uint_as_float(unsigned{value.bits} << 16); }
inline __nv_bfloat16 to_bfloat16(float value) {
  unsigned bits;
  memcpy(&bits, &value, sizeof bits);
  if (value != value) return {0x7fff};
  return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {to_bfloat16(x), to_bfloat16(y)};
}
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }

// Host --------------------------------------------------------------------------------------------

enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorNotSupported = 801
};
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount
};
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum { cudaEnableDefault, cudaFuncAttributeMaxDynamicSharedMemorySize };
enum { cudaLaunchAttributeClusterDimension };
using cudaStream_t = void*;
struct cudaLaunchAttribute {
  int id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  int numAttrs;
};

using cuuint64_t = std::uint64_t;
using cuuint32_t = std::uint32_t;
struct alignas(64) CUtensorMap {
  const unsigned char* matrix;
  std::uint64_t columns, rows, row_bytes;
  std::uint32_t box_columns, box_rows;
  int swizzle;
  unsigned char rest[76];
};
static_assert(sizeof(CUtensorMap) == 128);
enum { CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_INTERLEAVE_NONE, CUDA_SUCCESS = 0 };
enum { CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };
enum { CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_64B = 2, CU_TENSOR_MAP_SWIZZLE_128B };
int cuTensorMapEncodeTiled(CUtensorMap* map, int type, int rank, void* matrix,
                           const cuuint64_t* sizes, const cuuint64_t* strides,
                           const cuuint32_t* box, const cuuint32_t* steps, int interleave,
                           int swizzle, int promotion, int fill);

namespace machine {

extern int multiprocessors;
extern unsigned seed;    // of the order of everything; the same order for the same seed
extern long num_copies;  // so far
// Where kernels started so far; the blocks of the last one's clusters.
int num_kernels();
extern int cluster_blocks;

void launch(const cudaLaunchConfig_t& config, const void* kernel, std::function<void()> body);

// Below: what a thread of a kernel may do. Addresses are those of its block's shared memory.
unsigned char* shared_memory();
unsigned address_of(const void* pointer);
int cluster_rank();
void sync_warp();
void sync_threads(int barrier, int threads);
void sync_cluster();
std::int64_t from_lane(std::int64_t value, int lane);
void init_barrier(unsigned barrier, int arrivals);
void arrive(unsigned barrier, int rank, int bytes);  // which the phase has to wait for
bool phase_ended(unsigned barrier, unsigned parity);
void copy(unsigned to, const CUtensorMap& map, unsigned barrier, int column, int row, int rank);
void multiply(int columns, float* sums, std::uint64_t left, std::uint64_t right);
void commit_products();
void wait_for_products(int pending);

}  // namespace machine

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor   ? 9
           : attribute == cudaDevAttrComputeCapabilityMinor ? 0
                                                            : machine::multiprocessors;
  return cudaSuccess;
}
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, int, int,
                                                    cudaDriverEntryPointQueryResult* found) {
  *function = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, int, int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
template <typename Parameter, typename Argument>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameter),
                               const Argument& argument) {
  machine::launch(*config, reinterpret_cast<const void*>(kernel), [&] { kernel(argument); });
  return cudaSuccess;
}

// Device ------------------------------------------------------------------------------------------

long long clock64();
inline void __syncthreads() { machine::sync_threads(0, 384); }
inline void __syncwarp() { machine::sync_warp(); }
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return static_cast<T>(machine::from_lane(value, lane));
}
float __shfl_xor_sync(unsigned mask, float value, int lanes);  // in code that no test runs
