// Vectors of 16 float32, in the instructions that a file is compiled for.
//
// The layers are compiled twice, for AVX-512 and for AVX2, into the namespaces `avx512` and `avx2`.
// Sums have the same order in both; bfloat16 is AVX-512's alone.
// Functions carry a mark one by one and the caller asks the CPU first: the binary runs on every
// x86-64 machine.
#pragma once

#include <stdexcept>

#include "kernels.h"

#ifdef MOE_KERNELS_CPU_LAYERS

// GCC 12 takes what its own intrinsics leave undefined on purpose for a mistake.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstring>

#ifdef MOE_KERNELS_AVX512
#define MOE_KERNELS_INSTRUCTIONS avx512
// Float32 functions carry the mark of bfloat16 as well, but the compiler uses AVX512-BF16 only
// where an intrinsic asks for it, so they need the other four alone.
#define MOE_KERNELS_SIMD __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#else
#define MOE_KERNELS_INSTRUCTIONS avx2
#define MOE_KERNELS_SIMD __attribute__((target("avx2,fma")))
#endif

namespace moe_kernels::MOE_KERNELS_INSTRUCTIONS {

// Two bfloat16 or one float32; reading either through it is legal.
typedef std::uint32_t __attribute__((may_alias)) Word;

constexpr Index kLanes = 16;

#ifdef MOE_KERNELS_AVX512

struct Vector {
  __m512 lanes;
};
struct Words {
  __m512i lanes;
};
struct Mask {
  __mmask16 lanes;
};

MOE_KERNELS_SIMD inline Vector all(float x) { return {_mm512_set1_ps(x)}; }
MOE_KERNELS_SIMD inline Vector load(const float* from) { return {_mm512_loadu_ps(from)}; }
MOE_KERNELS_SIMD inline void store(float* to, Vector x) { _mm512_storeu_ps(to, x.lanes); }
MOE_KERNELS_SIMD inline Vector operator+(Vector x, Vector y) {
  return {_mm512_add_ps(x.lanes, y.lanes)};
}
MOE_KERNELS_SIMD inline Vector operator-(Vector x, Vector y) {
  return {_mm512_sub_ps(x.lanes, y.lanes)};
}
MOE_KERNELS_SIMD inline Vector operator*(Vector x, Vector y) {
  return {_mm512_mul_ps(x.lanes, y.lanes)};
}
// x * y + z, rounded once.
MOE_KERNELS_SIMD inline Vector multiply_add(Vector x, Vector y, Vector z) {
  return {_mm512_fmadd_ps(x.lanes, y.lanes, z.lanes)};
}
// The larger of both; y if one is NaN.
MOE_KERNELS_SIMD inline Vector larger(Vector x, Vector y) {
  return {_mm512_max_ps(x.lanes, y.lanes)};
}
MOE_KERNELS_SIMD inline float total(Vector x) { return _mm512_reduce_add_ps(x.lanes); }

MOE_KERNELS_SIMD inline Mask operator&(Mask x, Mask y) {
  return {static_cast<__mmask16>(x.lanes & y.lanes)};
}
MOE_KERNELS_SIMD inline Mask operator|(Mask x, Mask y) {
  return {static_cast<__mmask16>(x.lanes | y.lanes)};
}
MOE_KERNELS_SIMD inline Mask operator~(Mask x) { return {static_cast<__mmask16>(~x.lanes)}; }
MOE_KERNELS_SIMD inline bool any(Mask x) { return x.lanes != 0; }
// The lanes before `count`.
MOE_KERNELS_SIMD inline Mask first_lanes(Index count) {
  if (count >= kLanes) return {0xffff};
  return {static_cast<__mmask16>((1u << (count < 0 ? 0 : count)) - 1)};
}
MOE_KERNELS_SIMD inline Mask greater(Vector x, Vector y) {
  return {_mm512_cmp_ps_mask(x.lanes, y.lanes, _CMP_GT_OQ)};
}
MOE_KERNELS_SIMD inline Mask equal(Vector x, Vector y) {
  return {_mm512_cmp_ps_mask(x.lanes, y.lanes, _CMP_EQ_OQ)};
}
// Whether x >= y is false, as it is of NaN.
MOE_KERNELS_SIMD inline Mask not_at_least(Vector x, Vector y) {
  return {_mm512_cmp_ps_mask(x.lanes, y.lanes, _CMP_NGE_UQ)};
}
MOE_KERNELS_SIMD inline Mask is_nan(Vector x) {
  return {_mm512_cmp_ps_mask(x.lanes, x.lanes, _CMP_UNORD_Q)};
}
// x where the mask is set, else y.
MOE_KERNELS_SIMD inline Vector choose(Mask mask, Vector x, Vector y) {
  return {_mm512_mask_mov_ps(y.lanes, mask.lanes, x.lanes)};
}
// x where the mask is set, else zero.
MOE_KERNELS_SIMD inline Vector where(Mask mask, Vector x) {
  return {_mm512_maskz_mov_ps(mask.lanes, x.lanes)};
}

MOE_KERNELS_SIMD inline Words load_words(const Word* from) { return {_mm512_loadu_si512(from)}; }
MOE_KERNELS_SIMD inline Words repeat(Word word) {
  return {_mm512_set1_epi32(static_cast<int>(word))};
}

struct BFloat16 {
  using Element = std::uint16_t;
  static constexpr Index kPerWord = 2;

