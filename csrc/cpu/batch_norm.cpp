// CPU: sums over all rows of a value, channel by channel, as BatchNorm needs them.
#include <algorithm>
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
  const Index blocks = (rows + kBlockRows - 1) / kBlockRows;
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

}  // namespace

void channel_sums(const void* factor, const void* source, const float* shift, double* sums,
                  double* products, Index rows, Index C, int dtype, int num_threads) {
  with_dtype(dtype, [&](auto type) {
    run<decltype(type)>(factor, source, shift, sums, products, rows, C, num_threads);
  });
}

}  // namespace moe_kernels::MOE_KERNELS_INSTRUCTIONS
#endif
