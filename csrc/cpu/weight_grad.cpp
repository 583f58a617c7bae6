// CPU: weight gradient of one network's convolution, tap by tap.
//
//     grad_weight[r, s, c, o] = sum over p, q, n:
//         source[p * stride + r - padding, q * stride + s - padding, n, c] * grad[p, q, n, o]
//
// Pixels are the axis that is summed over, so bfloat16 values are first rewritten with two images
// in a word. Each sum is made by one thread in a fixed order.
#include <vector>

#include "cpu/outer.h"
#include "cpu/parallel.h"

#ifdef MOE_KERNELS_CPU_LAYERS

namespace moe_kernels::MOE_KERNELS_INSTRUCTIONS {
namespace {

constexpr Index kChunkWords = 64;  // of the summed axis: what two panels of the caches hold

// A value [pixels, N, C] as words [pixels, K, C] that each hold one channel.
template <typename T>
struct ImageWords {
  const Word* words;
  Index K;

  ImageWords(const void* value, Index, Index N, Index, int)
      : words(static_cast<const Word*>(value)), K(N) {}
};

#ifdef MOE_KERNELS_AVX512

// The bits of 16 bfloat16, each in a word.
MOE_KERNELS_SIMD inline __m512i widened(const std::uint16_t* from) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

// [K, C] words, K = N / 2 rounded up, from [N, C].
MOE_KERNELS_SIMD void image_pairs(const std::uint16_t* from, Word* to, Index N, Index C) {
  for (Index n = 0; n < N; n += 2) {
    const std::uint16_t *first = from + n * C, *second = first + C;
    const bool alone = n + 1 == N;
    Index c = 0;
    for (; c + kLanes <= C; c += kLanes) {
      const __m512i low = widened(first + c);
      const __m512i high = alone ? _mm512_setzero_si512() : widened(second + c);
      _mm512_storeu_si512(to + c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
    for (; c < C; ++c) to[c] = first[c] | (alone ? Word{0} : Word{second[c]} << 16);
    to += C;
  }
}

template <>
struct ImageWords<BFloat16> {
  std::vector<std::uint32_t> memory;
  const Word* words;
  Index K;

  ImageWords(const void* value, Index pixels, Index N, Index C, int num_threads)
      : memory(pixels * ((N + 1) / 2) * C), words(memory.data()), K((N + 1) / 2) {
    const auto* from = static_cast<const std::uint16_t*>(value);
    parallel_units(pixels, num_threads, [&, this](Index pixel) {
      image_pairs(from + pixel * N * C, memory.data() + pixel * K * C, N, C);
    });
  }
};

#endif

template <typename T>
void run(const void* source, const void* grad, float* grad_weight, const ConvSizes& sizes,
         int num_threads) {
  const Index C = sizes.C, O = sizes.O, taps = Index{sizes.R} * sizes.S;
  const Index pixels = Index{sizes.P} * sizes.Q;
  const ImageWords<T> x(source, Index{sizes.H} * sizes.W, sizes.N, C, num_threads);
  const ImageWords<T> dy(grad, pixels, sizes.N, O, num_threads);
  const Index K = x.K, at_once = std::max<Index>(1, kChunkWords / std::max<Index>(K, 1));
  const Index panels = num_panels(O);
  parallel_units(panels * taps, num_threads, [&](Index unit) {
    const Index tap = unit % taps, r = tap / sizes.S, s = tap % sizes.S;
    Index o = 0;
    for (Index i = 0; i < unit / taps; ++i) o += panel_width(O - o);
    const Index panel = panel_width(O - o);
    float* out = grad_weight + tap * C * O + o;
    std::vector<OuterTerm> terms;
    bool add = false;
    for (Index begin = 0; begin < pixels; begin += at_once) {
      terms.clear();
      for (Index pixel = begin; pixel < std::min(pixels, begin + at_once); ++pixel) {
        const Index h = source_pixel(sizes, pixel / sizes.Q, r, sizes.H);
        const Index w = source_pixel(sizes, pixel % sizes.Q, s, sizes.W);
        if (h < 0 || w < 0) continue;
        terms.push_back(
            {x.words + (h * sizes.W + w) * K * C, C, dy.words + pixel * K * O + o, O, K});
      }
      if (terms.empty()) continue;
      outer_rows<T>(terms.data(), static_cast<Index>(terms.size()), C, panel, out, O, add);
      add = true;
    }
    if (!add) {  // a tap that meets no pixel
      for (Index c = 0; c < C; ++c) std::fill_n(out + c * O, panel, 0.0f);
    }
  });
}

}  // namespace

void weight_grad(const void* source, const void* grad, float* grad_weight, ConvSizes sizes,
                 int dtype, int num_threads) {
  with_dtype(dtype, [&](auto type) {
    run<decltype(type)>(source, grad, grad_weight, sizes, num_threads);
  });
}

}  // namespace moe_kernels::MOE_KERNELS_INSTRUCTIONS
#endif
