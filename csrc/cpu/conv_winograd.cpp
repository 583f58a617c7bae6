// CPU: one network's 3x3 convolution of stride 1 by Winograd's F(2x4, 3x3).
//
//     out tile [2, 4] = A2^T (sum over channels of (G2 g G4^T) * (B2^T d B4)) A4
//
// with d the input tile [4, 6]: 24 matrix products over channels for 8 pixels instead of 72.
// Transforms are float32 and work on whole vectors of channels; the transformed input and the
// weights, transformed in float32, are rounded once to the dtype; nothing is rounded between
// products and output. Tiles are not square because bfloat16 loses too much in F(4x4, 3x3). For the
// same reason the longer side is evaluated at 0, 3/4, -3/4, 3/2, -3/2 and infinity: on random
// numbers the largest error is half of what the usual points 1 and 2 give.
//
// A unit of work is a block of tiles and images: its transformed input stays in the second-level
// cache while all weights pass by.
// Source: Lavin and Gray, arXiv:1509.09308.
#include <algorithm>
#include <type_traits>

#include "cpu/parallel.h"
#include "cpu/winograd.h"

#ifdef MOE_KERNELS_CPU_LAYERS

namespace moe_kernels::MOE_KERNELS_INSTRUCTIONS {
namespace {

// Rows of the widest layers that share a read of the weights, which come from the last cache.
#ifdef MOE_KERNELS_AVX512
constexpr Index kMinRows = 24, kMinRowImages = 16;
#else
constexpr Index kMinRows = 32, kMinRowImages = 32;
#endif
constexpr Index kInputBytes = kSecondCache * 2 / 5;
// Streams that start a multiple of 4096 bytes apart evict each other.
constexpr Index kSkew = 32;  // words

template <typename T>
struct Winograd {
  using Element = typename T::Element;

  ConvSizes sizes;
  const Element* source;
  const Word* weight;
  Side<T> side;
  Epilogue<T> epilogue;
  Index tiles_across, num_tiles;
  Index tiles_per_unit, images_per_unit, rows_at_once;

  Index words() const { return sizes.C / T::kPerWord; }
  Index widest() const { return panel_width(sizes.O); }

  // Chooses block sizes for the second-level cache.
  void plan() {
    tiles_across = divide_up(sizes.W, kTileWidth);
    num_tiles = divide_up(sizes.H, 2) * tiles_across;
    const Index row_bytes = kPoints * words() * sizeof(Word);
    const Index rows = std::max(kMinRows, kInputBytes / row_bytes / 8 * 8);
    const Index images = rows > kMinRows ? 16 : kMinRowImages;
    images_per_unit = divide_up(sizes.N, divide_up(sizes.N, images));
    tiles_per_unit = std::max<Index>(1, rows / images_per_unit);
    tiles_per_unit = divide_up(num_tiles, divide_up(num_tiles, tiles_per_unit));
    // Few channels: their weights stay in the second-level cache, the sums in the first.
    rows_at_once = sizes.C <= 128 ? max_rows(widest()) : 36;
  }

  // [24][rows][words], the tile's rows at `row`.
  MOE_KERNELS_SIMD void transform_input(Index tile, Index n, Index images, const Element* zeros,
                                        Word* to, Index point_stride) const {
    const Element* pixels[4][6];
    for (Index i = 0; i < 4; ++i) {
      for (Index j = 0; j < 6; ++j) {
        const Index h = tile / tiles_across * 2 - 1 + i,
                    w = tile % tiles_across * kTileWidth - 1 + j;
        const bool inside = h >= 0 && h < sizes.H && w >= 0 && w < sizes.W;
        pixels[i][j] = inside ? source + ((h * sizes.W + w) * sizes.N + n) * sizes.C : zeros;
      }
    }
    const Index channels = images * sizes.C, whole = channels / kGroup * kGroup;
    for (Index i = 0; i < whole; i += kGroup) {
      transform_channels<Groups<T>>(pixels, i, to + i / T::kPerWord, point_stride);
    }
#ifdef MOE_KERNELS_AVX512
    if constexpr (std::is_same_v<T, Float32>) {
      if (whole < channels) {
        transform_channels<HalfGroup>(pixels, whole, to + whole, point_stride);
      }
    }
#endif
  }

