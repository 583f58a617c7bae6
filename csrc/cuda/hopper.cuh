// How Hopper's own instructions are used here: bulk copies by descriptor (TMA), barriers that count
// bytes, and matrix products of 128 threads (wgmma). Only for code that is compiled for sm_90a.
//
// Matrices in shared memory are [rows, 64] bf16 with the 128-byte swizzle, as a TMA box of 64
// columns writes them: a row is 128 bytes, eight rows are one pattern of 1024 bytes, and the piece
// of 16 bytes number i of row r lies at place i ^ (r % 8). The pattern is a function of the
// address, so that every matrix has to start at a multiple of 1024 bytes.
#pragma once

#include "cuda/hopper_instructions.cuh"

namespace moe_kernels {

constexpr int kRowBytes = 128;
constexpr int kPatternBytes = 8 * kRowBytes;
constexpr int kProductDepth = 16;  // columns of one wgmma
constexpr int kProductRows = 64;   // rows of its left matrix
constexpr int kWarpgroup = 128;    // threads that issue one together

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

// How wgmma finds 16 columns of a matrix [rows, 64], number `step` of four: where it starts, and
// the distance between its patterns of eight rows, both in units of 16 bytes; the leading offset is
// not used (1); 1 << 62 is the 128-byte swizzle. A step of 16 columns is 32 bytes inside the
// pattern, and since the swizzle follows the address, adding them to the start is all it takes.
__device__ inline std::uint64_t matrix(const void* start, int step) {
  const unsigned address = shared_address(start) + step * kProductDepth * 2;
  return static_cast<std::uint64_t>((address & 0x3ffff) >> 4) | std::uint64_t{1} << 16 |
         static_cast<std::uint64_t>(kPatternBytes >> 4) << 32 | std::uint64_t{1} << 62;
}

}  // namespace moe_kernels
