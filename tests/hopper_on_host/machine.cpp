// A cluster of Hopper's multiprocessors: threads, barriers, copies and products.
//
// The threads of a cluster's blocks are contexts of one host thread and take turns. Whose turn it
// is, when a copy arrives and when a product reads its operands is drawn from a seed, within what
// the hardware allows, and often at its limits: a thread may run far ahead of the others, a copy
// arrive after all others, a product read only when it is waited for. So a missing wait shows, and
// shows again with the same seed.
#include "machine.h"

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <vector>

dim3 threadIdx, blockIdx;

namespace machine {

int multiprocessors = 2, cluster_blocks = 1;
unsigned seed = 1;
long num_copies = 0;

namespace {

constexpr unsigned kMemoryBytes = 227 * 1024;
constexpr unsigned kBase = 1024 + 16;  // the address of shared memory, aligned as badly as allowed
constexpr int kStackBytes = 64 * 1024, kWarp = 32, kDepth = 16;
constexpr long long kLong = 1LL << 33;  // cycles; more than any wait's patience

struct Product {
  int columns;
  float* sums;
  std::uint64_t left, right;
};

struct Block;

struct Thread {
  Block* block;
  unsigned number;
  ucontext_t context;
  std::vector<Product> open;                // not committed
  std::deque<std::vector<Product>> groups;  // committed, not done
};

// Threads that wait until enough of them have come.
struct Meeting {
  std::vector<Thread*> waiting;
};

struct Arrivals {
  int expected = 0, pending = 0;
  long bytes = 0;
  unsigned phase = 0;
  std::vector<Thread*> waiting;
};

struct Block {
  unsigned number, living;
  int rank;
  std::vector<unsigned char> memory = std::vector<unsigned char>(kMemoryBytes, 0xff);  // NaN
  std::map<unsigned, Arrivals> barriers;
  std::array<Meeting, 16> meetings;
  std::array<Meeting, 12> warps;
  std::array<std::int64_t, 12> sent = {};
};

struct Copy {
  unsigned to;
  CUtensorMap map;
  unsigned barrier;
  int column, row;
  Block* block;
  long long due;
};

std::vector<Block> blocks;
std::vector<std::unique_ptr<Thread>> threads;
std::vector<std::vector<char>> stacks;
std::array<std::vector<Thread*>, 2> ready;  // by block
std::vector<Copy> copies;
Meeting all;
Thread* running = nullptr;
ucontext_t scheduler;
long long now = 0;
std::mt19937 generator;
std::array<unsigned, 12> favor;  // of warps
unsigned ahead;                  // the block that runs ahead, or 2
std::set<const void*> kernels;
std::function<void()> kernel_body;

[[noreturn]] void fail(const char* format, ...) {
  std::va_list rest;
  va_start(rest, format);
  std::vprintf(format, rest);
  std::printf("\n");
  std::fflush(stdout);
  std::_Exit(1);
}

bool coin() { return generator() % 2 == 0; }

void make_ready(Thread* thread) { ready[thread->block->rank].push_back(thread); }

// Lets others run until somebody makes this thread ready.
void pause() { swapcontext(&running->context, &scheduler); }

// A place where others may come first.
void maybe_pause() {
  if (coin()) return;
  make_ready(running);
  pause();
}

void wake(std::vector<Thread*>& waiting) {
  for (Thread* thread : waiting) make_ready(thread);
  waiting.clear();
}

void meet(Meeting& meeting, std::size_t count) {
  meeting.waiting.push_back(running);
  if (meeting.waiting.size() == count) wake(meeting.waiting);
  pause();
}

Arrivals& barrier_at(Block& block, unsigned barrier) {
  const auto found = block.barriers.find(barrier);
  if (found == block.barriers.end()) fail("there is no barrier at %u", barrier);
  if (block.living == 0) fail("something arrives at a block that has ended");
  return found->second;
}

void end_phase_if_complete(Arrivals& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.expected;
  wake(barrier.waiting);
}

unsigned char* at(Block& block, unsigned address, unsigned bytes) {
  if (address < kBase || address + bytes > kBase + kMemoryBytes) fail("no memory at %u", address);
  return block.memory.data() + (address - kBase);
}

// The bits of an address that are added to its 16-byte number: how many of the next ones there are.
unsigned swizzled(unsigned address, int mode) {
  const unsigned bits = mode == CU_TENSOR_MAP_SWIZZLE_128B  ? 0x70
                        : mode == CU_TENSOR_MAP_SWIZZLE_64B ? 0x30
                                                            : 0;
  return address ^ (address >> 3 & bits);
}

void deliver(const Copy& copy) {
  const CUtensorMap& map = copy.map;
  if (copy.to % kDepth != 0 || copy.row < 0 || copy.column < 0 ||
      copy.row + std::uint64_t{map.box_rows} > map.rows ||
      copy.column + std::uint64_t{map.box_columns} > map.columns) {
    fail("copy to %u from row %d, column %d", copy.to, copy.row, copy.column);
  }
  const unsigned row_bytes = map.box_columns * sizeof(__nv_bfloat16);
  Arrivals& barrier = barrier_at(*copy.block, copy.barrier);
  for (unsigned row = 0; row < map.box_rows; ++row) {
    for (unsigned byte = 0; byte < row_bytes; byte += 16) {
      const unsigned to = swizzled(copy.to + row * row_bytes + byte, map.swizzle);
      memcpy(at(*copy.block, to, 16),
             map.matrix + (copy.row + row) * map.row_bytes + copy.column * sizeof(__nv_bfloat16) +
                 byte,
             16);
    }
  }
  ++num_copies;
  barrier.bytes -= map.box_rows * row_bytes;
  end_phase_if_complete(barrier);
}

// One row of 16 columns of an operand, by its descriptor.
std::array<float, kDepth> operand_row(Block& block, std::uint64_t descriptor, int row) {
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) fail("not a 128-byte swizzle");
  const unsigned start = (descriptor & 0x3fff) << 4, pattern = (descriptor >> 32 & 0x3fff) << 4;
  std::array<float, kDepth> result;
  for (int half = 0; half < 2; ++half) {
    const unsigned address = start + row / 8 * pattern + row % 8 * 128 + half * 16;
    __nv_bfloat16 piece[kDepth / 2];
    memcpy(piece, at(block, swizzled(address, CU_TENSOR_MAP_SWIZZLE_128B), 16), 16);
    for (int i = 0; i < kDepth / 2; ++i) result[half * kDepth / 2 + i] = to_float(piece[i]);
  }
  return result;
}

// This thread's part of a product of its warpgroup.
void compute(const Product& product) {
  Block& block = *running->block;
  const int warp = running->number / kWarp % 4, lane = running->number % kWarp;
  std::array<float, kDepth> left[2];
  for (int i = 0; i < 2; ++i) {
    left[i] = operand_row(block, product.left, 16 * warp + lane / 4 + 8 * i);
  }
  for (int j = 0; j < product.columns / 8; ++j) {
    for (int k = 0; k < 2; ++k) {
      const auto right = operand_row(block, product.right, 8 * j + 2 * (lane % 4) + k);
      for (int i = 0; i < 2; ++i) {
        float sum = 0.0f;
        for (int depth = 0; depth < kDepth; ++depth) sum += left[i][depth] * right[depth];
        product.sums[4 * j + 2 * i + k] += sum;
      }
    }
  }
}

void compute_oldest(Thread& thread) {
  for (const Product& product : thread.groups.front()) compute(product);
  thread.groups.pop_front();
}

void run_thread() {
  kernel_body();
  Block& block = *running->block;
  if (!running->open.empty() || !running->groups.empty()) fail("a product was not waited for");
  --block.living;
  swapcontext(&running->context, &scheduler);
}

bool anyone_ready() { return !ready[0].empty() || !ready[1].empty(); }

// Lets one thread run on, out of a few the one whose warp is in favor.
void run_one() {
  const unsigned block = ahead < 2 && !ready[ahead].empty() ? ahead : generator() % 2;
  std::vector<Thread*>& from = ready[block].empty() ? ready[1 - block] : ready[block];
  const auto favor_of = [&](std::size_t i) { return favor[from[i]->number / kWarp]; };
  std::size_t best = generator() % from.size();
  for (int i = 0; i < 3; ++i) {
    const std::size_t other = generator() % from.size();
    if (favor_of(other) > favor_of(best)) best = other;
  }
  running = from[best];
  from[best] = from.back();
  from.pop_back();
  threadIdx.x = running->number;
  blockIdx.x = running->block->number;
  swapcontext(&scheduler, &running->context);
}

// Delivers a copy that is due, if there is one.
bool deliver_one() {
  const auto due =
      std::find_if(copies.begin(), copies.end(), [](const Copy& copy) { return copy.due <= now; });
  if (due == copies.end()) return false;
  const Copy copy = *due;
  *due = copies.back();
  copies.pop_back();
  deliver(copy);
  return true;
}

bool anyone_lives() {
  return std::any_of(blocks.begin(), blocks.end(), [](const Block& x) { return x.living > 0; });
}

void run_cluster() {
  while (anyone_lives()) {
    if (now++ % 4096 == 0) {
      for (unsigned& x : favor) x = generator() % 3;
      ahead = generator() % 3;
    }
    if (coin() && deliver_one()) continue;
    if (anyone_ready()) {
      run_one();
    } else if (!copies.empty()) {
      now = std::max(now, std::min_element(copies.begin(), copies.end(), [](auto& a, auto& b) {
                            return a.due < b.due;
                          })->due);
    } else {
      // Nothing happens any more but that time passes for those that wait with patience.
      now += kLong;
      for (Block& block : blocks) {
        for (auto& [_, barrier] : block.barriers) wake(barrier.waiting);
      }
      if (!anyone_ready()) fail("all threads wait for each other");
    }
  }
  if (!copies.empty()) fail("a copy is in flight to a block that has ended");
}

}  // namespace

