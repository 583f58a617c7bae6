// CPU: weights in the order in which conv_direct and conv_winograd read them.
#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/product.h"

#ifdef MOE_KERNELS_CPU_LAYERS

namespace moe_kernels::MOE_KERNELS_INSTRUCTIONS {
namespace {

// To the nearest, ties to even; NaN stays NaN.
inline std::uint16_t to_bfloat16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline Word to_word(float value) {
  Word bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Outputs and channels that are transformed together: one panel or half of one.
constexpr Index kBlock = kMaxPanel < 32 ? kMaxPanel : 32;
constexpr int kTaps = 9;
constexpr int kPoints = 24;  // of a transformed filter, 4 x 6

// taps[i] = number i of each of sixteen filters of 9 numbers that follow each other.
#ifdef MOE_KERNELS_AVX512

// 9 and 16 have no common factor, so the numbers of one tap lie in 16 different lanes of 9 vectors:
// blend the vectors, then permute.
struct TapTable {
  __mmask16 from[kTaps][kTaps];  // [tap][vector]: lanes
  alignas(64) std::int32_t order[kTaps][16];

  TapTable() : from() {
    for (int tap = 0; tap < kTaps; ++tap) {
      for (int i = 0; i < 16; ++i) {
        const int place = kTaps * i + tap;
        from[tap][place / 16] |= static_cast<__mmask16>(1 << place % 16);
        order[tap][i] = place % 16;
      }
    }
  }
};

const TapTable kTapTable;

MOE_KERNELS_SIMD inline void load_taps(const float* filters, Vector taps[kTaps]) {
  __m512 vectors[kTaps];
#pragma GCC unroll 9
  for (int i = 0; i < kTaps; ++i) vectors[i] = _mm512_loadu_ps(filters + 16 * i);
#pragma GCC unroll 9
  for (int tap = 0; tap < kTaps; ++tap) {
    __m512 mixed = vectors[0];
#pragma GCC unroll 9
    for (int i = 1; i < kTaps; ++i) {
      mixed = _mm512_mask_mov_ps(mixed, kTapTable.from[tap][i], vectors[i]);
    }
    taps[tap] = {_mm512_permutexvar_ps(_mm512_load_si512(kTapTable.order[tap]), mixed)};
  }
}

#else

MOE_KERNELS_SIMD inline void load_taps(const float* filters, Vector taps[kTaps]) {
  for (int tap = 0; tap < kTaps; ++tap) {
    float numbers[16];
    for (int i = 0; i < 16; ++i) numbers[i] = filters[kTaps * i + tap];
    taps[tap] = load(numbers);
  }
}

#endif

// One row of G4: a filter's polynomial at 0, kNear, -kNear, kFar, -kFar and infinity, each divided
// by the product of the distances to the other points. From the last tap on if first = 2.
MOE_KERNELS_SIMD inline void evaluate(const Vector g[3], int first, Vector points[6]) {
  constexpr float kBetween = kFar2 - kNear2;
  const Vector g0 = g[first], g1 = g[1], g2 = g[2 - first];
  const Vector near = all(-0.5f / (kNear2 * kBetween));
  const Vector far = all(0.5f / (kFar2 * kBetween));
  const Vector near_even = near * multiply_add(g2, all(kNear2), g0);
  const Vector near_odd = near * (g1 * all(kNear));
  const Vector far_even = far * multiply_add(g2, all(kFar2), g0);
  const Vector far_odd = far * (g1 * all(kFar));
  points[0] = g0 * all(1.0f / (kNear2 * kFar2));
  points[1] = near_even + near_odd;
  points[2] = near_even - near_odd;
  points[3] = far_even + far_odd;
  points[4] = far_even - far_odd;
  points[5] = g2;
}

// A filter of 16 channels at the points of a tile: (G2 g G4^T), and of the filter turned by half a
// revolution.
struct Transformed {
  Vector points[4][6], turned[4][6];
};

// Of 16 filters that follow each other.
MOE_KERNELS_SIMD inline void transform_filters(const float* filters, Transformed* to) {
  Vector taps[kTaps];
  load_taps(filters, taps);
  const Vector half = all(0.5f);
  Vector rows[4][3];
#pragma GCC unroll 3
  for (int s = 0; s < 3; ++s) {
    const Vector top = taps[s], middle = taps[3 + s], bottom = taps[6 + s];
    rows[0][s] = top;
    rows[1][s] = half * (top + bottom + middle);
    rows[2][s] = half * (top + bottom - middle);
    rows[3][s] = bottom;
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    evaluate(rows[i], 0, to->points[i]);
    // Turning exchanges the first and last row of G2 g.
    evaluate(rows[i], 2, to->turned[i == 0 ? 3 : i == 3 ? 0 : i]);
  }
}

// Transformed filters of a block of outputs x channels at one point, one row per output.
template <typename T>
using Rows = typename T::Element[kBlock][kBlock];

#ifdef MOE_KERNELS_AVX512

// to[i * stride + j] = from[j][i], 16 x 16.
MOE_KERNELS_SIMD inline void transpose(const __m512i from[16], Word* to, Index stride) {
  __m512i a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    a[2 * i] = _mm512_unpacklo_epi32(from[2 * i], from[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_epi32(from[2 * i], from[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
    b[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
  }
  // b[4 * j + i] holds columns i, i + 4, i + 8, i + 12 of rows 4 * j to 4 * j + 3.
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i low01 = _mm512_shuffle_i32x4(b[i], b[4 + i], 0x88);
    const __m512i low23 = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0x88);
    const __m512i high01 = _mm512_shuffle_i32x4(b[i], b[4 + i], 0xdd);
    const __m512i high23 = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0xdd);
    _mm512_storeu_si512(to + i * stride, _mm512_shuffle_i32x4(low01, low23, 0x88));
    _mm512_storeu_si512(to + (i + 8) * stride, _mm512_shuffle_i32x4(low01, low23, 0xdd));
    _mm512_storeu_si512(to + (i + 4) * stride, _mm512_shuffle_i32x4(high01, high23, 0x88));
    _mm512_storeu_si512(to + (i + 12) * stride, _mm512_shuffle_i32x4(high01, high23, 0xdd));
  }
}

MOE_KERNELS_SIMD inline void transpose(const float* from, Index from_stride, Word* to,
                                       Index stride) {
  __m512i rows[16];
  for (Index i = 0; i < 16; ++i) rows[i] = _mm512_loadu_si512(from + i * from_stride);
  transpose(rows, to, stride);
}

MOE_KERNELS_SIMD inline void store_row(std::uint16_t* row, const Vector (&numbers)[2]) {
  const __m512bh both = _mm512_cvtne2ps_pbh(numbers[1].lanes, numbers[0].lanes);
  std::memcpy(row, &both, sizeof both);
}

// Words of channels meet outputs: [word][output], `width` outputs a row.
MOE_KERNELS_SIMD inline void pack_forward(const Rows<BFloat16>& rows, Word* to, Index width, Index,
                                          Index) {
  alignas(64) std::uint16_t order[kBlock];
  for (Index i = 0; i < kBlock; ++i) order[i] = static_cast<std::uint16_t>(BFloat16::channel_at(i));
  const __m512i places = _mm512_load_si512(order);
  for (Index o = 0; o < kBlock; o += 16) {
    __m512i words[16];
    for (Index i = 0; i < 16; ++i) {
      words[i] = _mm512_permutexvar_epi16(places, _mm512_loadu_si512(rows[o + i]));
    }
    transpose(words, to + o, width);
  }
}

// Words of outputs meet channels.
MOE_KERNELS_SIMD inline void pack_gradient(const Rows<BFloat16>& rows, Word* to, Index width, Index,
                                           Index) {
  for (Index k = 0; k < kBlock / 2; ++k) {
    const __m512i low = _mm512_loadu_si512(rows[BFloat16::channel_at(2 * k)]);
    const __m512i high = _mm512_loadu_si512(rows[BFloat16::channel_at(2 * k + 1)]);
    const __m512i words[2] = {
        _mm512_or_si512(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(low)),
                        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(high)), 16)),
        _mm512_or_si512(
            _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(low, 1)),
            _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(high, 1)), 16))};
    _mm512_storeu_si512(to + k * width, words[0]);
    _mm512_storeu_si512(to + k * width + 16, words[1]);
  }
}

