// CPU: layers of one network without matrix products: scale and shift, normalization over channels,
// depthwise convolution.
#include <algorithm>
#include <cmath>

#include "cpu/parallel.h"
#include "cpu/product.h"

#ifdef MOE_KERNELS_CPU_LAYERS

namespace moe_kernels::MOE_KERNELS_INSTRUCTIONS {
namespace {

constexpr Index kUnitRows = 64;  // that a thread takes at a time

// Calls body(begin, end) on parts of the rows.
template <typename Body>
void parallel_rows(Index rows, int num_threads, Body body) {
  parallel_units(divide_up(rows, kUnitRows), num_threads, [&](Index unit) {
    body(unit * kUnitRows, std::min(rows, (unit + 1) * kUnitRows));
  });
}

template <typename T>
MOE_KERNELS_SIMD void scale_rows(const typename T::Element* source, const float* scale,
                                 const typename T::Element* second, const float* second_scale,
                                 const Epilogue<T>& epilogue, Index begin, Index end, Index C) {
  for (Index row = begin; row < end; ++row) {
    for (Index c = 0; c < C; c += kLanes) {
      const Index at = row * C + c;
      Vector sum = T::load(source + at) * load(scale + c);
      if (second != nullptr) {
        sum = multiply_add(T::load(second + at), load(second_scale + c), sum);
      }
      epilogue.store(sum, at, c);
    }
  }
}

template <typename T>
void run_scale(const void* source, const float* scale, const void* second,
               const float* second_scale, const float* shift, const void* addend,
               const void* activation, void* output, Index rows, Index C, bool relu,
               int num_threads) {
  using Element = typename T::Element;
  const auto epilogue = make_epilogue<T>(shift, addend, activation, output, relu);
  parallel_rows(rows, num_threads, [&](Index begin, Index end) {
    scale_rows<T>(static_cast<const Element*>(source), scale, static_cast<const Element*>(second),
                  second_scale, epilogue, begin, end, C);
  });
}

// All images of output pixel (p, q).
template <typename T>
MOE_KERNELS_SIMD void depthwise_pixel(const ConvSizes& sizes, const typename T::Element* source,
                                      const float* weight, const Epilogue<T>& epilogue, Index p,
                                      Index q) {
  constexpr int kRows = 4;  // images that share a load of the weights
  const Index C = sizes.C, N = sizes.N;
  for (Index c = 0; c < C; c += kLanes) {
    for (Index n = 0; n < N; n += kRows) {
      const int rows = N - n < kRows ? static_cast<int>(N - n) : kRows;
      Vector sums[kRows];
      for (int row = 0; row < kRows; ++row) sums[row] = zero();
      for (Index r = 0; r < sizes.R; ++r) {
        const Index h = source_pixel(sizes, p, r, sizes.H);
        if (h < 0) continue;
        for (Index s = 0; s < sizes.S; ++s) {
          const Index w = source_pixel(sizes, q, s, sizes.W);
          if (w < 0) continue;
          const Vector tap = load(weight + (r * sizes.S + s) * C + c);
          const auto* from = source + ((h * sizes.W + w) * N + n) * C + c;
          if (rows == kRows) {
#pragma GCC unroll 4
            for (int row = 0; row < kRows; ++row) {
              sums[row] = multiply_add(T::load(from + row * C), tap, sums[row]);
            }
          } else {
            for (int row = 0; row < rows; ++row) {
              sums[row] = multiply_add(T::load(from + row * C), tap, sums[row]);
            }
          }
        }
      }
      const Index out = ((p * sizes.Q + q) * N + n) * C + c;
      for (int row = 0; row < rows; ++row) epilogue.store(sums[row], out + row * C, c);
    }
  }
}

template <typename T>
void run_depthwise(const void* source, const float* weight, const float* bias, const void* addend,
                   const void* activation, void* output, const ConvSizes& sizes, bool relu,
                   int num_threads) {
  using Element = typename T::Element;
  const auto epilogue = make_epilogue<T>(bias, addend, activation, output, relu);
  parallel_units(Index{sizes.P} * sizes.Q, num_threads, [&](Index unit) {
    depthwise_pixel<T>(sizes, static_cast<const Element*>(source), weight, epilogue, unit / sizes.Q,
                       unit % sizes.Q);
  });
}

// Mean and reciprocal deviation of the first `channels` numbers of a row, in which zeros follow.
struct Moments {
  float mean, scale;
};

template <typename T>
MOE_KERNELS_SIMD Moments moments_of(const typename T::Element* row, Index C, Index channels,
                                    float epsilon) {
  Vector sum = zero();
  for (Index c = 0; c < C; c += kLanes) sum = sum + T::load(row + c);
  const float mean = total(sum) / static_cast<float>(channels);
  Vector squares = zero();
  for (Index c = 0; c < C; c += kLanes) {
    const Vector difference = where(first_lanes(channels - c), T::load(row + c) - all(mean));
    squares = multiply_add(difference, difference, squares);
  }
  const float variance = total(squares) / static_cast<float>(channels);
  return {mean, 1.0f / std::sqrt(variance + epsilon)};
}

template <typename T>
MOE_KERNELS_SIMD void normalize_rows(const typename T::Element* source, const float* scale,
                                     const float* shift, typename T::Element* output, Index begin,
                                     Index end, Index C, Index channels, float epsilon) {
  for (Index row = begin; row < end; ++row) {
    const auto* from = source + row * C;
    const Moments moments = moments_of<T>(from, C, channels, epsilon);
    for (Index c = 0; c < C; c += kLanes) {
      const Vector centered = T::load(from + c) - all(moments.mean);
      const Vector normal = centered * all(moments.scale);
      T::store(output + row * C + c, multiply_add(normal, load(scale + c), load(shift + c)));
    }
  }
}

// With g = grad * scale and x the normalized source: (g - mean(g) - x * mean(g * x)) *
// deviation^-1.
template <typename T>
MOE_KERNELS_SIMD void normalize_rows_backward(const typename T::Element* grad,
                                              const typename T::Element* source, const float* scale,
                                              const Epilogue<T>& epilogue, Index begin, Index end,
                                              Index C, Index channels, float epsilon) {
  const float share = 1.0f / static_cast<float>(channels);
  for (Index row = begin; row < end; ++row) {
    const auto *from = source + row * C, *of = grad + row * C;
    const Moments moments = moments_of<T>(from, C, channels, epsilon);
    const Vector mean = all(moments.mean), factor = all(moments.scale);
    Vector sum = zero(), products = zero();
    for (Index c = 0; c < C; c += kLanes) {
      const Vector g = T::load(of + c) * load(scale + c);
      const Vector x = (T::load(from + c) - mean) * factor;
      sum = sum + g;
      products = multiply_add(g, x, products);
    }
    const Vector mean_grad = all(total(sum) * share);
    const Vector minus_slope = all(-(total(products) * share));
    for (Index c = 0; c < C; c += kLanes) {
      const Vector g = T::load(of + c) * load(scale + c);
      const Vector x = (T::load(from + c) - mean) * factor;
      const Vector rest = multiply_add(x, minus_slope, g - mean_grad);
      const Mask own = first_lanes(channels - c);  // those beyond stay zero
      epilogue.store(where(own, rest * factor), row * C + c, c);
    }
  }
}

template <typename T>
void run_norm(const void* source, const float* scale, const float* shift, void* output, Index rows,
              Index C, Index channels, float epsilon, int num_threads) {
  using Element = typename T::Element;
  parallel_rows(rows, num_threads, [&](Index begin, Index end) {
    normalize_rows<T>(static_cast<const Element*>(source), scale, shift,
                      static_cast<Element*>(output), begin, end, C, channels, epsilon);
  });
}

template <typename T>
void run_norm_backward(const void* grad, const void* source, const float* scale, const void* addend,
                       const void* activation, void* grad_source, Index rows, Index C,
                       Index channels, float epsilon, int num_threads) {
  using Element = typename T::Element;
  const auto epilogue = make_epilogue<T>(nullptr, addend, activation, grad_source, false);
  parallel_rows(rows, num_threads, [&](Index begin, Index end) {
    normalize_rows_backward<T>(static_cast<const Element*>(grad),
                               static_cast<const Element*>(source), scale, epilogue, begin, end, C,
                               channels, epsilon);
  });
}

}  // namespace

void layer_norm(const void* source, const float* scale, const float* shift, void* output,
                Index rows, Index C, Index channels, float epsilon, int dtype, int num_threads) {
  with_dtype(dtype, [&](auto type) {
    run_norm<decltype(type)>(source, scale, shift, output, rows, C, channels, epsilon, num_threads);
  });
}

void layer_norm_backward(const void* grad, const void* source, const float* scale,
                         const void* addend, const void* activation, void* grad_source, Index rows,
                         Index C, Index channels, float epsilon, int dtype, int num_threads) {
  with_dtype(dtype, [&](auto type) {
    run_norm_backward<decltype(type)>(grad, source, scale, addend, activation, grad_source, rows, C,
                                      channels, epsilon, num_threads);
  });
}

void scale_shift(const void* source, const float* scale, const void* second,
                 const float* second_scale, const float* shift, const void* addend,
                 const void* activation, void* output, Index rows, Index C, bool relu, int dtype,
                 int num_threads) {
  with_dtype(dtype, [&](auto type) {
    run_scale<decltype(type)>(source, scale, second, second_scale, shift, addend, activation,
                              output, rows, C, relu, num_threads);
  });
}

void conv_depthwise(const void* source, const float* weight, const float* bias, const void* addend,
                    const void* activation, void* output, ConvSizes sizes, bool relu, int dtype,
                    int num_threads) {
  with_dtype(dtype, [&](auto type) {
    run_depthwise<decltype(type)>(source, weight, bias, addend, activation, output, sizes, relu,
                                  num_threads);
  });
}

}  // namespace moe_kernels::MOE_KERNELS_INSTRUCTIONS
#endif
