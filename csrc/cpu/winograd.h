// Winograd's F(2x4, 3x3) as convolution and weight gradient share it: see conv_winograd.cpp.
#pragma once

#include "cpu/avx512.h"

#ifdef MOE_KERNELS_CPU_LAYERS

namespace moe_kernels {

constexpr Index kPoints = 24;  // of a transformed tile, 4 x 6
constexpr Index kTileWidth = 4;
constexpr Index kTilePixels = 8;

struct Pair {
  __m512 a, b;
};

// 32 channels as two vectors, and back as one row of words. bfloat16: even and odd channels, which
// takes a shift and a mask; `channel_at` says where they end up. float32: or 16 channels, as one.
template <typename T>
struct Halves;

template <>
struct Halves<BFloat16> {
  MOE_KERNELS_AVX512 static inline Pair load(const std::uint16_t* from) {
    const __m512i both = _mm512_loadu_si512(from);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(-65536)))};
  }
  MOE_KERNELS_AVX512 static inline void store(Word* to, Pair x) {
    const __m512bh both = _mm512_cvtne2ps_pbh(x.b, x.a);
    std::memcpy(to, &both, sizeof both);
  }
};

template <>
struct Halves<Float32> {
  MOE_KERNELS_AVX512 static inline Pair load(const float* from) {
    return {_mm512_loadu_ps(from), _mm512_loadu_ps(from + kLanes)};
  }
  MOE_KERNELS_AVX512 static inline void store(Word* to, Pair x) {
    _mm512_storeu_ps(to, x.a);
    _mm512_storeu_ps(to + kLanes, x.b);
  }
};

struct FirstHalf {
  MOE_KERNELS_AVX512 static inline Pair load(const float* from) {
    return {_mm512_loadu_ps(from), _mm512_setzero_ps()};
  }
  MOE_KERNELS_AVX512 static inline void store(Word* to, Pair x) { _mm512_storeu_ps(to, x.a); }
};

MOE_KERNELS_AVX512 inline Pair operator+(Pair x, Pair y) {
  return {_mm512_add_ps(x.a, y.a), _mm512_add_ps(x.b, y.b)};
}
MOE_KERNELS_AVX512 inline Pair operator-(Pair x, Pair y) {
  return {_mm512_sub_ps(x.a, y.a), _mm512_sub_ps(x.b, y.b)};
}

// x * factor + y.
MOE_KERNELS_AVX512 inline __m512 scaled(__m512 x, float factor, __m512 y) {
  return _mm512_fmadd_ps(x, _mm512_set1_ps(factor), y);
}
MOE_KERNELS_AVX512 inline Pair scaled(Pair x, float factor, Pair y) {
  return {scaled(x.a, factor, y.a), scaled(x.b, factor, y.b)};
}

// Row k of B2^T d B4, its six points, of channels from i on. pixels: the tile d, 4 x 6.
template <typename Half, typename Element>
MOE_KERNELS_AVX512 inline void input_row(const Element* const (*pixels)[6], Index i, int k,
                                         Pair points[6]) {
  // B2^T: d0 - d2, d1 + d2, d2 - d1, d1 - d3.
  const Element* const* first = pixels[k == 0 ? 0 : k == 2 ? 2 : 1];
  const Element* const* second = pixels[k < 2 ? 2 : k == 2 ? 1 : 3];
  Pair d[6];
#pragma GCC unroll 6
  for (int j = 0; j < 6; ++j) {
    const Pair x = Half::load(first[j] + i), y = Half::load(second[j] + i);
    d[j] = k == 1 ? x + y : x - y;
  }
  const Pair near_even = scaled(d[2], -kFar2, d[4]), near_odd = scaled(d[1], -kFar2, d[3]);
  const Pair far_even = scaled(d[2], -kNear2, d[4]), far_odd = scaled(d[1], -kNear2, d[3]);
  points[0] = scaled(d[0], kNear2 * kFar2, scaled(d[2], -(kNear2 + kFar2), d[4]));
  points[1] = scaled(near_odd, kNear, near_even);
  points[2] = scaled(near_odd, -kNear, near_even);
  points[3] = scaled(far_odd, kFar, far_even);
  points[4] = scaled(far_odd, -kFar, far_even);
  points[5] = scaled(d[1], kNear2 * kFar2, scaled(d[3], -(kNear2 + kFar2), d[5]));
}

}  // namespace moe_kernels
#endif