#else

// to[i * stride + j] = from[j * from_stride + i], 16 x 16.
inline void transpose(const float* from, Index from_stride, Word* to, Index stride) {
  for (Index i = 0; i < 16; ++i) {
    for (Index j = 0; j < 16; ++j) to[i * stride + j] = to_word(from[j * from_stride + i]);
  }
}

#endif

MOE_KERNELS_SIMD inline void store_row(float* row, const Vector (&numbers)[kBlock / 16]) {
  for (Index i = 0; i < kBlock / 16; ++i) store(row + 16 * i, numbers[i]);
}

// The last block may hold 16 outputs or channels in place of 32.
MOE_KERNELS_SIMD inline void pack_forward(const Rows<Float32>& rows, Word* to, Index width,
                                          Index outputs, Index channels) {
  for (Index o = 0; o < outputs; o += 16) {
    for (Index c = 0; c < channels; c += 16) {
      transpose(rows[o] + c, kBlock, to + c * width + o, width);
    }
  }
}

MOE_KERNELS_SIMD inline void pack_gradient(const Rows<Float32>& rows, Word* to, Index width,
                                           Index outputs, Index channels) {
  for (Index k = 0; k < outputs; ++k) {
    for (Index c = 0; c < channels; c += 16) {
      store(reinterpret_cast<float*>(to + k * width + c), load(rows[k] + c));
    }
  }
}

