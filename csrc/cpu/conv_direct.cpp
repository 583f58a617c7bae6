// CPU: convolution of one network, tap by tap, and its input gradient.
//
//     out[p, q] = sum over taps (r, s): source[p * stride + r - padding, ...] . weight[r, s]
//
// Every output pixel lists the taps that meet the image, so padding costs nothing, and neither do
// the holes in the gradient of a strided convolution: there source[p, q] is the gradient of output
// pixel (p, q), met by input pixel (h, w) through tap (r, s) if h + padding - r = p * stride.
#include <algorithm>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/product.h"

#ifdef MOE_KERNELS_CPU_LAYERS

namespace moe_kernels::MOE_KERNELS_INSTRUCTIONS {
namespace {

// Rows of images that one unit of work computes: enough to read the weights from the inner caches.
constexpr Index kUnitRows = 96;

template <typename T>
struct DirectConv {
  ConvSizes sizes;
  const typename T::Element* source;
  const Word* weight;
  Side<T> side;
  Epilogue<T> epilogue;

  Index row_words() const { return sizes.C / T::kPerWord; }
  Index group_outputs() const { return sizes.O / sizes.groups; }

  // The terms of output pixel (p, q) for the panel that starts at channel o.
  Index list_terms(Index p, Index q, Index o, Index panel, Term* terms) const {
    const Index row_stride = row_words(), K = row_stride / sizes.groups;
    const Index used = sizes.channels == 0 ? K : divide_up(sizes.channels, T::kPerWord);
    const Index first_word = o / group_outputs() * K;
    const Word* taps = weight + o * sizes.R * sizes.S * K;
    Term* term = terms;
    for (Index r = 0; r < sizes.R; ++r) {
      const Index h = source_pixel(sizes, p, r, sizes.H);
      if (h < 0) continue;
      for (Index s = 0; s < sizes.S; ++s) {
        const Index w = source_pixel(sizes, q, s, sizes.W);
        if (w < 0) continue;
        const auto* rows = source + (h * sizes.W + w) * sizes.N * sizes.C;
        *term++ = {reinterpret_cast<const Word*>(rows) + first_word, row_stride,
                   taps + (r * sizes.S + s) * K * panel, used};
      }
    }
    if (side.source != nullptr) {
      const Index D = side.words();
      const Word* rows = side.rows(p, q, sizes.N, sizes.input_grad);
      if (rows != nullptr) *term++ = {rows, D, side.weight + o * D, D};
    }
    return term - terms;
  }

  MOE_KERNELS_SIMD void pixel(Index p, Index q, Index o, Index panel, Term* terms,
                              float* sums) const {
    const Index num_terms = list_terms(p, q, o, panel, terms);
    const Index first = (p * sizes.Q + q) * sizes.N;
    const Index left = sizes.outputs == 0 ? panel : sizes.outputs - o;
    const Index computed = filled(panel, left), highest = max_rows(computed);
    for_each_part(sizes.N, highest, [&](Index n, Index rows) MOE_KERNELS_SIMD {
      multiply_for<T>(rows, computed)(terms, num_terms, sums);
      for (Index i = 0; i < num_terms; ++i) terms[i].rows += rows * terms[i].row_stride;
      for (Index row = 0; row < rows; ++row) {
        for (Index i = 0; i < panel; i += kLanes) {
          const Vector sum = load(sums + row * panel + i);
          epilogue.store(sum, (first + n + row) * sizes.O + o + i, o + i);
        }
      }
    });
  }
};

template <typename T>
void run_direct(const DirectConv<T>& conv, int num_threads) {
  const ConvSizes& sizes = conv.sizes;
  const Index pixels = Index{sizes.P} * sizes.Q;
  if (pixels == 0 || sizes.N == 0 || sizes.O == 0) return;
  const Index per_unit = std::max<Index>(1, kUnitRows / sizes.N);
  const Index blocks = divide_up(pixels, per_unit);
  // Few pixels: the output channels are shared out as well.
  const Index threads = thread_count(num_threads);
  const Index outputs = conv.group_outputs();
  const Index panels = sizes.groups * num_panels(outputs);
  const Index shares = std::min(panels, divide_up(4 * threads, blocks));
  parallel_units(blocks * shares, num_threads, [&](Index unit) {
    static thread_local std::vector<Term> terms;
    terms.resize(sizes.R * sizes.S + 1);
    alignas(64) float sums[16 * kMaxPanel];
    const Index share = unit / blocks, block = unit % blocks;
    const Index end = std::min(pixels, (block + 1) * per_unit);
    Index index = 0;
    for (Index first = 0; first < sizes.O; first += outputs) {
      for_each_panel(outputs, [&](Index o, Index panel) {
        if (index++ * shares / panels != share) return;
        for (Index pixel = block * per_unit; pixel < end; ++pixel) {
          conv.pixel(pixel / sizes.Q, pixel % sizes.Q, first + o, panel, terms.data(), sums);
        }
      });
    }
  });
}

template <typename T>
void direct(const void* source, const void* weight, const void* side, const void* side_weight,
            const float* bias, const void* addend, const void* activation, void* output,
            const ConvSizes& sizes, bool relu, bool float32_output, int num_threads) {
  using Element = typename T::Element;
  run_direct(
      DirectConv<T>{sizes, static_cast<const Element*>(source), static_cast<const Word*>(weight),
                    make_side<T>(side, side_weight, sizes),
                    make_epilogue<T>(bias, addend, activation, output, relu, float32_output)},
      num_threads);
}

}  // namespace

void conv_direct(const void* source, const void* weight, const void* side, const void* side_weight,
                 const float* bias, const void* addend, const void* activation, void* output,
                 ConvSizes sizes, bool relu, bool float32_output, int dtype, int num_threads) {
  with_dtype(dtype, [&](auto type) {
    direct<decltype(type)>(source, weight, side, side_weight, bias, addend, activation, output,
                           sizes, relu, float32_output, num_threads);
  });
}

}  // namespace moe_kernels::MOE_KERNELS_INSTRUCTIONS
#endif
