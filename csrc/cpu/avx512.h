// The inner product of the CPU convolutions: small blocks of rows x columns in registers.
//
// Values are [H, W, N, C], slabs with E = 1, bfloat16 or float32: the images of one pixel lie side
// by side, so that a filter tap multiplies whole rows of channels. A *word* is what one
// multiply-add broadcasts: two neighboring bfloat16 channels, or one float32 channel. Sums are
// float32 in a fixed order, one accumulator each, so the bits of an image depend neither on the
// batch nor on the threads.
//
// Axes: K words of one row, O output channels; a *panel* is up to 64 output channels, whose weights
// lie together as [taps, K, panel] words.
#pragma once

#include "kernels.h"

// Functions are compiled for these instructions one by one and the caller asks the CPU first: the
// binary runs on every x86-64 machine. Float32 functions carry the mark as well, but the compiler
// uses AVX512-BF16 only where an intrinsic asks for it, so they need the other four alone.
#ifdef MOE_KERNELS_CPU_LAYERS
#define MOE_KERNELS_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

// GCC 12 takes what its own intrinsics leave undefined on purpose for a mistake.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstdlib>
#include <cstring>
#include <new>

namespace moe_kernels {

// Two bfloat16 or one float32; reading either through it is legal.
typedef std::uint32_t __attribute__((may_alias)) Word;

constexpr Index kLanes = 16;
constexpr Index kMaxPanel = 64;

// Where Winograd's transforms evaluate, beside 0 and infinity, and the squares.
constexpr float kNear = 0.75f, kNear2 = kNear * kNear;
constexpr float kFar = 1.5f, kFar2 = kFar * kFar;

inline Index panel_width(Index remaining) {
  return remaining >= 64 ? 64 : remaining >= 32 ? 32 : 16;
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

struct BFloat16 {
  using Element = std::uint16_t;
  static constexpr Index kPerWord = 2;

  // Winograd's transformed rows hold the even channels of each 32, then the odd ones.
  static constexpr Index channel_at(Index place) {
    return place < 16 ? 2 * place : 2 * (place - 16) + 1;
  }

  MOE_KERNELS_AVX512 static inline __m512 dot(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  MOE_KERNELS_AVX512 static inline __m512 load(const Element* from) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  MOE_KERNELS_AVX512 static inline void store(Element* to, __m512 value) {
    const __m256bh half = _mm512_cvtneps_pbh(value);
    std::memcpy(to, &half, sizeof half);
  }
};

struct Float32 {
  using Element = float;
  static constexpr Index kPerWord = 1;

  static constexpr Index channel_at(Index place) { return place; }

  MOE_KERNELS_AVX512 static inline __m512 dot(__m512 sum, __m512i a, __m512i b) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
  }
  MOE_KERNELS_AVX512 static inline __m512 load(const Element* from) {
    return _mm512_loadu_ps(from);
  }
  MOE_KERNELS_AVX512 static inline void store(Element* to, __m512 value) {
    _mm512_storeu_ps(to, value);
  }
};

// out[row][column] = sum over terms and their words. ROWS x COLUMNS accumulators, the weights of
// one word and one broadcast word have to fit into 32 registers.
template <typename T, int ROWS, int COLUMNS>
MOE_KERNELS_AVX512 void multiply(const Term* terms, Index num_terms, float* out) {
  __m512 sums[ROWS][COLUMNS];
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 4
    for (int column = 0; column < COLUMNS; ++column) sums[row][column] = _mm512_setzero_ps();
  }
  for (const Term* term = terms; term < terms + num_terms; ++term) {
    const Word* rows = term->rows;
    const Word* panel = term->panel;
    const Index stride = term->row_stride;
    for (Index k = 0; k < term->K; ++k) {
      __m512i weights[COLUMNS];
#pragma GCC unroll 4
      for (int column = 0; column < COLUMNS; ++column) {
        weights[column] = _mm512_loadu_si512(panel + column * kLanes);
      }
#pragma GCC unroll 16
      for (int row = 0; row < ROWS; ++row) {
        const __m512i value = _mm512_set1_epi32(static_cast<int>(rows[row * stride + k]));
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
      _mm512_storeu_ps(out + (row * COLUMNS + column) * kLanes, sums[row][column]);
    }
  }
}

using Multiply = void (*)(const Term*, Index, float*);

// The kernel for a number of rows, at most max_rows(panel).
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

  MOE_KERNELS_AVX512 inline void store(__m512 sum, Index offset, Index o) const {
    const __m512 zero = _mm512_setzero_ps();
    if (bias != nullptr) sum = _mm512_add_ps(sum, _mm512_loadu_ps(bias + o));
    if (addend != nullptr) sum = _mm512_add_ps(sum, T::load(addend + offset));
    // The second operand comes back if one is NaN.
    if (relu) sum = _mm512_max_ps(zero, sum);
    if (activation != nullptr) {
      const __m512 source = T::load(activation + offset);
      sum = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(source, zero, _CMP_GT_OQ), sum);
    }
    if (float32_output) {
      _mm512_storeu_ps(static_cast<float*>(output) + offset, sum);
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

}  // namespace moe_kernels
#endif
