// Winograd's F(2x4, 3x3) as convolution and weight gradient share it: see conv_winograd.cpp.
#pragma once

#include "cpu/product.h"

#ifdef MOE_KERNELS_CPU_LAYERS

namespace moe_kernels::MOE_KERNELS_INSTRUCTIONS {

constexpr Index kPoints = 24;  // of a transformed tile, 4 x 6
constexpr Index kTileWidth = 4;
constexpr Index kTilePixels = 8;

// Transforms handle a group of channels at a time: as many as the registers hold. `Groups<T>` reads
// one from values and writes one to words.
template <typename T>
struct Groups;

#ifdef MOE_KERNELS_AVX512

constexpr Index kGroup = 32;

struct Group {
  Vector a, b;
};

// Even and odd channels, which takes a shift and a mask; `channel_at` says where they end up, and
// `in_order` puts them back.
template <>
struct Groups<BFloat16> {
  MOE_KERNELS_SIMD static inline Group load(const std::uint16_t* from) {
    const __m512i both = _mm512_loadu_si512(from);
    return {{_mm512_castsi512_ps(_mm512_slli_epi32(both, 16))},
            {_mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(-65536)))}};
  }
  MOE_KERNELS_SIMD static inline void store(Word* to, Group x) {
    const __m512bh both = _mm512_cvtne2ps_pbh(x.b.lanes, x.a.lanes);
    std::memcpy(to, &both, sizeof both);
  }
  MOE_KERNELS_SIMD static inline Group in_order(Group x) {
    alignas(64) static constexpr std::int32_t kOrder[2][16] = {
        {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23},
        {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31}};
    const auto half = [&](int i) MOE_KERNELS_SIMD -> Vector {
      const __m512i order = _mm512_load_si512(kOrder[i]);
      return {_mm512_permutex2var_ps(x.a.lanes, order, x.b.lanes)};
    };
    return {half(0), half(1)};
  }
};

MOE_KERNELS_SIMD inline Group load_group(const float* from) {
  return {load(from), load(from + kLanes)};
}
MOE_KERNELS_SIMD inline void store_group(float* to, Group x) {
  store(to, x.a);
  store(to + kLanes, x.b);
}
MOE_KERNELS_SIMD inline Group operator+(Group x, Group y) { return {x.a + y.a, x.b + y.b}; }
MOE_KERNELS_SIMD inline Group operator-(Group x, Group y) { return {x.a - y.a, x.b - y.b}; }
MOE_KERNELS_SIMD inline Group scaled(Group x, float factor) {
  return {x.a * all(factor), x.b * all(factor)};
}
// x * factor + y.
MOE_KERNELS_SIMD inline Group scaled(Group x, float factor, Group y) {
  return {multiply_add(x.a, all(factor), y.a), multiply_add(x.b, all(factor), y.b)};
}

// The first half of a group, of 16 channels in float32.
struct HalfGroup {
  MOE_KERNELS_SIMD static inline Group load(const float* from) {
    return {MOE_KERNELS_INSTRUCTIONS::load(from), zero()};
  }
  MOE_KERNELS_SIMD static inline void store(Word* to, Group x) {
    MOE_KERNELS_INSTRUCTIONS::store(reinterpret_cast<float*>(to), x.a);
  }
};

#else

constexpr Index kGroup = 8;

struct Group {
  __m256 lanes;
};

MOE_KERNELS_SIMD inline Group load_group(const float* from) { return {_mm256_loadu_ps(from)}; }
MOE_KERNELS_SIMD inline void store_group(float* to, Group x) { _mm256_storeu_ps(to, x.lanes); }
MOE_KERNELS_SIMD inline Group operator+(Group x, Group y) {
  return {_mm256_add_ps(x.lanes, y.lanes)};
}
MOE_KERNELS_SIMD inline Group operator-(Group x, Group y) {
  return {_mm256_sub_ps(x.lanes, y.lanes)};
}
MOE_KERNELS_SIMD inline Group scaled(Group x, float factor) {
  return {_mm256_mul_ps(x.lanes, _mm256_set1_ps(factor))};
}
// x * factor + y.
MOE_KERNELS_SIMD inline Group scaled(Group x, float factor, Group y) {
  return {_mm256_fmadd_ps(x.lanes, _mm256_set1_ps(factor), y.lanes)};
}

#endif

template <>
struct Groups<Float32> {
  MOE_KERNELS_SIMD static inline Group load(const float* from) { return load_group(from); }
  MOE_KERNELS_SIMD static inline void store(Word* to, Group x) {
    store_group(reinterpret_cast<float*>(to), x);
  }
  MOE_KERNELS_SIMD static inline Group in_order(Group x) { return x; }
};

// B2^T d of a group of channels, from i on; pixels: the tile d, 4 x 6.
template <typename Reader, typename Element>
class InputRows {
 public:
#ifdef MOE_KERNELS_AVX512
  MOE_KERNELS_SIMD inline void read(const Element* const (*pixels)[6], Index i) {
    pixels_ = pixels;
    i_ = i;
  }

  // Row k, of d0 - d2, d1 + d2, d2 - d1, d1 - d3.
  MOE_KERNELS_SIMD inline void get(int k, Group (&row)[6]) const {
    const Element* const* first = pixels_[k == 0 ? 0 : k == 2 ? 2 : 1];
    const Element* const* second = pixels_[k < 2 ? 2 : k == 2 ? 1 : 3];
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) {
      const Group x = Reader::load(first[j] + i_), y = Reader::load(second[j] + i_);
      row[j] = k == 1 ? x + y : x - y;
    }
  }

 private:
  const Element* const (*pixels_)[6];
  Index i_;
#else
  // Pixels often lie a multiple of 4096 bytes apart and evict each other from the first cache, so
  // each is read once; the rows are kept on the stack.
  MOE_KERNELS_SIMD inline void read(const Element* const (*pixels)[6], Index i) {
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) {
      const Group d0 = Reader::load(pixels[0][j] + i), d1 = Reader::load(pixels[1][j] + i);
      const Group d2 = Reader::load(pixels[2][j] + i), d3 = Reader::load(pixels[3][j] + i);
      rows_[0][j] = d0 - d2;
      rows_[1][j] = d1 + d2;
      rows_[2][j] = d2 - d1;
      rows_[3][j] = d1 - d3;
    }
  }

  MOE_KERNELS_SIMD inline void get(int k, Group (&row)[6]) const {
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) row[j] = rows_[k][j];
  }

 private:
  Group rows_[4][6];
#endif
};

// A row of B2^T d times B4: its six points.
MOE_KERNELS_SIMD inline void input_points(const Group (&d)[6], Group (&points)[6]) {
  const Group near_even = scaled(d[2], -kFar2, d[4]), near_odd = scaled(d[1], -kFar2, d[3]);
  const Group far_even = scaled(d[2], -kNear2, d[4]), far_odd = scaled(d[1], -kNear2, d[3]);
  points[0] = scaled(d[0], kNear2 * kFar2, scaled(d[2], -(kNear2 + kFar2), d[4]));
  points[1] = scaled(near_odd, kNear, near_even);
  points[2] = scaled(near_odd, -kNear, near_even);
  points[3] = scaled(far_odd, kFar, far_even);
  points[4] = scaled(far_odd, -kFar, far_even);
  points[5] = scaled(d[1], kNear2 * kFar2, scaled(d[3], -(kNear2 + kFar2), d[5]));
}

}  // namespace moe_kernels::MOE_KERNELS_INSTRUCTIONS
#endif
