// CPU: pooling and its gradient, the mean over pixels and its gradient, of one network. These
// layers move few numbers: plain loops over contiguous channels, which the compiler turns into
// vectors.
#include <algorithm>
#include <limits>

#include "cpu/parallel.h"
#include "cpu/product.h"

#ifdef MOE_KERNELS_CPU_LAYERS

namespace moe_kernels::MOE_KERNELS_INSTRUCTIONS {
namespace {

constexpr Index kStep = 64;  // channels summed at a time

template <typename T>
MOE_KERNELS_SIMD void pool_pixel(const PoolSizes& sizes, const typename T::Element* source,
                                 typename T::Element* out, Index p, Index q, bool maximum) {
  const Index row = Index{sizes.N} * sizes.C;
  const Index top = p * sizes.stride - sizes.padding, left = q * sizes.stride - sizes.padding;
  const Index h1 = std::min<Index>(sizes.H, top + sizes.kernel), h0 = std::max<Index>(0, top);
  const Index w1 = std::min<Index>(sizes.W, left + sizes.kernel), w0 = std::max<Index>(0, left);
  const Vector share = all(1.0f / static_cast<float>(sizes.kernel * sizes.kernel));
  for (Index i = 0; i < row; i += kLanes) {
    Vector result = all(maximum ? -std::numeric_limits<float>::infinity() : 0.0f);
    for (Index h = h0; h < h1; ++h) {
      for (Index w = w0; w < w1; ++w) {
        const Vector x = T::load(source + (h * sizes.W + w) * row + i);
        if (maximum) {
          // Once NaN, always NaN.
          result = choose(not_at_least(result, x) & ~is_nan(result), x, result);
        } else {
          result = result + x;
        }
      }
    }
    T::store(out + (p * sizes.Q + q) * row + i, maximum ? result : (result * share));
  }
}

template <typename T>
MOE_KERNELS_SIMD void pool_backward_pixel(const PoolSizes& sizes, const typename T::Element* grad,
                                          const typename T::Element* source,
                                          const typename T::Element* output,
                                          const typename T::Element* skip,
                                          const typename T::Element* activation,
                                          typename T::Element* grad_source, Index h, Index w) {
  const Index row = Index{sizes.N} * sizes.C, here = (h * sizes.W + w) * row;
  // Windows that hold this pixel.
  const auto first = [&](Index pixel) {
    const Index beyond = pixel + sizes.padding - sizes.kernel + 1;
    return beyond <= 0 ? 0 : divide_up(beyond, sizes.stride);
  };
  const Index p0 = first(h), p1 = std::min<Index>(sizes.P, (h + sizes.padding) / sizes.stride + 1);
  const Index q0 = first(w), q1 = std::min<Index>(sizes.Q, (w + sizes.padding) / sizes.stride + 1);
  const Vector share = all(1.0f / static_cast<float>(sizes.kernel * sizes.kernel));
  for (Index i = 0; i < row; i += kLanes) {
    Vector sum = zero();
    const Vector x = T::load(source + here + i);
    for (Index p = p0; p < p1; ++p) {
      for (Index q = q0; q < q1; ++q) {
        const Index there = (p * sizes.Q + q) * row + i;
        const Vector its = T::load(grad + there);
        if (output == nullptr) {
          sum = sum + its * share;
          continue;
        }
        // A window whose maximum is NaN goes to its first NaN.
        const Vector largest = T::load(output + there);
        const Mask nan = is_nan(largest);
        const auto wins = [&](Vector value) MOE_KERNELS_SIMD -> Mask {
          return equal(value, largest) | (nan & is_nan(value));
        };
        Mask mine = wins(x);
        const Index top = std::max<Index>(0, p * sizes.stride - sizes.padding);
        const Index left = std::max<Index>(0, q * sizes.stride - sizes.padding);
        const Index right =
            std::min<Index>(sizes.W, q * sizes.stride - sizes.padding + sizes.kernel);
        for (Index a = top; a <= h && any(mine); ++a) {
          for (Index b = left; b < (a == h ? w : right); ++b) {
            mine = mine & ~wins(T::load(source + (a * sizes.W + b) * row + i));
          }
        }
        sum = sum + where(mine, its);
      }
    }
    const Epilogue<T> epilogue{nullptr, skip, activation, grad_source, false, false};
    epilogue.store(sum, here + i, 0);
  }
}

template <typename T>
MOE_KERNELS_SIMD void mean_channels(const typename T::Element* source, float* mean, Index pixels,
                                    Index row, Index begin, Index end) {
  const Vector share = all(1.0f / static_cast<float>(pixels));
  for (Index i = begin; i < end; i += kLanes) {
    Vector sum = zero();
    for (Index pixel = 0; pixel < pixels; ++pixel) {
      sum = sum + T::load(source + pixel * row + i);
    }
    store(mean + i, (sum * share));
  }
}

template <typename T>
MOE_KERNELS_SIMD void spread_pixel(const float* grad, const void* activation, void* grad_source,
                                   Index pixels, Index row, Index pixel) {
  using Element = typename T::Element;
  const Vector share = all(1.0f / static_cast<float>(pixels));
  const Epilogue<T> epilogue{nullptr,     nullptr, static_cast<const Element*>(activation),
                             grad_source, false,   false};
  for (Index i = 0; i < row; i += kLanes) {
    epilogue.store(load(grad + i) * share, pixel * row + i, 0);
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
  parallel_units(divide_up(row, kStep), num_threads, [&](Index unit) {
    mean_channels<T>(static_cast<const Element*>(source), mean, pixels, row, unit * kStep,
                     std::min(row, (unit + 1) * kStep));
  });
}

}  // namespace

void pool(const void* source, void* output, PoolSizes sizes, bool maximum, int dtype,
          int num_threads) {
  with_dtype(dtype, [&](auto type) {
    run_pool<decltype(type)>(source, output, sizes, maximum, num_threads);
  });
}

void pool_backward(const void* grad, const void* source, const void* output, const void* skip,
                   const void* activation, void* grad_source, PoolSizes sizes, int dtype,
                   int num_threads) {
  with_dtype(dtype, [&](auto type) {
    run_pool_backward<decltype(type)>(grad, source, output, skip, activation, grad_source, sizes,
                                      num_threads);
  });
}

void pixel_mean(const void* source, float* mean, Index pixels, Index N, Index C, int dtype,
                int num_threads) {
  with_dtype(dtype, [&](auto type) {
    run_mean<decltype(type)>(source, mean, pixels, N * C, num_threads);
  });
}

void pixel_mean_backward(const float* grad, const void* activation, void* grad_source, Index pixels,
                         Index N, Index C, int dtype, int num_threads) {
  with_dtype(dtype, [&](auto type) {
    parallel_units(pixels, num_threads, [=](Index pixel) {
      spread_pixel<decltype(type)>(grad, activation, grad_source, pixels, N * C, pixel);
    });
  });
}

}  // namespace moe_kernels::MOE_KERNELS_INSTRUCTIONS
#endif
