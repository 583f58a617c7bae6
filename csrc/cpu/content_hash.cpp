// CPU: a hash of the bytes of each of many tensors, to see which of them changed.
//
// Every step is a bijection of the state for a given word and of the word for a given state. So a
// change of a single word always changes the hash; other changes go unseen with odds of about
// 2^-64. It is no protection from somebody who looks for a collision.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/parallel.h"

namespace moe_kernels {
namespace {

constexpr int kStates = 32;  // words that are mixed side by side
constexpr Index kStripe = kStates * sizeof(std::uint64_t);
constexpr Index kChunk = 1 << 18;  // bytes of a unit of work

inline std::uint64_t mixed(std::uint64_t state, std::uint64_t word) {
  const std::uint64_t product = (state ^ word) * 0x9e3779b97f4a7c15u;
  return product ^ (product >> 32);  // a product alone carries nothing downwards
}

MOE_KERNELS_CLONES
std::uint64_t hash_of_chunk(const unsigned char* bytes, Index size) {
  std::uint64_t states[kStates], words[kStates];
  for (int i = 0; i < kStates; ++i) states[i] = static_cast<std::uint64_t>(i) + 1;
  Index done = 0;
  for (; done + kStripe <= size; done += kStripe) {
    std::memcpy(words, bytes + done, kStripe);
#pragma omp simd
    for (int i = 0; i < kStates; ++i) states[i] = mixed(states[i], words[i]);
  }
  if (done < size) {
    std::fill_n(words, kStates, std::uint64_t{0});
    std::memcpy(words, bytes + done, static_cast<std::size_t>(size - done));
    for (int i = 0; i < kStates; ++i) states[i] = mixed(states[i], words[i]);
  }
  std::uint64_t hash = static_cast<std::uint64_t>(size);
  for (const std::uint64_t state : states) hash = mixed(hash, state);
  return hash;
}

}  // namespace

void content_hashes(const std::int64_t* addresses, const std::int64_t* sizes, std::int64_t* hashes,
                    Index count, int num_threads) {
  struct Chunk {
    const unsigned char* bytes;
    Index size;
    std::uint64_t hash;
  };
  std::vector<Chunk> chunks;
  std::vector<std::size_t> ends;  // of each tensor's chunks
  for (Index i = 0; i < count; ++i) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(addresses[i]);
    for (Index done = 0; done < sizes[i]; done += kChunk) {
      chunks.push_back({bytes + done, std::min(kChunk, sizes[i] - done), 0});
    }
    ends.push_back(chunks.size());
  }
  Chunk* all = chunks.data();
  parallel_units(static_cast<Index>(chunks.size()), num_threads, [=](Index unit) {
    all[unit].hash = hash_of_chunk(all[unit].bytes, all[unit].size);
  });
  std::size_t next = 0;
  for (Index i = 0; i < count; ++i) {
    std::uint64_t hash = 0;
    for (; next < ends[static_cast<std::size_t>(i)]; ++next) hash = mixed(hash, chunks[next].hash);
    hashes[i] = static_cast<std::int64_t>(hash);
  }
}

}  // namespace moe_kernels
