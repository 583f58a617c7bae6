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
};

// Sizes of a pooling of slabs with E = 1, by windows of kernel x kernel pixels.
struct PoolSizes {
  int N;
  int H, W, C;  // source [H, W, N, C]
  int P, Q;     // output [P, Q, N, C]
  int kernel, stride, padding;
};

// The layers of one network on a CPU with AVX-512. Values are slabs with E = 1, which is left out:
// [H, W, N, C]. C is padded with zero channels to a multiple of 16. `dtype` is float32, or bfloat16
// where the CPU has AVX512-BF16; sums are float32 in a fixed order, so an image's bits depend
// neither on the other images nor on the threads. The compiler has to know these instructions.
#if defined(__x86_64__) && (defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 10))
#define MOE_KERNELS_CPU_LAYERS

// output = relu?(conv(source) + conv1x1(side) + bias + addend), zero where activation <= 0. Every
// pointer but `output` may be null: without that term. O is a multiple of 16, C and D are even if
// bfloat16; the output is float32 whatever `dtype` is if `float32_output`. If there are several
// groups, each has a multiple of 32 channels on both sides, and there is no side.
void conv_direct(const void* source,       // [H, W, N, C]
                 const void* weight,       // packed by pack_direct
                 const void* side,         // [side_H, side_W, N, D]
                 const void* side_weight,  // packed by pack_direct
                 const float* bias,        // [O]
                 const void* addend,       // [P, Q, N, O]
                 const void* activation,   // [P, Q, N, O]
                 void* output,             // [P, Q, N, O]
                 ConvSizes sizes, bool relu, bool float32_output, int dtype, int num_threads);

// The same with a filter for each channel; C = O is a multiple of 16, and there is no side.
void conv_depthwise(const void* source,      // [H, W, N, C]
                    const float* weight,     // [R, S, C]
                    const float* bias,       // [C]
                    const void* addend,      // [P, Q, N, C]
                    const void* activation,  // [P, Q, N, C]
                    void* output,            // [P, Q, N, C]
                    ConvSizes sizes, bool relu, int dtype, int num_threads);

// output = relu?(source * scale + second * second_scale + shift + addend), zero where activation
// <= 0. Pointers but source, scale and output may be null; the second and its scale both or
// neither. C is a multiple of 16.
void scale_shift(const void* source,         // [rows, C]
                 const float* scale,         // [C]
                 const void* second,         // [rows, C]
                 const float* second_scale,  // [C]
                 const float* shift,         // [C]
                 const void* addend,         // [rows, C]
                 const void* activation,     // [rows, C]
                 void* output,               // [rows, C]
                 Index rows, Index C, bool relu, int dtype, int num_threads);

// Sums over rows of factor and of factor * (source - shift); without a factor, of source - shift
// and its square. C is a multiple of 16.
void channel_sums(const void* factor,  // [rows, C] or null
                  const void* source,  // [rows, C]
                  const float* shift,  // [C]
                  double* sums,        // [C]
                  double* products,    // [C]
                  Index rows, Index C, int dtype, int num_threads);

// Gradient of the weight of a convolution with one group, from its source and the gradient of its
// output; sizes are those of the convolution. O is a multiple of 16; C is any number.
void weight_grad(const void* source,  // [H, W, N, C]
                 const void* grad,    // [P, Q, N, O]
                 float* grad_weight,  // [R * S, C, O]
                 ConvSizes sizes, int dtype, int num_threads);

// The same for 3x3 filters of stride 1 and padding 1 by Winograd's F(2x4, 3x3), of `outputs` x
// `channels` x 9 numbers, written at the given strides. O and C are multiples of 32.
void weight_grad_winograd(const void* source,  // [H, W, N, C]
                          const void* grad,    // [H, W, N, O]
                          float* grad_weight, ConvSizes sizes, Index outputs, Index channels,
                          Index output_stride, Index channel_stride, Index tap_stride, int dtype,
                          int num_threads);

// output = normalized(source) * scale + shift: of each row the first `channels` numbers, to mean 0
// and variance 1, as LayerNorm does. Numbers beyond are zeros, in scale and shift as well.
void layer_norm(const void* source,  // [rows, C]
                const float* scale,  // [C]
                const float* shift,  // [C]
                void* output,        // [rows, C]
                Index rows, Index C, Index channels, float epsilon, int dtype, int num_threads);

// Gradient of the source of `layer_norm`; + addend, zero where activation <= 0; both may be null.
void layer_norm_backward(const void* grad,        // [rows, C]
                         const void* source,      // [rows, C]
                         const float* scale,      // [C]
                         const void* addend,      // [rows, C]
                         const void* activation,  // [rows, C]
                         void* grad_source,       // [rows, C]
                         Index rows, Index C, Index channels, float epsilon, int dtype,
                         int num_threads);

// conv_direct for 3x3 filters of stride 1 and padding 1 by Winograd's F(2x4, 3x3), with 3 times
// fewer products; O and C are as in pack_winograd. The weight is packed by it, once for the
// convolution and once for its input gradient; `input_grad` concerns the side alone.
void conv_winograd(const void* source, const void* weight, const void* side,
                   const void* side_weight, const float* bias, const void* addend,
                   const void* activation, void* output, ConvSizes sizes, bool relu,
                   bool float32_output, int dtype, int num_threads);

// Weight of conv_direct for O outputs (a multiple of 16) and K words of input channels, from
// `outputs` x `channels` x `taps` numbers at the given strides; zeros beyond. `doubled`: both
// bfloat16 of a word are the same weight, for a source split into high and low parts.
void pack_direct(const float* weight, void* packed, Index O, Index K, Index outputs, Index channels,
                 Index taps, Index output_stride, Index channel_stride, Index tap_stride,
                 bool doubled, int dtype, int num_threads);

// Both weights of conv_winograd from [outputs, channels, 3, 3]: of the convolution with O outputs
// and C channels, and of its input gradient. O and C are multiples of 32, or of 16 if float32.
void pack_winograd(const float* weight, void* forward, void* gradient, Index O, Index C,
                   Index outputs, Index channels, int dtype, int num_threads);

// Maximum or mean over windows; padding counts as -inf, or as zeros.
void pool(const void* source, void* output, PoolSizes sizes, bool maximum, int dtype,
          int num_threads);

// Gradient of the source of `pool`; the first maximum of a window receives it. `output` is what
// `pool` made, or null for means. Adds `skip`, and is zero where activation <= 0; both may be null.
void pool_backward(const void* grad,        // [P, Q, N, C]
                   const void* source,      // [H, W, N, C]
                   const void* output,      // [P, Q, N, C]
                   const void* skip,        // [H, W, N, C]
                   const void* activation,  // [H, W, N, C]
                   void* grad_source,       // [H, W, N, C]
                   PoolSizes sizes, int dtype, int num_threads);

// mean[n, c] over pixels, float32.
void pixel_mean(const void* source,  // [pixels, N, C]
                float* mean,         // [N, C]
                Index pixels, Index N, Index C, int dtype, int num_threads);

// Gradient of the source of `pixel_mean`: grad[n, c] / pixels at every pixel, zero where
// activation <= 0.
void pixel_mean_backward(const float* grad,       // [N, C]
                         const void* activation,  // [pixels, N, C] or null
                         void* grad_source,       // [pixels, N, C]
                         Index pixels, Index N, Index C, int dtype, int num_threads);
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