  template <typename Reader>
  MOE_KERNELS_SIMD static inline void transform_channels(const Element* const (*pixels)[6], Index i,
                                                         Word* out, Index point_stride) {
    InputRows<Reader, Element> rows;
    rows.read(pixels, i);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      Group d[6], points[6];
      rows.get(k, d);
      input_points(d, points);
      Word* row = out + 6 * k * point_stride;
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) Reader::store(row + j * point_stride, points[j]);
    }
  }

  // products: [24][panel] of one row, `stride` apart; added: [8][panel], or null.
  MOE_KERNELS_SIMD void transform_output(const float* products, Index stride, const float* added,
                                         Index added_stride, Index tile, Index n, Index o,
                                         Index panel) const {
    const Index p = tile / tiles_across * 2, q = tile % tiles_across * kTileWidth;
    const int height = p + 1 < sizes.P ? 2 : 1;
    const int width = static_cast<int>(std::min(kTileWidth, sizes.Q - q));
    const Index offset = ((p * sizes.Q + q) * sizes.N + n) * sizes.O + o;
    const Index next_column = Index{sizes.N} * sizes.O, next_row = sizes.Q * next_column;
    for (Index i = 0; i < panel; i += kLanes) {
      Vector half[2][6];
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) {
        const Vector m0 = load(products + j * stride + i);
        const Vector m1 = load(products + (6 + j) * stride + i);
        const Vector m2 = load(products + (12 + j) * stride + i);
        const Vector m3 = load(products + (18 + j) * stride + i);
        half[0][j] = m0 + (m1 + m2);
        half[1][j] = m1 - m2 - m3;
      }
#pragma GCC unroll 2
      for (int k = 0; k < 2; ++k) {
        if (k >= height) break;
        const Vector near_sum = half[k][1] + half[k][2], far_sum = half[k][3] + half[k][4];
        const Vector near_difference = half[k][1] - half[k][2];
        const Vector far_difference = half[k][3] - half[k][4];
        const Vector y[kTileWidth] = {
            half[k][0] + (near_sum + far_sum),
            multiply_add(far_difference, all(kFar), near_difference * all(kNear)),
            multiply_add(far_sum, all(kFar2), near_sum * all(kNear2)),
            multiply_add(far_difference, all(kFar * kFar2),
                         multiply_add(near_difference, all(kNear * kNear2), half[k][5]))};
#pragma GCC unroll 4
        for (int j = 0; j < kTileWidth; ++j) {
          if (j >= width) break;
          Vector sum = y[j];
          if (added != nullptr) {
            const float* its = added + (kTileWidth * k + j) * added_stride + i;
            sum = sum + load(its);
          }
          epilogue.store(sum, offset + k * next_row + j * next_column + i, o + i);
        }
      }
    }
  }

  // The 1x1 convolution of the side for `rows` rows, from `first` of the unit on: [8][rows][panel].
  void add_side(Index first_tile, Index first_image, Index images, Index first, Index rows, Index o,
                Index panel, float* added, Index stride) const {
    const Index D = side.words();
    for (Index row = first; row < first + rows;) {
      const Index tile = first_tile + row / images, n = row % images;
      const Index count = std::min({images - n, first + rows - row, max_rows(panel)});
      for (Index pixel = 0; pixel < kTilePixels; ++pixel) {
        const Index p = tile / tiles_across * 2 + pixel / kTileWidth;
        const Index q = tile % tiles_across * kTileWidth + pixel % kTileWidth;
        float* sums = added + pixel * stride + (row - first) * panel;
        const Word* read =
            p < sizes.P && q < sizes.Q ? side.rows(p, q, sizes.N, sizes.input_grad) : nullptr;
        if (read == nullptr) {
          std::fill_n(sums, count * panel, 0.0f);
          continue;
        }
        const Term term = {read + (first_image + n) * D, D, side.weight + o * D, D};
        multiply_for<T>(count, panel)(&term, 1, sums);
      }
      row += count;
    }
  }

  // Tiles [first_tile, last_tile) of images [first_image, first_image + images), panels of one
  // group.
  void run(Index first_tile, Index last_tile, Index first_image, Index images, Index group,
           Index groups) const {
    static thread_local Scratch scratch;
    const Index K = words(), rows = (last_tile - first_tile) * images;
    const Index input_stride = rows * K + kSkew;
    const Index at_once = std::min(rows, rows_at_once);
    const Index product_stride = at_once * widest() + kSkew;
    const Index zero_words = images * K;
    float* memory = scratch.floats(kPoints * input_stride +
                                   (kPoints + kTilePixels) * product_stride + zero_words);
    Word* input = reinterpret_cast<Word*>(memory);
    float* products = memory + kPoints * input_stride;
    float* added = products + kPoints * product_stride;
    float* zeros = added + kTilePixels * product_stride;
    std::fill_n(zeros, zero_words, 0.0f);

    for (Index tile = first_tile; tile < last_tile; ++tile) {
      transform_input(tile, first_image, images, reinterpret_cast<const Element*>(zeros),
                      input + (tile - first_tile) * images * K, input_stride);
    }
    const Index panels = num_panels(sizes.O);
    Index index = 0;
    for_each_panel(sizes.O, [&](Index o, Index panel) {
      if (index++ * groups / panels != group) return;
      const Word* own = weight + o * kPoints * K;
      for_each_part(rows, at_once, [&](Index first, Index count) {
        for (Index point = 0; point < kPoints; ++point) {
          const Word* from = input + point * input_stride + first * K;
          float* sums = products + point * product_stride;
          for_each_part(count, max_rows(panel), [&](Index row, Index height) {
            const Term term = {from + row * K, K, own + point * K * panel, K};
            multiply_for<T>(height, panel)(&term, 1, sums + row * panel);
          });
        }
        if (side.source != nullptr) {
          add_side(first_tile, first_image, images, first, count, o, panel, added, product_stride);
        }
        for (Index row = 0; row < count; ++row) {
          const Index tile = first_tile + (first + row) / images;
          const Index n = first_image + (first + row) % images;
          transform_output(products + row * panel, product_stride,
                           side.source == nullptr ? nullptr : added + row * panel, product_stride,
                           tile, n, o, panel);
        }
      });
    });
  }
};

