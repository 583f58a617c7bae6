// Shared by all CUDA kernels: warp-wide sums, packed loads, one launch per dtype.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernels.h"

namespace moe_kernels {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

// Butterflies: every lane gets the same bits, in an order that never changes.
__device__ inline float warp_sum(float value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullMask, value, offset);
  }
  return value;
}

__device__ inline float warp_max(float value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kFullMask, value, offset));
  }
  return value;
}

// N elements that move in one load or store.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T value[N];
};

template <typename T, int N>
bool is_aligned(const void* address) {
  return reinterpret_cast<std::uintptr_t>(address) % alignof(Pack<T, N>) == 0;
}

// Calls launch(T{}) with the element type that `dtype` names.
template <typename Launch>
int for_dtype(int dtype, Launch launch) {
  switch (dtype) {
    case kFloat32:
      launch(float{});
      break;
    case kFloat16:
      launch(__half{});
      break;
    case kBFloat16:
      launch(__nv_bfloat16{});
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace moe_kernels