  // Winograd's transformed rows hold the even channels of each 32, then the odd ones.
  static constexpr Index channel_at(Index place) {
    return place < 16 ? 2 * place : 2 * (place - 16) + 1;
  }

  MOE_KERNELS_SIMD static inline Vector dot(Vector sum, Words x, Words y) {
    return {_mm512_dpbf16_ps(sum.lanes, (__m512bh)x.lanes, (__m512bh)y.lanes)};
  }
  MOE_KERNELS_SIMD static inline Vector load(const Element* from) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  }
  MOE_KERNELS_SIMD static inline void store(Element* to, Vector value) {
    const __m256bh half = _mm512_cvtneps_pbh(value.lanes);
    std::memcpy(to, &half, sizeof half);
  }
};

#else

struct Vector {
  __m256 low, high;
};
struct Mask {
  __m256 low, high;  // of each lane all bits
};
using Words = Vector;  // words are float32

MOE_KERNELS_SIMD inline Vector all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
MOE_KERNELS_SIMD inline Vector load(const float* from) {
  return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
}
MOE_KERNELS_SIMD inline void store(float* to, Vector x) {
  _mm256_storeu_ps(to, x.low);
  _mm256_storeu_ps(to + 8, x.high);
}
MOE_KERNELS_SIMD inline Vector operator+(Vector x, Vector y) {
  return {_mm256_add_ps(x.low, y.low), _mm256_add_ps(x.high, y.high)};
}
MOE_KERNELS_SIMD inline Vector operator-(Vector x, Vector y) {
  return {_mm256_sub_ps(x.low, y.low), _mm256_sub_ps(x.high, y.high)};
}
MOE_KERNELS_SIMD inline Vector operator*(Vector x, Vector y) {
  return {_mm256_mul_ps(x.low, y.low), _mm256_mul_ps(x.high, y.high)};
}
// x * y + z, rounded once.
MOE_KERNELS_SIMD inline Vector multiply_add(Vector x, Vector y, Vector z) {
  return {_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high)};
}
// The larger of both; y if one is NaN.
MOE_KERNELS_SIMD inline Vector larger(Vector x, Vector y) {
  return {_mm256_max_ps(x.low, y.low), _mm256_max_ps(x.high, y.high)};
}
// In the order of AVX-512's reduction.
MOE_KERNELS_SIMD inline float total(Vector x) {
  const __m256 eight = _mm256_add_ps(x.high, x.low);
  const __m128 four = _mm_add_ps(_mm256_extractf128_ps(eight, 1), _mm256_castps256_ps128(eight));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

MOE_KERNELS_SIMD inline Mask operator&(Mask x, Mask y) {
  return {_mm256_and_ps(x.low, y.low), _mm256_and_ps(x.high, y.high)};
}
MOE_KERNELS_SIMD inline Mask operator|(Mask x, Mask y) {
  return {_mm256_or_ps(x.low, y.low), _mm256_or_ps(x.high, y.high)};
}
MOE_KERNELS_SIMD inline Mask operator~(Mask x) {
  const __m256 ones = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
  return {_mm256_xor_ps(x.low, ones), _mm256_xor_ps(x.high, ones)};
}
MOE_KERNELS_SIMD inline bool any(Mask x) {
  return _mm256_movemask_ps(_mm256_or_ps(x.low, x.high)) != 0;
}
// The lanes before `count`.
MOE_KERNELS_SIMD inline Mask first_lanes(Index count) {
  const __m256i end = _mm256_set1_epi32(static_cast<int>(count < kLanes ? count : kLanes));
  const __m256i low = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i high = _mm256_add_epi32(low, _mm256_set1_epi32(8));
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(end, low)),
          _mm256_castsi256_ps(_mm256_cmpgt_epi32(end, high))};
}
MOE_KERNELS_SIMD inline Mask greater(Vector x, Vector y) {
  return {_mm256_cmp_ps(x.low, y.low, _CMP_GT_OQ), _mm256_cmp_ps(x.high, y.high, _CMP_GT_OQ)};
}
MOE_KERNELS_SIMD inline Mask equal(Vector x, Vector y) {
  return {_mm256_cmp_ps(x.low, y.low, _CMP_EQ_OQ), _mm256_cmp_ps(x.high, y.high, _CMP_EQ_OQ)};
}
// Whether x >= y is false, as it is of NaN.
MOE_KERNELS_SIMD inline Mask not_at_least(Vector x, Vector y) {
  return {_mm256_cmp_ps(x.low, y.low, _CMP_NGE_UQ), _mm256_cmp_ps(x.high, y.high, _CMP_NGE_UQ)};
}
MOE_KERNELS_SIMD inline Mask is_nan(Vector x) {
  return {_mm256_cmp_ps(x.low, x.low, _CMP_UNORD_Q), _mm256_cmp_ps(x.high, x.high, _CMP_UNORD_Q)};
}
// x where the mask is set, else y.
MOE_KERNELS_SIMD inline Vector choose(Mask mask, Vector x, Vector y) {
  return {_mm256_blendv_ps(y.low, x.low, mask.low), _mm256_blendv_ps(y.high, x.high, mask.high)};
}
// x where the mask is set, else zero.
MOE_KERNELS_SIMD inline Vector where(Mask mask, Vector x) {
  return {_mm256_and_ps(mask.low, x.low), _mm256_and_ps(mask.high, x.high)};
}