template <typename T>
void winograd(const void* source, const void* weight, const void* side, const void* side_weight,
              const float* bias, const void* addend, const void* activation, void* output,
              const ConvSizes& sizes, bool relu, bool float32_output, int num_threads) {
  using Element = typename T::Element;
  if (sizes.N == 0) return;
  Winograd<T> conv{};
  conv.sizes = sizes;
  conv.source = static_cast<const Element*>(source);
  conv.weight = static_cast<const Word*>(weight);
  conv.side = make_side<T>(side, side_weight, sizes);
  conv.epilogue = make_epilogue<T>(bias, addend, activation, output, relu, float32_output);
  conv.plan();
  const Index tile_blocks = divide_up(conv.num_tiles, conv.tiles_per_unit);
  const Index image_blocks = divide_up(sizes.N, conv.images_per_unit);
  const Index blocks = tile_blocks * image_blocks;
  // Few tiles: the output channels are shared out too, and each share transforms the input again.
  const Index panels = num_panels(sizes.O), threads = thread_count(num_threads);
  const Index groups = blocks >= 4 * threads ? 1 : std::min(panels, divide_up(4 * threads, blocks));
  parallel_units(blocks * groups, num_threads, [&](Index unit) {
    const Index group = unit / blocks, block = unit % blocks;
    const Index tile = block / image_blocks * conv.tiles_per_unit;
    const Index image = block % image_blocks * conv.images_per_unit;
    conv.run(tile, std::min(conv.num_tiles, tile + conv.tiles_per_unit), image,
             std::min(conv.images_per_unit, sizes.N - image), group, groups);
  });
}

}  // namespace

void conv_winograd(const void* source, const void* weight, const void* side,
                   const void* side_weight, const float* bias, const void* addend,
                   const void* activation, void* output, ConvSizes sizes, bool relu,
                   bool float32_output, int dtype, int num_threads) {
  with_dtype(dtype, [&](auto type) {
    winograd<decltype(type)>(source, weight, side, side_weight, bias, addend, activation, output,
                             sizes, relu, float32_output, num_threads);
  });
}

}  // namespace moe_kernels::MOE_KERNELS_INSTRUCTIONS
#endif
