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

// A 64-bit hash of the bytes of each tensor, whatever their dtype. It depends on every byte and its
// place, and not on the threads. An address is that of the first of sizes[i] bytes.
void content_hashes(const std::int64_t* addresses,  // [count]
                    const std::int64_t* sizes,      // [count]
                    std::int64_t* hashes,           // [count]
                    Index count, int num_threads);

// Sizes of a convolution of slabs [E, H, W, N, C], E experts and N images, the images of one pixel
// side by side; or, if `input_grad`, of its input gradient: then the source is the gradient of the
// convolution's output, and the output here is the gradient of its input.
struct ConvSizes {
  int E, P, Q, N, O;      // output [E, P, Q, N, O]
  int source_E, H, W, C;  // source [source_E, H, W, N, C]; 1 if all experts read the same, else E
  int R, S;               // filter taps
  int stride, padding;
  // A 1x1 convolution that is added, of side [E, side_H, side_W, N, D]; D = 0: none.
  int side_H, side_W, D, side_stride;
  bool input_grad;
  int groups = 1;  // slices of O that each read their slice of C; more than 1 on CPUs alone
  // Of C and O, what is no padding; 0: all, as of several groups. Convolutions on CPUs skip the
  // rest.
  int channels = 0, outputs = 0;
};

// Sizes of a pooling of slabs with E = 1, by windows of kernel x kernel pixels.
struct PoolSizes {
  int N;
  int H, W, C;  // source [H, W, N, C]
  int P, Q;     // output [P, Q, N, C]
  int kernel, stride, padding;
};

// Whether the layers of cpu/layers.h are compiled: the compiler has to know their instructions.
#if defined(__x86_64__) && (defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 10))
#define MOE_KERNELS_CPU_LAYERS
#endif

// softmax_combine on a GPU, for up to 6000 experts: a warp keeps two floats of each in shared
// memory.
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

// Convolution of slabs, or its input gradient, on GPUs of compute capability 9.0; elsewhere, and
// for sizes that it does not take, a cudaError_t:
//
//   output[e] = act(conv(source[e]) + bias[e] + addend[e] + conv1x1(side[e])), 0 if activation <= 0
//
// T is bfloat16. N is a multiple of 128; C, D and O of 64; side, its weight, bias, addend and
// activation may be null (D = 0). All addresses are multiples of 16. `clusters`: in clusters of two
// blocks where the sizes allow. Exported only by builds for 90a-real.
int conv_sm90a(const void* source,       // [source_E, H, W, N, C] T
               const void* weight,       // [E, O, R, S, C] T
               const void* side,         // [E, side_H, side_W, N, D] T
               const void* side_weight,  // [E, O, D] T
               const float* bias,        // [E, O]
               const void* addend,       // [E, P, Q, N, O] T
               const void* activation,   // [E, P, Q, N, O] T
               void* output,             // [E, P, Q, N, O] T
               ConvSizes sizes, bool relu, bool clusters, int dtype, void* stream);

// How conv_sm90a cuts up a convolution on a GPU of so many multiprocessors: the tile of a block, in
// images and channels, and that of a worker, which is a block or a cluster; in the narrow kernel
// half a block. N is a multiple of 128 and O of 64. Needs no GPU.
struct ConvTiles {
  int rows, channels;
  int worker_rows, worker_channels;
  bool narrow;

  int blocks() const { return worker_rows / rows * (worker_channels / channels); }  // of a cluster
};
ConvTiles conv_sm90a_tiles(const ConvSizes& sizes, int multiprocessors, bool clusters);

// conv_sm90a in float32 on a CPU, by plain loops in the order of the GPU's work: tiles of tile_rows
// images x tile_channels channels, by so many workers (cuda/conv_schedule.h). Slow: it proves that
// order on any machine. Returns the number of tiles, or -1 if two countings of a tile's chunks
// differ.
Index conv_by_schedule(const float* source, const float* weight, const float* side,
                       const float* side_weight, const float* bias, const float* addend,
                       const float* activation, float* output, ConvSizes sizes, bool relu,
                       int tile_rows, int tile_channels, int num_workers, bool by_expert);

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
