// CPU: weight gradient of one network's 3x3 convolution of stride 1, by Winograd's F(2x4, 3x3).
//
// The convolution is A2^T ((G2 g G4^T) * (B2^T d B4)) A4, summed over channels, so
//
//     grad_weight[o, c] = G2^T (sum over tiles, images: (A2 e A4^T)[o] * (B2^T d B4)[c]) G4
//
// with d the input tile [4, 6] and e the gradient of the output tile [2, 4]: 24 products in place
// of
// 72. Transforms are float32, rounded once to the dtype before they are multiplied. The summed axis
// comes in chunks whose transforms stay in the caches; each sum is made in a fixed order.
#include <algorithm>
#include <vector>

#include "cpu/outer.h"
#include "cpu/parallel.h"
#include "cpu/winograd.h"

#ifdef MOE_KERNELS_CPU_LAYERS

namespace moe_kernels::MOE_KERNELS_INSTRUCTIONS {
namespace {

// That a thread takes at a time: no more than lie together in a panel.
constexpr Index kUnitOutputs = kMaxPanel < 32 ? kMaxPanel : 32;
constexpr Index kChunkBytes = Index{1} << 20;  // of both transforms
constexpr Index kMinChunk = 32;                // words

// Row k of A2 e A4^T, its six points, of channels from i on. pixels: the tile e, 2 x 4.
template <typename Reader, typename Element>
MOE_KERNELS_SIMD inline void grad_row(const Element* const (*pixels)[kTileWidth], Index i, int k,
                                      Group points[6]) {
  // A2: e0, e0 + e1, e0 - e1, -e1.
  Group e[kTileWidth];
#pragma GCC unroll 4
  for (int j = 0; j < kTileWidth; ++j) {
    const Group x = Reader::load(pixels[k == 3][j] + i);
    if (k == 0) {
      e[j] = x;
    } else if (k == 3) {
      e[j] = scaled(x, -1.0f);
    } else {
      const Group y = Reader::load(pixels[1][j] + i);
      e[j] = k == 1 ? x + y : x - y;
    }
  }
  const Group near_even = scaled(e[2], kNear2, e[0]), near_odd = scaled(e[3], kNear2, e[1]);
  const Group far_even = scaled(e[2], kFar2, e[0]), far_odd = scaled(e[3], kFar2, e[1]);
  points[0] = e[0];
  points[1] = scaled(near_odd, kNear, near_even);
  points[2] = scaled(near_odd, -kNear, near_even);
  points[3] = scaled(far_odd, kFar, far_even);
  points[4] = scaled(far_odd, -kFar, far_even);
  points[5] = e[3];
}

// A group of channels of as many images as a word holds.
#ifdef MOE_KERNELS_AVX512
MOE_KERNELS_SIMD inline void store_images(Word* to, const Group (&images)[2]) {
  store_words(to, images[0].a, images[1].a);
  store_words(to + kLanes, images[0].b, images[1].b);
}
#endif
MOE_KERNELS_SIMD inline void store_images(Word* to, const Group (&image)[1]) {
  Groups<Float32>::store(to, image[0]);
}

template <typename T>
struct WinogradGrad {
  using Element = typename T::Element;
  static constexpr int kImages = T::kPerWord;

  ConvSizes sizes;
  const Element* source;
  const Element* grad;
  const Element* zeros;  // as many as there are channels
  float* grad_weight;
  Index outputs, channels;  // without padding
  Index output_stride, channel_stride, tap_stride;
  Index tiles_across, per_tile;  // words

  // The pixels of a tile whose first is (top, left), of one image.
  template <int ROWS, int COLUMNS>
  void find(const Element* values, Index H, Index W, Index width, Index n, Index top, Index left,
            const Element* (*pixels)[COLUMNS]) const {
    for (Index i = 0; i < ROWS; ++i) {
      for (Index j = 0; j < COLUMNS; ++j) {
        const Index h = top + i, w = left + j;
        const bool inside = h >= 0 && h < H && w >= 0 && w < W && n < sizes.N;
        pixels[i][j] = inside ? values + ((h * W + w) * sizes.N + n) * width : zeros;
      }
    }
  }

