// CPU: pooling and its gradient, the mean over pixels and its gradient, of one network. These
// layers move few numbers: plain loops over contiguous channels, which the compiler turns into
// vectors.
#include <algorithm>
#include <limits>

#include "cpu/avx512.h"
#include "cpu/parallel.h"

#ifdef MOE_KERNELS_CPU_LAYERS

namespace moe_kernels {
namespace {

constexpr Index kStep = 64;  // channels summed at a time

template <typename T>
MOE_KERNELS_AVX512 void pool_pixel(const PoolSizes& sizes, const typename T::Element* source,
                                   typename T::Element* out, Index p, Index q, bool maximum) {
  const Index row = Index{sizes.N} * sizes.C;
  const Index top = p * sizes.stride - sizes.padding, left = q * sizes.stride - sizes.padding;
  const Index h1 = std::min<Index>(sizes.H, top + sizes.kernel), h0 = std::max<Index>(0, top);
  const Index w1 = std::min<Index>(sizes.W, left + sizes.kernel), w0 = std::max<Index>(0, left);
  const __m512 share = _mm512_set1_ps(1.0f / static_cast<float>(sizes.kernel * sizes.kernel));
  for (Index i = 0; i < row; i += kLanes) {
    __m512 result = _mm512_set1_ps(maximum ? -std::numeric_limits<float>::infinity() : 0.0f);
    for (Index h = h0; h < h1; ++h) {
      for (Index w = w0; w < w1; ++w) {
        const __m512 x = T::load(source + (h * sizes.W + w) * row + i);
        if (maximum) {
          // Once NaN, always NaN.
          const __mmask16 greater = _mm512_cmp_ps_mask(result, x, _CMP_NGE_UQ);
          const __mmask16 number = _mm512_cmp_ps_mask(result, result, _CMP_ORD_Q);
          result = _mm512_mask_mov_ps(result, greater & number, x);
        } else {
          result = _mm512_add_ps(result, x);
        }
      }
    }
    T::store(out + (p * sizes.Q + q) * row + i, maximum ? result : _mm512_mul_ps(result, share));
  }
}

template <typename T>
MOE_KERNELS_AVX512 void pool_backward_pixel(const PoolSizes& sizes, const typename T::Element* grad,
                                            const typename T::Element* source,
                                            const typename T::Element* output,
                                            const typename T::Element* skip,
                                            const typename T::Element* activation,
                                            typename T::Element* grad_source, Index h, Index w) {
  const Index row = Index{sizes.N} * sizes.C, here = (h * sizes.W + w) * row;
  // Windows that hold this pixel.
  const auto first = [&](Index pixel) {
    const Index beyond = pixel + sizes.padding - sizes.kernel + 1;
    return beyond <= 0 ? 0 : (beyond + sizes.stride - 1) / sizes.stride;
  };
  const Index p0 = first(h), p1 = std::min<Index>(sizes.P, (h + sizes.padding) / sizes.stride + 1);
  const Index q0 = first(w), q1 = std::min<Index>(sizes.Q, (w + sizes.padding) / sizes.stride + 1);
  const __m512 zero = _mm512_setzero_ps();
  const __m512 share = _mm512_set1_ps(1.0f / static_cast<float>(sizes.kernel * sizes.kernel));
  for (Index i = 0; i < row; i += kLanes) {
    __m512 sum = zero;
    const __m512 x = T::load(source + here + i);
    for (Index p = p0; p < p1; ++p) {
      for (Index q = q0; q < q1; ++q) {
        const Index there = (p * sizes.Q + q) * row + i;
        const __m512 its = T::load(grad + there);
        if (output == nullptr) {
          sum = _mm512_add_ps(sum, _mm512_mul_ps(its, share));
          continue;
        }
        // A window whose maximum is NaN goes to its first NaN.
        const __m512 largest = T::load(output + there);
        const __mmask16 nan = _mm512_cmp_ps_mask(largest, largest, _CMP_UNORD_Q);
        const auto wins = [&](__m512 value) MOE_KERNELS_AVX512 -> __mmask16 {
          return _mm512_cmp_ps_mask(value, largest, _CMP_EQ_OQ) |
                 (nan & _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q));
        };
        __mmask16 mine = wins(x);
        const Index top = std::max<Index>(0, p * sizes.stride - sizes.padding);
        const Index left = std::max<Index>(0, q * sizes.stride - sizes.padding);
        const Index right =
            std::min<Index>(sizes.W, q * sizes.stride - sizes.padding + sizes.kernel);
        for (Index a = top; a <= h && mine != 0; ++a) {
          for (Index b = left; b < (a == h ? w : right); ++b) {
            mine &= ~wins(T::load(source + (a * sizes.W + b) * row + i));
          }
        }
        sum = _mm512_add_ps(sum, _mm512_maskz_mov_ps(mine, its));
      }
    }
    const Epilogue<T> epilogue{nullptr, skip, activation, grad_source, false, false};
    epilogue.store(sum, here + i, 0);
  }
}

template <typename T>
MOE_KERNELS_AVX512 void mean_channels(const typename T::Element* source, float* mean, Index pixels,
                                      Index row, Index begin, Index end) {
  const __m512 share = _mm512_set1_ps(1.0f / static_cast<float>(pixels));
  for (Index i = begin; i < end; i += kLanes) {
    __m512 sum = _mm512_setzero_ps();
    for (Index pixel = 0; pixel < pixels; ++pixel) {
      sum = _mm512_add_ps(sum, T::load(source + pixel * row + i));
    }
    _mm512_storeu_ps(mean + i, _mm512_mul_ps(sum, share));
  }
}

template <typename T>
MOE_KERNELS_AVX512 void spread_pixel(const float* grad, const void* activation, void* grad_source,
                                     Index pixels, Index row, Index pixel) {
  using Element = typename T::Element;
  const __m512 share = _mm512_set1_ps(1.0f / static_cast<float>(pixels));
  const Epilogue<T> epilogue{nullptr,     nullptr, static_cast<const Element*>(activation),
                             grad_source, false,   false};
  for (Index i = 0; i < row; i += kLanes) {
    epilogue.store(_mm512_mul_ps(_mm512_loadu_ps(grad + i), share), pixel * row + i, 0);
  }
}

template <typename T>
void run_pool(const void* source, void* output, const PoolSizes& sizes, bool maximum,
              int num_threads) {
  using Element = typename T::Element;
  parallel_units(Index{sizes.P} * sizes.Q, num_threads, [&](Index unit) {
    pool_pixel<T>(sizes, static_cast<const Element*>(source), static_cast<Element*>(output),
                  unit / sizes.Q, unit % sizes.Q, maximum);
  });
}

template <typename T>
void run_pool_backward(const void* grad, const void* source, const void* output, const void* skip,
                       const void* activation, void* grad_source, const PoolSizes& sizes,
                       int num_threads) {
  using Element = typename T::Element;
  parallel_units(Index{sizes.H} * sizes.W, num_threads, [&](Index unit) {
    pool_backward_pixel<T>(sizes, static_cast<const Element*>(grad),
                           static_cast<const Element*>(source), static_cast<const Element*>(output),
                           static_cast<const Element*>(skip),
                           static_cast<const Element*>(activation),
                           static_cast<Element*>(grad_source), unit / sizes.W, unit % sizes.W);
  });
}

template <typename T>
void run_mean(const void* source, float* mean, Index pixels, Index row, int num_threads) {
  using Element = typename T::Element;
  parallel_units((row + kStep - 1) / kStep, num_threads, [&](Index unit) {
    mean_channels<T>(static_cast<const Element*>(source), mean, pixels, row, unit * kStep,
                     std::min(row, (unit + 1) * kStep));
  });
}

}  // namespace

