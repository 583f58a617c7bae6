// The inner product of the CPU convolutions: small blocks of rows x columns in registers.
//
// Values are [H, W, N, C], slabs with E = 1, bfloat16 or float32: the images of one pixel lie side
// by side, so that a filter tap multiplies whole rows of channels. A *word* is what one
// multiply-add broadcasts: two neighboring bfloat16 channels, or one float32 channel. Sums are
// float32 in a fixed order, one accumulator each, so the bits of an image depend neither on the
// batch nor on the threads.
//
// Axes: K words of one row, O output channels; a *panel* is up to 64 output channels (AVX2: 16),
// whose weights lie together as [taps, K, panel] words.
#pragma once

#include <cstdlib>
#include <new>

#include "cpu/layers.h"
#include "cpu/vectors.h"

#ifdef MOE_KERNELS_CPU_LAYERS

namespace moe_kernels::MOE_KERNELS_INSTRUCTIONS {

#ifdef MOE_KERNELS_AVX512
constexpr Index kMaxPanel = 64;
constexpr Index kSecondCache = 1 << 20;  // bytes, per core
#else
constexpr Index kMaxPanel = 16;
constexpr Index kSecondCache = 1 << 19;
#endif

// Where Winograd's transforms evaluate, beside 0 and infinity, and the squares.
constexpr float kNear = 0.75f, kNear2 = kNear * kNear;
constexpr float kFar = 1.5f, kFar2 = kFar * kFar;

inline Index panel_width(Index remaining) {
  Index width = kMaxPanel;
  while (width > remaining && width > kLanes) width /= 2;
  return width;
}

inline Index num_panels(Index O) {
  Index panels = 0;
  for (Index o = 0; o < O; o += panel_width(O - o)) ++panels;
  return panels;
}

// Calls body(first output channel, width) for each panel.
template <typename Body>
void for_each_panel(Index O, Body body) {
  for (Index o = 0; o < O; o += panel_width(O - o)) body(o, panel_width(O - o));
}

// Scratch memory of one thread, kept between calls.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }

  float* floats(Index count) {
    if (count > size_) {
      std::free(memory_);
      size_ = 0;
      const std::size_t bytes = (count * sizeof(float) + 4095) / 4096 * 4096;
      memory_ = static_cast<float*>(std::aligned_alloc(4096, bytes));
      if (memory_ == nullptr) throw std::bad_alloc();
      size_ = count;
    }
    return memory_;
  }

 private:
  float* memory_ = nullptr;
  Index size_ = 0;
};

// Rows of one tap and the weights they meet.
struct Term {
  const Word* rows;
  Index row_stride;  // words
  const Word* panel;
  Index K;
};

// out[row][column] = sum over terms and their words. ROWS x COLUMNS accumulators, the weights of
// one word and one broadcast word have to fit into the registers: 32, or of AVX2 16 half as long.
template <typename T, int ROWS, int COLUMNS>
MOE_KERNELS_SIMD void multiply(const Term* terms, Index num_terms, float* out) {
  Vector sums[ROWS][COLUMNS];
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 4
    for (int column = 0; column < COLUMNS; ++column) sums[row][column] = zero();
  }
  for (const Term* term = terms; term < terms + num_terms; ++term) {
    const Word* rows = term->rows;
    const Word* panel = term->panel;
    const Index stride = term->row_stride;
    for (Index k = 0; k < term->K; ++k) {
      Words weights[COLUMNS];
#pragma GCC unroll 4
      for (int column = 0; column < COLUMNS; ++column) {
        weights[column] = load_words(panel + column * kLanes);
      }
#pragma GCC unroll 16
      for (int row = 0; row < ROWS; ++row) {
        const Words value = repeat(rows[row * stride + k]);
#pragma GCC unroll 4
        for (int column = 0; column < COLUMNS; ++column) {
          sums[row][column] = T::dot(sums[row][column], value, weights[column]);
        }
      }
      panel += COLUMNS * kLanes;
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 4
    for (int column = 0; column < COLUMNS; ++column) {
      store(out + (row * COLUMNS + column) * kLanes, sums[row][column]);
    }
  }
}

using Multiply = void (*)(const Term*, Index, float*);

// The kernel for a number of rows, at most max_rows(panel).
#ifdef MOE_KERNELS_AVX512
inline Index max_rows(Index panel) { return panel == 64 ? 6 : panel == 32 ? 12 : 16; }

template <typename T>
Multiply multiply_for(Index rows, Index panel) {
  static constexpr Multiply narrow[] = {
      multiply<T, 1, 1>,  multiply<T, 2, 1>,  multiply<T, 3, 1>,  multiply<T, 4, 1>,
      multiply<T, 5, 1>,  multiply<T, 6, 1>,  multiply<T, 7, 1>,  multiply<T, 8, 1>,
      multiply<T, 9, 1>,  multiply<T, 10, 1>, multiply<T, 11, 1>, multiply<T, 12, 1>,
      multiply<T, 13, 1>, multiply<T, 14, 1>, multiply<T, 15, 1>, multiply<T, 16, 1>};
  static constexpr Multiply middle[] = {multiply<T, 1, 2>,  multiply<T, 2, 2>,  multiply<T, 3, 2>,
                                        multiply<T, 4, 2>,  multiply<T, 5, 2>,  multiply<T, 6, 2>,
                                        multiply<T, 7, 2>,  multiply<T, 8, 2>,  multiply<T, 9, 2>,
                                        multiply<T, 10, 2>, multiply<T, 11, 2>, multiply<T, 12, 2>};
  static constexpr Multiply wide[] = {multiply<T, 1, 4>, multiply<T, 2, 4>, multiply<T, 3, 4>,
                                      multiply<T, 4, 4>, multiply<T, 5, 4>, multiply<T, 6, 4>};
  return panel == 64 ? wide[rows - 1] : panel == 32 ? middle[rows - 1] : narrow[rows - 1];
}

