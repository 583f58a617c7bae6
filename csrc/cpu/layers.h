// The layers of one network on a CPU, as _native.avx512 and _native.avx2 export them.
//
// Values are slabs with E = 1, which is left out: [H, W, N, C]. C is padded with zero channels to a
// multiple of 16. `dtype` is float32, or bfloat16 where the CPU has AVX512-BF16; sums are float32
// in a fixed order, so an image's bits depend neither on the other images nor on the threads.
#pragma once

#include "cpu/vectors.h"

#ifdef MOE_KERNELS_CPU_LAYERS

namespace moe_kernels::MOE_KERNELS_INSTRUCTIONS {

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

// BatchNorm in train mode, by the statistics of at least two rows: output = source * affine[0] +
// affine[1]. Moves the running statistics as torch does. weight and bias may be null. Channels
// beyond `channels` are padding: their affine is zero.
void batch_norm(const void* source,       // [rows, C]
                const float* weight,      // [channels]
                const float* bias,        // [channels]
                float* running_mean,      // [channels]
                float* running_variance,  // [channels]
                double* numbers,          // [3, C], written: mean, deviation, scale
                float* affine,            // [2, C], written
                Index rows, Index C, Index channels, double epsilon, double momentum, int dtype,
                int num_threads);

// The way back of `batch_norm`, which wrote `numbers`: the gradient of its source is grad *
// affine[0] + source * affine[1] + affine[2]. grad_weight and grad_bias may be null.
void batch_norm_backward(const void* grad,       // [rows, C]
                         const void* source,     // [rows, C]
                         const double* numbers,  // [3, C]
                         float* grad_weight,     // [channels], written
                         float* grad_bias,       // [channels], written
                         float* affine,          // [3, C], written
                         Index rows, Index C, Index channels, int dtype, int num_threads);

// Gradient of the weight of a convolution with one group, from its source and the gradient of its
// output; sizes are those of the convolution. O is a multiple of 16; C is any number. What is of
// padded channels is not written.
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

}  // namespace moe_kernels::MOE_KERNELS_INSTRUCTIONS
#endif
