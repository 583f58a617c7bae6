// CPU: sums over all rows of a value, channel by channel, and BatchNorm in train mode.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/product.h"

#ifdef MOE_KERNELS_CPU_LAYERS

namespace moe_kernels::MOE_KERNELS_INSTRUCTIONS {
namespace {

// Rows whose sums are float32; those of blocks are added up in float64.
constexpr Index kBlockRows = 256;

// sums[c] and products[c] of COUNT vectors of channels from c on, over rows [begin, end).
template <typename T, int COUNT>
MOE_KERNELS_SIMD void sum_channels(const typename T::Element* factor,
                                   const typename T::Element* source, const float* shift,
                                   float* sums, float* products, Index begin, Index end, Index C,
                                   Index c) {
  Vector sum[COUNT], product[COUNT], from[COUNT];
#pragma GCC unroll 4
  for (int i = 0; i < COUNT; ++i) {
    sum[i] = product[i] = zero();
    from[i] = load(shift + c + i * kLanes);
  }
  for (Index row = begin; row < end; ++row) {
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; ++i) {
      const Index at = row * C + c + i * kLanes;
      const Vector x = T::load(source + at) - from[i];
      const Vector g = factor == nullptr ? x : T::load(factor + at);
      sum[i] = sum[i] + g;
      product[i] = multiply_add(g, x, product[i]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < COUNT; ++i) {
    store(sums + c + i * kLanes, sum[i]);
    store(products + c + i * kLanes, product[i]);
  }
}

template <typename T>
void sum_rows(const typename T::Element* factor, const typename T::Element* source,
              const float* shift, float* sums, float* products, Index begin, Index end, Index C) {
  Index c = 0;
  for (; c + 4 * kLanes <= C; c += 4 * kLanes) {
    sum_channels<T, 4>(factor, source, shift, sums, products, begin, end, C, c);
  }
  for (; c < C; c += kLanes) {
    sum_channels<T, 1>(factor, source, shift, sums, products, begin, end, C, c);
  }
}

template <typename T>
void run(const void* factor, const void* source, const float* shift, double* sums, double* products,
         Index rows, Index C, int num_threads) {
  using Element = typename T::Element;
  const Index blocks = divide_up(rows, kBlockRows);
  std::vector<float> parts(2 * blocks * C);
  parallel_units(blocks, num_threads, [&](Index block) {
    float* own = parts.data() + 2 * block * C;
    sum_rows<T>(static_cast<const Element*>(factor), static_cast<const Element*>(source), shift,
                own, own + C, block * kBlockRows, std::min(rows, (block + 1) * kBlockRows), C);
  });
  std::fill_n(sums, C, 0.0);
  std::fill_n(products, C, 0.0);
  for (Index block = 0; block < blocks; ++block) {
    const float* own = parts.data() + 2 * block * C;
    for (Index c = 0; c < C; ++c) sums[c] += own[c];
    for (Index c = 0; c < C; ++c) products[c] += own[C + c];
  }
}

template <typename T>
MOE_KERNELS_SIMD void read_row(const void* source, Index C, float* row) {
  const auto* from = static_cast<const typename T::Element*>(source);
  for (Index c = 0; c < C; c += kLanes) store(row + c, T::load(from + c));
}

}  // namespace

void channel_sums(const void* factor, const void* source, const float* shift, double* sums,
                  double* products, Index rows, Index C, int dtype, int num_threads) {
  with_dtype(dtype, [&](auto type) {
    run<decltype(type)>(factor, source, shift, sums, products, rows, C, num_threads);
  });
}

void batch_norm(const void* source, const float* weight, const float* bias, float* running_mean,
                float* running_variance, double* numbers, float* affine, Index rows, Index C,
                Index channels, double epsilon, double momentum, int dtype, int num_threads) {
  std::vector<float> first(C);
  std::vector<double> sums(C), squares(C);
  with_dtype(dtype, [&](auto type) { read_row<decltype(type)>(source, C, first.data()); });
  channel_sums(nullptr, source, first.data(), sums.data(), squares.data(), rows, C, dtype,
               num_threads);
  const double count = static_cast<double>(rows);
  const float share = static_cast<float>(momentum), rest = static_cast<float>(1 - momentum);
  for (Index c = 0; c < C; ++c) {
    const bool padding = c >= channels;
    const double offset = sums[c] / count, mean = first[c] + offset;
    const double variance = std::max(squares[c] / count - offset * offset, 0.0);
    const double deviation = std::sqrt(variance + epsilon);
    const double gamma = padding ? 0.0 : weight == nullptr ? 1.0 : weight[c];
    const double beta = padding || bias == nullptr ? 0.0 : bias[c];
    const double scale = gamma / deviation;
    numbers[c] = mean;
    numbers[C + c] = deviation;
    numbers[2 * C + c] = scale;
    affine[c] = static_cast<float>(scale);
    affine[C + c] = static_cast<float>(beta - mean * scale);
    if (padding) continue;
    const double unbiased = variance * count / (count - 1);
    running_mean[c] = running_mean[c] * rest + static_cast<float>(mean) * share;
    running_variance[c] = running_variance[c] * rest + static_cast<float>(unbiased) * share;
  }
}

void batch_norm_backward(const void* grad, const void* source, const double* numbers,
                         float* grad_weight, float* grad_bias, float* affine, Index rows, Index C,
                         Index channels, int dtype, int num_threads) {
  std::vector<float> mean(numbers, numbers + C);
  std::vector<double> sums(C), products(C);
  channel_sums(grad, source, mean.data(), sums.data(), products.data(), rows, C, dtype,
               num_threads);
  for (Index c = 0; c < C; ++c) {
    const double deviation = numbers[C + c], scale = numbers[2 * C + c];
    const double slope = -scale * products[c] / (static_cast<double>(rows) * deviation * deviation);
    affine[c] = static_cast<float>(scale);
    affine[C + c] = static_cast<float>(slope);
    affine[2 * C + c] =
        static_cast<float>(-scale * sums[c] / static_cast<double>(rows) - slope * mean[c]);
    if (c >= channels) continue;
    if (grad_weight != nullptr) grad_weight[c] = static_cast<float>(products[c] / deviation);
    if (grad_bias != nullptr) grad_bias[c] = static_cast<float>(sums[c]);
  }
}

}  // namespace moe_kernels::MOE_KERNELS_INSTRUCTIONS
#endif
