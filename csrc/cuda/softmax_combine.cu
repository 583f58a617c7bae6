// CUDA: gate softmax x expert logits, its gradients, and both fused with cross-entropy.
// The formulas are in softmax_combine.cpp. One warp per image; sums in float32, in a fixed order.
#include <cfloat>

#include "cuda/common.cuh"

namespace moe_kernels {
namespace {

constexpr int kWarpsPerBlock = 4;

// A warp's image and its part of the block's shared memory.
struct Warp {
  int lane;
  Index image;
  float* scratch;

  __device__ explicit Warp(Index floats) {
    extern __shared__ float shared[];
    const int warp = threadIdx.x / kWarp;
    lane = threadIdx.x % kWarp;
    image = static_cast<Index>(blockIdx.x) * (blockDim.x / kWarp) + warp;
    scratch = shared + warp * floats;
  }
};

template <typename T>
__device__ void softmax(const T* gate_logits, float* weights, Index E, int lane) {
  float max = -INFINITY;
  for (Index e = lane; e < E; e += kWarp) max = fmaxf(max, static_cast<float>(gate_logits[e]));
  max = warp_max(max);
  float sum = 0.0f;
  for (Index e = lane; e < E; e += kWarp) {
    weights[e] = expf(static_cast<float>(gate_logits[e]) - max);
    sum += weights[e];
  }
  sum = warp_sum(sum);
  for (Index e = lane; e < E; e += kWarp) weights[e] /= sum;
  __syncwarp();
}

// One combined logit; `expert_logits` points to its element of the first expert.
template <typename T>
__device__ float combine(const float* weights, const T* expert_logits, Index E, Index stride) {
  float logit = 0.0f;
  for (Index e = 0; e < E; ++e) {
    logit += weights[e] * static_cast<float>(expert_logits[e * stride]);
  }
  return logit;
}

// From s[e] in shared memory; what sums over E sees is what every lane subtracts from.
template <typename T>
__device__ void gate_gradient(const float* weights, const float* s, T* grad_gate_logits, Index E,
                              int lane) {
  __syncwarp();
  float mean = 0.0f;
  for (Index e = lane; e < E; e += kWarp) mean += weights[e] * s[e];
  mean = warp_sum(mean);
  for (Index e = lane; e < E; e += kWarp) {
    grad_gate_logits[e] = static_cast<T>(weights[e] * (s[e] - mean));
  }
}

template <typename T>
__global__ void forward_kernel(const T* gate_logits, const T* expert_logits, T* logits, Index B,
                               Index E, Index K) {
  const Warp warp(E);
  const Index b = warp.image;
  if (b >= B) return;  // whole warps leave: the warp-wide sums of the others stay complete
  float* weights = warp.scratch;
  softmax(gate_logits + b * E, weights, E, warp.lane);
  for (Index k = warp.lane; k < K; k += kWarp) {
    logits[b * K + k] = static_cast<T>(combine(weights, expert_logits + b * K + k, E, B * K));
  }
}

template <typename T>
__global__ void backward_kernel(const T* grad_logits, const T* gate_logits, const T* expert_logits,
                                T* grad_gate_logits, T* grad_expert_logits, Index B, Index E,
                                Index K) {
  const Warp warp(2 * E);
  const Index b = warp.image;
  if (b >= B) return;
  float *weights = warp.scratch, *s = warp.scratch + E;
  softmax(gate_logits + b * E, weights, E, warp.lane);
  for (Index e = 0; e < E; ++e) {
    float partial = 0.0f;
    for (Index k = warp.lane; k < K; k += kWarp) {
      const Index i = (e * B + b) * K + k;
      const float d = static_cast<float>(grad_logits[b * K + k]);
      partial += d * static_cast<float>(expert_logits[i]);
      grad_expert_logits[i] = static_cast<T>(weights[e] * d);
    }
    partial = warp_sum(partial);
    if (warp.lane == 0) s[e] = partial;
  }
  gate_gradient(weights, s, grad_gate_logits + b * E, E, warp.lane);
}

template <typename T>
__global__ void cross_entropy_kernel(const T* gate_logits, const T* expert_logits,
                                     const std::int64_t* labels, float* loss, T* grad_gate_logits,
                                     T* grad_expert_logits, Index B, Index E, Index K) {
  const Warp warp(2 * E);
  const Index b = warp.image;
  if (b >= B) return;
  float *weights = warp.scratch, *s = warp.scratch + E;
  for (Index e = warp.lane; e < E; e += kWarp) s[e] = 0.0f;
  softmax(gate_logits + b * E, weights, E, warp.lane);  // its end is a barrier for s as well

  // Each lane keeps a running maximum and the sum relative to it. It starts at a finite number:
  // then a logit of -inf adds 0, and only NaN and +inf turn the sum into NaN, as in torch.
  const std::int64_t label = labels[b];
  float max = -FLT_MAX, sum = 0.0f, label_logit = 0.0f;
  for (Index k = warp.lane; k < K; k += kWarp) {
    const float logit = combine(weights, expert_logits + b * K + k, E, B * K);
    const float new_max = fmaxf(max, logit);
    sum = sum * expf(max - new_max) + expf(logit - new_max);
    max = new_max;
    if (k == label) label_logit = logit;
  }
  const float lane_max = max;
  max = warp_max(max);
  sum = warp_sum(sum * expf(lane_max - max));
  label_logit = warp_sum(label_logit);
  if (label < 0 || label >= K) sum = NAN;
  if (warp.lane == 0) loss[b] = logf(sum) - (label_logit - max);

  // 32 classes at a time, so that any K fits into registers; their logits are computed again.
  for (Index first = 0; first < K; first += kWarp) {
    const Index k = first + warp.lane;
    const bool active = k < K;
    float d = 0.0f;
    if (active) {
      const float logit = combine(weights, expert_logits + b * K + k, E, B * K);
      d = expf(logit - max) / sum - (k == label ? 1.0f : 0.0f);
    }
    for (Index e = 0; e < E; ++e) {
      const Index i = (e * B + b) * K + k;
      float partial = 0.0f;
      if (active) {
        partial = d * static_cast<float>(expert_logits[i]);
        grad_expert_logits[i] = static_cast<T>(weights[e] * d);
      }
      partial = warp_sum(partial);
      if (warp.lane == 0) s[e] += partial;
    }
  }
  gate_gradient(weights, s, grad_gate_logits + b * E, E, warp.lane);
}

// Blocks, threads and bytes of shared memory for `floats` of scratch per warp.
struct Grid {
  unsigned blocks, threads;
  std::size_t bytes;

