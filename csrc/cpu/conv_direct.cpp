// CPU: convolution of slabs, tap by tap, and its input gradient.
//
//     out[p, q] = sum over taps (r, s): source[p * stride + r - padding, ...] . weights[r, s]
//
// Every output pixel lists the taps that meet the image, so padding costs nothing, and neither do
// the holes in the gradient of a strided convolution: there source[p, q] is the gradient of output
// pixel (p, q), met by input pixel (h, w) through tap (r, s) if h + padding - r = p * stride.
#include <algorithm>
#include <vector>

#include "cpu/avx512.h"
#include "cpu/parallel.h"

#ifdef MOE_KERNELS_SLAB

namespace moe_kernels {
namespace {

// Rows of images that one unit of work computes: enough to read the weights from the inner caches.
constexpr Index kUnitRows = 96;

template <typename T>
struct DirectConv {
  SlabConv shape;
  const typename T::Element* source;
  const Word* weights;
  Pointwise<T> pointwise;
  Epilogue<T> epilogue;

  Index words() const { return shape.C / T::kPerWord; }

  // Source pixel of output position `p` and tap `r` along one axis, or -1.
  Index source_pixel(Index p, Index r, Index size) const {
    Index pixel = p * shape.stride + r - shape.padding;
    if (shape.transposed) {
      pixel = p + shape.padding - r;
      if (pixel < 0 || pixel % shape.stride != 0) return -1;
      pixel /= shape.stride;
    }
    return pixel >= 0 && pixel < size ? pixel : -1;
  }

  // The terms of output pixel (p, q) for the panel that starts at channel o.
  Index list_terms(Index p, Index q, Index o, Index panel, Term* terms) const {
    const Index K = words();
    const Word* taps = weights + o * shape.R * shape.S * K;
    Term* term = terms;
    for (Index r = 0; r < shape.R; ++r) {
      const Index h = source_pixel(p, r, shape.H);
      if (h < 0) continue;
      for (Index s = 0; s < shape.S; ++s) {
        const Index w = source_pixel(q, s, shape.W);
        if (w < 0) continue;
        const auto* rows = source + (h * shape.W + w) * shape.N * shape.C;
        *term++ = {reinterpret_cast<const Word*>(rows), K, taps + (r * shape.S + s) * K * panel, K};
      }
    }
    if (pointwise.source != nullptr) {
      const Index D = pointwise.words();
      const Word* rows = pointwise.rows(p, q, shape.N, shape.transposed);
      if (rows != nullptr) *term++ = {rows, D, pointwise.weights + o * D, D};
    }
    return term - terms;
  }

  MOE_KERNELS_AVX512 void pixel(Index p, Index q, Index o, Index panel, Term* terms,
                                float* sums) const {
    const Index num_terms = list_terms(p, q, o, panel, terms);
    const Index first = (p * shape.Q + q) * shape.N;
    const Index highest = max_rows(panel);
    for (Index blocks = (shape.N + highest - 1) / highest, n = 0; blocks > 0; --blocks) {
      const Index rows = (shape.N - n + blocks - 1) / blocks;
      multiply_for<T>(rows, panel)(terms, num_terms, sums);
      for (Index i = 0; i < num_terms; ++i) terms[i].rows += rows * terms[i].row_stride;
      for (Index row = 0; row < rows; ++row) {
        for (Index i = 0; i < panel; i += kLanes) {
          const __m512 sum = _mm512_loadu_ps(sums + row * panel + i);
          epilogue.store(sum, (first + n + row) * shape.O + o + i, o + i);
        }
      }
      n += rows;
    }
  }
};

template <typename T>
void run_direct(const DirectConv<T>& conv, int num_threads) {
  const SlabConv& shape = conv.shape;
  if (shape.N == 0) return;
  const Index pixels = shape.P * shape.Q;
  const Index per_unit = std::max<Index>(1, kUnitRows / shape.N);
  const Index blocks = (pixels + per_unit - 1) / per_unit;
  // Few pixels: the output channels are shared out as well.
  const Index threads = thread_count(num_threads);
  const Index panels = num_panels(shape.O);
  const Index groups = std::min(panels, (4 * threads + blocks - 1) / blocks);
  parallel_units(blocks * groups, num_threads, [&](Index unit) {
    static thread_local std::vector<Term> terms;
    terms.resize(shape.R * shape.S + 1);
    alignas(64) float sums[16 * kMaxPanel];
    const Index group = unit / blocks, block = unit % blocks;
    const Index end = std::min(pixels, (block + 1) * per_unit);
    Index index = 0;
    for_each_panel(shape.O, [&](Index o, Index panel) {
      if (index++ * groups / panels != group) return;
      for (Index pixel = block * per_unit; pixel < end; ++pixel) {
        conv.pixel(pixel / shape.Q, pixel % shape.Q, o, panel, terms.data(), sums);
      }
    });
  });
}

template <typename T>
void direct(const SlabConv& shape, const void* source, const void* weights, const float* bias,
            const void* addend, const void* mask, const void* pointwise_source,
            const void* pointwise_weights, void* out, int num_threads) {
  using Element = typename T::Element;
  run_direct(DirectConv<T>{shape,
                           static_cast<const Element*>(source),
                           static_cast<const Word*>(weights),
                           {static_cast<const Element*>(pointwise_source),
                            static_cast<const Word*>(pointwise_weights), shape.pointwise_H,
                            shape.pointwise_W, shape.pointwise_C, shape.pointwise_stride},
                           {bias, static_cast<const Element*>(addend),
                            static_cast<const Element*>(mask), out, shape.relu, shape.out_float32}},
             num_threads);
}

}  // namespace

void slab_conv(const void* source, const void* weights, const float* bias, const void* addend,
               const void* mask, const void* pointwise_source, const void* pointwise_weights,
               void* out, SlabConv shape, int dtype, int num_threads) {
  const auto run = dtype == kBFloat16 ? direct<BFloat16> : direct<Float32>;
  run(shape, source, weights, bias, addend, mask, pointwise_source, pointwise_weights, out,
      num_threads);
}

}  // namespace moe_kernels
#endif
