// Hopper's own instructions: bulk copies by descriptor (TMA), barriers that count bytes, and matrix
// products of 128 threads (wgmma). Only for code that is compiled for sm_90a.
//
// Matrices in shared memory are [rows, 64] bf16 with the 128-byte swizzle, as a TMA box of 64
// columns writes them: a row is 128 bytes, eight rows are one pattern of 1024 bytes, and the piece
// of 16 bytes number i of row r lies at place i ^ (r % 8). The pattern is a function of the
// address, so that every matrix has to start at a multiple of 1024 bytes.
#pragma once

#include <cuda.h>

#include "cuda/common.cuh"

namespace moe_kernels {

constexpr int kRowBytes = 128;
constexpr int kPatternBytes = 8 * kRowBytes;
constexpr int kProductDepth = 16;  // columns of one wgmma
constexpr int kProductRows = 64;   // rows of its left matrix
constexpr int kWarpgroup = 128;    // threads that issue one together

__device__ inline unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

using Barrier = std::uint64_t;

__device__ inline void init_barrier(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals));
}

// Between init_barrier and the first use by other threads or by a copy; then __syncthreads().
__device__ inline void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives, and lets the phase end only after so many bytes were copied.
__device__ inline void arrive_and_expect(Barrier* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

__device__ inline bool phase_ended(const Barrier* barrier, unsigned parity) {
  unsigned ended;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(ended)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return ended != 0;
}

// Waits for the end of the phase of this parity and returns true. After two seconds or so it gives
// up, sets `failed`, which ends all other waits of the block as well, and returns false: a mistake
// in the protocol, or a GPU that behaves otherwise than thought, must not hang the process.
__device__ inline bool wait(const Barrier* barrier, unsigned parity, volatile int* failed) {
  constexpr long long kPatience = 1LL << 32;  // cycles
  if (phase_ended(barrier, parity)) return true;
  const long long start = clock64();
  while (!phase_ended(barrier, parity)) {
    if (clock64() - start > kPatience) *failed = 1;
    if (*failed != 0) return false;
  }
  return true;
}

// Copies the box of `map` at (column, row) to shared memory; `barrier` counts its bytes.
__device__ inline void copy_box(void* to, const CUtensorMap* map, Barrier* barrier, int column,
                                int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row)
      : "memory");
}

// How wgmma finds 16 columns of a matrix [rows, 64], number `step` of four: where it starts, and
// the distance between its patterns of eight rows, both in units of 16 bytes; the leading offset is
// not used (1); 1 << 62 is the 128-byte swizzle. A step of 16 columns is 32 bytes inside the
// pattern, and since the swizzle follows the address, adding them to the start is all it takes.
__device__ inline std::uint64_t matrix(const void* start, int step) {
  const unsigned address = shared_address(start) + step * kProductDepth * 2;
  return static_cast<std::uint64_t>((address & 0x3ffff) >> 4) | std::uint64_t{1} << 16 |
         static_cast<std::uint64_t>(kPatternBytes >> 4) << 32 | std::uint64_t{1} << 62;
}

// Around products: all registers that they use are written; start those issued so far; wait until
// at most `kPending` groups of them are unfinished.
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ inline void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// sums += left [64, 16] times right [N, 16] transposed.
//
// Of the 64 x N sums, thread 32 * w + lane holds row 16 * w + lane / 4 + 8 * i, column
// 8 * j + 2 * (lane % 4) + k at sums[4 * j + 2 * i + k].
template <int N>
__device__ void multiply(float (&sums)[N / 2], std::uint64_t left, std::uint64_t right);

// clang-format off
#define MOE_KERNELS_TEN(t) \
  "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9,"
#define MOE_KERNELS_SUMS(i) \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), \
  "+f"(sums[i + 4]), "+f"(sums[i + 5]), "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define MOE_KERNELS_MULTIPLY(n, registers, left_number, right_number, ...)                    \
  template <>                                                                                 \
  __device__ inline void multiply<n>(float(&sums)[n / 2], std::uint64_t left,                 \
                                     std::uint64_t right) {                                   \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" registers "}, " \
                 "%" #left_number ", %" #right_number ", 1, 1, 1, 0, 0;"                      \
                 : __VA_ARGS__                                                                \
                 : "l"(left), "l"(right));                                                    \
  }

MOE_KERNELS_MULTIPLY(64,
    MOE_KERNELS_TEN() MOE_KERNELS_TEN(1) MOE_KERNELS_TEN(2) "%30,%31", 32, 33,
    MOE_KERNELS_SUMS(0), MOE_KERNELS_SUMS(8), MOE_KERNELS_SUMS(16), MOE_KERNELS_SUMS(24))
MOE_KERNELS_MULTIPLY(128,
    MOE_KERNELS_TEN() MOE_KERNELS_TEN(1) MOE_KERNELS_TEN(2) MOE_KERNELS_TEN(3) MOE_KERNELS_TEN(4)
    MOE_KERNELS_TEN(5) "%60,%61,%62,%63", 64, 65,
    MOE_KERNELS_SUMS(0), MOE_KERNELS_SUMS(8), MOE_KERNELS_SUMS(16), MOE_KERNELS_SUMS(24),
    MOE_KERNELS_SUMS(32), MOE_KERNELS_SUMS(40), MOE_KERNELS_SUMS(48), MOE_KERNELS_SUMS(56))
MOE_KERNELS_MULTIPLY(256,
    MOE_KERNELS_TEN() MOE_KERNELS_TEN(1) MOE_KERNELS_TEN(2) MOE_KERNELS_TEN(3) MOE_KERNELS_TEN(4)
    MOE_KERNELS_TEN(5) MOE_KERNELS_TEN(6) MOE_KERNELS_TEN(7) MOE_KERNELS_TEN(8) MOE_KERNELS_TEN(9)
    MOE_KERNELS_TEN(10) MOE_KERNELS_TEN(11) "%120,%121,%122,%123,%124,%125,%126,%127",
    128, 129,
    MOE_KERNELS_SUMS(0), MOE_KERNELS_SUMS(8), MOE_KERNELS_SUMS(16), MOE_KERNELS_SUMS(24),
    MOE_KERNELS_SUMS(32), MOE_KERNELS_SUMS(40), MOE_KERNELS_SUMS(48), MOE_KERNELS_SUMS(56),
    MOE_KERNELS_SUMS(64), MOE_KERNELS_SUMS(72), MOE_KERNELS_SUMS(80), MOE_KERNELS_SUMS(88),
    MOE_KERNELS_SUMS(96), MOE_KERNELS_SUMS(104), MOE_KERNELS_SUMS(112), MOE_KERNELS_SUMS(120))
#undef MOE_KERNELS_MULTIPLY
#undef MOE_KERNELS_SUMS
#undef MOE_KERNELS_TEN
// clang-format on

}  // namespace moe_kernels
