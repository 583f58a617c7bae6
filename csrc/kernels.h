// Every function that the extension exports: addresses and sizes in, numbers out.
//
// Axes: B images, E experts, K classes, P pixels of one image. All tensors are contiguous.
// The CPU functions work in float32. The *_cuda functions read and write `dtype` where a comment
// says T, compute in float32, launch on `stream` without waiting, and return a cudaError_t (0 is
// success). An empty batch is a no-op everywhere. NaN and infinities spread as in torch.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MOE_KERNELS_HOST_DEVICE __host__ __device__
#else
#define MOE_KERNELS_HOST_DEVICE
#endif

namespace moe_kernels {

using Index = std::int64_t;

enum Dtype : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// logits[b, k] = sum_e softmax(gate_logits[b])[e] * expert_logits[e, b, k]
void softmax_combine(const float* gate_logits,    // [B, E]
                     const float* expert_logits,  // [E, B, K]
                     float* logits,               // [B, K]
                     Index B, Index E, Index K, int num_threads);

// Both gradients of softmax_combine, from the gradient of its result.
void softmax_combine_backward(const float* grad_logits,    // [B, K]
                              const float* gate_logits,    // [B, E]
                              const float* expert_logits,  // [E, B, K]
                              float* grad_gate_logits,     // [B, E]
                              float* grad_expert_logits,   // [E, B, K]
                              Index B, Index E, Index K, int num_threads);

// Cross-entropy of the combined logits and the gradients of its sum over the batch, in one pass.
// A label outside [0, K) reads nothing out of bounds: that image gets NaN.
void softmax_combine_cross_entropy(const float* gate_logits,    // [B, E]
                                   const float* expert_logits,  // [E, B, K]
                                   const std::int64_t* labels,  // [B]
                                   float* loss,                 // [B]
                                   float* grad_gate_logits,     // [B, E]
                                   float* grad_expert_logits,   // [E, B, K]
                                   Index B, Index E, Index K, int num_threads);

// adversarial <- clip(adversarial + step_size * sign(grad)), in place.
void linf_step(float* adversarial,      // [B, P]
               const float* grad,       // [B, P]
               const float* images,     // [B, P]
               const float* epsilon,    // [B]
               const float* step_size,  // [B]
               Index B, Index P, float low, float high, int num_threads);

// The same on a GPU, for up to 6000 experts: a warp keeps two floats of each in shared memory.
int softmax_combine_cuda(const void* gate_logits,    // [B, E] T
                         const void* expert_logits,  // [E, B, K] T
                         void* logits,               // [B, K] T
                         Index B, Index E, Index K, int dtype, void* stream);

int softmax_combine_backward_cuda(const void* grad_logits,    // [B, K] T
                                  const void* gate_logits,    // [B, E] T
                                  const void* expert_logits,  // [E, B, K] T
                                  void* grad_gate_logits,     // [B, E] T
                                  void* grad_expert_logits,   // [E, B, K] T
                                  Index B, Index E, Index K, int dtype, void* stream);

int softmax_combine_cross_entropy_cuda(const void* gate_logits,     // [B, E] T
                                       const void* expert_logits,   // [E, B, K] T
                                       const std::int64_t* labels,  // [B]
                                       float* loss,                 // [B]
                                       void* grad_gate_logits,      // [B, E] T
                                       void* grad_expert_logits,    // [E, B, K] T
                                       Index B, Index E, Index K, int dtype, void* stream);

int linf_step_cuda(float* adversarial,      // [B, P]
                   const void* grad,        // [B, P] T
                   const float* images,     // [B, P]
                   const float* epsilon,    // [B]
                   const float* step_size,  // [B]
                   Index B, Index P, float low, float high, int dtype, void* stream);

const char* cuda_error_message(int code);

// torch.maximum and torch.minimum: NaN if either is. Two plain selects, which GCC vectorizes.
MOE_KERNELS_HOST_DEVICE inline float maximum(float a, float b) {
  const float larger = a > b ? a : b;  // b where either is NaN
  return a == a ? larger : a;
}
MOE_KERNELS_HOST_DEVICE inline float minimum(float a, float b) {
  const float smaller = a < b ? a : b;
  return a == a ? smaller : a;
}

// One pixel of linf_step. The CPU and the GPU compile this same text without fused multiply-add:
// equal bits everywhere. A gradient of zero or NaN has sign 0 and moves nothing.
MOE_KERNELS_HOST_DEVICE inline float step_pixel(float adversarial, float grad, float image,
                                                float epsilon, float step_size, float low,
                                                float high) {
  const float sign = static_cast<float>(grad > 0.0f) - static_cast<float>(grad < 0.0f);
  float pixel = adversarial + step_size * sign;
  pixel = minimum(maximum(pixel, image - epsilon), image + epsilon);
  return minimum(maximum(pixel, low), high);
}

}  // namespace moe_kernels
