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

constexpr Index kChunkWords = 128;  // of the summed axis
constexpr Index kFewChannels = 32, kFewWords = 16;

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

// Part of the summed axis. It is copied so that the innermost loop reads neighbors: rows of many
// channels lie a power of two apart, and would evict each other from the first cache.
template <typename T>
class Chunk {
 public:
  // channels: those of C that are no padding; K: words of a pixel.
  Chunk(Index C, Index channels, Index O, Index K, Scratch* scratch)
      : C_(C), channels_(channels), O_(O) {
    copied_ = std::max(C, O) > kFewChannels || K < kFewWords;
    if (!copied_) return;
    const Index rows = divide_up(channels, kOuterRows) * kOuterRows;
    rows_ = reinterpret_cast<Word*>(scratch->floats(kChunkWords * (rows + O)));
    columns_ = rows_ + kChunkWords * rows;
  }

  Index size() const { return size_; }

  // Adds words x [count, C] and dy [count, O].
  void append(const Word* x, const Word* dy, Index count) {
    if (copied_) {
      copy(x, dy, count);
    } else {
      pieces_.push_back({x, C_, dy, O_, count});
    }
    size_ += count;
  }

  // out [channels, O] = (add: +=) the sum over the chunk for the panel that starts at channel o.
  void multiply(Index o, Index panel, float* out, bool add) {
    if (copied_) {
      multiply_copied(o, panel, out, add);
      return;
    }
    terms_ = pieces_;
    for (OuterTerm& term : terms_) term.panel += o;
    outer_rows<T>(terms_.data(), static_cast<Index>(terms_.size()), channels_, panel, out + o, O_,
                  add);
  }

  void clear() {
    size_ = 0;
    pieces_.clear();
  }

 private:
  void copy(const Word* x, const Word* dy, Index count) {
    for (Index k = size_; k < size_ + count; ++k, x += C_, dy += O_) {
      Index c = 0;
      for (; c + kOuterRows <= channels_; c += kOuterRows) {
        std::memcpy(rows_ + c * kChunkWords + k * kOuterRows, x + c, kOuterRows * sizeof(Word));
      }
      std::memcpy(rows_ + c * kChunkWords + k * kOuterRows, x + c, (channels_ - c) * sizeof(Word));
      for_each_panel(O_, [&](Index o, Index panel) {
        std::memcpy(columns_ + o * kChunkWords + k * panel, dy + o, panel * sizeof(Word));
      });
    }
  }

  void multiply_copied(Index o, Index panel, float* out, bool add) const {
    for (Index c = 0; c < channels_; c += kOuterRows) {
      const OuterTerm term{rows_ + c * kChunkWords, kOuterRows, columns_ + o * kChunkWords, panel,
                           size_};
      const Index rows = std::min(kOuterRows, channels_ - c);
      outer_for<T>(rows, panel)(&term, 1, out + c * O_ + o, O_, add);
    }
  }

  Index C_, channels_, O_, size_ = 0;
  bool copied_;
  Word* rows_ = nullptr;     // of 6 channels each, the words side by side
  Word* columns_ = nullptr;  // panels
  std::vector<OuterTerm> pieces_, terms_;
};

template <typename T>
void run(const void* source, const void* grad, float* grad_weight, const ConvSizes& sizes,
         int num_threads) {
  const Index C = sizes.C, O = sizes.O, taps = Index{sizes.R} * sizes.S;
  const Index pixels = Index{sizes.P} * sizes.Q;
  const ImageWords<T> x(source, Index{sizes.H} * sizes.W, sizes.N, C, num_threads);
  const ImageWords<T> dy(grad, pixels, sizes.N, O, num_threads);
  // Few taps: the output channels are shared out as well.
  const Index panels = num_panels(O), threads = thread_count(num_threads);
  const Index shares = std::min(panels, divide_up(4 * threads, taps));
  parallel_units(shares * taps, num_threads, [&](Index unit) {
    static thread_local Scratch scratch;
    const Index tap = unit % taps, r = tap / sizes.S, s = tap % sizes.S, share = unit / taps;
    float* out = grad_weight + tap * C * O;
    Chunk<T> chunk(C, sizes.channels == 0 ? C : sizes.channels, O, x.K, &scratch);
    bool add = false;
    const auto flush = [&] {
      Index index = 0;
      for_each_panel(O, [&](Index o, Index panel) {
        if (index++ * shares / panels == share) chunk.multiply(o, panel, out, add);
      });
      chunk.clear();
      add = true;
    };
    for (Index pixel = 0; pixel < pixels; ++pixel) {
      const Index h = source_pixel(sizes, pixel / sizes.Q, r, sizes.H);
      const Index w = source_pixel(sizes, pixel % sizes.Q, s, sizes.W);
      if (h < 0 || w < 0) continue;
      for (Index k = 0, count; k < x.K; k += count) {
        count = std::min(x.K - k, kChunkWords - chunk.size());
        chunk.append(x.words + ((h * sizes.W + w) * x.K + k) * C, dy.words + (pixel * x.K + k) * O,
                     count);
        if (chunk.size() == kChunkWords) flush();
      }
    }
    if (chunk.size() > 0 || !add) flush();  // zeros for a tap that meets no pixel
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