void pool(const void* source, void* output, PoolSizes sizes, bool maximum, int dtype,
          int num_threads) {
  const auto run = dtype == kBFloat16 ? run_pool<BFloat16> : run_pool<Float32>;
  run(source, output, sizes, maximum, num_threads);
}

void pool_backward(const void* grad, const void* source, const void* output, const void* skip,
                   const void* activation, void* grad_source, PoolSizes sizes, int dtype,
                   int num_threads) {
  const auto run = dtype == kBFloat16 ? run_pool_backward<BFloat16> : run_pool_backward<Float32>;
  run(grad, source, output, skip, activation, grad_source, sizes, num_threads);
}

void pixel_mean(const void* source, float* mean, Index pixels, Index N, Index C, int dtype,
                int num_threads) {
  const auto run = dtype == kBFloat16 ? run_mean<BFloat16> : run_mean<Float32>;
  run(source, mean, pixels, N * C, num_threads);
}

void pixel_mean_backward(const float* grad, const void* activation, void* grad_source, Index pixels,
                         Index N, Index C, int dtype, int num_threads) {
  const auto run = dtype == kBFloat16 ? spread_pixel<BFloat16> : spread_pixel<Float32>;
  parallel_units(pixels, num_threads,
                 [=](Index pixel) { run(grad, activation, grad_source, pixels, N * C, pixel); });
}

}  // namespace moe_kernels
#endif
