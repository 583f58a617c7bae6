// Shared by all CPU kernels: threads and vector units.
#pragma once

#include "kernels.h"

#ifdef _OPENMP
#include <omp.h>
#endif

// One binary has to run on every x86-64 machine and still use the vector units of each: GCC
// compiles a function so marked several times and the loader picks. (It needs glibc.)
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define MOE_KERNELS_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MOE_KERNELS_CLONES
#endif

namespace moe_kernels {

// Waking the threads costs some microseconds, and on a shared machine a whole time slice.
constexpr Index kMinParallelWork = 1 << 16;  // elements

// Calls body(begin, end) on contiguous ranges of [0, B), one per thread. An image is never split,
// so the number of threads changes no bit of the result. num_threads = 0 leaves it to OpenMP.
template <typename Body>
void parallel_images(Index B, Index elements, int num_threads, Body body) {
#ifdef _OPENMP
  if (elements >= kMinParallelWork && B > 1) {
#pragma omp parallel num_threads(num_threads > 0 ? num_threads : omp_get_max_threads())
    {
      const Index thread = omp_get_thread_num(), threads = omp_get_num_threads();
      body(B * thread / threads, B * (thread + 1) / threads);
    }
    return;
  }
#endif
  body(Index{0}, B);
}

inline Index divide_up(Index a, Index b) { return (a + b - 1) / b; }

// Calls body(first, count) for the fewest parts of [0, total) of at most `most`, which are even.
template <typename Body>
inline void for_each_part(Index total, Index most, Body body) {
  Index first = 0;
  for (Index parts = divide_up(total, most); parts > 0; --parts) {
    const Index count = divide_up(total - first, parts);
    body(first, count);
    first += count;
  }
}

inline Index thread_count(int num_threads) {
#ifdef _OPENMP
  return num_threads > 0 ? num_threads : omp_get_max_threads();
#else
  return num_threads > 0 ? num_threads : 1;
#endif
}

// Calls body(unit) for each unit of [0, count). Threads take the next one when they are free, so
// units must not depend on each other.
template <typename Body>
void parallel_units(Index count, int num_threads, Body body) {
#ifdef _OPENMP
  if (const int threads = static_cast<int>(thread_count(num_threads)); threads > 1 && count > 1) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (Index unit = 0; unit < count; ++unit) body(unit);
    return;
  }
#endif
  for (Index unit = 0; unit < count; ++unit) body(unit);
}

}  // namespace moe_kernels