// Where a block of outputs from `o` on and the words of K start at one point.
inline Word* place(void* packed, Index O, Index o, Index K, Index k, Index point, Index* width) {
  Index start = o / kMaxPanel * kMaxPanel;
  if (O - start < kMaxPanel) start = o;  // the last panels are no wider than a block
  *width = panel_width(O - start);
  return static_cast<Word*>(packed) + start * kPoints * K + (point * K + k) * *width + o - start;
}

template <typename T>
MOE_KERNELS_SIMD void pack_block(const float* weight, void* forward, void* gradient, Index O,
                                 Index C, Index outputs, Index channels, Index o, Index c) {
  alignas(64) Rows<T> rows[2][kPoints];  // of the filters, of the turned ones
  for (Index i = 0; i < kBlock; ++i) {
    alignas(64) float filters[kBlock * kTaps];
    const Index count = o + i < outputs ? std::clamp<Index>(channels - c, 0, kBlock) : 0;
    const float* from = weight + ((o + i) * channels + c) * kTaps;
    if (count < kBlock) {
      std::fill_n(filters, kBlock * kTaps, 0.0f);
      if (count > 0) std::copy_n(from, count * kTaps, filters);
      from = filters;
    }
    Transformed made[kBlock / 16];
    for (Index part = 0; part < kBlock / 16; ++part) {
      transform_filters(from + 16 * kTaps * part, &made[part]);
    }
    for (int point = 0; point < kPoints; ++point) {
      const int row = point / 6, column = point % 6;
      Vector numbers[2][kBlock / 16];
      for (Index part = 0; part < kBlock / 16; ++part) {
        numbers[0][part] = made[part].points[row][column];
        numbers[1][part] = made[part].turned[row][column];
      }
      store_row(rows[0][point][i], numbers[0]);
      store_row(rows[1][point][i], numbers[1]);
    }
  }
  const Index block_outputs = std::min(kBlock, O - o), block_channels = std::min(kBlock, C - c);
  for (Index point = 0; point < kPoints; ++point) {
    Index width;
    Word* to = place(forward, O, o, C / T::kPerWord, c / T::kPerWord, point, &width);
    pack_forward(rows[0][point], to, width, block_outputs, block_channels);
    to = place(gradient, C, c, O / T::kPerWord, o / T::kPerWord, point, &width);
    pack_gradient(rows[1][point], to, width, block_outputs, block_channels);
  }
}

}  // namespace

void pack_direct(const float* weight, void* packed, Index O, Index K, Index outputs, Index channels,
                 Index taps, Index output_stride, Index channel_stride, Index tap_stride,
                 bool doubled, int dtype, int num_threads) {
  const Index panels = num_panels(O);
  const auto number = [=](Index o, Index c, Index tap) {
    if (o >= outputs || c >= channels) return 0.0f;
    return weight[o * output_stride + c * channel_stride + tap * tap_stride];
  };
  parallel_units(panels * taps, num_threads, [=](Index unit) {
    const Index tap = unit % taps;
    Index o = 0, panel = panel_width(O);
    for (Index i = 0; i < unit / taps; ++i) {
      o += panel;
      panel = panel_width(O - o);
    }
    Word* to = static_cast<Word*>(packed) + o * taps * K + tap * K * panel;
    for (Index k = 0; k < K; ++k) {
      for (Index i = 0; i < panel; ++i) {
        if (dtype == kFloat32) {
          *to++ = to_word(number(o + i, k, tap));
        } else if (doubled) {
          *to++ = to_bfloat16(number(o + i, k, tap)) * 0x10001u;
        } else {
          const Word high = to_bfloat16(number(o + i, 2 * k + 1, tap));
          *to++ = to_bfloat16(number(o + i, 2 * k, tap)) | high << 16;
        }
      }
    }
  });
}

void pack_winograd(const float* weight, void* forward, void* gradient, Index O, Index C,
                   Index outputs, Index channels, int dtype, int num_threads) {
  const Index across = divide_up(C, kBlock);
  with_dtype(dtype, [&](auto type) {
    parallel_units(divide_up(O, kBlock) * across, num_threads, [=](Index unit) {
      pack_block<decltype(type)>(weight, forward, gradient, O, C, outputs, channels,
                                 unit / across * kBlock, unit % across * kBlock);
    });
  });
}

}  // namespace moe_kernels::MOE_KERNELS_INSTRUCTIONS
#endif
