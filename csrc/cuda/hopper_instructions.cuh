// The instructions that CUDA C++ has no words for: one function each, and nothing else. The tests
// put functions of the same names in place of this file and run the kernels on a CPU.
//
// Where a function takes a rank, it means the block of that rank in the cluster.
#pragma once

#include <cuda.h>

#include "cuda/common.cuh"

namespace moe_kernels {

using Barrier = std::uint64_t;  // an mbarrier in shared memory

// What the launch gave to this block.
__device__ inline unsigned char* dynamic_shared_memory() {
  extern __shared__ unsigned char raw[];
  return raw;
}

__device__ inline unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

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

// Arrives at the barrier at the same place in the shared memory of another block.
__device__ inline void arrive_at(Barrier* barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(rank)
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

// Copies the box of `map` at (column, row) to shared memory; `barrier` counts its bytes.
__device__ inline void copy_box(void* to, const CUtensorMap* map, Barrier* barrier, int column,
                                int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row)
      : "memory");
}

// The same into every block of a cluster of two: to the same place in its shared memory, and the
// barrier at the same place counts the bytes.
__device__ inline void copy_box_to_both(void* to, const CUtensorMap* map, Barrier* barrier,
                                        int column, int row) {
  constexpr std::uint16_t kBoth = 3;
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "h"(kBoth)
      : "memory");
}

__device__ inline int cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// All threads of all blocks of the cluster; what they wrote before is seen by all after it.
__device__ inline void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// So many threads, of whole warps; barrier 0 is __syncthreads().
template <int kThreads>
__device__ inline void sync_threads(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}

// All warps of a warpgroup together; it gives registers back, or waits until so many are free.
template <int kRegisters, bool kMore>
__device__ void set_registers() {
  if constexpr (kMore) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
  }
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
