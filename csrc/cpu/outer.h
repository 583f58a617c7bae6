// The inner product of weight gradients: sums over pixels and images, small blocks in registers.
//
// A *word* holds one channel of two images in bfloat16, of one image in float32: see `image_pairs`.
#pragma once

#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/product.h"

#ifdef MOE_KERNELS_CPU_LAYERS

namespace moe_kernels::MOE_KERNELS_INSTRUCTIONS {

// K words of some rows, and the K words of some columns that they meet.
struct OuterTerm {
  const Word* rows;  // [K, row_stride]
  Index row_stride;
  const Word* panel;  // [K, panel_stride]
  Index panel_stride;
  Index K;
};

// out[row, column] = (add: +=) sum over terms and k of rows[k, row] * panel[k, column].
template <typename T, int ROWS, int COLUMNS>
MOE_KERNELS_SIMD void outer(const OuterTerm* terms, Index num_terms, float* out, Index out_stride,
                            bool add) {
  Vector sums[ROWS][COLUMNS];
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 4
    for (int column = 0; column < COLUMNS; ++column) {
      sums[row][column] = add ? load(out + row * out_stride + column * kLanes) : zero();
    }
  }
  for (const OuterTerm* term = terms; term < terms + num_terms; ++term) {
    const Word* rows = term->rows;
    const Word* panel = term->panel;
    for (Index k = 0; k < term->K; ++k) {
      Words columns[COLUMNS];
#pragma GCC unroll 4
      for (int column = 0; column < COLUMNS; ++column) {
        columns[column] = load_words(panel + column * kLanes);
      }
#pragma GCC unroll 16
      for (int row = 0; row < ROWS; ++row) {
        const Words value = repeat(rows[row]);
#pragma GCC unroll 4
        for (int column = 0; column < COLUMNS; ++column) {
          sums[row][column] = T::dot(sums[row][column], value, columns[column]);
        }
      }
      rows += term->row_stride;
      panel += term->panel_stride;
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 4
    for (int column = 0; column < COLUMNS; ++column) {
      store(out + row * out_stride + column * kLanes, sums[row][column]);
    }
  }
}

using Outer = void (*)(const OuterTerm*, Index, float*, Index, bool);

constexpr Index kOuterRows = 6;

template <typename T, int COLUMNS>
constexpr Outer kOuter[kOuterRows] = {outer<T, 1, COLUMNS>, outer<T, 2, COLUMNS>,
                                      outer<T, 3, COLUMNS>, outer<T, 4, COLUMNS>,
                                      outer<T, 5, COLUMNS>, outer<T, 6, COLUMNS>};

// The kernel for at most kOuterRows rows.
template <typename T>
Outer outer_for(Index rows, [[maybe_unused]] Index panel) {
#ifdef MOE_KERNELS_AVX512
  if (panel == 64) return kOuter<T, 4>[rows - 1];
  if (panel == 32) return kOuter<T, 2>[rows - 1];
#endif
  return kOuter<T, 1>[rows - 1];
}

// Any number of rows: `terms` is changed.
template <typename T>
void outer_rows(OuterTerm* terms, Index num_terms, Index rows, Index panel, float* out,
                Index out_stride, bool add) {
  for_each_part(rows, kOuterRows, [&](Index first, Index height) {
    outer_for<T>(height, panel)(terms, num_terms, out + first * out_stride, out_stride, add);
    for (Index i = 0; i < num_terms; ++i) terms[i].rows += height;
  });
}

#ifdef MOE_KERNELS_AVX512
// Two vectors of float32 as words: one channel of two images each.
MOE_KERNELS_SIMD inline void store_words(Word* to, Vector first, Vector second) {
  alignas(64) static constexpr std::uint16_t kInterleaved[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second.lanes, first.lanes);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(kInterleaved), both));
}
#endif

}  // namespace moe_kernels::MOE_KERNELS_INSTRUCTIONS
#endif