MOE_KERNELS_SIMD inline Words load_words(const Word* from) {
  return load(reinterpret_cast<const float*>(from));
}
MOE_KERNELS_SIMD inline Words repeat(Word word) {
  const __m256 words = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(word)));
  return {words, words};
}

#endif

MOE_KERNELS_SIMD inline Vector zero() { return all(0.0f); }

struct Float32 {
  using Element = float;
  static constexpr Index kPerWord = 1;

  static constexpr Index channel_at(Index place) { return place; }

  MOE_KERNELS_SIMD static inline Vector dot(Vector sum, Words x, Words y) {
#ifdef MOE_KERNELS_AVX512
    return {_mm512_fmadd_ps(_mm512_castsi512_ps(x.lanes), _mm512_castsi512_ps(y.lanes), sum.lanes)};
#else
    return multiply_add(x, y, sum);
#endif
  }
  MOE_KERNELS_SIMD static inline Vector load(const Element* from) {
    return MOE_KERNELS_INSTRUCTIONS::load(from);
  }
  MOE_KERNELS_SIMD static inline void store(Element* to, Vector value) {
    MOE_KERNELS_INSTRUCTIONS::store(to, value);
  }
};

// Calls body(BFloat16{}) or body(Float32{}).
template <typename Body>
void with_dtype(int dtype, Body body) {
#ifdef MOE_KERNELS_AVX512
  if (dtype == kBFloat16) return body(BFloat16{});
#endif
  if (dtype != kFloat32) throw std::invalid_argument("these instructions compute in float32");
  body(Float32{});
}

}  // namespace moe_kernels::MOE_KERNELS_INSTRUCTIONS
#endif