int num_kernels() { return static_cast<int>(kernels.size()); }

void launch(const cudaLaunchConfig_t& config, const void* kernel, std::function<void()> body) {
  const unsigned num_threads = config.blockDim.x;
  cluster_blocks = config.numAttrs > 0 ? config.attrs[0].val.clusterDim.x : 1;
  if (config.dynamicSmemBytes > kMemoryBytes || config.gridDim.x % cluster_blocks != 0) {
    fail("no such launch");
  }
  kernels.insert(kernel);
  kernel_body = std::move(body);
  generator.seed(seed);
  stacks.resize(cluster_blocks * num_threads, std::vector<char>(kStackBytes));
  for (unsigned first = 0; first < config.gridDim.x; first += cluster_blocks) {
    threads.clear();
    blocks = std::vector<Block>(cluster_blocks);
    for (int rank = 0; rank < cluster_blocks; ++rank) {
      blocks[rank].number = first + rank;
      blocks[rank].living = num_threads;
      blocks[rank].rank = rank;
      for (unsigned i = 0; i < num_threads; ++i) {
        auto& thread = threads.emplace_back(std::make_unique<Thread>());
        thread->block = &blocks[rank];
        thread->number = i;
        getcontext(&thread->context);
        thread->context.uc_stack.ss_sp = stacks[threads.size() - 1].data();
        thread->context.uc_stack.ss_size = kStackBytes;
        makecontext(&thread->context, run_thread, 0);
        make_ready(thread.get());
      }
    }
    run_cluster();
  }
}