  // Both transforms of word `index` of the summed axis, as word k of K of a chunk: panels of
  // [24][K, panel].
  MOE_KERNELS_SIMD void transform(Index index, Word* of_source, Word* of_grad, Index k,
                                  Index K) const {
    const Index tile = index / per_tile, n = index % per_tile * kImages;
    const Index p = tile / tiles_across * 2, q = tile % tiles_across * kTileWidth;
    const Element* d[kImages][4][6];
    const Element* e[kImages][2][kTileWidth];
    for (int i = 0; i < kImages; ++i) {
      find<4, 6>(source, sizes.H, sizes.W, sizes.C, n + i, p - 1, q - 1, d[i]);
      find<2, kTileWidth>(grad, sizes.P, sizes.Q, sizes.O, n + i, p, q, e[i]);
    }
    for (Index c = 0; c < sizes.C; c += kGroup) {
      Index stride;
      Word* to = place(of_source, c, sizes.C, k, K, &stride);
      InputRows<Groups<T>, Element> rows[kImages];
      for (int i = 0; i < kImages; ++i) rows[i].read(d[i], c);
#pragma GCC unroll 4
      for (int row = 0; row < 4; ++row) {
        Group points[kImages][6];
        for (int i = 0; i < kImages; ++i) {
          Group of_row[6];
          rows[i].get(row, of_row);
          input_points(of_row, points[i]);
        }
        store(points, to + 6 * row * stride, stride);
      }
    }
    for (Index o = 0; o < sizes.O; o += kGroup) {
      Index stride;
      Word* to = place(of_grad, o, sizes.O, k, K, &stride);
#pragma GCC unroll 4
      for (int row = 0; row < 4; ++row) {
        Group points[kImages][6];
        for (int i = 0; i < kImages; ++i) grad_row<Groups<T>>(e[i], o, row, points[i]);
        store(points, to + 6 * row * stride, stride);
      }
    }
  }

  MOE_KERNELS_SIMD static inline void store(const Group (&points)[kImages][6], Word* to,
                                            Index stride) {
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) {
      Group images[kImages];
      for (int i = 0; i < kImages; ++i) images[i] = points[i][j];
      store_images(to + j * stride, images);
    }
  }

  // Where word k of channels c .. c + 31 begins; `stride` from one point to the next.
  static Word* place(Word* memory, Index c, Index C, Index k, Index K, Index* stride) {
    const Index start = c / kMaxPanel * kMaxPanel;
    const Index own = C - start < kMaxPanel ? c : start;  // the last panel may be of 32 channels
    const Index width = panel_width(C - own);
    *stride = K * width;
    return memory + own * kPoints * K + k * width + c - own;
  }

  // products: [24][kUnitOutputs][panel], of the channels from c on, to grad_weight.
  MOE_KERNELS_SIMD void finish(const float* products, Index o, Index c, Index panel) const {
    for (Index row = 0; row < kUnitOutputs; ++row) {
      const Index output = o + T::channel_at(row);
      if (output >= outputs) continue;
      for (Index i = 0; i < panel; i += kGroup) {
        if (c + i >= channels) break;
        Group taps[3][3];
        filter(products + row * panel + i, kUnitOutputs * panel, taps);
        for (int tap = 0; tap < 9; ++tap) {
          write(taps[tap / 3][tap % 3], output, c + i, tap);
        }
      }
    }
  }

  // G2^T m G4 of a group of channels, at one output.
  MOE_KERNELS_SIMD static inline void filter(const float* products, Index stride,
                                             Group (*taps)[3]) {
    constexpr float kBetween = kFar2 - kNear2;
    constexpr float kA = -0.5f / (kNear2 * kBetween), kB = 0.5f / (kFar2 * kBetween);
    Group rows[4][3];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      Group m[6];
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) {
        m[j] = load_group(products + (6 * k + j) * stride);
      }
      const Group near_sum = m[1] + m[2], near_difference = m[1] - m[2];
      const Group far_sum = m[3] + m[4], far_difference = m[3] - m[4];
      rows[k][0] = scaled(m[0], 1.0f / (kNear2 * kFar2), scaled(near_sum, kA, scaled(far_sum, kB)));
      rows[k][1] = scaled(near_difference, kA * kNear, scaled(far_difference, kB * kFar));
      rows[k][2] = scaled(near_sum, kA * kNear2, scaled(far_sum, kB * kFar2, m[5]));
    }
#pragma GCC unroll 3
    for (int s = 0; s < 3; ++s) {
      const Group sum = scaled(rows[1][s] + rows[2][s], 0.5f);
      taps[0][s] = rows[0][s] + sum;
      taps[1][s] = scaled(rows[1][s] - rows[2][s], 0.5f);
      taps[2][s] = rows[3][s] + sum;
    }
  }

  // A group of channels of one tap, of which the last may be padding.
  MOE_KERNELS_SIMD void write(Group tap, Index o, Index c, int place) const {
    tap = Groups<T>::in_order(tap);
    float* to = grad_weight + o * output_stride + c * channel_stride + place * tap_stride;
    const Index count = std::min<Index>(kGroup, channels - c);
    if (channel_stride == 1 && count == kGroup) {
      store_group(to, tap);
      return;
    }
    alignas(64) float numbers[kGroup];
    store_group(numbers, tap);
    for (Index i = 0; i < count; ++i) to[i * channel_stride] = numbers[i];
  }
};

