// In place of csrc's file of this name: the same functions on the machine of machine.h.
#pragma once

#include "cuda/common.cuh"

namespace moe_kernels {

using Barrier = std::uint64_t;

inline unsigned char* dynamic_shared_memory() { return machine::shared_memory(); }
inline unsigned shared_address(const void* pointer) { return machine::address_of(pointer); }

inline void init_barrier(Barrier* barrier, int arrivals) {
  machine::init_barrier(shared_address(barrier), arrivals);
}
inline void publish_barriers() {}
inline void arrive(Barrier* barrier) {
  machine::arrive(shared_address(barrier), machine::cluster_rank(), 0);
}
inline void arrive_at(Barrier* barrier, int rank) {
  machine::arrive(shared_address(barrier), rank, 0);
}
inline void arrive_and_expect(Barrier* barrier, int bytes) {
  machine::arrive(shared_address(barrier), machine::cluster_rank(), bytes);
}
inline bool phase_ended(const Barrier* barrier, unsigned parity) {
  return machine::phase_ended(shared_address(barrier), parity);
}

inline void copy_box(void* to, const CUtensorMap* map, Barrier* barrier, int column, int row) {
  machine::copy(shared_address(to), *map, shared_address(barrier), column, row,
                machine::cluster_rank());
}
inline void copy_box_to_both(void* to, const CUtensorMap* map, Barrier* barrier, int column,
                             int row) {
  for (int rank = 0; rank < 2; ++rank) {
    machine::copy(shared_address(to), *map, shared_address(barrier), column, row, rank);
  }
}

inline int cluster_rank() { return machine::cluster_rank(); }
inline void sync_cluster() { machine::sync_cluster(); }
template <int kThreads>
void sync_threads(int barrier) {
  machine::sync_threads(barrier, kThreads);
}
template <int kRegisters, bool kMore>
void set_registers() {}

inline void begin_products() {}
inline void commit_products() { machine::commit_products(); }
template <int kPending>
void wait_for_products() {
  machine::wait_for_products(kPending);
}
template <int N>
void multiply(float (&sums)[N / 2], std::uint64_t left, std::uint64_t right) {
  machine::multiply(N, sums, left, right);
}

}  // namespace moe_kernels
