// CPU: layers of one network that never mix channels: scale and shift, and depthwise convolution.
#include "cpu/avx512.h"
#include "cpu/parallel.h"

#ifdef MOE_KERNELS_CPU_LAYERS

namespace moe_kernels {
namespace {

constexpr Index kUnitRows = 64;  // that a thread takes at a time

template <typename T>
MOE_KERNELS_AVX512 void scale_rows(const typename T::Element* source, const float* scale,
                                   const Epilogue<T>& epilogue, Index begin, Index end, Index C) {
  for (Index row = begin; row < end; ++row) {
    for (Index c = 0; c < C; c += kLanes) {
      const Index at = row * C + c;
      epilogue.store(_mm512_mul_ps(T::load(source + at), _mm512_loadu_ps(scale + c)), at, c);
    }
  }
}

template <typename T>
void run_scale(const void* source, const float* scale, const float* shift, const void* addend,
               const void* activation, void* output, Index rows, Index C, bool relu,
               int num_threads) {
  using Element = typename T::Element;
  const auto epilogue = make_epilogue<T>(shift, addend, activation, output, relu);
  parallel_units((rows + kUnitRows - 1) / kUnitRows, num_threads, [&](Index unit) {
    const Index begin = unit * kUnitRows;
    const Index end = begin + kUnitRows < rows ? begin + kUnitRows : rows;
    scale_rows<T>(static_cast<const Element*>(source), scale, epilogue, begin, end, C);
  });
}

// All images of output pixel (p, q).
template <typename T>
MOE_KERNELS_AVX512 void depthwise_pixel(const ConvSizes& sizes, const typename T::Element* source,
                                        const float* weight, const Epilogue<T>& epilogue, Index p,
                                        Index q) {
  constexpr int kRows = 4;  // images that share a load of the weights
  const Index C = sizes.C, N = sizes.N;
  for (Index c = 0; c < C; c += kLanes) {
    for (Index n = 0; n < N; n += kRows) {
      const int rows = N - n < kRows ? static_cast<int>(N - n) : kRows;
      __m512 sums[kRows];
      for (int row = 0; row < kRows; ++row) sums[row] = _mm512_setzero_ps();
      for (Index r = 0; r < sizes.R; ++r) {
        const Index h = source_pixel(sizes, p, r, sizes.H);
        if (h < 0) continue;
        for (Index s = 0; s < sizes.S; ++s) {
          const Index w = source_pixel(sizes, q, s, sizes.W);
          if (w < 0) continue;
          const __m512 tap = _mm512_loadu_ps(weight + (r * sizes.S + s) * C + c);
          const auto* from = source + ((h * sizes.W + w) * N + n) * C + c;
          if (rows == kRows) {
#pragma GCC unroll 4
            for (int row = 0; row < kRows; ++row) {
              sums[row] = _mm512_fmadd_ps(T::load(from + row * C), tap, sums[row]);
            }
          } else {
            for (int row = 0; row < rows; ++row) {
              sums[row] = _mm512_fmadd_ps(T::load(from + row * C), tap, sums[row]);
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

}  // namespace

void scale_shift(const void* source, const float* scale, const float* shift, const void* addend,
                 const void* activation, void* output, Index rows, Index C, bool relu, int dtype,
                 int num_threads) {
  const auto run = dtype == kBFloat16 ? run_scale<BFloat16> : run_scale<Float32>;
  run(source, scale, shift, addend, activation, output, rows, C, relu, num_threads);
}

void conv_depthwise(const void* source, const float* weight, const float* bias, const void* addend,
                    const void* activation, void* output, ConvSizes sizes, bool relu, int dtype,
                    int num_threads) {
  const auto run = dtype == kBFloat16 ? run_depthwise<BFloat16> : run_depthwise<Float32>;
  run(source, weight, bias, addend, activation, output, sizes, relu, num_threads);
}

}  // namespace moe_kernels
#endif