template <typename T>
void run(const void* source, const void* grad, float* grad_weight, const ConvSizes& sizes,
         Index outputs, Index channels, Index output_stride, Index channel_stride, Index tap_stride,
         int num_threads) {
  using Element = typename T::Element;
  const Index C = sizes.C, O = sizes.O;
  const std::vector<Element> zeros(std::max(C, O));
  WinogradGrad<T> work{};
  work.sizes = sizes;
  work.source = static_cast<const Element*>(source);
  work.grad = static_cast<const Element*>(grad);
  work.zeros = zeros.data();
  work.grad_weight = grad_weight;
  work.outputs = outputs;
  work.channels = channels;
  work.output_stride = output_stride;
  work.channel_stride = channel_stride;
  work.tap_stride = tap_stride;
  work.tiles_across = divide_up(sizes.W, kTileWidth);
  work.per_tile = divide_up(sizes.N, T::kPerWord);
  const Index total = divide_up(sizes.H, 2) * work.tiles_across * work.per_tile;
  const Index fits = kChunkBytes / (kPoints * (C + O) * Index{sizeof(Word)});
  const Index chunks = std::max<Index>(1, total / std::max(kMinChunk, fits));
  const Index longest = divide_up(total, chunks);

  static thread_local Scratch transforms, sums;
  Word* of_source = reinterpret_cast<Word*>(transforms.floats(kPoints * (C + O) * longest));
  Word* of_grad = of_source + kPoints * C * longest;
  const Index groups = divide_up(O, kUnitOutputs), block = kPoints * kUnitOutputs * kMaxPanel;
  const Index panels = num_panels(C);
  float* kept = chunks == 1 ? nullptr : sums.floats(groups * panels * block);
  for (Index chunk = 0; chunk < chunks; ++chunk) {
    const Index first = total * chunk / chunks, K = total * (chunk + 1) / chunks - first;
    parallel_units(K, num_threads,
                   [&](Index k) { work.transform(first + k, of_source, of_grad, k, K); });
    parallel_units(groups * panels, num_threads, [&](Index unit) {
      static thread_local Scratch scratch;
      const Index o = unit % groups * kUnitOutputs;
      Index c = 0;
      for (Index i = 0; i < unit / groups; ++i) c += panel_width(C - c);
      const Index panel = panel_width(C - c);
      float* products = kept == nullptr ? scratch.floats(block) : kept + unit * block;
      for (Index point = 0; point < kPoints; ++point) {
        Index stride;
        const Word* rows = WinogradGrad<T>::place(of_grad, o, O, 0, K, &stride);
        OuterTerm term{rows + point * stride, stride / K,
                       of_source + c * kPoints * K + point * K * panel, panel, K};
        outer_rows<T>(&term, 1, kUnitOutputs, panel, products + point * kUnitOutputs * panel, panel,
                      chunk > 0);
      }
      if (chunk == chunks - 1) work.finish(products, o, c, panel);
    });
  }
}

}  // namespace

void weight_grad_winograd(const void* source, const void* grad, float* grad_weight, ConvSizes sizes,
                          Index outputs, Index channels, Index output_stride, Index channel_stride,
                          Index tap_stride, int dtype, int num_threads) {
  with_dtype(dtype, [&](auto type) {
    run<decltype(type)>(source, grad, grad_weight, sizes, outputs, channels, output_stride,
                        channel_stride, tap_stride, num_threads);
  });
}

}  // namespace moe_kernels::MOE_KERNELS_INSTRUCTIONS
#endif