  Grid(Index B, Index floats) {
    constexpr Index limit = 48 * 1024 / sizeof(float);
    const Index warps = floats * kWarpsPerBlock <= limit ? kWarpsPerBlock : 1;
    blocks = static_cast<unsigned>((B + warps - 1) / warps);
    threads = static_cast<unsigned>(warps * kWarp);
    bytes = static_cast<std::size_t>(warps * floats) * sizeof(float);
  }
};

}  // namespace

int softmax_combine_cuda(const void* gate_logits, const void* expert_logits, void* logits, Index B,
                         Index E, Index K, int dtype, void* stream) {
  if (B == 0) return cudaSuccess;
  const Grid grid(B, E);
  return for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    forward_kernel<T><<<grid.blocks, grid.threads, grid.bytes, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const T*>(gate_logits), static_cast<const T*>(expert_logits),
        static_cast<T*>(logits), B, E, K);
  });
}

int softmax_combine_backward_cuda(const void* grad_logits, const void* gate_logits,
                                  const void* expert_logits, void* grad_gate_logits,
                                  void* grad_expert_logits, Index B, Index E, Index K, int dtype,
                                  void* stream) {
  if (B == 0) return cudaSuccess;
  const Grid grid(B, 2 * E);
  return for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    backward_kernel<T>
        <<<grid.blocks, grid.threads, grid.bytes, static_cast<cudaStream_t>(stream)>>>(
            static_cast<const T*>(grad_logits), static_cast<const T*>(gate_logits),
            static_cast<const T*>(expert_logits), static_cast<T*>(grad_gate_logits),
            static_cast<T*>(grad_expert_logits), B, E, K);
  });
}

int softmax_combine_cross_entropy_cuda(const void* gate_logits, const void* expert_logits,
                                       const std::int64_t* labels, float* loss,
                                       void* grad_gate_logits, void* grad_expert_logits, Index B,
                                       Index E, Index K, int dtype, void* stream) {
  if (B == 0) return cudaSuccess;
  const Grid grid(B, 2 * E);
  return for_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    cross_entropy_kernel<T>
        <<<grid.blocks, grid.threads, grid.bytes, static_cast<cudaStream_t>(stream)>>>(
            static_cast<const T*>(gate_logits), static_cast<const T*>(expert_logits), labels, loss,
            static_cast<T*>(grad_gate_logits), static_cast<T*>(grad_expert_logits), B, E, K);
  });
}

const char* cuda_error_message(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // namespace moe_kernels