unsigned char* shared_memory() { return running->block->memory.data(); }
unsigned address_of(const void* pointer) {
  return static_cast<unsigned>(static_cast<const unsigned char*>(pointer) - shared_memory()) +
         kBase;
}
int cluster_rank() { return running->block->rank; }
void sync_warp() { meet(running->block->warps[running->number / kWarp], kWarp); }
void sync_threads(int barrier, int count) { meet(running->block->meetings[barrier], count); }
void sync_cluster() { meet(all, threads.size()); }

std::int64_t from_lane(std::int64_t value, int lane) {
  std::int64_t& sent = running->block->sent[running->number / kWarp];
  if (static_cast<int>(running->number % kWarp) == lane) sent = value;
  sync_warp();
  const std::int64_t result = sent;
  sync_warp();
  return result;
}

void init_barrier(unsigned barrier, int arrivals) {
  if (barrier % sizeof(std::uint64_t) != 0) fail("a barrier at %u", barrier);
  Arrivals& made = running->block->barriers[barrier];
  made = Arrivals{};
  made.expected = made.pending = arrivals;
}

void arrive(unsigned barrier, int rank, int bytes) {
  maybe_pause();
  Arrivals& found = barrier_at(blocks[rank], barrier);
  if (found.pending == 0) fail("too many arrivals at %u", barrier);
  found.bytes += bytes;
  --found.pending;
  end_phase_if_complete(found);
}

bool phase_ended(unsigned barrier, unsigned parity) {
  maybe_pause();
  Arrivals& found = barrier_at(*running->block, barrier);
  if (found.phase % 2 == parity) {
    found.waiting.push_back(running);
    pause();
  }
  return found.phase % 2 != parity;
}

void copy(unsigned to, const CUtensorMap& map, unsigned barrier, int column, int row, int rank) {
  const long long delay = coin() ? 0 : generator() % 4096;
  copies.push_back({to, map, barrier, column, row, &blocks[rank], now + delay});
  maybe_pause();
}

void multiply(int columns, float* sums, std::uint64_t left, std::uint64_t right) {
  running->open.push_back({columns, sums, left, right});
}

void commit_products() {
  running->groups.push_back(std::move(running->open));
  running->open.clear();
  maybe_pause();
  // Groups end in order; this one may as well end at once.
  if (coin()) {
    while (!running->groups.empty()) compute_oldest(*running);
  }
}

void wait_for_products(int pending) {
  maybe_pause();
  while (static_cast<int>(running->groups.size()) > pending) compute_oldest(*running);
  sync_warp();  // a warp goes on together
}

}  // namespace machine

long long clock64() { return machine::now; }

int cuTensorMapEncodeTiled(CUtensorMap* map, int, int rank, void* matrix, const cuuint64_t* sizes,
                           const cuuint64_t* strides, const cuuint32_t* box,
                           const cuuint32_t* steps, int, int swizzle, int, int) {
  if (rank != 2 || reinterpret_cast<std::uintptr_t>(matrix) % 16 != 0 || strides[0] % 16 != 0 ||
      reinterpret_cast<std::uintptr_t>(map) % 64 != 0 || sizes[0] == 0 || sizes[1] == 0 ||
      sizes[1] > 1ull << 32 || box[0] == 0 || box[0] * sizeof(__nv_bfloat16) > 128 || box[1] == 0 ||
      box[1] > 256 || steps[0] != 1 || steps[1] != 1) {
    return cudaErrorInvalidValue;
  }
  *map = {static_cast<const unsigned char*>(matrix),
          sizes[0],
          sizes[1],
          strides[0],
          box[0],
          box[1],
          swizzle,
          {}};
  return CUDA_SUCCESS;
}