// Channels of a panel that are computed, of which `left` are no padding.
inline Index filled(Index panel, Index) { return panel; }
#else
// The same for a panel whose last 8 channels are padding: zeros.
template <int ROWS>
MOE_KERNELS_SIMD void multiply_half(const Term* terms, Index num_terms, float* out) {
  __m256 sums[ROWS];
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; ++row) sums[row] = _mm256_setzero_ps();
  for (const Term* term = terms; term < terms + num_terms; ++term) {
    const float* rows = reinterpret_cast<const float*>(term->rows);
    const float* panel = reinterpret_cast<const float*>(term->panel);
    for (Index k = 0; k < term->K; ++k) {
      const __m256 weights = _mm256_loadu_ps(panel + k * kLanes);
#pragma GCC unroll 16
      for (int row = 0; row < ROWS; ++row) {
        const __m256 value = _mm256_broadcast_ss(rows + row * term->row_stride + k);
        sums[row] = _mm256_fmadd_ps(value, weights, sums[row]);
      }
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; ++row) store(out + row * kLanes, {sums[row], _mm256_setzero_ps()});
}

constexpr Index kHalfPanel = 8;

inline Index filled(Index panel, Index left) { return left <= kHalfPanel ? kHalfPanel : panel; }

inline Index max_rows(Index panel) { return panel == kHalfPanel ? 12 : 6; }

template <typename T>
Multiply multiply_for(Index rows, Index panel) {
  static constexpr Multiply half[] = {multiply_half<1>,  multiply_half<2>,  multiply_half<3>,
                                      multiply_half<4>,  multiply_half<5>,  multiply_half<6>,
                                      multiply_half<7>,  multiply_half<8>,  multiply_half<9>,
                                      multiply_half<10>, multiply_half<11>, multiply_half<12>};
  static constexpr Multiply whole[] = {multiply<T, 1, 1>, multiply<T, 2, 1>, multiply<T, 3, 1>,
                                       multiply<T, 4, 1>, multiply<T, 5, 1>, multiply<T, 6, 1>};
  return panel == kHalfPanel ? half[rows - 1] : whole[rows - 1];
}
#endif

// What happens to a finished sum before it is stored: + bias, + addend, ReLU, zero where a ReLU cut
// before. The pointers may be null; addend and activation have the shape of the output.
template <typename T>
struct Epilogue {
  using Element = typename T::Element;

  const float* bias;
  const Element* addend;
  const Element* activation;  // zero where this is not positive
  void* output;
  bool relu;
  bool float32_output;

  MOE_KERNELS_SIMD inline void store(Vector sum, Index offset, Index o) const {
    if (bias != nullptr) sum = sum + load(bias + o);
    if (addend != nullptr) sum = sum + T::load(addend + offset);
    if (relu) sum = larger(zero(), sum);  // NaN stays
    if (activation != nullptr) sum = where(greater(T::load(activation + offset), zero()), sum);
    if (float32_output) {
      MOE_KERNELS_INSTRUCTIONS::store(static_cast<float*>(output) + offset, sum);
    } else {
      T::store(static_cast<Element*>(output) + offset, sum);
    }
  }
};

template <typename T>
Epilogue<T> make_epilogue(const float* bias, const void* addend, const void* activation,
                          void* output, bool relu, bool float32_output = false) {
  using Element = typename T::Element;
  return {bias,
          static_cast<const Element*>(addend),
          static_cast<const Element*>(activation),
          output,
          relu,
          float32_output};
}

// Source pixel of output position `p` and tap `r` along one axis of `size` pixels, or -1; see
// conv_direct.cpp.
inline Index source_pixel(const ConvSizes& sizes, Index p, Index r, Index size) {
  Index pixel = p * sizes.stride + r - sizes.padding;
  if (sizes.input_grad) {
    pixel = p + sizes.padding - r;
    if (pixel < 0 || pixel % sizes.stride != 0) return -1;
    pixel /= sizes.stride;
  }
  return pixel >= 0 && pixel < size ? pixel : -1;
}

// A 1x1 convolution added to the sum, or its input gradient. `source` is null if there is none.
template <typename T>
struct Side {
  const typename T::Element* source;  // [H, W, N, C]
  const Word* weight;
  Index H, W, C, stride;

  Index words() const { return C / T::kPerWord; }

  // The rows that output pixel (p, q) reads, or null where the gradient reaches no input.
  const Word* rows(Index p, Index q, Index N, bool input_grad) const {
    Index h = p * stride, w = q * stride;
    if (input_grad) {
      if (p % stride != 0 || q % stride != 0) return nullptr;
      h = p / stride;
      w = q / stride;
    }
    if (h >= H || w >= W) return nullptr;
    return reinterpret_cast<const Word*>(source + (h * W + w) * N * C);
  }
};

template <typename T>
Side<T> make_side(const void* side, const void* weight, const ConvSizes& sizes) {
  return {static_cast<const typename T::Element*>(side),
          static_cast<const Word*>(weight),
          sizes.side_H,
          sizes.side_W,
          sizes.D,
          sizes.side_stride};
}

}  // namespace moe_kernels::MOE_KERNELS_INSTRUCTIONS
#endif
