// CUDA: one L-inf attack step. Compiled with -fmad=false, see step_pixel in kernels.h.
#include "cuda/common.cuh"

namespace moe_kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kPack = 4;  // float32: 16 bytes, the widest load

// Each thread takes N neighbors of the flat batch; they may belong to two images, or to N.
template <typename T, int N>
__global__ void step_kernel(float* adversarial, const T* grad, const float* images,
                            const float* epsilon, const float* step_size, Index total, Index P,
                            float low, float high) {
  const Index first = (static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (first >= total) return;
  Index b = first / P;
  if (first + N > total) {
    for (Index i = first; i < total; ++i) {
      b = i / P;
      adversarial[i] = step_pixel(adversarial[i], static_cast<float>(grad[i]), images[i],
                                  epsilon[b], step_size[b], low, high);
    }
    return;
  }
  auto& pixels = *reinterpret_cast<Pack<float, N>*>(adversarial + first);
  const auto direction = *reinterpret_cast<const Pack<T, N>*>(grad + first);
  const auto centers = *reinterpret_cast<const Pack<float, N>*>(images + first);
  Pack<float, N> result = pixels;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    while (first + j >= (b + 1) * P) ++b;
    result.value[j] = step_pixel(result.value[j], static_cast<float>(direction.value[j]),
                                 centers.value[j], epsilon[b], step_size[b], low, high);
  }
  pixels = result;
}

}  // namespace

int linf_step_cuda(float* adversarial, const void* grad, const float* images, const float* epsilon,
                   const float* step_size, Index B, Index P, float low, float high, int dtype,
                   void* stream) {
  const Index total = B * P;
  if (total == 0) return cudaSuccess;
  return for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const bool packed = is_aligned<float, kPack>(adversarial) && is_aligned<T, kPack>(grad) &&
                        is_aligned<float, kPack>(images);
    const Index per_block = kThreads * (packed ? kPack : 1);
    const auto blocks = static_cast<unsigned>((total + per_block - 1) / per_block);
    const auto kernel = packed ? step_kernel<T, kPack> : step_kernel<T, 1>;
    kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        adversarial, static_cast<const T*>(grad), images, epsilon, step_size, total, P, low, high);
  });
}

}  // namespace moe_kernels
